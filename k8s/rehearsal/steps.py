"""What happened at each weight, and whether that is what must happen. Pure."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..rollout.gate import Gate, Report

__all__ = ["GATE", "Answer", "Rollouts", "Step", "percentile_s", "problems"]

# The replay is to find the planted version by what it says. How long it takes tells nothing here: the servers
# share the machine, and at 100% the one on trial does all the work.
GATE: Final = Gate(min_agreement=0.98, max_shift=1.0, max_latency_ratio=math.inf, max_errors=0)

# Weights are chances. Counts less likely than that are no chance: one false alarm in 10,000 rehearsals.
_LEAST_CHANCE: Final = 1e-5


@dataclass(frozen=True)
class Answer:
    """sent_s: since the traffic began. version: None for a failure. right: the label is the true one."""

    sent_s: float
    latency_s: float
    version: int | None
    right: bool
    error: str = ""


@dataclass(frozen=True)
class Step:
    """A time with one weight.

    canary: the version on trial, None where there is none. weight_percent: its share of the requests.
    changed_s: when the weight was changed; began_s: when nothing was under way any more that had been sent
        before the change; ended_s. Seconds since the traffic began.
    answers: to what was sent from began_s to ended_s.
    report: what the comparison found; None where nothing was compared. failures: what the gate says of it.
    """

    name: str
    canary: int | None
    weight_percent: int
    changed_s: float
    began_s: float
    ended_s: float
    answers: tuple[Answer, ...]
    report: Report | None = None
    failures: tuple[str, ...] = ()

    @property
    def by_version(self) -> dict[int, int]:
        """How many requests each version answered, ascending by version."""
        counts = Counter(answer.version for answer in self.answers if answer.version is not None)
        return dict(sorted(counts.items()))

    @property
    def failed(self) -> int:
        """How many requests had no answer."""
        return sum(bool(answer.error) for answer in self.answers)

    @property
    def verdict(self) -> str:
        """Empty where nothing was compared; "passed", or why not."""
        if self.report is None:
            return ""
        return "; ".join(self.failures) or "passed"

    def latency_s(self, percent: float) -> float:
        """Of the requests that were answered; NaN of none."""
        return percentile_s([answer.latency_s for answer in self.answers if not answer.error], percent)


@dataclass(frozen=True)
class Rollouts:
    """What is rehearsed.

    stable: the version that serves. good: the one that goes through all of weights_percent. bad: the one that
        must not, since its answers differ.
    """

    stable: int
    good: int
    bad: int
    weights_percent: tuple[int, ...]


def percentile_s(latencies_s: Sequence[float], percent: float) -> float:
    """By rank, so that it is a time that was seen; NaN of none."""
    if not latencies_s:
        return math.nan
    rank = max(1, math.ceil(percent / 100 * len(latencies_s) - 1e-9))
    return sorted(latencies_s)[rank - 1]


def problems(
    steps: Sequence[Step], answers: Sequence[Answer], plan: Rollouts, gate: Gate = GATE
) -> tuple[str, ...]:
    """What did not go as it must, one sentence each; empty if all did.

    answers: all of them, those between the steps, too.
    """
    return (*_lost(answers), *_wrong_shares(steps, plan), *_good(steps, plan), *_bad(steps, plan, gate))


def _lost(answers: Sequence[Answer]) -> Iterator[str]:
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        yield f"{len(errors)} of {len(answers)} requests failed; the first: {errors[0]}"


def _wrong_shares(steps: Sequence[Step], plan: Rollouts) -> Iterator[str]:
    for step in steps:
        where = f"{step.name} at {step.weight_percent}%"
        answered = sum(step.by_version.values())
        if not answered:
            yield f"{where}: no request was answered"
        strangers = step.by_version.keys() - {plan.stable, step.canary}
        if strangers:
            yield f"{where}: version {min(strangers)} answered, which should not be asked"
        got = 0 if step.canary is None else step.by_version.get(step.canary, 0)
        if not _within_chance(got, answered, step.weight_percent / 100):
            yield f"{where}: the canary answered {got} of {answered} requests, which is no chance"


def _good(steps: Sequence[Step], plan: Rollouts) -> Iterator[str]:
    own = [step for step in steps if step.canary == plan.good]
    for step in own:
        if step.failures:
            yield f"version {plan.good}, which is good, was aborted at {step.weight_percent}%: {step.verdict}"
            return
    weights = tuple(step.weight_percent for step in own if step.report is not None)
    if weights != plan.weights_percent:
        yield (
            f"version {plan.good}: expected the weights {_percents(plan.weights_percent)}, got "
            + _percents(weights)
        )
    if not own or own[-1].weight_percent:
        yield f"version {plan.good} was not taken back"


def _bad(steps: Sequence[Step], plan: Rollouts, gate: Gate) -> Iterator[str]:
    own = [step for step in steps if step.canary == plan.bad]
    compared = [step for step in own if step.report is not None]
    if len(compared) != 1 or not compared[0].failures:
        weights = tuple(step.weight_percent for step in compared)
        yield f"version {plan.bad}, which is bad, was not aborted at once: it had {_percents(weights)}"
        return
    report = compared[0].report
    others = () if report is None else replace(gate, min_agreement=0.0).failures(report)
    if others:
        yield f"version {plan.bad} was aborted for other reasons than agreement: {'; '.join(others)}"
    if own[-1].weight_percent:
        yield f"version {plan.bad} was not taken back"


def _within_chance(count: int, total: int, share: float) -> bool:
    """Whether a binomial count is no rarer, on its side of the mean, than _LEAST_CHANCE / 2."""
    if share in (0.0, 1.0):
        return count == total * share
    side = range(count + 1) if count <= total * share else range(count, total + 1)
    return math.fsum(_binomial(n, total, share) for n in side) > _LEAST_CHANCE / 2


def _binomial(count: int, total: int, share: float) -> float:
    ways = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
    return math.exp(ways + count * math.log(share) + (total - count) * math.log1p(-share))


def _percents(weights: Sequence[int]) -> str:
    return ", ".join(f"{weight}%" for weight in weights) or "none"
