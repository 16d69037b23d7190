"""The fake server that others test against."""

import doctest
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from graftserve.client import (
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
    NotFoundError,
    OverloadedError,
    RetryPolicy,
    TensorSpec,
    UnavailableError,
    VersionState,
    VersionStatus,
    testing,
)
from graftserve.client.testing import FakeModel, FakeServer, FakeSignature, StatusError
from graftserve.client.wire import ModelSpec, PredictRequest, PredictResponse
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.tensors import to_proto


@pytest.fixture
def fake():
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(fake):
    with Client(fake.target, "flowers", timeout_s=20) as client:
        yield client


def test_the_examples_in_its_documentation_run():
    results = doctest.testmod(testing)
    assert results.attempted > 5
    assert not results.failed


def test_it_needs_no_tensorflow():
    code = """
import sys
from graftserve.client import Client
from graftserve.client.testing import FakeServer
with FakeServer() as server, Client(server.target, "flowers") as client:
    client.classify(b"a")
print([name for name in ("tensorflow", "keras", "PIL", "scipy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


# Answers


def test_without_setup_an_answer_depends_on_the_bytes_alone(fake, client):
    images = [f"image {number}".encode() for number in range(50)]
    first = client.classify_many(images)
    assert {prediction.label for prediction in first} == set(fake.model.classes)
    for prediction in first:
        assert prediction.version == 1
        assert len(prediction.top) == 5
        assert prediction.score == prediction.top[0][1] >= 0.5
        assert sum(score for _, score in prediction.top) == pytest.approx(1, abs=1e-6)
    vectors = client.embed(images)
    assert vectors.shape == (50, 8)
    assert len(np.unique(vectors, axis=0)) == 50
    with FakeServer() as other, Client(other.target, "flowers") as another:
        assert another.classify_many(images) == first
        np.testing.assert_array_equal(another.embed(images), vectors)


def test_answers_by_a_function():
    def answer(image):
        return {b"rose": "rose", b"both": {"tulip": 0.25, "rose": 0.75}, b"text": None}[image]

    model = FakeModel("garden", classes=("tulip", "rose", "daisy"), answer=answer, top=2)
    with FakeServer(model) as server, Client(server.target, "garden") as client:
        rose, both, text = client.classify_many([b"rose", b"both", b"text"])
        assert rose.top == (("rose", 1.0), ("tulip", 0.0))
        assert both.top == (("rose", 0.75), ("tulip", 0.25))
        assert isinstance(text, InvalidImageError)
        result = client.predict({"image_bytes": [b"both", b"text"]}, outputs=["probabilities", "valid"])
        np.testing.assert_array_equal(result["probabilities"], [[0.25, 0.75, 0], [0, 0, 0]])
        np.testing.assert_array_equal(result["valid"], [True, False])
        with pytest.raises(InvalidImageError) as caught:
            client.embed([b"rose", b"text"])
        assert caught.value.indexes == (1,)


def test_answers_by_a_mapping_with_exceptions_among_them():
    answers = {
        b"rose": "rose",
        b"text": InvalidImageError("no image"),
        b"full": StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
    }
    with FakeServer("flowers", answer=answers) as server, Client(server.target, "flowers") as client:
        assert client.classify(b"rose").label == "rose"
        with pytest.raises(InvalidImageError):
            client.classify(b"text")
        with pytest.raises(OverloadedError, match="full"):
            client.classify(b"full")
        with pytest.raises(InvalidArgumentError, match="no answer for 5 bytes: b'other'"):
            client.classify(b"other")
        server.model.answer = lambda image: "daisy"
        assert client.classify(b"other").label == "daisy"


def test_an_answer_may_raise():
    def answer(image):
        if image == b"text":
            raise InvalidImageError("no image")
        raise StatusError(grpc.StatusCode.INTERNAL, "out of luck")

    with FakeServer(answer=answer) as server, Client(server.target, "flowers") as client:
        with pytest.raises(InvalidImageError):
            client.classify(b"text")
        with pytest.raises(InternalError, match="out of luck"):
            client.classify(b"other")


def test_several_models():
    with FakeServer(
        "first", FakeModel("second", answer=lambda image: "two"), answer=lambda image: "one"
    ) as server:
        for name, label in (("first", "one"), ("second", "two")):
            with Client(server.target, name) as client:
                assert client.classify(b"a").label == label
        with Client(server.target, "third") as client, pytest.raises(NotFoundError, match=r"Latest\(third\)"):
            client.classify(b"a")


# Signatures


def test_signatures_of_any_kind(fake, client):
    fake.model.signatures["stats"] = FakeSignature(
        {"values": TensorSpec("float32", (None, 3)), "names": TensorSpec("string", (None,))},
        {
            "mean": TensorSpec("float64", (None,)),
            "counts": TensorSpec("int64", None),
            "tagged": TensorSpec("string", (None,)),
        },
        lambda inputs: {
            "mean": inputs["values"].mean(axis=1),
            "counts": [[1, 2], [3, 4]],
            "tagged": [name + b"!" for name in inputs["names"]],
        },
    )
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = client.predict({"values": values, "names": ["a", "b"]}, signature="stats")
    assert result["mean"].dtype == np.float64
    np.testing.assert_array_equal(result["mean"], [1, 4])
    assert result["counts"].dtype == np.int64
    assert result["tagged"].tolist() == [b"a!", b"b!"]
    assert set(
        client.predict({"values": values, "names": ["a", "b"]}, signature="stats", outputs=["mean"])
    ) == {"mean"}
    declared = client.metadata().signatures["stats"]
    assert declared.inputs == fake.model.signatures["stats"].inputs
    assert declared.outputs == fake.model.signatures["stats"].outputs
    for inputs, message in (
        ({"values": values}, "Missing but required: {'names'}"),
        ({"values": values.astype(np.float64), "names": ["a", "b"]}, "values"),
        ({"values": values, "names": ["a", "b"], "more": values}, "more"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            client.predict(inputs, signature="stats")


def test_signatures_can_be_taken_away(fake, client):
    del fake.model.signatures["features"]
    assert set(client.metadata().signatures) == {"serving_default"}
    with pytest.raises(FailedPreconditionError, match="features"):
        client.predict({"image_bytes": [b"a"]}, signature="features")


# Faults


def test_faults_come_in_the_order_that_they_were_ordered(fake):
    fake.fail(grpc.StatusCode.INTERNAL, "one", times=2)
    fake.fail(grpc.StatusCode.NOT_FOUND, "two")
    with Client(fake.target, "flowers", retry=RetryPolicy(max_attempts=1)) as client:
        for error, message in ((InternalError, "one"), (InternalError, "one"), (NotFoundError, "two")):
            with pytest.raises(error, match=message):
                client.classify(b"a")
        assert client.classify(b"a").version == 1


def test_every_third_request_fails_until_healed(fake):
    fake.fail(grpc.StatusCode.INTERNAL, every=3, times=None)

    def works(client):
        try:
            client.classify(b"a")
        except InternalError:
            return False
        return True

    with Client(fake.target, "flowers", retry=RetryPolicy(max_attempts=1)) as client:
        assert [works(client) for _ in range(7)] == [True, True, False, True, True, False, True]
        fake.heal()
        assert all(works(client) for _ in range(4))


def test_a_pushback_travels_with_the_fault(fake):
    fake.fail(grpc.StatusCode.UNAVAILABLE, retry_pushback_ms=1234)
    with grpc.insecure_channel(fake.target) as channel:
        predict = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        with pytest.raises(grpc.RpcError) as caught:
            predict(b"", timeout=20)
    assert ("grpc-retry-pushback-ms", "1234") in caught.value.trailing_metadata()


def test_a_negative_pushback_ends_the_retries(fake, client):
    fake.fail(grpc.StatusCode.UNAVAILABLE, retry_pushback_ms=-1)
    with pytest.raises(UnavailableError):
        client.classify(b"a")
    assert len(fake.images) == 1


@pytest.mark.parametrize(("method", "ask"), [("GetModelStatus", "status"), ("GetModelMetadata", "metadata")])
def test_faults_of_other_methods(fake, client, method, ask):
    fake.fail(grpc.StatusCode.INTERNAL, "no", method=method)
    client.classify(b"a")
    with pytest.raises(InternalError):
        getattr(client, ask)()
    getattr(client, ask)()


@pytest.mark.parametrize("options", [{"times": 0}, {"every": 0}, {"method": "Classify"}])
def test_orders_out_of_range(fake, options):
    with pytest.raises(ValueError, match="expected"):
        fake.fail(grpc.StatusCode.INTERNAL, **options)


# Time


@pytest.mark.parametrize(
    "latency",
    [
        {"latency_s": 0.2},
        {"latency_per_image_s": 0.1},
        {"latency_s": lambda images: 0.2 if b"slow" in images else 0},
    ],
)
def test_an_answer_takes_the_latency_at_least(latency):
    with FakeServer(**latency) as server, Client(server.target, "flowers") as client:
        begin = time.monotonic()
        client.predict({"image_bytes": [b"slow", b"a"]})
        assert time.monotonic() - begin >= 0.2


def test_latency_ends_with_the_call():
    # `stop` waits for the threads: it would not return.
    with FakeServer(latency_s=1000) as server, Client(server.target, "flowers") as client:  # noqa: SIM117
        with pytest.raises(DeadlineExceededError):
            client.classify(b"a", timeout_s=0.2)


def test_holding_shows_how_many_are_under_way(fake):
    request = PredictRequest(model_spec=ModelSpec(name="flowers"))
    request.inputs["image_bytes"].CopyFrom(to_proto([b"a"]))
    with grpc.insecure_channel(fake.target) as channel:
        predict = channel.unary_unary(
            PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString
        )
        with fake.holding():
            calls = [predict.future(request, timeout=60) for _ in range(5)]
            fake.wait_for_predicts(5)
            assert not any(call.done() for call in calls)
        assert all(call.result().outputs["valid"].ByteSize() for call in calls)
        predict(request, timeout=60)
    assert fake.most_active == 5


def test_held_predicts_go_when_the_event_is_set(fake, client):
    with fake.holding() as event, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.classify, b"a")
        fake.wait_for_predicts(1)
        event.set()
        assert call.result(20).version == 1


def test_waiting_for_predicts_has_an_end(fake, client):
    client.classify(b"a")
    fake.wait_for_predicts(1, timeout_s=0)
    with pytest.raises(TimeoutError, match=r"expected 2 Predicts within 0\.05 s, got 1"):
        fake.wait_for_predicts(2, timeout_s=0.05)


# Versions


def test_versions_come_and_go(fake, client):
    fake.model.set_version(2, VersionState.LOADING)
    assert client.classify(b"a").version == 1
    fake.model.set_version(2)
    assert client.classify(b"a").version == 2
    fake.model.set_version(2, VersionState.END, error_code="INTERNAL", error_message="broken")
    assert client.classify(b"a").version == 1
    assert client.status() == (
        VersionStatus(2, VersionState.END, "INTERNAL", "broken"),
        VersionStatus(1, VersionState.AVAILABLE, "OK", ""),
    )
    fake.model.versions.clear()
    for call in (client.status, client.metadata, lambda: client.classify(b"a")):
        with pytest.raises(NotFoundError):
            call()


def test_a_client_waits_for_a_version(fake):
    fake.model.set_version(7, VersionState.LOADING)
    with Client(fake.target, "flowers", version=7) as client, ThreadPoolExecutor(1) as pool:
        with pytest.raises(NotFoundError, match=r"Specific\(flowers, 7\)"):
            client.classify(b"a")
        waiting = pool.submit(client.wait_until_ready, 20)
        fake.model.set_version(7)
        assert waiting.result(20) == 7


def test_labels_choose_versions(fake):
    fake.model.set_version(2)
    with Client(fake.target, "flowers", version_label="stable") as client:
        with pytest.raises(InvalidArgumentError, match="Unrecognized servable version label: stable"):
            client.classify(b"a")
        fake.model.labels["stable"] = 1
        assert client.classify(b"a").version == 1


# What is recorded


def test_calls_are_recorded(fake):
    with Client(fake.target, "flowers", metadata={"authorization": "Bearer 7"}) as client:
        client.predict({"image_bytes": [b"a", b"b"]}, timeout_s=20)
        client.classify(b"c", timeout_s=20)
        client.status()
        client.metadata()
    assert [call.method for call in fake.calls] == [
        "Predict",
        "Predict",
        "GetModelStatus",
        "GetModelMetadata",
    ]
    assert fake.batches == [[b"a", b"b"], [b"c"]]
    assert fake.images == [b"a", b"b", b"c"]
    for call in fake.calls[:2]:
        assert ("authorization", "Bearer 7") in call.metadata
        assert 15 < call.timeout_s < 21  # gRPC rounds deadlines up on the wire
        assert call.request.model_spec.name == "flowers"
    fake.clear()
    assert not fake.calls


def test_an_answer_can_be_rewritten(fake, client):
    fake.rewrite = lambda response: response.outputs["scores"].Clear()
    with pytest.raises(ModelMismatchError, match="scores"):
        client.classify(b"a")


# Coming and going


def test_it_comes_back_on_the_same_port(fake):
    with (
        Client(fake.target, "flowers", timeout_s=20, retry=RetryPolicy(max_attempts=1000)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        before = client.classify(b"a")
        target = fake.target
        for _ in range(3):
            fake.stop()
            fake.stop()
            with (
                Client(target, "flowers", retry=RetryPolicy(max_attempts=1)) as impatient,
                pytest.raises(UnavailableError),
            ):
                impatient.classify(b"a")
            call = pool.submit(client.classify, b"a")
            fake.start()
            assert call.result(20) == before
        assert fake.target == target
        assert len(fake.images) == 4


def test_it_is_started_once(fake):
    with pytest.raises(RuntimeError, match="listens at"):
        fake.start()


def test_a_taken_port_is_an_error(fake):
    with pytest.raises(RuntimeError):
        FakeServer(port=fake.port).start()


def test_stopping_breaks_held_calls_off(fake):
    with (
        Client(fake.target, "flowers", retry=RetryPolicy(max_attempts=1)) as client,
        ThreadPoolExecutor(1) as pool,
        fake.holding(),
    ):
        call = pool.submit(client.classify, b"a")
        fake.wait_for_predicts(1)
        fake.stop()
        with pytest.raises(UnavailableError):
            call.result(20)


def test_servers_at_several_addresses_share_a_port():
    with (
        FakeServer(answer=lambda image: "one") as one,
        FakeServer(answer=lambda image: "two", host="127.0.0.2", port=one.port) as two,
    ):
        for server, label in ((one, "one"), (two, "two")):
            with Client(server.target, "flowers") as client:
                assert client.classify(b"a").label == label


def test_tls():
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    credentials = grpc.ssl_server_credentials(
        [(certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())]
    )
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with FakeServer(credentials=credentials) as server:
        target = f"localhost:{server.port}"
        with Client(target, "flowers", credentials=trusted) as client:
            assert client.classify(b"a").version == 1
        with (
            Client(target, "flowers", retry=RetryPolicy(max_attempts=1)) as client,
            pytest.raises(UnavailableError),
        ):
            client.classify(b"a")


# Health


def health_of(stub, service):
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status


def test_health_follows_the_models(fake):
    status = health_pb2.HealthCheckResponse
    long_name = "m" * 300
    fake.models[long_name] = FakeModel(long_name)
    with grpc.insecure_channel(fake.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (
            health_of(stub, "") == health_of(stub, "flowers") == health_of(stub, long_name) == status.SERVING
        )
        fake.model.set_version(1, VersionState.END)
        fake.serving = False
        assert health_of(stub, "") == health_of(stub, "flowers") == status.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health_of(stub, "other")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_can_be_watched(fake):
    status = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(fake.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(service="flowers"), timeout=20)
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=20)
        assert next(watched).status == status.SERVING
        assert next(unknown).status == status.SERVICE_UNKNOWN
        fake.model.set_version(1, VersionState.UNLOADING)
        assert next(watched).status == status.NOT_SERVING
        fake.models["other"] = FakeModel("other")
        assert next(unknown).status == status.SERVING
        watched.cancel()


def test_a_client_that_checks_health_leaves_a_server_alone_that_is_not_serving(fake):
    fake.serving = False
    with Client(fake.target, "flowers", health_check="", retry=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            client.classify(b"a", timeout_s=1)
        assert not fake.images
        fake.serving = True
        client.wait_until_ready(20)
        assert client.classify(b"a").version == 1
