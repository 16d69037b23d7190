"""The client against a real gRPC server in this process."""

import signal
import subprocess
import sys
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
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
    NotFoundError,
    OverloadedError,
    Prediction,
    RetryPolicy,
    Signature,
    TensorSpec,
    UnavailableError,
    VersionState,
    VersionStatus,
)
from graftserve.client.wire import DataType, TensorProto
from graftserve.client.wire.tensors import to_proto
from tests.client.async_in_thread import AsyncInThread

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "going away")


@pytest.fixture(autouse=True, params=[Client, AsyncInThread])
def either(request, monkeypatch):
    """Every test here is of both clients."""
    monkeypatch.setattr(request.module, "Client", request.param)


@pytest.fixture
def client(server):
    with Client(server.target, "flowers", timeout_s=20) as client:
        yield client


def image(length):
    return b"x" * length


# One image


def test_classify_gives_label_score_top_and_version(client):
    assert client.classify(image(7)) == Prediction("c7", 0.75, (("c7", 0.75), ("c8", 0.25)), 3)


def test_classify_leaves_the_probabilities_on_the_server(client, server):
    client.classify(image(7))
    assert list(server.requests[0].output_filter) == ["classes", "scores", "valid"]


def test_classify_reads_files(client, tmp_path):
    (tmp_path / "a.jpg").write_bytes(image(12))
    assert client.classify(tmp_path / "a.jpg").label == "c2"


def test_classify_raises_for_an_image_that_the_server_cannot_decode(client):
    with pytest.raises(InvalidImageError, match="cannot be decoded"):
        client.classify(b"bad")


def test_classify_raises_for_a_missing_file_without_asking_the_server(client, server):
    with pytest.raises(InvalidImageError, match=r"nowhere\.jpg"):
        client.classify("nowhere.jpg")
    assert not server.requests


# Many images


def test_classify_many_keeps_order_and_puts_errors_in_place(client):
    results = client.classify_many([image(1), b"bad", image(3), "nowhere.jpg", image(5)])
    assert [type(result) for result in results] == [
        Prediction,
        InvalidImageError,
        Prediction,
        InvalidImageError,
        Prediction,
    ]
    assert [results[i].label for i in (0, 2, 4)] == ["c1", "c3", "c5"]
    assert [results[i].indexes for i in (1, 3)] == [(1,), (3,)]
    assert "nowhere.jpg" in str(results[3])
    assert results[3].model == "flowers"


def test_classify_many_of_nothing_asks_nothing(client, server):
    assert client.classify_many([]) == []
    assert not server.requests


def test_classify_many_of_only_unreadable_images_asks_nothing(client, server):
    assert [type(result) for result in client.classify_many(["no.jpg", b""])] == [InvalidImageError] * 2
    assert not server.requests


def test_classify_many_splits_by_count(server):
    with Client(server.target, "flowers", max_batch_images=4) as client:
        results = client.classify_many(image(n) for n in range(1, 11))
    assert [result.label for result in results] == [f"c{n % 10}" for n in range(1, 11)]
    assert max(len(batch) for batch in server.batches) <= 4


