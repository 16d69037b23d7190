"""What the engine does with what happens, one story at a time."""

import math

import pytest

from graftserve.client.batching import Item
from graftserve.client.errors import (
    CallCancelledError,
    ClosedError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
    OverloadedError,
    UnavailableError,
)
from graftserve.client.retry import RetryPolicy
from tests.client.engine_driver import CODE, Driver, PlainLane


def results(items):
    return [item.result for item in items]


def warm(driver, answers=10, latency_s=0.01):
    """Let the client learn what latency is usual."""
    for number in range(answers):
        driver.submit(f"warm {number}")
        driver.sleep(latency_s)
        driver.answer(driver.only())
    driver.sleep(1)


# Batching


def test_what_comes_while_nothing_is_under_way_is_sent_at_once():
    driver = Driver()
    (item,) = driver.submit("a")
    assert driver.contents() == [["a"]]
    driver.answer(driver.only())
    assert item.result == "re a"
    assert driver.idle()


def test_what_comes_while_a_request_is_under_way_shares_the_next():
    driver = Driver(max_in_flight=1)
    driver.submit("a")
    for content in "bcd":
        driver.submit(content)
    assert driver.contents() == [["a"]]
    driver.answer(driver.only())
    assert driver.contents() == [["b", "c", "d"]]
    driver.answer(driver.only())
    assert results(driver.items) == ["re a", "re b", "re c", "re d"]
    assert driver.idle()


def test_what_waits_is_shared_out_among_the_requests_that_may_be_under_way():
    driver = Driver(max_in_flight=4)
    driver.submit(*"abcdefgh")
    assert driver.contents() == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]


@pytest.mark.parametrize(
    ("options", "sizes", "expected"),
    [
        ({"max_batch_images": 4}, [1] * 10, [4, 4, 2]),
        ({"max_batch_bytes": 10}, [4] * 5, [2, 2, 1]),
        ({"max_batch_bytes": 10}, [4, 40, 4, 4], [1, 1, 2]),  # the large one travels alone
    ],
    ids=["images", "bytes", "one too large"],
)
def test_a_request_is_bounded(options, sizes, expected):
    driver = Driver(max_in_flight=1, **options)
    driver.submit("first")
    for number, size in enumerate(sizes):
        driver.submit(str(number), size_bytes=size)
    driver.answer(driver.only())
    counts = []
    while driver.under_way:
        counts.append(len(driver.only().items))
        driver.answer(driver.only())
    assert counts == expected
    assert driver.idle()


def test_the_delay_gathers_company():
    driver = Driver(max_delay_s=0.05)
    driver.submit("a")
    driver.sleep(0.04)
    driver.submit("b")
    assert driver.contents() == []
    driver.sleep(0.011)
    assert driver.contents() == [["a", "b"]]


@pytest.mark.parametrize(
    ("options", "sizes"), [({"max_batch_images": 3}, [1, 1, 1]), ({"max_batch_bytes": 10}, [4, 6])]
)
def test_the_delay_ends_when_a_request_is_full(options, sizes):
    driver = Driver(max_delay_s=5, **options)
    for size in sizes:
        assert driver.contents() == []
        driver.submit("x", size_bytes=size)
    assert driver.contents() == [["x"] * len(sizes)]


@pytest.mark.parametrize(("known", "sent_after_s"), [(False, 0.5), (True, 0.75)])
def test_the_delay_leaves_time_for_an_answer_before_the_nearest_deadline(known, sent_after_s):
    driver = Driver(max_delay_s=5)
    if known:
        for number in range(10):
            driver.submit(*map(str, range(32)))
            driver.sleep(0.01)
            driver.answer(driver.only())
            assert driver.stats.succeeded == 32 * (number + 1)
        driver.sleep(1)
    driver.submit("patient")
    driver.submit("urgent", timeout_s=1)
    driver.sleep(sent_after_s - 0.001)
    assert driver.contents() == []
    driver.sleep(0.002)
    assert driver.contents() == [["patient", "urgent"]]


def test_callers_that_were_answered_together_are_waited_for():
    driver = Driver(max_in_flight=1)
    driver.submit("first")
    driver.submit(*"abcd")
    driver.answer(driver.only())
    driver.sleep(0.01)
    driver.answer(driver.only())
    driver.submit("e")
    driver.submit("f")
    assert driver.contents() == []  # two more are on their way
    driver.submit("g")
    driver.submit("h")
    assert driver.contents() == [["e", "f", "g", "h"]]


