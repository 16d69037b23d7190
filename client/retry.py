"""When to send a failed call again: a pure function of the error, the attempt and the time left.

Source of the waits: "Exponential Backoff And Jitter" (AWS Architecture Blog, Marc Brooker, 2015), the
variant "full jitter": uniform between zero and an exponentially growing ceiling, so that clients that
failed together do not come back together.
"""

from dataclasses import dataclass

import grpc

__all__ = ["RetryPolicy", "retry_wait_s"]


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently to try.

    max_attempts: the first sending included; 1 means never again.
    first_ceiling_s: the longest wait before the second attempt; it doubles with each further one.
    max_ceiling_s: where the doubling ends.
    Raises ValueError for values that are not positive.
    """

    max_attempts: int = 5
    first_ceiling_s: float = 0.2
    max_ceiling_s: float = 2.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"expected max_attempts of 1 or more, got {self.max_attempts}")
        if not 0 < self.first_ceiling_s <= self.max_ceiling_s:
            raise ValueError(
                "expected 0 < first_ceiling_s <= max_ceiling_s, "
                f"got {self.first_ceiling_s} and {self.max_ceiling_s}"
            )


def retry_wait_s(
    policy: RetryPolicy, code: grpc.StatusCode | None, attempt: int, left_s: float, random: float
) -> float | None:
    """The seconds to wait before the next attempt, or None to give up.

    attempt: how often the call has been sent, from 1.
    left_s: seconds until the call's deadline; a wait that would use them all is not begun.
    random: uniform in [0, 1).
    Only UNAVAILABLE is worth it: a Predict changes nothing on the server, so sending it twice is safe,
    and every other status would come back the same, or make an overload worse.
    """
    if code is not grpc.StatusCode.UNAVAILABLE or attempt >= policy.max_attempts:
        return None
    # 60 doublings reach past any ceiling; more would overflow a float.
    ceiling_s = min(policy.max_ceiling_s, policy.first_ceiling_s * 2.0 ** min(attempt - 1, 60))
    wait_s = random * ceiling_s
    return wait_s if wait_s < left_s else None
