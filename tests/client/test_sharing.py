"""How calls share requests, and what becomes of those that spoil them and of those that leave."""

import itertools
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from graftserve.client import (
    Client,
    ClosedError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
    OverloadedError,
    Prediction,
    RetryPolicy,
)
from graftserve.client.testing import StatusError
from graftserve.client.wire.tensors import to_proto
from tests.client.async_in_thread import AsyncInThread


@pytest.fixture(autouse=True, params=[Client, AsyncInThread])
def either(request, monkeypatch):
    """Every test here is of both clients."""
    monkeypatch.setattr(request.module, "Client", request.param)


def image(length):
    return b"x" * length


def until(condition):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def busy(server, client, pool):
    """A call that holds the client's only request."""
    server.hold = threading.Event()
    first = pool.submit(client.classify, image(9))
    assert server.entered.acquire(timeout=20)
    return first


def refuse_bad(server):
    """The model has no `valid`: it refuses a whole request for one bad image, as most do."""
    del server.signatures.signature_def["serving_default"].outputs["valid"]
    answer = server._answer

    def refusing(request):
        for content in request.inputs["image_bytes"].string_val:
            if content.startswith(b"bad"):
                raise StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT, "jpeg::Uncompress failed. Invalid JPEG data"
                )
        return answer(request)

    server._answer = refusing


# Sharing


def test_what_gathers_while_a_request_is_under_way_shares_the_next(server):
    with Client(server.target, "flowers", max_in_flight=1) as client, ThreadPoolExecutor(16) as pool:
        first = busy(server, client, pool)
        calls = [pool.submit(client.classify, image(n)) for n in range(1, 11)]
        until(lambda: client.stats().queued == 10)
        server.hold.set()
        assert first.result(20).label == "c9"
        assert [call.result(20).label for call in calls] == [f"c{n % 10}" for n in range(1, 11)]
    assert [len(batch) for batch in server.batches] == [1, 10]


def test_a_bad_image_is_its_callers_alone(server):
    with Client(server.target, "flowers", max_in_flight=1) as client, ThreadPoolExecutor(16) as pool:
        busy(server, client, pool)
        calls = [pool.submit(client.classify, content) for content in (image(1), b"bad", image(3))]
        until(lambda: client.stats().queued == 3)
        server.hold.set()
        assert [type(call.exception(20)) for call in calls] == [type(None), InvalidImageError, type(None)]
    assert len(server.batches) == 2


def test_different_kinds_of_calls_do_not_share(server):
    with Client(server.target, "flowers", max_in_flight=1) as client, ThreadPoolExecutor(16) as pool:
        busy(server, client, pool)
        calls = [
            pool.submit(client.classify, image(1)),
            pool.submit(client.classify, image(2), metadata={"tenant": "a"}),
            pool.submit(client.embed, [image(3)]),
        ]
        until(lambda: client.stats().queued == 3)
        server.hold.set()
        assert [call.exception(20) for call in calls] == [None] * 3
    assert [len(batch) for batch in server.batches] == [1] * 4


def test_metadata_of_a_call_travels_with_it(server):
    with Client(server.target, "flowers", metadata={"app": "shop"}) as client:
        client.classify(image(1), metadata={"tenant": "a"})
        assert {("app", "shop"), ("tenant", "a")} <= set(server.metadata)
        client.classify(image(1))
        assert "tenant" not in dict(server.metadata)


@pytest.mark.parametrize(
    ("name", "value"),
    [("Bad Key", "v"), ("", "v"), ("tenant", 5), ("tenant", "a\nb"), ("x-bin", "text"), ("a", b"\xff")],
)
def test_metadata_that_grpc_would_not_send_is_named(server, name, value):
    metadata = {name: value}
    with Client(server.target, "flowers") as client:
        for call in (
            lambda: client.classify(image(1), metadata=metadata),
            lambda: client.classify_many([image(1)], metadata=metadata),
            lambda: client.embed([image(1)], metadata=metadata),
            lambda: client.predict({}, metadata=metadata),
        ):
            with pytest.raises(ValueError, match=f"expected metadata .* got {name!r} with a value of type"):
                call()
        client.classify(image(1), metadata={"x-bin": b"\xff", "tenant": b"text"})
    with pytest.raises(ValueError, match="expected metadata"):
        Client(server.target, "flowers", metadata=metadata)
    assert len(server.requests) == 1