def test_callers_that_do_not_come_back_are_not_waited_for_long():
    driver = Driver(max_in_flight=1)
    driver.submit("first")
    driver.submit(*"abcd")
    driver.answer(driver.only())
    driver.sleep(0.01)
    driver.answer(driver.only())
    driver.submit("e")
    driver.sleep(0.0009)
    assert driver.contents() == []
    driver.sleep(0.0002)  # a tenth of the latency is over
    assert driver.contents() == [["e"]]


def test_a_lone_caller_never_waits():
    driver = Driver(max_in_flight=1)
    for _ in range(5):
        driver.submit("a")
        assert driver.contents() == [["a"]]
        driver.sleep(0.01)
        driver.answer(driver.only())


# Bounds


def test_no_more_requests_than_allowed_are_under_way():
    driver = Driver(max_in_flight=3)
    driver.submit(*"abcdefghij", lane=PlainLane("alone", merges=False))
    assert driver.contents() == [["a"], ["b"], ["c"]]
    assert driver.stats.queued == 7
    driver.answer(driver.under_way[1])
    assert driver.contents() == [["a"], ["c"], ["d"]]


@pytest.mark.parametrize(
    ("options", "size_bytes"), [({"max_queued_images": 2}, 1), ({"max_queued_bytes": 20}, 10)]
)
def test_the_queue_is_bounded(options, size_bytes):
    driver = Driver(max_in_flight=1, **options)
    items = [driver.submit(str(number), size_bytes=size_bytes)[0] for number in range(4)]
    assert [item.finished for item in items] == [False, False, False, True]
    assert isinstance(items[3].result, OverloadedError)
    assert "2 images wait and 1 requests are under way" in str(items[3].result)
    assert driver.stats.overloaded == 1


def test_one_item_may_wait_however_large_it_is():
    driver = Driver(max_in_flight=1, max_queued_bytes=10)
    driver.submit("a", size_bytes=100)
    (large,) = driver.submit("b", size_bytes=100)
    assert not large.finished


# Deadlines


def test_a_deadline_passes_in_the_queue():
    driver = Driver(max_in_flight=1)
    driver.submit("a", timeout_s=60)
    (item,) = driver.submit("b", timeout_s=2)
    driver.sleep(2)
    assert isinstance(item.result, DeadlineExceededError)
    assert "the call's 2 s were over before it could be sent; 1 images wait and 1 requests" in str(
        item.result
    )
    driver.answer(driver.only())
    assert driver.idle()
    assert driver.stats.expired == 1


def test_a_deadline_passes_while_a_request_is_under_way():
    driver = Driver()
    (item,) = driver.submit("a", timeout_s=2)
    attempt = driver.only()
    assert attempt.timeout_s == pytest.approx(2)
    driver.sleep(2)
    assert isinstance(item.result, DeadlineExceededError)
    assert "no answer within the call's 2 s" in str(item.result)
    assert driver.cancelled == [attempt]
    assert driver.idle()


def test_a_deadline_passes_before_the_next_attempt():
    driver = Driver(retry=RetryPolicy(first_ceiling_s=4, max_ceiling_s=4))
    (item,) = driver.submit("a", timeout_s=2.5)
    driver.sleep(1)
    driver.submit("b")
    driver.fail(driver.under_way[0], CODE.RESOURCE_EXHAUSTED, "busy", pushback_s=1)
    assert not item.finished
    driver.items[0].deadline = driver.now + 0.5  # the server's wait fitted in, and then time was lost
    driver.sleep(0.5)
    assert isinstance(item.result, DeadlineExceededError)
    assert "before attempt 2; the last gave RESOURCE_EXHAUSTED: busy" in str(item.result)


def test_grpc_s_clock_may_be_ahead_a_little():
    driver = Driver()
    (item,) = driver.submit("a", timeout_s=2)
    driver.sleep(1.99)
    driver.fail(driver.only(), CODE.DEADLINE_EXCEEDED, "Deadline Exceeded")
    assert "no answer within the call's 2 s" in str(item.result)
    assert driver.idle()


