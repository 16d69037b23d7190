"""Traces and metrics of clients, as OpenTelemetry's SDK gets them."""

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from graftserve.client import (
    AsyncClient,
    Client,
    InternalError,
    InvalidImageError,
    ModelMismatchError,
    RetryPolicy,
    UnavailableError,
)
from graftserve.client.hooks import CallEnd, CallStart, RequestEnd, RequestStart
from graftserve.client.opentelemetry import OpenTelemetryHooks, _server
from graftserve.client.wire.tensors import to_proto
from tests.client.async_in_thread import AsyncInThread

PREDICT = "tensorflow.serving.PredictionService/Predict"


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


class Telemetry:
    """An SDK that keeps what it gets."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])
        self.hooks = OpenTelemetryHooks(self.tracers, self.meters)
        self.tracer = self.tracers.get_tracer("test")

    def ended(self):
        """All spans that have ended so far."""
        return self._exporter.get_finished_spans()

    def spans(self, count):
        """The same in the order of their start, once there are so many."""
        until(lambda: len(self.ended()) >= count)
        spans = sorted(self.ended(), key=lambda span: span.start_time)
        assert len(spans) == count
        return spans

    def metrics(self):
        """Points by name and attributes."""
        data = self._reader.get_metrics_data()
        return {
            (metric.name, frozenset(point.attributes.items())): point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }

    def point(self, name, **attributes):
        """The only one of that name with these attributes; in their names, _ stands for a dot."""
        wanted = {(key.replace("_", "."), value) for key, value in attributes.items()}
        (point,) = [
            point
            for (found, labels), point in self.metrics().items()
            if found == name and wanted <= {(key.replace("_", "."), value) for key, value in labels}
        ]
        return point


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    yield telemetry
    telemetry.tracers.shutdown()
    telemetry.meters.shutdown()


@pytest.fixture
def client(server, telemetry):
    with Client(server.target, "flowers", timeout_s=20, hooks=telemetry.hooks) as client:
        yield client


def in_span(client, tracer, name):
    """client.classify within a span, for a thread of its own."""

    def call(content):
        with tracer.start_as_current_span(name):
            return client.classify(content)

    return call


def sent_context(server):
    """Trace, span and whether they are sampled, as the server got them."""
    _, trace_id, span_id, flags = dict(server.metadata)["traceparent"].split("-")
    return int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & TraceFlags.SAMPLED)


def link_ids(span):
    return [link.context.span_id for link in span.links]


# Traces


def test_a_call_and_its_request(client, server, telemetry):
    client.classify(image(7))
    call, request = telemetry.spans(2)
    assert (call.name, call.kind, call.parent) == ("classify flowers", SpanKind.INTERNAL, None)
    assert dict(call.attributes) == {
        "graftserve.client.method": "classify",
        "graftserve.model.name": "flowers",
    }
    assert (request.name, request.kind) == (PREDICT, SpanKind.CLIENT)
    assert request.parent.span_id == call.context.span_id
    assert request.context.trace_id == call.context.trace_id
    found = dict(request.attributes)
    assert 0 <= found.pop("graftserve.queue_seconds") < 10
    assert found == {
        "rpc.system.name": "grpc",
        "rpc.method": PREDICT,
        "rpc.status_code": "OK",
        "server.address": "127.0.0.1",
        "server.port": server.port,
        "graftserve.model.name": "flowers",
        "graftserve.model.signature": "serving_default",
        "graftserve.model.version": 3,
        "graftserve.rows": 1,
        "graftserve.request.bytes": 7,
        "graftserve.request.attempt": 1,
        "graftserve.request.hedge": False,
    }
    assert {span.status.status_code for span in (call, request)} == {StatusCode.UNSET}
    assert call.start_time <= request.start_time < request.end_time <= call.end_time
    assert sent_context(server) == (request.context.trace_id, request.context.span_id, True)
    assert request.instrumentation_scope.name == "graftserve.client"


def test_conventions_are_spelled_as_opentelemetry_does(client, telemetry):
    from opentelemetry.semconv._incubating.attributes import rpc_attributes
    from opentelemetry.semconv._incubating.metrics import rpc_metrics
    from opentelemetry.semconv.attributes import server_attributes

    client.classify(image(7))
    _, request = telemetry.spans(2)
    assert {
        rpc_attributes.RPC_SYSTEM_NAME,
        rpc_attributes.RPC_METHOD,
        server_attributes.SERVER_ADDRESS,
        server_attributes.SERVER_PORT,
    } <= set(request.attributes)
    assert rpc_metrics.RPC_CLIENT_CALL_DURATION in {name for name, _ in telemetry.metrics()}


def test_a_call_is_in_its_callers_trace(client, telemetry):
    with telemetry.tracer.start_as_current_span("outer"):
        client.classify(image(1))
    outer, call, request = telemetry.spans(3)
    assert outer.name == "outer"
    assert call.parent.span_id == outer.context.span_id
    assert request.parent.span_id == call.context.span_id
    assert len({span.context.trace_id for span in (outer, call, request)}) == 1


def test_a_request_that_another_thread_sends_is_in_the_callers_trace(server, telemetry):
    # The second call's request goes out when the first is answered, from gRPC's thread or that call's task.
    with (
        Client(server.target, "flowers", max_in_flight=1, timeout_s=20, hooks=telemetry.hooks) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        server.hold = threading.Event()
        first = pool.submit(in_span(client, telemetry.tracer, "first"), image(1))
        assert server.entered.acquire(timeout=20)
        second = pool.submit(in_span(client, telemetry.tracer, "second"), image(22))
        until(lambda: client.stats().queued == 1)
        server.hold.set()
        first.result(), second.result()
    spans = telemetry.spans(6)
    outer = {span.name: span.context.trace_id for span in spans if span.name in ("first", "second")}
    requests = {
        span.attributes["graftserve.request.bytes"]: span.context.trace_id
        for span in spans
        if span.kind is SpanKind.CLIENT
    }
    assert requests == {1: outer["first"], 22: outer["second"]}


def test_tasks_at_the_same_time_keep_to_their_traces(server, telemetry):
    async def main():
        async with AsyncClient(server.target, "flowers", hooks=telemetry.hooks) as client:

            async def call(n):
                with telemetry.tracer.start_as_current_span(f"outer {n}"):
                    await client.classify(image(n))

            await asyncio.gather(*map(call, range(1, 9)))

    asyncio.run(main())
    until(lambda: sum(span.name.startswith("outer") for span in telemetry.ended()) == 8)
    spans = telemetry.ended()
    outer = {span.context.span_id: span.context.trace_id for span in spans if span.name.startswith("outer")}
    calls = [span for span in spans if span.kind is SpanKind.INTERNAL and span.name == "classify flowers"]
    assert {call.parent.span_id: call.context.trace_id for call in calls} == outer


def test_a_shared_request_has_one_parent_and_links_to_the_others(server, telemetry):
    with (
        Client(server.target, "flowers", max_in_flight=1, timeout_s=20, hooks=telemetry.hooks) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        server.hold = threading.Event()
        busy = pool.submit(client.classify, image(9))
        assert server.entered.acquire(timeout=20)
        calls = []
        for n in (1, 2, 3):
            calls.append(pool.submit(client.classify, image(n)))
            until(lambda n=n: client.stats().queued == n)
        server.hold.set()
        for call in (busy, *calls):
            call.result()
    spans = telemetry.spans(6)
    first, *others = [span for span in spans if span.name == "classify flowers"][1:]
    (shared,) = [span for span in spans if span.attributes.get("graftserve.rows") == 3]
    assert shared.parent.span_id == first.context.span_id
    assert link_ids(shared) == [other.context.span_id for other in others]
    assert link_ids(first) == []
    # And back, so that it is found from each of their traces.
    assert [link_ids(other) for other in others] == [[shared.context.span_id]] * 2


def test_a_shared_request_goes_below_a_caller_that_is_sampled(server, telemetry):
    # Otherwise the one that is watched would see nothing of its request.
    unsampled = NonRecordingSpan(SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(0)))

    def call(content, span=None):
        token = context.attach(trace.set_span_in_context(span)) if span else None
        try:
            return client.classify(content)
        finally:
            if token:
                context.detach(token)

    with (
        Client(server.target, "flowers", max_in_flight=1, timeout_s=20, hooks=telemetry.hooks) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        server.hold = threading.Event()
        busy = pool.submit(call, image(9), unsampled)
        assert server.entered.acquire(timeout=20)
        hidden = pool.submit(call, image(1), unsampled)
        until(lambda: client.stats().queued == 1)
        seen = pool.submit(call, image(2))
        until(lambda: client.stats().queued == 2)
        server.hold.set()
        for future in (busy, hidden, seen):
            future.result()
    caller, request = telemetry.spans(2)
    assert request.parent.span_id == caller.context.span_id
    assert [link.context.trace_id for link in request.links] == [1]
    assert sent_context(server)[2]


def test_a_caller_that_is_not_sampled_stays_so(server, telemetry):
    tracers = TracerProvider(sampler=ALWAYS_OFF)
    with Client(server.target, "flowers", hooks=OpenTelemetryHooks(tracers, telemetry.meters)) as client:
        client.classify(image(1))
    assert not sent_context(server)[2]
    assert telemetry.spans(0) == []


def test_retries_are_siblings(client, server, telemetry):
    server.faults = [(grpc.StatusCode.UNAVAILABLE, "going away")]
    client.classify(image(1))
    call, lost, answered = telemetry.spans(3)
    assert lost.parent.span_id == answered.parent.span_id == call.context.span_id
    assert [span.attributes["graftserve.request.attempt"] for span in (lost, answered)] == [1, 2]
    assert (lost.status.status_code, lost.status.description) == (StatusCode.ERROR, "going away")
    assert lost.attributes["error.type"] == lost.attributes["rpc.status_code"] == "UNAVAILABLE"
    assert "graftserve.model.version" not in lost.attributes
    # Handled: the call is none the worse.
    assert call.status.status_code == answered.status.status_code == StatusCode.UNSET


def test_the_copy_that_lost_is_no_error(server, telemetry):
    with Client(server.target, "flowers", retry=RetryPolicy(hedge=True), hooks=telemetry.hooks) as client:
        for _ in range(10):
            client.classify(image(1))
        hold = server.hold_next = threading.Event()
        client.classify(image(22))
        hold.set()
    until(lambda: not telemetry.hooks._spans)
    copies = sorted(
        (span for span in telemetry.ended() if span.attributes.get("graftserve.request.bytes") == 22),
        key=lambda span: span.start_time,
    )
    hedges = [span.attributes["graftserve.request.hedge"] for span in copies]
    assert hedges == [False] + [True] * (len(copies) - 1)
    assert {span.attributes["rpc.status_code"] for span in copies} == {"OK", "CANCELLED"}
    for span in copies:
        cancelled = span.attributes["rpc.status_code"] == "CANCELLED"
        assert span.attributes.get("graftserve.request.abandoned", False) == cancelled
        assert span.status.status_code is StatusCode.UNSET
        assert "error.type" not in span.attributes


def test_a_failing_call(client, server, telemetry):
    server.faults = [(grpc.StatusCode.INTERNAL, "out of order")]
    with pytest.raises(InternalError) as failed:
        client.classify(image(1))
    call, request = telemetry.spans(2)
    assert (request.status.status_code, request.status.description) == (StatusCode.ERROR, "out of order")
    assert request.attributes["error.type"] == "INTERNAL"
    assert (call.status.status_code, call.status.description) == (StatusCode.ERROR, str(failed.value))
    assert call.attributes["error.type"] == "InternalError"


def test_an_answer_that_makes_no_sense(client, server, telemetry):
    import numpy as np

    scores = to_proto(np.zeros((7, 2), np.float32))
    server.rewrite = lambda response: response.outputs["scores"].CopyFrom(scores)
    with pytest.raises(ModelMismatchError):
        client.classify(image(1))
    _, request = telemetry.spans(2)
    assert request.attributes["rpc.status_code"] == "OK"
    assert request.attributes["error.type"] == "ModelMismatchError"
    assert request.status.status_code is StatusCode.ERROR


def test_bad_images(client, telemetry, tmp_path):
    with pytest.raises(InvalidImageError):
        client.classify(b"bad")
    with pytest.raises(InvalidImageError):
        client.classify(tmp_path / "missing.jpg")
    decoded, request, unread = telemetry.spans(3)
    assert request.attributes["graftserve.rows.invalid"] == 1
    assert request.status.status_code is StatusCode.UNSET
    assert decoded.attributes["error.type"] == unread.attributes["error.type"] == "InvalidImageError"
    assert "missing.jpg" in unread.status.description


def test_what_the_callers_own_code_raises(client, telemetry):
    def images():
        yield image(1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        client.classify_many(images())
    call = next(span for span in telemetry.spans(1) if span.name == "classify_many flowers")
    assert call.attributes["error.type"] == "OSError"
    assert telemetry.point("graftserve.client.call.duration", error_type="(other)").count == 1


def test_a_cancelled_call(server, telemetry):
    async def main():
        async with AsyncClient(server.target, "flowers", timeout_s=20, hooks=telemetry.hooks) as client:
            server.hold = threading.Event()
            call = asyncio.create_task(client.classify(image(1)))
            await asyncio.to_thread(server.entered.acquire, timeout=20)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.hold.set()

    asyncio.run(main())
    call, request = telemetry.spans(2)
    assert (call.status.status_code, call.attributes["error.type"]) == (StatusCode.ERROR, "cancelled")
    assert request.attributes["graftserve.request.abandoned"] is True


def test_spans_do_not_pile_up(client, telemetry):
    for _ in range(5):
        client.classify(image(1))
    with pytest.raises(InvalidImageError):
        client.classify(b"bad")
    telemetry.spans(12)
    assert telemetry.hooks._spans == {}


def test_the_global_propagator_is_used(server, telemetry, monkeypatch):
    class Propagator:
        fields = frozenset({"X-Trace"})

        def extract(self, carrier, context=None, getter=None):
            return context

        def inject(self, carrier, context=None, setter=None):
            carrier["X-Trace"] = str(trace.get_current_span(context).get_span_context().span_id)
            carrier["baggage"] = str(baggage.get_baggage("tenant", context))

    before = propagate.get_global_textmap()
    propagate.set_global_textmap(Propagator())
    try:
        with Client(server.target, "flowers", hooks=telemetry.hooks) as client:
            client.classify(image(1))
    finally:
        propagate.set_global_textmap(before)
    _, request = telemetry.spans(2)
    assert dict(server.metadata)["x-trace"] == str(request.context.span_id)


def test_callers_metadata_goes_along(server, telemetry):
    with Client(server.target, "flowers", hooks=telemetry.hooks) as client:
        client.classify(image(1), metadata={"x-tenant": "a"})
    assert {"x-tenant", "traceparent"} <= set(dict(server.metadata))


@pytest.mark.parametrize(
    ("target", "address", "port"),
    [
        ("localhost:8500", "localhost", 8500),
        ("localhost", "localhost", None),
        ("dns:///models.svc:8500", "models.svc", 8500),
        ("dns://10.0.0.1/models.svc:8500", "models.svc", 8500),
        ("dns:models.svc", "models.svc", None),
        ("ipv4:10.0.0.1:8500", "10.0.0.1", 8500),
        ("ipv4:10.0.0.1:8500,10.0.0.2:8500", "ipv4:10.0.0.1:8500,10.0.0.2:8500", None),
        ("ipv6:[2001:db8::1]:8500", "2001:db8::1", 8500),
        ("[::1]:8500", "::1", 8500),
        ("::1", "::1", None),
        ("unix:/run/model.sock", "/run/model.sock", None),
        ("unix:///run/model.sock", "/run/model.sock", None),
        ("unix-abstract:model", "model", None),
        ("xds:///models", "xds:///models", None),
    ],
)
def test_targets_as_the_conventions_describe_them(target, address, port):
    assert _server(target) == {"server.address": address} | ({"server.port": port} if port else {})


# Metrics


def test_metrics_of_calls_and_requests(client, server, telemetry):
    server.faults = [(grpc.StatusCode.UNAVAILABLE, "going away")]
    client.classify(image(1))
    client.classify_many([image(1), b"bad", image(2)])
    client.status()
    telemetry.spans(3 + len(server.batches) - 1 + 2)
    point = telemetry.point
    call = point("graftserve.client.call.duration", graftserve_client_method="classify")
    assert (call.count, call.explicit_bounds[0], call.explicit_bounds[-1]) == (1, 0.001, 60.0)
    rpc = {"rpc_method": PREDICT, "server_address": "127.0.0.1", "server_port": server.port}
    lost = point("rpc.client.call.duration", rpc_status_code="UNAVAILABLE", **rpc)
    assert (lost.count, lost.attributes["error.type"]) == (1, "UNAVAILABLE")
    assert lost.explicit_bounds == (
        *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    )
    answered = point("rpc.client.call.duration", rpc_status_code="OK", **rpc)
    assert answered.count == len(server.batches) - 1
    assert "error.type" not in answered.attributes
    assert point("graftserve.client.retries", graftserve_model_name="flowers").value == 1
    assert point("graftserve.client.request.rows").sum == 5
    assert point("graftserve.client.queue.duration").count == len(server.batches) - 1
    rows = {"graftserve_model_name": "flowers", "graftserve_model_version": 3}
    assert point("graftserve.client.rows", graftserve_rows_valid=True, **rows).value == 3
    assert point("graftserve.client.rows", graftserve_rows_valid=False, **rows).value == 1
    assert point("graftserve.client.active_requests").value == 0


def test_the_duration_of_a_failed_call_has_its_error(client, server, telemetry):
    with pytest.raises(InvalidImageError):
        client.classify(b"bad")
    failed = telemetry.point("graftserve.client.call.duration", error_type="InvalidImageError")
    assert failed.count == 1


def test_versions_are_told_apart(client, server, telemetry):
    client.classify(image(1))
    server.versions[4] = (30, 0, "")
    client.classify_many([image(1)] * 3)
    assert telemetry.point("graftserve.client.rows", graftserve_model_version=3).value == 1
    assert telemetry.point("graftserve.client.rows", graftserve_model_version=4).value == 3


def test_targets_and_models_without_end_make_no_series_without_end(telemetry):
    hooks = telemetry.hooks

    def pretend(n):
        call = CallStart("classify", f"model {n}")
        caller = hooks.call_started(call)
        request = RequestStart(
            *(f"host:{n}", call.model, f"/{PREDICT}", f"{n}", 1, 1, 1, False, False, 0.0, (caller,))
        )
        hooks.request_started(request)
        hooks.request_ended(request, RequestEnd("OK", 0.1, n))
        hooks.call_ended(caller, call, CallEnd(0.1, None))

    for n in range(200):
        pretend(n)
    before = telemetry.metrics()
    for n in range(200, 600):
        pretend(n)
    after = telemetry.metrics()
    assert after.keys() == before.keys()
    for name in ("rpc.client.call.duration", "graftserve.client.call.duration"):
        assert sum(point.count for (found, _), point in after.items() if found == name) == 600
    # The spans say what is what.
    assert len({span.attributes.get("server.port") for span in telemetry.spans(1200)} - {None}) == 600


def test_hooks_of_one_provider_do_not_count_twice(server, telemetry):
    second = OpenTelemetryHooks(telemetry.tracers, telemetry.meters)
    with (
        Client(server.target, "flowers", hooks=telemetry.hooks) as one,
        Client(server.target, "flowers", hooks=second) as two,
    ):
        for hooks, client in ((telemetry.hooks, one), (second, two)):
            hooks.watch(getattr(client, "_client", client))
            client.classify(image(1))
        assert telemetry.point("graftserve.client.call.duration").count == 2
        limit = one.stats().max_in_flight + two.stats().max_in_flight
        assert telemetry.point("graftserve.client.batches.limit").value == limit


def test_a_clients_queue_and_circuits(server, telemetry):
    with (
        Client(server.target, "flowers", max_in_flight=1, timeout_s=20, hooks=telemetry.hooks) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        telemetry.hooks.watch(getattr(client, "_client", client))
        server.hold = threading.Event()
        calls = [pool.submit(client.classify, image(9))]
        assert server.entered.acquire(timeout=20)
        calls += [pool.submit(client.classify, image(n)) for n in (1, 2)]
        until(lambda: client.stats().queued == 2)
        values = [
            telemetry.point(f"graftserve.client.{name}", graftserve_model_name="flowers").value
            for name in ("queued_rows", "batches", "batches.limit", "circuit_open", "active_requests")
        ]
        server.hold.set()
        for call in calls:
            call.result()
    assert values == [2, 1, 1, 0, 1]
    assert not [name for name, _ in telemetry.metrics() if name == "graftserve.client.queued_rows"]


def test_an_open_circuit_shows(telemetry):
    policy = RetryPolicy(max_attempts=1)
    with Client("127.0.0.1:1", "flowers", hooks=telemetry.hooks, retry=policy) as client:
        telemetry.hooks.watch(getattr(client, "_client", client))

        def is_open():
            with pytest.raises(UnavailableError):
                client.classify(image(1))
            return client.stats().targets[0].circuit_open

        until(is_open)
        assert telemetry.point("graftserve.client.circuit_open", server_port=1).value == 1


# Without an SDK, and without the API


def test_without_an_sdk_nothing_happens(server):
    code = f"""
