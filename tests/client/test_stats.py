"""What the counters make of what happens."""

import grpc
import pytest

from graftserve.client.errors import CallCancelledError, DeadlineExceededError, InternalError, OverloadedError
from graftserve.client.stats import Counters


def read(counters):
    return counters.stats(queued=1, in_flight=2, max_in_flight=3, max_batch_images=4, targets=())


def test_nothing_has_happened():
    stats = read(Counters())
    assert (stats.items, stats.succeeded, stats.failed, stats.requests) == (0, 0, 0, 0)
    assert (stats.batch_images, stats.queue_s_p50, stats.network_s_p99) == (None, None, None)
    assert (stats.queued, stats.in_flight, stats.max_in_flight, stats.max_batch_images) == (1, 2, 3, 4)


def test_items_are_counted_by_how_they_end():
    counters = Counters()
    for kind in (
        DeadlineExceededError,
        CallCancelledError,
        CallCancelledError,
        OverloadedError,
        InternalError,
    ):
        counters.finished(kind("why"))
    counters.finished("a result")
    stats = read(counters)
    assert (stats.succeeded, stats.failed) == (1, 5)
    assert (stats.expired, stats.cancelled, stats.overloaded) == (1, 2, 1)
    assert sum(stats.errors.values()) == stats.failed


def test_requests_are_counted_by_why_they_are_sent():
    counters = Counters()
    counters.sent(1, explains=False, hedge=False, again=False)
    counters.sent(1, explains=False, hedge=False, again=True)
    counters.sent(1, explains=False, hedge=True, again=False)
    counters.sent(1, explains=True, hedge=False, again=True)
    counters.failed(grpc.StatusCode.UNAVAILABLE)
    counters.failed(None)
    stats = read(counters)
    assert (stats.requests, stats.retries, stats.hedges, stats.explanations) == (4, 1, 1, 1)
    assert stats.codes == {"UNAVAILABLE": 1}


def test_times_are_quantiles_of_the_last_thousand():
    counters = Counters()
    for number in range(5000):
        counters.answered(2, float(number), 0.5)
    stats = read(counters)
    assert stats.batch_images == 2
    assert stats.queue_s_p95 == 0.5
    assert stats.network_s_p50 == pytest.approx(5000 - 512, abs=1)
    assert stats.network_s_p99 == pytest.approx(5000 - 10, abs=1)