def test_a_deadline_of_the_server_s_own_is_told_as_it_is():
    driver = Driver()
    (item,) = driver.submit("a", timeout_s=60)
    driver.sleep(1)
    driver.fail(driver.only(), CODE.DEADLINE_EXCEEDED, "the proxy gave up")
    assert isinstance(item.result, DeadlineExceededError)
    assert item.result.details == "the proxy gave up"
    assert driver.idle()


# Leaving


def test_a_request_that_nobody_waits_for_is_cancelled_and_makes_room():
    driver = Driver(max_in_flight=1)
    (a,) = driver.submit("a")
    driver.submit("b")
    attempt = driver.only()
    driver.leave(a)
    assert isinstance(a.result, CallCancelledError)
    assert driver.cancelled == [attempt]
    assert driver.contents() == [["b"]]
    driver.fail(attempt, CODE.CANCELLED)  # gRPC reports it later
    driver.answer(driver.only())
    assert driver.idle()
    assert driver.stats.cancelled == 1


def test_a_request_that_somebody_waits_for_goes_on():
    driver = Driver(max_in_flight=1)
    driver.submit("first")
    a, b = driver.submit("a", "b")
    driver.answer(driver.only())
    driver.leave(a)
    driver.answer(driver.only())
    assert isinstance(a.result, CallCancelledError)
    assert b.result == "re b"
    assert driver.idle()


def test_an_item_leaves_the_queue():
    driver = Driver(max_in_flight=1)
    driver.submit("first")
    _, b, _ = driver.submit(*"abc")
    driver.leave(b)
    driver.answer(driver.only())
    assert driver.contents() == [["a", "c"]]


def test_an_item_may_leave_before_it_was_submitted():
    driver = Driver()
    item = Item(driver.lane, "a", 1, 1, driver.now + 10, driver._notified)
    driver.items.append(item)
    driver._do(driver.engine.leave(item, driver.now))
    assert isinstance(item.result, CallCancelledError)
    assert driver.idle()


# Retries


def test_what_gets_lost_is_sent_again_after_growing_waits():
    driver = Driver(retry=RetryPolicy(max_attempts=4, first_ceiling_s=0.2, max_ceiling_s=0.4))
    (item,) = driver.submit("a")
    for attempt, wait_s in ((1, 0.1), (2, 0.2), (3, 0.2)):  # half of the ceiling, by this random number
        assert driver.only().number == attempt
        driver.fail(driver.only(), CODE.CANCELLED if attempt == 2 else CODE.UNAVAILABLE)
        driver.sleep(wait_s - 0.001)
        assert driver.contents() == []
        driver.sleep(0.002)
    driver.fail(driver.only(), CODE.UNAVAILABLE, "gone")
    assert isinstance(item.result, UnavailableError)
    assert "after 4 attempts: gone" in str(item.result)
    assert driver.stats.retries == 3
    assert driver.idle()


def test_a_retry_asks_only_for_those_who_still_wait():
    driver = Driver(max_in_flight=1)
    driver.submit("first")
    a, _ = driver.submit("a", "b")
    driver.answer(driver.only())
    driver.fail(driver.only())
    driver.leave(a)
    driver.sleep(1)
    assert driver.contents() == [["b"]]


def test_retries_end_with_their_budget():
    driver = Driver(retry=RetryPolicy(budget_ratio=0.1, budget_per_s=0), random=lambda: 0.0)
    for _ in range(100):
        (item,) = driver.submit("a")
        while not item.finished:
            driver.fail(driver.only())
            driver.sleep(0)
    # Ten are saved up, and a hundred requests earn ten more.
    assert driver.stats.retries == pytest.approx(20, abs=1)
    assert driver.idle()


@pytest.mark.parametrize(
    ("code", "pushback_s", "again_after_s"),
    [
        (CODE.RESOURCE_EXHAUSTED, 0.7, 0.7),
        (CODE.RESOURCE_EXHAUSTED, None, None),
        (CODE.RESOURCE_EXHAUSTED, -1.0, None),
        (CODE.UNAVAILABLE, 0.7, 0.7),
        (CODE.UNAVAILABLE, -1.0, None),
        (CODE.INTERNAL, 0.7, None),
    ],
)
def test_the_server_says_when_to_come_back(code, pushback_s, again_after_s):
    driver = Driver()
    (item,) = driver.submit("a")
    driver.fail(driver.only(), code, "no", pushback_s)
    assert item.finished == (again_after_s is None)
    if again_after_s is not None:
        driver.sleep(again_after_s - 0.001)
        assert driver.contents() == []
        driver.sleep(0.002)
        assert driver.contents() == [["a"]]


