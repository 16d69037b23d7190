"""The engine under every order of events that Hypothesis can think of."""

import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from graftserve.client.errors import ClientError, InternalError
from graftserve.client.retry import RetryPolicy
from tests.client.engine_driver import CODE, Driver, PlainLane

REFUSED = "a bad one among them"


class World(RuleBasedStateMachine):
    """An engine, its callers, and servers that do what they like.

    A server takes at most 5 rows and 40 bytes, in the form "new", and nothing bad.
    """

    def __init__(self):
        super().__init__()
        self.driver = None

    @initialize(
        target_count=st.integers(1, 3),
        max_in_flight=st.integers(1, 4),
        max_delay_s=st.sampled_from([0.0, 0.2]),
        target_latency_s=st.sampled_from([None, 0.1]),
        hedge=st.booleans(),
        max_attempts=st.integers(1, 4),
        budget_per_s=st.sampled_from([0.0, 1.0, 1000.0]),
        wait_for_ready=st.booleans(),
        random=st.randoms(use_true_random=False),
        form=st.sampled_from(["new", "old"]),
        warm=st.booleans(),
        closes_after=st.sampled_from([1, 4, 1000, 1000, 1000]),
    )
    def start(
        self, target_count, hedge, max_attempts, budget_per_s, random, form, warm, closes_after, **options
    ):
        self.driver = Driver(
            targets=[f"t:{number}" for number in range(target_count)],
            random=random.random,
            max_batch_images=8,
            max_batch_bytes=64,
            max_queued_images=40,
            max_queued_bytes=400,
            retry=RetryPolicy(
                hedge=hedge, max_attempts=max_attempts, budget_per_s=budget_per_s, budget_ratio=0.5
            ),
            **options,
        )
        self.lanes = [
            PlainLane("images", form=form),
            PlainLane("rigid", rigid=True, form=form),
            PlainLane("alone", merges=False, form=form),
            PlainLane("question", merges=False, urgent=True, retries=False),
            PlainLane("wait", merges=False, urgent=True),
        ]
        self.closed = False
        self.closes_after = closes_after
        self.over = []
        for number in range(12 if warm else 0):
            # Enough answers to know what is slow.
            (item,) = self.driver.submit(f"warm {number}", lane=PlainLane("images", form="new"))
            self.driver.sleep(options["max_delay_s"] + 0.01)
            self.driver.answer(self.driver.under_way[0])
            assert item.result == f"re warm {number}"

    @rule(
        count=st.integers(1, 9),
        lane=st.sampled_from([0, 0, 0, 1, 2, 3, 4]),
        rows=st.sampled_from([1, 1, 1, 2, 6]),
        size_bytes=st.sampled_from([0, 1, 1, 15, 50]),
        bad=st.sets(st.integers(0, 8), max_size=3),
        timeout_s=st.sampled_from([0.0, 0.05, 1.0, 30.0]),
    )
    def submit(self, count, lane, rows, size_bytes, bad, timeout_s):
        lane = self.lanes[lane]
        first = len(self.driver.items)
        contents = [
            f"{'bad' if i in bad else 'good'} {first + i}" for i in range(1 if lane.urgent else count)
        ]
        rows = rows if lane.merges else 1
        items = self.driver.submit(
            *contents, lane=lane, rows=rows, size_bytes=size_bytes, timeout_s=timeout_s
        )
        assert all(item.finished for item in items) or not self.closed

    @rule(choice=st.integers(0, 50))
    @precondition(lambda self: self.driver.under_way)
    def serve(self, choice):
        """A server that works."""
        driver = self.driver
        attempt = driver.under_way[choice % len(driver.under_way)]
        self.over.append(attempt)
        if attempt.explains:
            driver.answer(attempt, ["new"])
        elif attempt.lane.urgent:
            driver.answer(attempt)
        elif attempt.rows > 5:
            driver.fail(
                attempt,
                CODE.INVALID_ARGUMENT,
                f"Task size {attempt.rows} is larger than maximum input batch size 5",
            )
        elif attempt.size_bytes > 40:
            driver.fail(
                attempt,
                CODE.RESOURCE_EXHAUSTED,
                f"Received message larger than max ({attempt.size_bytes} vs. 40)",
            )
        elif attempt.lane.form != "new" or any("bad" in item.content for item in attempt.items):
            driver.fail(attempt, CODE.INVALID_ARGUMENT, REFUSED)
        else:
            driver.answer(attempt)

    @rule(count=st.integers(1, 10), after_s=st.sampled_from([0.0, 0.005]))
    @precondition(lambda self: self.driver.under_way)
    def serve_many(self, count, after_s):
        for _ in range(count):
            self.driver.sleep(after_s)
            if self.driver.under_way:
                self.serve(0)

    @rule(
        choice=st.integers(0, 50),
        code=st.sampled_from([*grpc.StatusCode, CODE.UNAVAILABLE, CODE.UNAVAILABLE]),
        pushback_s=st.sampled_from([None, None, -1.0, 0.0, 0.3]),
    )
    @precondition(lambda self: self.driver.under_way)
    def fail(self, choice, code, pushback_s):
        attempt = self.driver.under_way[choice % len(self.driver.under_way)]
        self.over.append(attempt)
        self.driver.fail(attempt, code, "at will", pushback_s)

    @rule(choice=st.integers(0, 50))
    @precondition(lambda self: self.driver.under_way)
    def fail_here(self, choice):
        attempt = self.driver.under_way[choice % len(self.driver.under_way)]
        self.over.append(attempt)
        self.driver.fail(attempt, None, error=InternalError("no sense in it"))

    @rule(choice=st.integers(0, 50))
    @precondition(lambda self: self.driver.under_way)
    def stall(self, choice):
        attempt = self.driver.under_way[choice % len(self.driver.under_way)]
        if attempt.hedge or attempt.explains or len(attempt.items) > 1 or len(attempt.batch.attempts) > 1:
            return
        wait_s = self.driver.engine.take_over(attempt, self.driver.now)
        if wait_s < attempt.timeout_s:
            self.driver.sleep(max(0.0, wait_s))
            self.over.append(attempt)
            self.driver.stalled(attempt)

    @rule(choice=st.integers(0, 200), answers=st.booleans())
    @precondition(lambda self: self.over or self.driver.cancelled)
    def late(self, choice, answers):
        """What nobody waits for any more ends."""
        late = self.over + self.driver.cancelled
        attempt = late[choice % len(late)]
        before = self.driver.stats
        if answers:
            self.driver.answer(attempt, ["too late"] * len(attempt.items))
        else:
            self.driver.fail(attempt, CODE.CANCELLED)
        assert self.driver.stats == before

    @rule(choice=st.integers(0, 200))
    @precondition(lambda self: self.driver.items)
    def leave(self, choice):
        self.driver.leave(self.driver.items[choice % len(self.driver.items)])

    @rule()
    @precondition(lambda self: self.driver.under_way)
    def leave_all_of_a_request(self):
        for item in self.driver.under_way[0].items:
            self.driver.leave(item)

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 3.0, 40.0]))
    def sleep(self, seconds):
        self.driver.sleep(seconds)

    @rule()
    def close(self):
        self.closes_after -= 1
        if self.closes_after == 0:
            self.driver.close()
            self.closed = True
            assert self.driver.idle()

    def teardown(self):
        if self.driver is None:
            return
        # The servers mend their ways; nothing may be left over.
        for _ in range(2000):
            if all(item.finished for item in self.driver.items):
                break
            if self.driver.under_way:
                self.serve(0)
            else:
                self.driver.sleep(0.05)
        assert self.driver.idle()
        for item in self.driver.items:
            assert isinstance(item.result, ClientError) or item.result == f"re {item.content}"


@pytest.mark.parametrize(
    ("examples", "steps"), [(30, 30), pytest.param(300, 60, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_whatever_happens_every_item_is_finished_once(examples, steps):
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
