"""The retry rule as tables."""

import grpc
import pytest

from graftserve.client.retry import RetryBudget, RetryPolicy, retry_wait_s

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


def test_what_holds_by_default():
    policy = RetryPolicy()
    waits = [retry_wait_s(policy, UNAVAILABLE, attempt, 100, 1.0) for attempt in range(1, 6)]
    assert waits == [pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.8), pytest.approx(1.6), None]
    assert retry_wait_s(RetryPolicy(max_attempts=9), UNAVAILABLE, 6, 100, 1.0) == 2.0
    assert spent(RetryBudget(policy.budget_ratio, policy.budget_per_s, 0.0), [0.0] * 1000) == 100


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
        {"budget_ratio": -0.1},
        {"budget_ratio": 1.1},
        {"budget_per_s": -1},
    ],
)
def test_a_policy_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected"):
        RetryPolicy(**arguments)


@pytest.mark.parametrize("ratio", [0, 1])
def test_a_budget_of_nothing_and_of_everything(ratio):
    assert RetryPolicy(budget_ratio=ratio, budget_per_s=0).budget_ratio == ratio


@pytest.mark.parametrize(
    ("code", "pushback_s", "wait_s"),
    [
        (UNAVAILABLE, 0.7, 0.7),
        (UNAVAILABLE, 0.0, 0.0),
        (UNAVAILABLE, -1.0, None),
        (UNAVAILABLE, 10.0, None),  # all the time that is left
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.7, 0.7),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, -1.0, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, None),
        (grpc.StatusCode.INTERNAL, 0.7, None),
    ],
)
def test_pushback(code, pushback_s, wait_s):
    assert retry_wait_s(POLICY, code, 1, 10, 0.5, pushback_s) == wait_s


def spent(budget, moments):
    """How many retries are allowed at these moments."""
    return sum(budget.spend(moment) for moment in moments)


@pytest.mark.parametrize(
    ("ratio", "per_s", "requests", "allowed"),
    [
        (0.0, 0.0, 1000, 0),  # none at all
        (0.2, 0.0, 0, 10),  # what is saved up
        (0.2, 0.0, 1000, 10),  # no more can be
        (0.0, 3.0, 0, 30),
        (0.0, 0.5, 0, 10),
    ],
)
def test_what_the_budget_holds_at_most(ratio, per_s, requests, allowed):
    budget = RetryBudget(ratio, per_s, 0.0)
    for _ in range(requests):
        budget.sent(0.0)
    assert spent(budget, [0.0] * 1000) == allowed


def test_the_budget_grows_with_requests_and_with_time():
    budget = RetryBudget(0.25, 2.0, 0.0)
    spent(budget, [0.0] * 100)
    for _ in range(40):
        budget.sent(0.0)
    assert budget.allows(0.0)
    assert spent(budget, [0.0] * 100) == 10
    assert not budget.allows(0.0)
    assert spent(budget, [3.0] * 100) == 6


def test_a_server_that_fails_gets_a_bounded_share_more():
    budget = RetryBudget(0.2, 0.0, 0.0)
    retries = 0
    for number in range(1000):
        budget.sent(number / 100)
        retries += spent(budget, [number / 100] * 4)  # each is tried five times
    assert retries == pytest.approx(0.2 * 1000 + 10, abs=1)