def test_questions_about_the_server_are_not_sent_again_unless_wanted():
    driver = Driver()
    (item,) = driver.submit("a", lane=PlainLane("question", merges=False, urgent=True, retries=False))
    driver.fail(driver.only())
    assert isinstance(item.result, UnavailableError)


def test_overload_halves_the_requests_under_way_once_for_all_that_were_sent_before():
    driver = Driver(targets=("a:1", "b:1"), max_in_flight=8)
    driver.submit(*"abcdefgh", lane=PlainLane("alone", merges=False))
    assert driver.stats.max_in_flight == 8
    driver.sleep(0.01)
    for _ in range(4):
        driver.fail(driver.under_way[0], CODE.RESOURCE_EXHAUSTED)
    assert driver.stats.max_in_flight == 4


# Second copies


def test_a_hedge_goes_elsewhere_and_the_first_answer_counts():
    driver = Driver(targets=("a:1", "b:1"), retry=RetryPolicy(hedge=True))
    warm(driver)
    (item,) = driver.submit("x")
    first = driver.only()
    driver.sleep(0.011)
    _, second = driver.under_way
    assert second.hedge
    assert second.target != first.target
    driver.answer(second)
    assert item.result == "re x"
    assert driver.cancelled == [first]
    driver.answer(first)
    assert driver.stats.hedges == 1
    assert driver.idle()


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.RESOURCE_EXHAUSTED, CODE.NOT_FOUND, CODE.INTERNAL])
@pytest.mark.parametrize("loser", [0, 1])
def test_while_one_copy_is_under_way_the_other_may_fail(code, loser):
    driver = Driver(targets=("a:1", "b:1"), retry=RetryPolicy(hedge=True, max_attempts=2))
    warm(driver)
    (item,) = driver.submit("x")
    driver.sleep(0.011)
    driver.fail(driver.under_way[loser], code)
    assert not item.finished
    driver.answer(driver.only())
    assert item.result == "re x"
    assert driver.idle()


def test_a_request_that_seems_lost_is_sent_again_beside_itself():
    driver = Driver()
    warm(driver)
    driver.submit("x", timeout_s=60)
    driver.sleep(0.99)
    assert len(driver.under_way) == 1
    driver.sleep(0.02)
    assert driver.contents() == [["x"], ["x"]]


def test_without_budget_there_is_no_second_copy():
    driver = Driver(retry=RetryPolicy(budget_ratio=0, budget_per_s=0))
    warm(driver)
    (item,) = driver.submit("x", timeout_s=60)
    attempt = driver.only()
    assert driver.engine.take_over(attempt, driver.now) == math.inf
    driver.sleep(30)
    assert driver.contents() == [["x"]]
    driver.answer(driver.only())
    assert item.result == "re x"


def test_an_attempt_that_was_taken_over_is_given_up():
    driver = Driver(targets=("a:1", "b:1"))
    warm(driver)
    (item,) = driver.submit("x", timeout_s=60)
    first = driver.only()
    wait_s = driver.engine.take_over(first, driver.now)
    assert wait_s == pytest.approx(1)
    assert driver.engine.wake_at(driver.now) == math.inf  # the thread watches it now
    driver.sleep(wait_s)
    driver.stalled(first)
    assert driver.only().target != first.target
    driver.answer(driver.only())
    assert item.result == "re x"
    assert driver.idle()


def test_a_copy_of_items_that_expire_leaves_nothing_behind():
    driver = Driver(max_in_flight=1, retry=RetryPolicy(hedge=True))
    warm(driver)
    (item,) = driver.submit("x", timeout_s=0.01)
    attempt = driver.only()
    driver.now += 0.02  # the shell is late: the hedge and the deadline are due
    driver._do(driver.engine.tick(driver.now))
    assert isinstance(item.result, DeadlineExceededError)
    assert driver.cancelled == [attempt]
    assert driver.idle()


# Targets


