"""A canary's way up through the weights, and down."""

import time
from collections.abc import Callable
from typing import Final, Protocol

from ..rollout.gate import Gate, Report
from .steps import GATE, Answer, Step

__all__ = ["WEIGHTS_PERCENT", "Clients", "Proxy", "Ramp"]

WEIGHTS_PERCENT: Final = (1, 10, 50, 100)


class Proxy(Protocol):
    """What sends requests to stable and canary, such as Envoy."""

    def set_weight(self, canary_percent: int) -> None:
        """Send so many of 100 requests to the canary."""
        ...


class Clients(Protocol):
    """The callers, such as Traffic."""

    def now_s(self) -> float:
        """The time on their clock."""
        ...

    def answers(self) -> tuple[Answer, ...]:
        """All that they got."""
        ...

    def wait_for_round(self) -> None:
        """Wait until nothing is under way that was sent before."""
        ...


class Ramp:
    """Moves the weights, one step after the other; `steps` are those that are over.

    step_s: seconds of traffic at each weight, without the comparison.
    listener: told of each step when it is over.
    """

    def __init__(
        self,
        proxy: Proxy,
        traffic: Clients,
        *,
        step_s: float,
        gate: Gate = GATE,
        listener: Callable[[Step], None] = lambda step: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.steps: list[Step] = []
        self._proxy, self._traffic = proxy, traffic
        self._gate, self._step_s = gate, step_s
        self._listener, self._sleep = listener, sleep

    def rise(self, canary: int, compare: Callable[[], Report]) -> bool:
        """Give the canary more and more of the traffic, as long as it passes the gate.

        compare: called at each weight.
        Returns whether it went through all of WEIGHTS_PERCENT; if it did not, it has no traffic any more.
        """
        for weight_percent in WEIGHTS_PERCENT:
            if self.hold("canary", canary, weight_percent, compare).failures:
                self.hold("aborted", canary, 0)
                return False
        return True

    def hold(
        self,
        name: str,
        canary: int | None,
        weight_percent: int,
        compare: Callable[[], Report] | None = None,
    ) -> Step:
        """One step: change the weight, let the callers ask, compare."""
        changed_s = self._traffic.now_s()
        self._proxy.set_weight(weight_percent)
        self._traffic.wait_for_round()
        began_s = self._traffic.now_s()
        self._sleep(self._step_s)
        report = None if compare is None else compare()
        ended_s = self._traffic.now_s()
        self._traffic.wait_for_round()  # so that all that was sent until then has its answer
        step = Step(
            name,
            canary,
            weight_percent,
            changed_s,
            began_s,
            ended_s,
            tuple(answer for answer in self._traffic.answers() if began_s <= answer.sent_s < ended_s),
            report,
            () if report is None else self._gate.failures(report),
        )
        self.steps.append(step)
        self._listener(step)
        return step