from graftserve.client import Client
from graftserve.client.hooks import CallEnd, CallStart, RequestEnd, RequestStart
from graftserve.client.opentelemetry import OpenTelemetryHooks
hooks = OpenTelemetryHooks()
with Client({server.target!r}, "flowers", hooks=hooks) as client:
    hooks.watch(client)
    print(client.classify(b"abc").label)
import sys
print([name for name in sys.modules if name.startswith("opentelemetry.sdk")])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == (["c3", "[]"], "")
    assert "traceparent" not in dict(server.metadata)


def test_providers_that_are_set_later_count(server):
    code = f"""
from graftserve.client import Client
from graftserve.client.hooks import CallEnd, CallStart, RequestEnd, RequestStart
from graftserve.client.opentelemetry import OpenTelemetryHooks
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

hooks = OpenTelemetryHooks()
trace.set_tracer_provider(TracerProvider())
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
with Client({server.target!r}, "flowers", hooks=hooks) as client:
    client.classify(b"abc")
(resource,) = reader.get_metrics_data().resource_metrics
(scope,) = resource.scope_metrics
print("rpc.client.call.duration" in [metric.name for metric in scope.metrics])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
    assert sent_context(server)[2]


def test_what_is_missing_is_named():
    code = """
import sys
sys.modules["opentelemetry"] = None
try:
    import graftserve.client.opentelemetry
except ImportError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "graftserve.client.opentelemetry needs the API of OpenTelemetry: "
        "pip install 'graftserve[client-otel]'"
    )