def test_a_target_that_hangs_gets_no_more():
    driver = Driver(targets=("hangs:1", "works:1"))
    warm(driver)
    asked = []
    for _ in range(8):
        (item,) = driver.submit("x", timeout_s=60)
        while not item.finished:
            driver.sleep(0.01)
            working = [attempt for attempt in driver.under_way if attempt.target == 1]
            if working:
                driver.answer(working[0])
        asked.append({attempt.target for attempt in driver.cancelled})
        driver.cancelled.clear()
    assert sum(0 in targets for targets in asked) == 1


def fail_for(driver, seconds):
    """One caller whose calls get lost; returns the last error."""
    end = driver.now + seconds
    while driver.now < end:
        (item,) = driver.submit("x", timeout_s=60)
        while not item.finished:
            if driver.under_way:
                driver.fail(driver.only(), details="connection refused")
            else:
                driver.sleep(0.05)
        driver.sleep(0.05)
    return item.result


def test_a_circuit_opens_is_tried_and_closes():
    driver = Driver(retry=RetryPolicy(max_attempts=1))
    error = fail_for(driver, 3.2)
    assert driver.stats.targets[0].circuit_open
    assert isinstance(error, UnavailableError)
    assert error.code is CODE.UNAVAILABLE
    assert "attempts found no server; it is tried again in 0." in str(error)
    sent = driver.sent
    (fast,) = driver.submit("x")
    assert isinstance(fast.result, UnavailableError)
    assert driver.sent == sent

    driver.sleep(1)
    (probe,) = driver.submit("x")
    (other,) = driver.submit("x")
    assert "now, by another call" in str(other.result)
    assert driver.contents() == [["x"]]
    driver.answer(driver.only())
    assert probe.result == "re x"
    assert not driver.stats.targets[0].circuit_open
    assert driver.idle()


def test_calls_wait_for_a_circuit_if_wanted():
    driver = Driver(retry=RetryPolicy(max_attempts=1), wait_for_ready=True)
    while not driver.stats.targets[0].circuit_open:
        (item,) = driver.submit("x")
        driver.sleep(0.5)
        driver.fail(driver.only())
    (item,) = driver.submit("x")
    assert not item.finished
    assert driver.contents() == []
    driver.sleep(1)
    driver.answer(driver.only())
    assert item.result == "re x"
    assert driver.idle()


def test_a_question_is_asked_though_the_circuit_is_open():
    driver = Driver(retry=RetryPolicy(max_attempts=1))
    fail_for(driver, 3.2)
    (item,) = driver.submit("status", lane=PlainLane("question", merges=False, urgent=True))
    driver.answer(driver.only())
    assert item.result == "re status"
    assert not driver.stats.targets[0].circuit_open


def test_questions_overtake_and_take_no_room():
    driver = Driver(max_in_flight=1, max_queued_images=1)
    driver.submit("a")
    driver.submit("b")
    driver.submit("status", lane=PlainLane("question", merges=False, urgent=True))
    assert driver.contents() == [["a"], ["status"]]
    assert driver.stats.in_flight == 1


# Refusals


def together(driver, *contents, **options):
    """Items that share one request."""
    driver.submit("first", **options)
    items = driver.submit(*contents, **options)
    driver.answer(driver.only())
    assert driver.contents() == [list(contents)]
    return items


def refuse_bad(driver, details="cannot be decoded"):
    """A server that refuses requests with something bad in them; how many it was asked."""
    asked = 0
    while driver.under_way:
        attempt = driver.under_way[0]
        asked += 1
        if attempt.explains:
            driver.answer(attempt, ["old"])
        elif any("bad" in item.content for item in attempt.items):
            driver.fail(attempt, CODE.INVALID_ARGUMENT, details)
        else:
            driver.answer(attempt)
    return asked


def test_who_spoils_a_request_is_found_and_nobody_else_suffers():
    driver = Driver(max_in_flight=1)
    items = together(
        driver, *(f"good {i}" for i in range(20)), "bad 20", *(f"good {i}" for i in range(21, 32))
    )
    asked = refuse_bad(driver)
    assert asked <= 2 + math.log2(32) + 3  # the request itself and the explanation, then the search
    for item in items:
        if "bad" in item.content:
            assert isinstance(item.result, InvalidImageError)
            assert item.result.details == "cannot be decoded"
        else:
            assert item.result == f"re {item.content}"
    assert (driver.stats.searches, driver.stats.explanations) == (1, 1)
    assert driver.idle()