def test_a_delay_gathers_though_nothing_is_under_way(server):
    with (
        Client(server.target, "flowers", max_delay_s=20, max_batch_images=4) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(client.classify, image(n)) for n in range(1, 5)]
        assert [call.result(15).label for call in calls] == ["c1", "c2", "c3", "c4"]
    assert [len(batch) for batch in server.batches] == [4]


def test_a_delay_ends_with_the_nearest_deadline(server):
    with Client(server.target, "flowers", max_delay_s=1000) as client:
        for _ in range(20):  # until it is known how long a request takes
            client.classify_many([image(1)] * 32)
        client.classify(image(1), timeout_s=3)


# Bad company


@pytest.mark.parametrize("position", [0, 7, 31])
def test_only_the_culprit_fails_where_the_model_refuses_the_batch(server, position):
    refuse_bad(server)
    images = [image(n) for n in range(1, 33)]
    images[position] = b"bad"
    with Client(server.target, "flowers", max_in_flight=1) as client:
        client.classify(image(1))  # learns what the model has
        asked = len(server.requests)
        results = client.classify_many(images)
    assert [index for index, result in enumerate(results) if not isinstance(result, Prediction)] == [position]
    assert isinstance(results[position], InvalidImageError)
    assert "jpeg::Uncompress failed" in str(results[position])
    assert results[position].indexes == (position,)
    assert len(server.requests) - asked <= 1 + math.log2(32) + 2


def test_two_culprits_of_one_batch(server):
    refuse_bad(server)
    images = [image(1), b"bad 1", image(3), image(4), b"bad 2", image(6)]
    with Client(server.target, "flowers", max_in_flight=1) as client:
        results = client.classify_many(images)
    assert [isinstance(result, InvalidImageError) for result in results] == [
        content.startswith(b"bad") for content in images
    ]
    assert [result.label for result in results if isinstance(result, Prediction)] == ["c1", "c3", "c4", "c6"]


def test_a_model_that_calls_its_input_otherwise(server):
    default = server.signatures.signature_def["serving_default"]
    default.inputs["jpegs"].CopyFrom(default.inputs["image_bytes"])
    del default.inputs["image_bytes"]
    answer = server._answer

    def renamed(request):
        if "jpegs" not in request.inputs:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "Missing but required: {jpegs}")
        request.inputs["image_bytes"].CopyFrom(request.inputs["jpegs"])
        default.inputs["image_bytes"].CopyFrom(default.inputs["jpegs"])
        del request.inputs["jpegs"], default.inputs["jpegs"]
        return answer(request)

    server._answer = renamed
    with Client(server.target, "flowers") as client:
        assert client.classify(image(3)).label == "c3"


def test_a_batch_above_the_servers_limit_is_split(server):
    answer = server._answer

    def limited(request):
        if (size := len(request.inputs["image_bytes"].string_val)) > 8:
            raise StatusError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Task size {size} is larger than maximum input batch size 8",
            )
        return answer(request)

    server._answer = limited
    with Client(server.target, "flowers", max_in_flight=1) as client:
        assert len(client.classify_many([image(n) for n in range(1, 65)])) == 64
        assert client.stats().max_batch_images == 8
    assert sum(len(batch) > 8 for batch in server.batches) <= 2


def test_a_message_above_the_servers_limit_is_split(start_server):
    server = start_server(max_message_bytes=100_000)
    with Client(server.target, "flowers", max_in_flight=1) as client:
        results = client.classify_many([image(40_000 + n) for n in range(8)])
        assert [result.label for result in results] == [f"c{n}" for n in range(8)]
        assert max(len(batch) for batch in server.batches) == 2
        with pytest.raises(InvalidArgumentError, match="100000"):
            client.classify(image(200_000))