def test_classify_many_splits_by_bytes_and_sends_a_giant_alone(server):
    with Client(server.target, "flowers", max_batch_bytes=1000, max_in_flight=1) as client:
        client.classify_many([image(400), image(600), image(1), image(5000), image(2)])
    assert [[len(item) for item in batch] for batch in server.batches] == [[400, 600], [1], [5000], [2]]


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_classify_many_keeps_its_bound_of_requests_in_flight_and_uses_it(server, max_in_flight):
    server.hold = threading.Event()
    with (
        Client(server.target, "flowers", max_batch_images=1, max_in_flight=max_in_flight) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(client.classify_many, [image(n) for n in range(1, 9)])
        for _ in range(max_in_flight):
            assert server.entered.acquire(timeout=20)
        server.hold.set()
        assert len(call.result(20)) == 8
    assert server.most_active == max_in_flight


def test_classify_many_takes_images_only_as_they_are_sent(server):
    server.hold = threading.Event()
    taken = []

    def images():
        for n in range(1, 101):
            taken.append(n)
            yield image(n)

    with (
        Client(server.target, "flowers", max_batch_images=2, max_in_flight=2) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(client.classify_many, images())
        for _ in range(2):
            assert server.entered.acquire(timeout=20)
        assert len(taken) <= 6  # two batches of two under way, and the next
        server.hold.set()
        assert len(call.result(20)) == 100


def test_classify_many_passes_on_what_the_iterable_raises(client):
    def images():
        yield image(1)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        client.classify_many(images())


@pytest.mark.parametrize(
    "images", [b"abc", "a.jpg", 7, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)]
)
def test_a_single_image_in_place_of_many_is_refused(client, images):
    with pytest.raises(InvalidArgumentError, match="put a single image into a list"):
        client.classify_many(images)


def test_one_deadline_covers_all_batches(server):
    server.hold = threading.Event()
    with Client(server.target, "flowers", max_batch_images=1, max_in_flight=2) as client:
        begin = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            client.classify_many([image(n) for n in range(1, 9)], timeout_s=0.5)
        assert time.monotonic() - begin < 5
    assert len(server.batches) <= 4


def test_answers_above_the_default_message_limit_arrive(client):
    big = image(6 * 2**20)
    assert [result.label for result in client.classify_many([big, big])] == [f"c{len(big) % 10}"] * 2
    x = np.arange(2 * 2**20, dtype=np.float32)
    np.testing.assert_array_equal(client.predict({"x": x}, signature="half_plus_two")["y"], x / 2 + 2)


# Features


def test_embed_gives_float32_rows_in_order(server):
    with Client(server.target, "flowers", max_batch_images=2) as client:
        vectors = client.embed([b"abc", b"b", b"cc", b"dddd", b"e"])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[3, 97], [1, 98], [2, 99], [4, 100], [1, 101]])


def test_embed_names_every_bad_image(client):
    with pytest.raises(InvalidImageError, match="2 bad of 4, counted from 0: 1, 2;") as caught:
        client.embed([b"a", b"bad", "nowhere.jpg", b"d"])
    assert caught.value.indexes == (1, 2)


def test_embed_of_nothing(client):
    assert client.embed([]).shape == (0, 0)


# Any model


def test_predict_calls_any_signature(client):
    x = np.float32([1, 2, 4])
    result = client.predict({"x": x}, signature="half_plus_two")
    assert dict(result).keys() == {"y"}
    np.testing.assert_array_equal(result["y"], [2.5, 3, 4])
    assert result.version == 3


def test_outputs_and_signatures_are_in_the_order_of_their_names(client):
    outputs = ["classes", "probabilities", "scores", "valid"]
    assert list(client.predict({"image_bytes": [b"abc"]})) == outputs
    signatures = client.metadata().signatures
    assert list(signatures) == ["features", "half_plus_two", "serving_default"]
    assert list(signatures["serving_default"].outputs) == outputs


def test_predict_asks_only_for_the_outputs_wanted(client):
    result = client.predict({"image_bytes": [b"abc"]}, outputs=["classes"])
    assert result["classes"].tolist() == [[b"c3", b"c4"]]
    assert len(result) == 1


def test_predict_names_the_input_that_cannot_be_encoded(client, server):
    with pytest.raises(InvalidArgumentError, match="input 'x': expected numbers"):
        client.predict({"x": np.array("2026-01-01", "datetime64[D]")})
    assert not server.requests


def test_predict_keeps_the_servers_words(client, server):
    with pytest.raises(InvalidArgumentError) as caught:
        client.predict({"z": np.float32([1])}, signature="half_plus_two")
    assert caught.value.details == "Missing but required: {'x'}"
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.target, caught.value.model) == (server.target, "flowers")
    assert isinstance(caught.value.__cause__.__cause__, grpc.RpcError)


def test_a_wrong_input_name_lists_the_right_ones(client):
    with pytest.raises(
        InvalidArgumentError, match=r"takes x float32 \[N\] and gives y; got inputs z \(the server"
    ):
        client.predict({"z": np.float32([1])}, signature="half_plus_two")
    with pytest.raises(InvalidArgumentError, match="gives y; got no outputs zz"):
        client.predict({"x": np.float32([1])}, signature="half_plus_two", outputs=["zz"])