def test_a_lane_that_does_not_fit_is_adapted_and_asked_again():
    driver = Driver()
    (item,) = driver.submit("a")
    driver.fail(driver.only(), CODE.INVALID_ARGUMENT, "no input image_bytes")
    assert driver.only().explains
    assert driver.only().lane is driver.metadata_lane
    driver.answer(driver.only(), ["new"])
    assert driver.lane.form == "new"
    driver.answer(driver.only())
    assert item.result == "re a"
    assert driver.idle()


def test_those_refused_before_the_lane_was_adapted_are_asked_again_too():
    driver = Driver(max_in_flight=3)
    items = driver.submit("a", "b", "c")
    asked = list(driver.under_way)
    assert len(asked) == 3
    for attempt in asked:
        driver.fail(attempt, CODE.INVALID_ARGUMENT, "no input image_bytes")
    while driver.under_way:
        attempt = driver.under_way[0]
        driver.answer(attempt, ["new"] if attempt.explains else None)
    assert results(items) == ["re a", "re b", "re c"]
    assert driver.idle()


def test_a_model_that_is_not_what_is_needed_is_said_to_everybody():
    driver = Driver(max_in_flight=1)
    items = together(driver, "a", "b", lane=PlainLane(rigid=True))
    driver.fail(driver.only(), CODE.INVALID_ARGUMENT, "no such input")
    driver.answer(driver.only(), ["new"])
    assert [str(item.result) for item in items] == ["the model is new"] * 2
    assert all(isinstance(item.result, ModelMismatchError) for item in items)
    assert items[0].result is not items[1].result  # each caller raises its own
    assert items[0].result.__cause__.details == "no such input"
    assert driver.idle()


def test_an_explanation_is_kept_for_a_while():
    driver = Driver(max_in_flight=1)
    for seconds, explanations in ((0, 1), (9, 1), (2, 2)):
        driver.sleep(seconds)
        (item,) = driver.submit("bad")
        refuse_bad(driver)
        assert isinstance(item.result, InvalidImageError)
        assert driver.stats.explanations == explanations


def test_a_refusal_without_explanation_is_passed_on():
    driver = Driver()
    (item,) = driver.submit("a", timeout_s=60)
    driver.fail(driver.only(), CODE.FAILED_PRECONDITION, "no such signature")
    explanation = driver.only()
    assert explanation.timeout_s <= 2  # the refusal is known, so its reason is not waited for long
    driver.sleep(explanation.timeout_s)
    driver.fail(explanation, CODE.DEADLINE_EXCEEDED)
    assert isinstance(item.result, FailedPreconditionError)
    assert item.result.details == "no such signature"
    assert driver.idle()


def test_a_deadline_passes_during_an_explanation():
    driver = Driver()
    (item,) = driver.submit("a", timeout_s=1)
    driver.fail(driver.only(), CODE.INVALID_ARGUMENT, "not like this")
    explanation = driver.only()
    driver.sleep(1)
    assert isinstance(item.result, DeadlineExceededError)
    assert "while a refusal was looked into: not like this" in str(item.result)
    assert driver.cancelled == [explanation]
    driver.answer(explanation, ["new"])
    assert driver.idle()


def test_some_leave_during_a_search():
    driver = Driver(max_in_flight=1)
    items = together(driver, *(f"good {i}" for i in range(6)), "bad 6", "bad 7")
    driver.fail(driver.only(), CODE.INVALID_ARGUMENT, "no")
    driver.answer(driver.only(), ["old"])
    assert len(driver.only().items) == 4
    for item in (*items[:4], items[7]):  # all that are asked, and one to come
        driver.leave(item)
    assert len(driver.cancelled) == 1
    refuse_bad(driver)
    assert results(items[4:6]) == ["re good 4", "re good 5"]
    assert isinstance(items[6].result, InvalidImageError)
    assert isinstance(items[7].result, CallCancelledError)
    assert driver.idle()


def test_a_deadline_passes_during_the_search_of_a_large_request():
    driver = Driver(max_in_flight=1, max_batch_images=2000)
    items = together(driver, *(f"bad {i}" for i in range(2000)), timeout_s=5)
    for _ in range(30):
        driver.now += 0.1
        attempt = driver.only()
        if attempt.explains:
            driver.answer(attempt, ["old"])
        else:
            driver.fail(attempt, CODE.INVALID_ARGUMENT, "no")
    assert sum(item.finished for item in items) > 2
    driver.sleep(5)
    assert driver.idle()
    assert {type(item.result) for item in items} == {InvalidImageError, DeadlineExceededError}


