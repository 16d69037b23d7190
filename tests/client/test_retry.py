"""The retry rule as tables."""

import grpc
import pytest

from graftserve.client.retry import RetryPolicy, retry_wait_s

POLICY = RetryPolicy(max_attempts=5, first_ceiling_s=0.1, max_ceiling_s=0.5)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("attempt", "left_s", "random", "wait_s"),
    [
        (1, 10, 0.5, 0.05),
        (2, 10, 0.5, 0.1),
        (3, 10, 0.5, 0.2),
        (4, 10, 0.5, 0.25),  # the ceiling of 0.8 is cut to 0.5
        (1, 10, 0.0, 0.0),
        (4, 10, 0.999, 0.4995),
        (5, 10, 0.5, None),  # that was the last attempt
        (6, 10, 0.5, None),
        (1, 0.06, 0.5, 0.05),
        (1, 0.05, 0.5, None),  # the wait would use up what is left
        (1, 0.0, 0.0, None),
        (1, -1.0, 0.0, None),
    ],
)
def test_waits(attempt, left_s, random, wait_s):
    assert retry_wait_s(POLICY, UNAVAILABLE, attempt, left_s, random) == pytest.approx(wait_s)


LOST = {UNAVAILABLE, grpc.StatusCode.CANCELLED}


@pytest.mark.parametrize("code", [*(code for code in grpc.StatusCode if code not in LOST), None])
def test_nothing_but_what_got_lost_is_retried(code):
    assert retry_wait_s(POLICY, code, 1, 10, 0.5) is None


def test_a_high_attempt_number_does_not_overflow():
    policy = RetryPolicy(max_attempts=10**6, first_ceiling_s=0.1, max_ceiling_s=2)
    assert retry_wait_s(policy, UNAVAILABLE, 10**5, 10, 0.5) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_attempts": 0},
        {"first_ceiling_s": 0},
        {"first_ceiling_s": -1},
        {"first_ceiling_s": 3, "max_ceiling_s": 2},
    ],
)
def test_a_policy_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected"):
        RetryPolicy(**arguments)
