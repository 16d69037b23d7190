"""How costs grow."""

import pytest

from benchmarks.curves import bends_at, curve, exponents, reached_at


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({1: 5.0, 10: 5.0, 100: 5.0}, [0, 0]),
        ({10: 2.0, 100: 20.0}, [1]),
        ({100: 400.0, 10: 4.0}, [2]),  # in any order
        ({1: 1.0, 4: 2.0, 16: 32.0}, [0.5, 2]),
        ({7: 3.0}, []),
    ],
)
def test_exponents_are_those_of_the_powers(costs: dict[int, float], expected: list[float]) -> None:
    assert exponents(costs) == pytest.approx(expected)


def test_the_first_bend_is_said() -> None:
    assert bends_at({1: 1.0, 10: 9.0, 100: 900.0, 1000: 900_000.0}) == 100
    assert bends_at({1: 1.0, 10: 10.0, 100: 100.0}) is None
    assert bends_at({1: 1.0, 10: 12.0}) is None  # 1.08
    assert bends_at({1: 1.0, 10: 12.0}, bent=1.0) == 10


@pytest.mark.parametrize("costs", [{0: 1.0, 1: 1.0}, {1: 0.0, 2: 1.0}, {1: 1.0, 2: -1.0}])
def test_what_has_no_logarithm_is_refused(costs: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="expected work and cost above 0, got a cost of"):
        exponents(costs)


def test_a_curve_has_medians_their_spread_and_the_bend() -> None:
    assert curve("images", "s", {100: [9.0, 30.0, 10.0], 10: [1.0]}) == {
        "bends_at": "nowhere",
        "last_to_first": 10.0,
        "points": [
            {"images": 10, "s": 1.0, "exponent": None},
            {"images": 100, "s": 10.0, "min s": 9.0, "max s": 30.0, "exponent": 1.0},
        ],
    }


def test_one_point_is_no_growth() -> None:
    assert curve("images", "s", {10: [2.0]}) == {
        "bends_at": "nowhere",
        "points": [{"images": 10, "s": 2.0, "exponent": None}],
    }


def test_the_first_moment_counts_even_if_the_value_falls_again() -> None:
    history = [(1.0, 0.5), (2.0, 0.75), (3.0, 0.7), (4.0, 0.9)]
    assert reached_at(history, 0.75) == 2.0
    assert reached_at(history, 0.8) == 4.0
    assert reached_at(history, 0.95) is None