# Limits that the server tells


def test_the_largest_number_of_images_is_learned():
    driver = Driver(max_in_flight=1, max_batch_images=64)
    items = together(driver, *map(str, range(33)))
    driver.fail(
        driver.only(),
        CODE.INVALID_ARGUMENT,
        "Task size 33 is larger than maximum input batch size 32",
    )
    assert driver.stats.max_batch_images == 32
    assert len(driver.only().items) == 32
    driver.answer(driver.only())
    driver.answer(driver.only())
    assert results(items) == [f"re {number}" for number in range(33)]
    assert driver.stats.explanations == 0
    assert driver.idle()


def test_the_largest_message_is_learned():
    driver = Driver(max_in_flight=1)
    items = together(driver, *"abcde", size_bytes=1_000_000)
    driver.fail(
        driver.only(), CODE.RESOURCE_EXHAUSTED, "Received message larger than max (5000000 vs. 4194304)"
    )
    assert driver.contents() == [["a", "b", "c", "d"]]
    assert driver.stats.max_in_flight == 1
    driver.answer(driver.only())
    driver.answer(driver.only())
    assert results(items) == [f"re {content}" for content in "abcde"]
    assert driver.idle()


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (CODE.INVALID_ARGUMENT, "Task size 1000 is larger than maximum input batch size 999"),
        (CODE.RESOURCE_EXHAUSTED, "Received message larger than max (9999999 vs. 9999998)"),
    ],
)
def test_a_server_that_refuses_every_size_is_not_asked_for_ever(code, details):
    driver = Driver(max_in_flight=1)
    items = together(driver, *map(str, range(32)), size_bytes=100)
    sent = driver.sent
    while driver.under_way:
        driver.fail(driver.only(), code, details)
    assert driver.sent - sent <= 32 + 5
    assert all(isinstance(item.result, InvalidArgumentError) for item in items)
    assert driver.idle()


def test_too_much_during_a_search_blames_nobody():
    driver = Driver(max_in_flight=1)
    items = together(driver, *(f"good {i}" for i in range(15)), "bad 15")
    driver.fail(driver.only(), CODE.INVALID_ARGUMENT, "no")
    driver.answer(driver.only(), ["old"])
    assert len(driver.only().items) == 8
    driver.fail(driver.only(), CODE.INVALID_ARGUMENT, "Task size 8 is larger than maximum input batch size 4")
    refuse_bad(driver)
    assert results(items[:15]) == [f"re good {i}" for i in range(15)]
    assert isinstance(items[15].result, InvalidImageError)
    assert driver.stats.max_batch_images == 4
    assert driver.idle()


# Faults of this side, and the end


def test_an_answer_that_makes_no_sense_ends_the_call():
    driver = Driver()
    (item,) = driver.submit("a")
    error = InternalError("no sense in it")
    driver.fail(driver.only(), None, error=error)
    assert str(item.result) == "no sense in it"
    assert driver.idle()


def test_closing_ends_everything():
    driver = Driver(max_in_flight=2)
    under_way = driver.submit("a", "b", lane=PlainLane("alone", merges=False))
    queued = driver.submit("c", "d")
    driver.fail(driver.under_way[0])  # waits for its next attempt
    attempt = driver.only()
    driver.close()
    assert driver.cancelled == [attempt]
    (late,) = driver.submit("e")
    assert all(isinstance(item.result, ClosedError) for item in (*under_way, *queued, late))
    driver.fail(attempt, CODE.CANCELLED)
    driver.close()
    assert driver.idle()


def test_lanes_that_are_not_used_any_more_are_forgotten():
    driver = Driver(max_in_flight=1)
    (first,) = driver.submit("first", lane=PlainLane("first"))
    held = driver.only()
    driver.submit("kept", lane=PlainLane("kept"))
    for number in range(200):
        (item,) = driver.submit("x", lane=PlainLane(f"lane {number}"))
        driver.leave(item)
    assert len(driver.engine._lanes) <= 64
    driver.answer(held)
    driver.answer(driver.only())
    assert first.result == "re first"
    assert driver.idle()
