"""Who spoils a request, asked of a server that knows."""

import math

import pytest

from graftserve.client.isolation import Search


def run(items, bad, *, largest=math.inf, leaves=()):
    """Search; returns the culprits, those that passed and the sizes asked. Groups above `largest` are refused
    as such; leaves: (question, items) that go away before it.
    """
    search = Search(items)
    culprits, passed, sizes = [], [], []
    gone = set()
    while group := search.ask():
        assert group, "an empty group was asked"
        gone |= {item for question, leaving in leaves if len(sizes) >= question for item in leaving}
        live = [item for item in group if item not in gone]
        if not live:
            continue  # its outcome is not told
        sizes.append(len(live))
        if len(live) > largest or any(item in bad for item in live):
            if search.refused():
                culprits += live
        else:
            search.passed()
            passed += live
    return culprits, passed, sizes


@pytest.mark.parametrize("count", range(1, 65))
def test_one_culprit_is_found_wherever_it_is(count):
    for position in range(count):
        culprits, passed, sizes = run(range(count), {position})
        assert culprits == [position]
        assert sorted(passed) == [item for item in range(count) if item != position]
        assert len(sizes) <= math.ceil(math.log2(count)) + 3


@pytest.mark.parametrize("count", [2, 3, 8, 17, 32, 64])
def test_two_culprits_are_found_wherever_they_are(count):
    for first in range(count):
        for second in range(first + 1, count):
            culprits, passed, sizes = run(range(count), {first, second})
            assert sorted(culprits) == [first, second]
            assert len(passed) == count - 2
            assert len(sizes) <= 2 * math.ceil(math.log2(count)) + count


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [8, 32, 64])
def test_many_culprits_cost_little_more_than_one_by_one(count, step):
    bad = set(range(0, count, step))
    culprits, passed, sizes = run(range(count), bad)
    assert set(culprits) == bad
    assert len(culprits) == len(bad)
    assert sorted(passed) == sorted(set(range(count)) - bad)
    assert len(sizes) <= 2 * math.ceil(math.log2(count)) + count


@pytest.mark.parametrize("largest", [1, 2, 5, 16])
def test_a_group_that_is_refused_as_such_blames_nobody(largest):
    culprits, passed, _ = run(range(32), set(), largest=largest)
    assert culprits == []
    assert sorted(passed) == list(range(32))


def test_nobody_to_blame_is_blamed_when_the_cause_has_passed():
    # The first refusal came from something else: all pass now.
    culprits, passed, sizes = run(range(32), set())
    assert culprits == []
    assert sorted(passed) == list(range(32))
    assert len(sizes) <= math.log2(32) + 2


@pytest.mark.parametrize("bad", [{3}, {20}, {3, 20}])
@pytest.mark.parametrize("question", range(6))
@pytest.mark.parametrize(
    "leaving",
    [range(16), range(16, 32), [3], [20], [0, 31], range(32)],
    ids=lambda items: f"{list(items)[:2]}",
)
def test_items_leave_meanwhile(bad, question, leaving):
    leaving = set(leaving)
    culprits, passed, _ = run(range(32), bad, leaves=[(question, leaving)])
    assert set(culprits) <= bad
    assert set(culprits) | leaving >= bad
    assert not set(passed) & bad
    # Everybody who stayed has an answer, and nobody has two.
    assert set(culprits) | set(passed) | leaving == set(range(32))
    assert len(culprits) + len(passed) == len(set(culprits) | set(passed))