# Leaving


def test_a_call_past_its_deadline_leaves_its_batch(server):
    with Client(server.target, "flowers", max_in_flight=1) as client, ThreadPoolExecutor(8) as pool:
        busy(server, client, pool)
        patient = pool.submit(client.classify, image(1))
        until(lambda: client.stats().queued == 1)
        with pytest.raises(DeadlineExceededError, match="over before it could be sent"):
            client.classify(image(2), timeout_s=0.2)
        server.hold.set()
        assert patient.result(20).label == "c1"
        until(lambda: client.stats().in_flight == 0)
    assert [len(batch) for batch in server.batches] == [1, 1]


def test_a_call_past_its_deadline_does_not_end_those_that_share_its_request(server):
    with Client(server.target, "flowers", max_in_flight=1) as client, ThreadPoolExecutor(8) as pool:
        busy(server, client, pool)
        hold, server.hold = server.hold, threading.Event()
        patient = pool.submit(client.classify, image(1))
        hasty = pool.submit(client.classify, image(2), timeout_s=1)
        until(lambda: client.stats().queued == 2)
        hold.set()
        assert server.entered.acquire(timeout=20)
        with pytest.raises(DeadlineExceededError, match=r"no answer within the call's 1 s"):
            hasty.result(20)
        server.hold.set()
        assert patient.result(20).label == "c1"
    assert [len(batch) for batch in server.batches] == [1, 2]


def test_the_queue_is_bounded(server):
    with (
        Client(server.target, "flowers", max_in_flight=1, max_queued_images=3) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        busy(server, client, pool)
        calls = [pool.submit(client.classify, image(n)) for n in range(1, 4)]
        until(lambda: client.stats().queued == 3)
        with pytest.raises(OverloadedError, match=r"3 images wait .*max_queued_images 3"):
            client.classify(image(4))
        server.hold.set()
        assert [call.result(20).label for call in calls] == ["c1", "c2", "c3"]


def test_many_images_wait_for_room_instead(server):
    with Client(server.target, "flowers", max_in_flight=1, max_batch_images=2, max_queued_images=2) as client:
        assert len(client.classify_many([image(n) for n in range(1, 101)])) == 100


# Twice


def test_overload_is_not_retried_but_for_pushback(server):
    server.faults = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")]
    with Client(server.target, "flowers") as client:
        with pytest.raises(OverloadedError, match="Threadpool"):
            client.classify(image(1))
        server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_pushback_ms=20)
        assert client.classify(image(1)).label == "c1"
        assert client.stats().retries == 1
        server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "not again", retry_pushback_ms=-1)
        with pytest.raises(OverloadedError, match="not again"):
            client.classify(image(1))


def test_a_slow_request_is_hedged(server):
    with Client(server.target, "flowers", retry=RetryPolicy(hedge=True)) as client:
        for _ in range(10):
            client.classify(image(1))
        hold = server.hold_next = threading.Event()
        assert client.classify(image(2)).label == "c2"
        assert client.stats().hedges >= 1
        hold.set()


def test_a_lost_request_is_sent_again(server):
    with Client(server.target, "flowers") as client:
        for _ in range(10):
            client.classify(image(1))
        hold = server.hold_next = threading.Event()
        begin = time.monotonic()
        assert client.classify(image(2), timeout_s=30).label == "c2"
        assert 0.9 < time.monotonic() - begin < 20
        hold.set()


# Streams


def test_a_stream_is_in_order_and_takes_a_bounded_number_ahead(server):
    taken = itertools.count()
    last = -1

    def images():
        nonlocal last
        for last in taken:
            if last == 5000:
                return
            yield b"bad" if last % 50 == 49 else image(last % 97 + 1)

    with Client(server.target, "flowers", max_in_flight=4) as client:
        window = 5 * 32
        for index, result in enumerate(client.stream(images())):
            assert last - index <= window + 1
            if index % 50 == 49:
                assert isinstance(result, InvalidImageError)
                assert result.indexes == (index,)
            else:
                assert result.label == f"c{(index % 97 + 1) % 10}"
    assert index == 4999