def test_predict_on_a_missing_signature(client):
    with pytest.raises(
        FailedPreconditionError, match="no signature 'zz': it has features, half_plus_two, serving_default"
    ):
        client.predict({}, signature="zz")


def test_an_answer_that_does_not_parse_is_an_internal_error(client, server):
    def rewrite(response):
        response.outputs["y"].CopyFrom(TensorProto(dtype=DataType.DT_FLOAT, tensor_content=b"abc"))

    server.rewrite = rewrite
    with pytest.raises(InternalError, match="output 'y'"):
        client.predict({"x": np.float32([1])}, signature="half_plus_two")


# Models that are not what a method needs


def test_classify_on_a_model_without_classes_names_what_it_has(client, server):
    default = server.signatures.signature_def["serving_default"]
    del default.outputs["classes"]
    for call in (lambda: client.classify(b"a"), lambda: client.classify_many([b"a"])):
        with pytest.raises(ModelMismatchError, match="outputs probabilities, scores, valid") as caught:
            call()
        assert "classes" in caught.value.details
        assert isinstance(caught.value.__cause__, InvalidArgumentError)


def test_classify_on_a_model_with_another_input_names_it(client, server):
    half = server.signatures.signature_def["half_plus_two"]
    server.signatures.signature_def["serving_default"].CopyFrom(half)
    with pytest.raises(ModelMismatchError, match="got inputs x and outputs y"):
        client.classify(b"a")


def test_embed_on_a_model_without_features_names_the_signatures(client, server):
    del server.signatures.signature_def["features"]
    with pytest.raises(
        ModelMismatchError, match="signature features, got only half_plus_two, serving_default"
    ):
        client.embed([b"a"])


def test_an_invalid_argument_on_a_fitting_model_stays_one(client, server):
    server.faults = [(grpc.StatusCode.INVALID_ARGUMENT, "no")]
    with pytest.raises(InvalidArgumentError, match="no"):
        client.classify(b"a")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores", np.zeros((2, 2), np.float32), "one row per image, 1"),
        ("scores", np.zeros((1, 3), np.float32), r"one shape \[N, K\]"),
        ("scores", np.array([["a", "b"]], object), "scores of float32"),
        ("valid", np.array(True), "one row per image"),
    ],
)
def test_an_answer_of_another_shape_is_a_mismatch(client, server, name, value, message):
    server.rewrite = lambda response: response.outputs[name].CopyFrom(to_proto(value))
    with pytest.raises(ModelMismatchError, match=message):
        client.classify(b"a")


# Which version, and metadata


@pytest.mark.parametrize(("choice", "version"), [({"version": 2}, 2), ({"version_label": "old"}, 1), ({}, 3)])
def test_the_version_asked_for_answers(server, choice, version):
    server.versions = {1: (30, 0, ""), 2: (30, 0, ""), 3: (30, 0, "")}
    server.labels = {"old": 1}
    with Client(server.target, "flowers", **choice) as client:
        assert client.classify(b"a").version == version
        assert client.metadata().version == version
        assert client.wait_until_ready(5) == version


def test_a_version_that_is_not_there(server):
    with (
        Client(server.target, "flowers", version=9) as client,
        pytest.raises(NotFoundError, match="flowers, 9"),
    ):
        client.classify(b"a")


def test_metadata_lists_signatures(client):
    found = client.metadata()
    assert (found.model, found.version) == ("flowers", 3)
    assert set(found.signatures) == {"serving_default", "features", "half_plus_two"}
    assert found.signatures["features"] == Signature(
        {"image_bytes": TensorSpec("string", (None,))},
        {"features": TensorSpec("float32", (None, 2)), "valid": TensorSpec("bool", (None,))},
    )


def test_status_lists_versions_latest_first(client, server):
    server.versions = {1: (50, 5, "gone"), 3: (30, 0, ""), 4: (20, 0, "")}
    assert client.status() == (
        VersionStatus(4, VersionState.LOADING, "OK", ""),
        VersionStatus(3, VersionState.AVAILABLE, "OK", ""),
        VersionStatus(1, VersionState.END, "NOT_FOUND", "gone"),
    )


