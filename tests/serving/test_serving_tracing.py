"""Traces, as a collector receives them over OTLP."""

import json
import logging
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from graftserve.client import Client
from graftserve.client.opentelemetry import OpenTelemetryHooks
from graftserve.client.wire import PredictRequest, PredictResponse
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.tensors import to_proto
from graftserve.serving.app import Server
from graftserve.serving.errors import ServingError
from graftserve.serving.flags import Options
from tests.client.async_in_thread import AsyncInThread

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TIMEOUT_S = 30.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.schemas: set[str] = set()
        self._came = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: grpc.ServicerContext | None) -> Any:  # noqa: N802  # the RPC's name
        with self._came:
            for resource in request.resource_spans:
                self.resources.append(attributes(resource.resource))
                self.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.schemas |= {scope.schema_url for scope in resource.scope_spans}
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def take(self, name: str) -> tuple[Span, dict[str, Span]]:
        """The next span of that name, and its children by name."""
        with self._came:
            assert self._came.wait_for(lambda: any(span.name == name for span in self.spans), TIMEOUT_S)
            span = next(span for span in self.spans if span.name == name)
            children = {other.name: other for other in self.spans if other.parent_span_id == span.span_id}
            self.spans = [other for other in self.spans if other is not span]
        return span, children

    def stop(self) -> None:
        self._server.stop(None).wait()