def test_a_stream_as_completed_gives_every_index_once(server):
    with Client(server.target, "flowers") as client:
        results = dict(client.stream_as_completed(image(n % 50 + 1) for n in range(500)))
    assert {index: result.label for index, result in results.items()} == {
        n: f"c{(n % 50 + 1) % 10}" for n in range(500)
    }


def test_a_stream_that_is_left_leaves_nothing_behind(server):
    with Client(server.target, "flowers", max_batch_images=4) as client:
        stream = client.stream(image(1) for _ in itertools.count())
        assert next(stream).label == "c1"
        stream.close()
        until(lambda: client.stats().in_flight == 0 and client.stats().queued == 0)


def test_a_stream_raises_what_is_no_images_fault(server):
    with Client(server.target, "flowers", max_batch_images=1, max_in_flight=1) as client:
        stream = client.stream([image(1), image(2), image(3)])
        assert next(stream).label == "c1"
        server.faults = [(grpc.StatusCode.INTERNAL, "broken")] * 3
        with pytest.raises(InternalError, match="broken"):
            list(stream)


# Any model


def test_rows_of_predicts_share_a_request_when_asked_to(server):
    with Client(server.target, "flowers", max_in_flight=1) as client, ThreadPoolExecutor(8) as pool:
        first = busy(server, client, pool)

        def half(values, **settings):
            x = np.array(values, np.float32)
            return client.predict({"x": x}, signature="half_plus_two", merge_rows=True, **settings)["y"]

        calls = [pool.submit(half, values) for values in ([2], [4, 6], [8])]
        until(lambda: client.stats().queued == 4)
        server.hold.set()
        assert [call.result(20).tolist() for call in calls] == [[3], [4, 5], [6]]
        first.result(20)
        with pytest.raises(InvalidArgumentError, match=r"same number of rows to merge, got x \[\]"):
            half(1.0)
    assert len(server.requests) == 2


def test_outputs_without_a_row_each_cannot_be_merged(server):
    def rewrite(response):
        response.outputs["y"].CopyFrom(to_proto(np.zeros(7, np.float32)))

    server.rewrite = rewrite
    with (
        Client(server.target, "flowers") as client,
        pytest.raises(ModelMismatchError, match="call predict without merge_rows"),
    ):
        client.predict({"x": np.float32([1])}, signature="half_plus_two", merge_rows=True)


# Counting


def test_stats_count(server):
    with Client(server.target, "flowers", max_in_flight=1, max_batch_images=4) as client:
        client.classify_many([image(n) for n in range(1, 9)] + [b"bad"])
        client.status()
        server.faults = [(grpc.StatusCode.UNAVAILABLE, "going")]
        client.classify(image(1))
        stats = client.stats()
    assert (stats.items, stats.succeeded, stats.failed) == (11, 10, 1)
    assert (stats.requests, stats.retries, stats.hedges) == (6, 1, 0)
    assert (stats.codes, stats.errors) == ({"UNAVAILABLE": 1}, {"InvalidImageError": 1})
    assert (stats.queued, stats.in_flight) == (0, 0)
    assert [(target.target, target.circuit_open) for target in stats.targets] == [(server.target, False)]
    assert 0 < stats.network_s_p50 <= stats.network_s_p99


def test_a_closed_client_ends_what_waits(server):
    client = Client(server.target, "flowers", max_in_flight=1)
    with ThreadPoolExecutor(8) as pool:
        first = busy(server, client, pool)
        calls = [first, *(pool.submit(client.classify, image(n)) for n in range(1, 4))]
        until(lambda: client.stats().queued == 3)
        client.close()
        assert [type(call.exception(20)) for call in calls] == [ClosedError] * 4