def test_status_takes_states_and_codes_it_does_not_know(client, server):
    server.versions = {1: (35, 99, "new")}
    assert client.status() == (VersionStatus(1, VersionState.UNKNOWN, "99", "new"),)


def test_call_metadata_travels(server):
    with Client(server.target, "flowers", metadata={"authorization": "Bearer 7"}) as client:
        client.classify(b"a")
    assert ("authorization", "Bearer 7") in server.metadata


# Readiness


def test_wait_until_ready_waits_for_a_server_that_does_not_run_yet(start_server):
    first = start_server()
    first.stop()
    with Client(first.target, "flowers") as client, ThreadPoolExecutor(1) as pool:
        with pytest.raises(DeadlineExceededError, match=r"not ready within 0.3 s; last seen: UNAVAILABLE"):
            client.wait_until_ready(0.3)
        waiting = pool.submit(client.wait_until_ready, 20)
        start_server(first.port)
        assert waiting.result(20) == 3


def test_wait_until_ready_waits_for_the_version(server):
    server.versions = {3: (30, 0, ""), 4: (20, 0, "")}
    with Client(server.target, "flowers", version=4) as client, ThreadPoolExecutor(1) as pool:
        with pytest.raises(DeadlineExceededError, match=r"version 4, at .* last seen: version 4 is LOADING"):
            client.wait_until_ready(0.3)
        waiting = pool.submit(client.wait_until_ready, 20)
        server.versions = {3: (30, 0, ""), 4: (30, 0, "")}
        assert waiting.result(20) == 4


def test_wait_until_ready_says_why_a_version_failed(server, client):
    server.versions = {3: (50, 9, "saved_model.pb is broken")}
    with pytest.raises(DeadlineExceededError, match=r"version 3 is END \(FAILED_PRECONDITION: saved_model"):
        client.wait_until_ready(0.3)


def test_wait_until_ready_says_that_the_model_is_unknown(server, client):
    server.known = False
    with pytest.raises(DeadlineExceededError, match="Could not find any versions"):
        client.wait_until_ready(0.3)


def test_wait_until_ready_waits_for_the_label(server):
    with Client(server.target, "flowers", version_label="stable") as client:
        with pytest.raises(DeadlineExceededError, match=r"label 'stable', at .*Unrecognized"):
            client.wait_until_ready(0.3)
        server.labels = {"stable": 3}
        assert client.wait_until_ready(20) == 3


# Faults


def test_unavailable_is_retried(client, server):
    server.faults = [UNAVAILABLE] * 2
    assert client.classify(image(4)).label == "c4"
    assert len(server.requests) == 3


def test_unavailable_is_retried_among_many(server):
    server.faults = [UNAVAILABLE] * 3
    with Client(server.target, "flowers", max_batch_images=2, max_in_flight=1) as client:
        results = client.classify_many([image(n) for n in range(1, 9)])
    assert [result.label for result in results] == [f"c{n}" for n in range(1, 9)]
    assert len(server.requests) == 7


def test_attempts_are_bounded(server):
    server.faults = [UNAVAILABLE] * 10
    with Client(server.target, "flowers", retry=RetryPolicy(max_attempts=2)) as client:
        with pytest.raises(UnavailableError, match="after 2 attempts: going away"):
            client.classify(b"a")
        assert len(server.requests) == 2
        with pytest.raises(UnavailableError, match="after 2 attempts: going away"):
            client.classify_many([b"a"])
        assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
    ],
)
def test_other_errors_are_not_retried(client, server, code, error):
    server.faults = [(code, "no")]
    with pytest.raises(error, match="no"):
        client.classify(b"a")
    assert len(server.requests) == 1


