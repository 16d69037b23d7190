"""Curves: how a cost grows with the work (as fast, slower, or faster), and when a value is reached.

Imports nothing but the standard library.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["BENT", "bends_at", "curve", "exponents", "reached_at"]

BENT = 1.2
"""An exponent from which on a cost grows faster than the work, and not by chance."""


def exponents(costs: Mapping[int, float]) -> list[float]:
    """Between neighbouring points, log of the costs' ratio to log of the works': 0 where the cost stays as it
    is, 1 where it grows as the work does, 2 where with its square.

    costs: by work, all of them above 0. Raises ValueError.
    """
    points = sorted(costs.items())
    for work, cost in points:
        if not (work > 0 and cost > 0):
            raise ValueError(f"expected work and cost above 0, got a cost of {cost} for {work}")
    return [
        math.log(cost / cost_before) / math.log(work / work_before)
        for (work_before, cost_before), (work, cost) in itertools.pairwise(points)
    ]


def bends_at(costs: Mapping[int, float], bent: float = BENT) -> int | None:
    """The least work by which the cost has grown with an exponent above `bent`; None if it never does."""
    works = sorted(costs)[1:]
    return next(
        (work for work, found in zip(works, exponents(costs), strict=True) if found > bent),
        None,
    )


def curve(work: str, cost: str, samples: Mapping[int, Sequence[float]], digits: int = 4) -> dict[str, Any]:
    """What a result says of costs by work.

    work, cost: what they are, with their units. samples: of each work what the rounds gave.
    """
    medians = {amount: statistics.median(values) for amount, values in sorted(samples.items())}
    rows = []
    for (amount, median), exponent in zip(medians.items(), [None, *exponents(medians)], strict=True):
        ends = {f"min {cost}": min(samples[amount]), f"max {cost}": max(samples[amount])}
        costs = {cost: median, **(ends if len(samples[amount]) > 1 else {})}
        rows.append(
            {
                work: amount,
                **{name: round(value, digits) for name, value in costs.items()},
                "exponent": None if exponent is None else round(exponent, 2),
            }
        )
    found: dict[str, Any] = {"bends_at": bends_at(medians) or "nowhere", "points": rows}
    if len(medians) > 1:
        first, *_, last = medians.values()
        found["last_to_first"] = round(last / first, 3)
    return found


def reached_at(history: Iterable[tuple[float, float]], value: float) -> float | None:
    """The moment of the first point of at least `value`; None if there is none.

    history: moments and values, in the order of time.
    """
    return next((moment for moment, reached in history if reached >= value), None)