def attributes(holder: Any) -> dict[str, Any]:
    values = ((entry.key, entry.value) for entry in holder.attributes)
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def http_address(collector: Collector) -> Iterator[str]:
    """The same collector's address for OTLP over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # called by that name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            collector.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(body), None)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(
    collector: Collector,
    saved_models: Path,
    base_options: Mapping[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """The model `text`, version 3, traced; spans are sent every 20 ms."""
    base_path = tmp_path_factory.mktemp("traced")
    shutil.copytree(saved_models / "many", base_path / "3")
    options = Options(
        model_base_path=str(base_path),
        model_name="text",
        enable_tracing=True,
        access_log=True,
        **base_options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        server = Server(options)
        server.start()
    yield server
    assert server.stop(5)


def predict(
    server: Server, signature: str, metadata: Any = (), name: str = "text", **inputs: Any
) -> PredictResponse:
    request = PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(to_proto(value))
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary(PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString)
        response: PredictResponse = call(request, metadata=metadata, timeout=TIMEOUT_S)
    return response


def post(server: Server, path: str, body: bytes, **headers: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{server.rest_port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_trace_goes_on_over_grpc(
    server: Server, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    access = logging.getLogger("graftserve.access")
    access.addHandler(caplog.handler)
    try:
        predict(
            server, "text", [("traceparent", TRACEPARENT), ("x-bin", b"\xff")], text=np.array([b"a", b"bc"])
        )
    finally:
        access.removeHandler(caplog.handler)
    span, children = collector.take("tensorflow.serving.PredictionService/Predict")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.status.code == Status.STATUS_CODE_UNSET
    found = attributes(span)
    assert found.pop("network.peer.port") > 0
    seconds = [found.pop(f"graftserve.{name}_seconds") for name in ("queue", "runtime")]
    assert 0 < sum(seconds) < (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert found == {
        "rpc.system.name": "grpc",
        "rpc.method": "tensorflow.serving.PredictionService/Predict",
        "rpc.status_code": "OK",
        "network.peer.address": "127.0.0.1",
        "graftserve.model.name": "text",
        "graftserve.model.version": 3,
        "graftserve.model.signature": "text",
        "graftserve.model.engine": "tensorflow",
        "graftserve.rows": 2,
    }
    assert children.keys() == {"queue", "run"}
    queue, run = children["queue"], children["run"]
    assert span.start_time_unix_nano == queue.start_time_unix_nano < queue.end_time_unix_nano
    assert queue.end_time_unix_nano <= run.start_time_unix_nano < run.end_time_unix_nano
    assert run.end_time_unix_nano <= span.end_time_unix_nano <= time.time_ns()
    assert collector.resources[-1]["service.name"] == "graftserve"
    assert collector.resources[-1]["deployment.environment.name"] == "test"
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == access.name]
    assert line["trace_id"] == TRACE


@pytest.mark.parametrize("client_class", [Client, AsyncInThread])
def test_one_trace_from_the_caller_through_the_client_to_the_model(
    server: Server, collector: Collector, client_class: Any
) -> None:
    exporter, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    hooks = OpenTelemetryHooks(tracers)
    with (
        client_class(f"127.0.0.1:{server.grpc_port}", "text", timeout_s=TIMEOUT_S, hooks=hooks) as client,
        tracers.get_tracer("test").start_as_current_span("caller"),
    ):
        answer = client.predict({"text": [b"a", b"bc"]}, signature="text", merge_rows=True)
    assert answer["length"].tolist() == [1, 2]
    served, children = collector.take("tensorflow.serving.PredictionService/Predict")
    assert children.keys() >= {"run"}
    request, call, caller = exporter.get_finished_spans()
    assert caller.name == "caller"
    assert call.parent.span_id == caller.context.span_id
    assert request.parent.span_id == call.context.span_id
    assert int.from_bytes(served.parent_span_id) == request.context.span_id
    assert {request.context.trace_id, call.context.trace_id, int.from_bytes(served.trace_id)} == {
        caller.context.trace_id
    }
    assert (
        attributes(served)["graftserve.model.version"] == request.attributes["graftserve.model.version"] == 3
    )
    assert attributes(served)["graftserve.rows"] == request.attributes["graftserve.rows"] == 2
    # Both sides speak of the call in the same words.
    assert collector.schemas == {request.instrumentation_scope.schema_url}
    rpc = {name: value for name, value in request.attributes.items() if name.startswith("rpc.")}
    assert rpc == {name: value for name, value in attributes(served).items() if name.startswith("rpc.")}
    assert rpc.keys() == {"rpc.system.name", "rpc.method", "rpc.status_code"}
    tracers.shutdown()


def test_a_trace_goes_on_over_rest(server: Server, collector: Collector) -> None:
    path = "/v1/models/text/versions/3:predict"
    assert post(server, path, b'{"instances": ["a"]}', traceparent=TRACEPARENT) == 200
    span, children = collector.take("POST /v1/models/{name}:predict")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    found = attributes(span)
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/models/{name}:predict",
        "http.response.status_code": 200,
        "url.path": path,
        "url.scheme": "http",
        "network.peer.address": "127.0.0.1",
        "graftserve.model.version": 3,
        "graftserve.rows": 1,
    }
    assert found.items() >= expected.items()
    assert children.keys() == {"run"}


def test_a_request_without_a_trace_begins_one(server: Server, collector: Collector) -> None:
    assert post(server, "/v1/models/text:predict", b'{"instances": ["a"]}', traceparent="nonsense") == 200
    span, _ = collector.take("POST /v1/models/{name}:predict")
    assert span.parent_span_id == b""
    assert span.trace_id.hex() != TRACE


def test_what_the_caller_decided_not_to_sample_is_not_sent(server: Server, collector: Collector) -> None:
    left_out = "4bf92f3577b34da6a3ce929d0e0e4736"
    for flag, trace in (("00", left_out), ("01", TRACE)):
        headers = {"traceparent": f"00-{trace}-{PARENT}-{flag}"}
        assert post(server, "/v1/models/text:predict", b'{"instances": ["a"]}', **headers) == 200
    span, _ = collector.take("POST /v1/models/{name}:predict")
    assert span.trace_id.hex() == TRACE
    assert [span for span in collector.spans if span.trace_id.hex() == left_out] == []


def test_errors_of_callers_and_of_the_server(server: Server, collector: Collector) -> None:
    name = "tensorflow.serving.PredictionService/Predict"
    with pytest.raises(grpc.RpcError):
        predict(server, "text", name="nobody")
    span, children = collector.take(name)
    found = attributes(span)
    assert span.status.code == Status.STATUS_CODE_UNSET  # the caller's fault
    assert found["rpc.status_code"] == found["error.type"] == "NOT_FOUND"
    assert found["graftserve.error.message"].startswith("Servable not found for request")
    assert found["graftserve.model.name"] == "nobody"
    assert not found.keys() & {"graftserve.model.version", "graftserve.model.engine", "graftserve.rows"}
    assert children.keys() == {"queue"}
    request = PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "text", "spin"
    request.inputs["rounds"].CopyFrom(to_proto(np.int32(2**31 - 1)))
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary(PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString)
        with pytest.raises(grpc.RpcError):
            call(request, timeout=0.3)
    span, children = collector.take(name)
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert span.status.message == attributes(span)["graftserve.error.message"] != ""
    assert attributes(span)["error.type"] == "DEADLINE_EXCEEDED"
    assert children["run"].end_time_unix_nano == span.end_time_unix_nano
    assert post(server, "/v1/models/text:predict", b"{}") == 400
    span, children = collector.take("POST /v1/models/{name}:predict")
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes(span)["http.response.status_code"] == 400


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_last_spans_are_sent_before_the_end(
    collector: Collector,
    http_address: str,
    start_server: Callable[..., Server],
    publish: Callable[[str, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    protocol: str,
) -> None:
    publish("half_plus_two", tmp_path / "1")
    address = collector.address if protocol == "grpc" else http_address
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("OTEL_SERVICE_NAME", protocol)
    server = start_server(tmp_path, model_name="half", enable_tracing=True)
    assert post(server, "/v1/models/half:predict", b'{"instances": [1]}') == 200
    assert protocol not in [resource["service.name"] for resource in collector.resources]
    assert server.stop(10)
    assert protocol in [resource["service.name"] for resource in collector.resources]
    collector.take("POST /v1/models/{name}:predict")


def test_a_collector_that_is_away_holds_nothing_up(
    start_server: Callable[..., Server],
    publish: Callable[[str, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    publish("half_plus_two", tmp_path / "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    server = start_server(tmp_path, model_name="half", enable_tracing=True)
    assert post(server, "/v1/models/half:predict", b'{"instances": [1]}') == 200
    began_s = time.monotonic()
    assert server.stop(0.5)
    assert time.monotonic() - began_s < TIMEOUT_S


def test_what_is_missing_is_named(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    expected = "OTEL_EXPORTER_OTLP_PROTOCOL: expected grpc or http/protobuf, got 'http/json'"
    with pytest.raises(ServingError, match=expected):
        start_server(tmp_path, enable_tracing=True)
    for protocol, package, module in (
        ("grpc", r"'graftserve\[otel\]'", "opentelemetry.sdk.trace.export"),
        (
            "http/protobuf",
            "'opentelemetry-exporter-otlp-proto-http'",
            "opentelemetry.exporter.otlp.proto.http",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
            for name in (module, f"{module}.trace_exporter"):
                patch.setitem(sys.modules, name, None)
            with pytest.raises(ServingError, match=f"needs OpenTelemetry: pip install {package}"):
                start_server(tmp_path, enable_tracing=True)


def test_without_the_flag_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys, urllib.request
from graftserve.client.wire import SignatureDefMap
from graftserve.serving.app import Server
from graftserve.serving.flags import Options

class Servable:
    engine, signatures, signature_def_map = "none", {{}}, SignatureDefMap()
    def close(self): pass

class Engine:
    def load(self, servable_id, path): return Servable()

options = Options(host="127.0.0.1", port=0, rest_api_port=-1, model_base_path={str(tmp_path)!r})
server = Server(options, Engine())
server.start()
print(urllib.request.urlopen(f"http://127.0.0.1:{{server.rest_port}}/v1/models/default").status)
server.stop(0)
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200", "[]"]