def test_a_slow_server_meets_the_deadline(client, server):
    server.hold = threading.Event()
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError) as caught:
        client.classify(b"a", timeout_s=0.3)
    assert 0.25 < time.monotonic() - begin < 5
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_restarted_server_is_found_again(start_server):
    first = start_server()
    with (
        Client(first.target, "flowers", retry=RetryPolicy(max_attempts=1000), timeout_s=20) as client,
        Client(first.target, "flowers", retry=RetryPolicy(max_attempts=1)) as impatient,
        ThreadPoolExecutor(1) as pool,
    ):
        client.classify(b"a")
        first.stop()
        with pytest.raises(UnavailableError):
            impatient.classify(b"a")
        call = pool.submit(client.classify, b"a")
        start_server(first.port)
        assert call.result(20).label == "c1"


def test_a_request_in_flight_survives_a_restart(start_server):
    first = start_server()
    first.hold = threading.Event()
    with (
        Client(first.target, "flowers", retry=RetryPolicy(max_attempts=1000), timeout_s=20) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        one = pool.submit(client.classify, b"a")
        many = pool.submit(client.classify_many, [b"a", b"bb"])
        for _ in range(2):
            assert first.entered.acquire(timeout=20)
        first.stop()
        second = start_server(first.port)
        assert one.result(20).label == "c1"
        assert [result.label for result in many.result(20)] == ["c1", "c2"]
        assert len(second.requests) == 3


def test_many_threads_get_their_own_answers(client):
    lengths = list(range(1, 33)) * 8
    with ThreadPoolExecutor(32) as pool:
        labels = [result.label for result in pool.map(client.classify, map(image, lengths))]
        nested = list(pool.map(client.classify_many, [[image(n), b"bad"] for n in lengths]))
    assert labels == [f"c{n % 10}" for n in lengths]
    assert [first.label for first, _ in nested] == labels
    assert all(isinstance(second, InvalidImageError) for _, second in nested)


# The end


def test_a_closed_client_says_so(server):
    client = Client(server.target, "flowers")
    client.classify(b"a")
    client.close()
    client.close()
    for call in (
        lambda: client.classify(b"a"),
        lambda: client.classify_many([b"a"]),
        lambda: client.embed([b"a"]),
        lambda: client.predict({}),
        client.status,
        client.metadata,
        client.wait_until_ready,
    ):
        with pytest.raises(ClosedError, match="make a new one"):
            call()


def test_close_ends_calls_under_way(server):
    server.hold = threading.Event()
    client = Client(server.target, "flowers")
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.classify, b"a"), pool.submit(client.classify_many, [b"a"])]
        for _ in calls:
            assert server.entered.acquire(timeout=20)
        client.close()
        for call in calls:
            with pytest.raises(ClosedError):
                call.result(20)


@pytest.mark.parametrize("call", ["classify(b'a')", "classify_many([b'a', b'b'])"])
def test_ctrl_c_ends_a_call(server, call):
    server.hold = threading.Event()
    # Where the tests run in the background the signal is ignored, and children inherit that.
    code = f"""
import signal
from graftserve.client import Client
signal.signal(signal.SIGINT, signal.default_int_handler)
with Client({server.target!r}, "flowers", timeout_s=1000) as client:
    client.{call}
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert server.entered.acquire(timeout=60)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")


def test_a_failing_batch_ends_the_call(server):
    server.faults = [(grpc.StatusCode.INTERNAL, "broken")]
    with Client(server.target, "flowers", max_batch_images=1, max_in_flight=1) as client:
        with pytest.raises(InternalError, match="broken"):
            client.classify_many([image(n) for n in range(1, 9)])
        assert len(server.requests) <= 2  # the next may have left before the call heard of it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": ""}, "target"),
        ({"model": ""}, "model"),
        ({"version": 1, "version_label": "a"}, "got both"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"max_batch_images": 0}, "max_batch_images"),
        ({"max_batch_bytes": 0}, "max_batch_bytes"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_delay_s": -1}, "max_delay_s"),
        ({"target_latency_s": 0}, "target_latency_s"),
        ({"max_queued_images": 0}, "max_queued_images"),
        ({"target": []}, "target"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Client(**{"target": "localhost:1", "model": "m", **arguments})


def test_timeout_of_a_call_is_checked(client):
    with pytest.raises(ValueError, match="timeout_s above 0"):
        client.classify(b"a", timeout_s=-1)
