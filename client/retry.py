"""When to send a failed request again: pure functions of the error, the attempt, the time and the budget.

Sources. The waits: "Exponential Backoff And Jitter" (AWS Architecture Blog, Marc Brooker, 2015), the
variant "full jitter": uniform between zero and an exponentially growing ceiling, so that clients that
failed together do not come back together. The budget: Finagle's RetryBudget. The pushback: gRPC proposal
A6, "client retries".
"""

from dataclasses import dataclass
from typing import Final

import grpc

__all__ = ["RetryBudget", "RetryPolicy", "retry_wait_s"]


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently to try.

    max_attempts: the first sending included; 1 means never again.
    first_ceiling_s: the longest wait before the second attempt; it doubles with each further one.
    max_ceiling_s: where the doubling ends.
    budget_ratio: retries allowed for every request sent, in [0, 1]: what a server that fails gets at most
        beside its ordinary load.
    budget_per_s: retries a second allowed beyond that, so that a client that asks rarely can retry, too.
    hedge: send a second copy of a request that takes longer than 95% of the last ones, and take the first
        answer. Without it that is done only for a request that takes ten times as long, and a second at
        least: by all appearance it is lost.
    Raises ValueError for values out of range.
    """

    max_attempts: int = 5
    first_ceiling_s: float = 0.2
    max_ceiling_s: float = 2.0
    budget_ratio: float = 0.2
    budget_per_s: float = 10.0
    hedge: bool = False

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"expected max_attempts of 1 or more, got {self.max_attempts}")
        if not 0 < self.first_ceiling_s <= self.max_ceiling_s:
            raise ValueError(
                "expected 0 < first_ceiling_s <= max_ceiling_s, "
                f"got {self.first_ceiling_s} and {self.max_ceiling_s}"
            )
        if not 0 <= self.budget_ratio <= 1:
            raise ValueError(f"expected budget_ratio from 0 to 1, got {self.budget_ratio}")
        if self.budget_per_s < 0:
            raise ValueError(f"expected budget_per_s of 0 or more, got {self.budget_per_s}")


# CANCELLED by the server is what a call gets that arrives in the instant in which gRPC stops.
_LOST: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


def retry_wait_s(
    policy: RetryPolicy,
    code: grpc.StatusCode | None,
    attempt: int,
    left_s: float,
    random: float,
    pushback_s: float | None = None,
) -> float | None:
    """The seconds to wait before the next attempt, or None to give up.

    attempt: how often the request has been sent, from 1.
    left_s: seconds until the deadline; a wait that would use them all is not begun.
    random: uniform in [0, 1).
    pushback_s: what the server asks to wait (`grpc-retry-pushback-ms`); negative means: do not come back.
    A request that got lost is worth it: it changes nothing on the server, so sending it twice is safe. So is
    one that an overloaded server asks for again at a later time. Any other status would come back the same,
    or make an overload worse.
    """
    overloaded = code is grpc.StatusCode.RESOURCE_EXHAUSTED and pushback_s is not None
    if not (code in _LOST or overloaded) or attempt >= policy.max_attempts:
        return None
    if pushback_s is not None:
        if pushback_s < 0:
            return None
        wait_s = pushback_s
    else:
        # 60 doublings reach past any ceiling; more would overflow a float.
        ceiling_s = min(policy.max_ceiling_s, policy.first_ceiling_s * 2.0 ** min(attempt - 1, 60))
        wait_s = random * ceiling_s
    return wait_s if wait_s < left_s else None


class RetryBudget:
    """Bounds retries to a share of what is sent, so that they cannot multiply the load of a server that
    fails.

    ratio, per_s: as RetryPolicy's budget_ratio and budget_per_s. Ten seconds' worth can be saved up.
    """

    def __init__(self, ratio: float, per_s: float, now: float) -> None:
        self._ratio = ratio
        self._per_s = per_s
        self._most = 10 * max(per_s, 1.0)
        self._balance = self._most if per_s or ratio else 0.0
        self._at = now

    def sent(self, now: float) -> None:
        """A request was sent that is no retry."""
        self._balance = min(self._most, self._refilled(now) + self._ratio)

    def spend(self, now: float) -> bool:
        """Take one retry out of the budget; False if it is used up."""
        if not self.allows(now):
            return False
        self._balance -= 1
        return True

    def allows(self, now: float) -> bool:
        """Whether a retry could be taken out now."""
        self._balance = self._refilled(now)
        return self._balance >= 1

    def _refilled(self, now: float) -> float:
        balance = min(self._most, self._balance + (now - self._at) * self._per_s)
        self._at = now
        return balance
