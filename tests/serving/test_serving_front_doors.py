"""What flags open, close and limit at the two front doors: health, reflection, TLS, sizes, metrics."""

import gzip
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from google.protobuf import text_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from graftserve.client.wire import (
    GetModelStatusRequest,
    GetModelStatusResponse,
    PredictRequest,
    PredictResponse,
    ReloadConfigRequest,
    ReloadConfigResponse,
    SSLConfig,
)
from graftserve.client.wire.methods import GET_MODEL_STATUS, HANDLE_RELOAD_CONFIG_REQUEST, METHODS, PREDICT
from graftserve.client.wire.tensors import to_array, to_proto
from graftserve.serving.app import Server
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.flags import Options
from graftserve.serving.grpc_api import _STATUS, _peer
from graftserve.serving.rest_api import HTTP_STATUS

Publish = Callable[[str, Path], Path]
Start = Callable[..., Server]

FLOATS = np.array([1, 2, 5], np.float32)


def predict_request(x: Any = FLOATS, name: str = "default", label: str = "", **spec: Any) -> PredictRequest:
    request = PredictRequest()
    request.model_spec.name = name
    if label:
        request.model_spec.version_label = label
    request.inputs["x"].CopyFrom(to_proto(x))
    return request


def predict(channel: grpc.Channel, request: PredictRequest, timeout_s: float = 30) -> PredictResponse:
    call = channel.unary_unary(PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString)
    response: PredictResponse = call(request, timeout=timeout_s)
    return response


def reload(channel: grpc.Channel, text: str, timeout_s: float = 30) -> ReloadConfigResponse:
    request = ReloadConfigRequest()
    text_format.Parse(text, request.config)
    call = channel.unary_unary(
        HANDLE_RELOAD_CONFIG_REQUEST.path,
        ReloadConfigRequest.SerializeToString,
        ReloadConfigResponse.FromString,
    )
    response: ReloadConfigResponse = call(request, timeout=timeout_s)
    return response


def get(port: int | None, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Any:
    assert port is not None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def rpc_error(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details()


@pytest.fixture
def half(publish: Publish, tmp_path: Path) -> Path:
    publish("half_plus_two", tmp_path / "half" / "1")
    publish("half_plus_three", tmp_path / "half" / "2")
    return tmp_path / "half"


def test_a_broken_config_file_is_told_and_changes_nothing(
    half: Path, start_server: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "models.config"
    config.write_text(f'model_config_list {{ config {{ name: "half" base_path: "{half}" }} }}')
    server = start_server(None, model_config_file=str(config), model_config_file_poll_wait_seconds=1)
    config.write_text("model_config_list { config {")
    deadline_s = time.monotonic() + 20
    while "the model configuration stays as it is" not in caplog.text and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert "expected a ModelServerConfig in text format" in caplog.text
    assert server.manager.is_available("half", 2)


def test_health_follows_each_model(
    half: Path,
    start_server: Start,
    channel_to: Callable[[Server], grpc.Channel],
    tmp_path: Path,
    publish: Publish,
) -> None:
    server = start_server(half, enable_grpc_healthcheck_service=True)
    channel = channel_to(server)
    stub = health_pb2_grpc.HealthStub(channel)
    serving, not_serving = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    for service in ("", "ModelService", "PredictionService", "default"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == serving
    unknown = health_pb2.HealthCheckRequest(service="other")
    assert rpc_error(lambda: stub.Check(unknown, timeout=10))[0] == "NOT_FOUND"

    # More watchers than threads: they must not keep requests out.
    watches = [
        stub.Watch(health_pb2.HealthCheckRequest(service="default"), timeout=60)
        for _ in range(server.options.grpc_threads + 2)
    ]
    assert all(next(watch).status == serving for watch in watches)
    assert predict(channel, predict_request()).model_spec.version.value == 2
    publish("half_plus_four", tmp_path / "other" / "1")
    reload(channel, f'model_config_list {{ config {{ name: "other" base_path: "{tmp_path / "other"}" }} }}')
    assert all(next(watch).status == not_serving for watch in watches)
    assert stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10).status == serving
    everything = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=60)
    assert next(everything).status == serving
    stopping = threading.Thread(target=server.stop, args=(5,))
    stopping.start()
    assert next(everything).status == not_serving
    for watch in (*watches, everything):
        watch.cancel()
    stopping.join(20)


def test_reflection_describes_every_method_well_enough_to_call_it(
    many_server: Server, channel_to: Callable[[Server], grpc.Channel]
) -> None:
    channel = channel_to(many_server)
    database = ProtoReflectionDescriptorDatabase(channel)
    services = database.get_services()
    assert {method.service for method in METHODS} <= set(services)
    pool = DescriptorPool(database)
    for method in METHODS:
        described = pool.FindServiceByName(method.service).methods_by_name[method.name]
        assert described.input_type.full_name == f"tensorflow.serving.{method.request.DESCRIPTOR.name}"
    described = pool.FindServiceByName(GET_MODEL_STATUS.service).methods_by_name[GET_MODEL_STATUS.name]
    request = GetMessageClass(described.input_type)()
    text_format.Parse('model_spec { name: "text" }', request)
    call = channel.unary_unary(
        GET_MODEL_STATUS.path,
        GetModelStatusRequest.SerializeToString,
        GetModelStatusResponse.FromString,
    )
    states = call(GetModelStatusRequest.FromString(request.SerializeToString()), timeout=10)
    assert [entry.version for entry in states.model_version_status] == [3]


def test_tls_and_mutual_tls(half: Path, start_server: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, client = authority.issue_cert("localhost"), authority.issue_cert("client")
    root = authority.cert_pem.bytes()
    config = SSLConfig(
        server_key=certificate.private_key_pem.bytes().decode(),
        server_cert=b"".join(blob.bytes() for blob in certificate.cert_chain_pems).decode(),
        custom_ca=root.decode(),
    )

    def start(name: str) -> int:
        file = tmp_path / name
        file.write_text(text_format.MessageToString(config))
        return start_server(half, host="localhost", ssl_config_file=str(file)).grpc_port

    def ask(port: int, credentials: grpc.ChannelCredentials | None) -> int:
        target = f"localhost:{port}"
        with (
            grpc.insecure_channel(target)
            if credentials is None
            else grpc.secure_channel(target, credentials) as channel
        ):
            return predict(channel, predict_request(), timeout_s=10).model_spec.version.value

    anonymous = grpc.ssl_channel_credentials(root)
    known = grpc.ssl_channel_credentials(
        root, client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )
    port = start("tls.config")
    assert ask(port, anonymous) == 2
    with pytest.raises(grpc.RpcError):
        ask(port, None)
    config.client_verify = True
    port = start("mutual.config")
    assert ask(port, known) == 2
    with pytest.raises(grpc.RpcError):
        ask(port, anonymous)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server_key: '/etc/key.pem'", "server_key: expected the PEM text itself .*got something else"),
        ("server_key: '-----BEGIN PRIVATE KEY-----'", "server_cert: expected the PEM text itself.*nothing"),
        (
            "server_key: '-----BEGIN PRIVATE KEY-----' server_cert: '-----BEGIN CERTIFICATE-----' "
            "client_verify: true",
            "client_verify: expected custom_ca with it",
        ),
    ],
)
def test_certificates_that_cannot_be_used_are_named(
    half: Path, start_server: Start, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "ssl.config").write_text(text)
    with pytest.raises(ServingError, match=f"--ssl_config_file: {message}"):
        start_server(half, ssl_config_file=str(tmp_path / "ssl.config"))


def test_a_unix_socket_beside_the_port_also_after_a_crash_left_it(
    half: Path, start_server: Start, tmp_path: Path
) -> None:
    path = f"{os.path.relpath(tmp_path)}/s"  # a socket's path has at most 107 characters
    Path(path).write_bytes(b"")
    Path(path).unlink()
    for _ in range(2):
        server = start_server(half, grpc_socket_path=path)
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert predict(channel, predict_request()).model_spec.version.value == 2
        server.stop(0)
    with pytest.raises(ServingError, match="expected a path in a folder that can be written to"):
        start_server(half, grpc_socket_path=str(tmp_path / "gone" / "s"))


def test_packed_tensors_when_asked(
    half: Path, start_server: Start, channel_to: Callable[[Server], grpc.Channel]
) -> None:
    server = start_server(half, enable_serialization_as_tensor_content=True)
    proto = predict(channel_to(server), predict_request()).outputs["y"]
    assert (len(proto.tensor_content), list(proto.float_val)) == (12, [])
    np.testing.assert_array_equal(to_array(proto), FLOATS / 2 + 3)


def test_messages_above_the_limit_are_refused_at_both_doors(
    half: Path, start_server: Start, channel_to: Callable[[Server], grpc.Channel]
) -> None:
    server = start_server(half, max_message_bytes=10_000)
    big = predict_request(np.zeros(10_000, np.float32))
    code, message = rpc_error(lambda: predict(channel_to(server), big))
    assert (code, "larger than max" in message) == ("RESOURCE_EXHAUSTED", True)
    body = json.dumps({"instances": [0.5] * 10_000}).encode()
    path = "/v1/models/default:predict"
    response, content = get(server.rest_port, path, "POST", body)
    assert (response.status, json.loads(content)["error"]) == (
        413,
        "Expected a body of at most 10000 bytes: send fewer rows at once",
    )
    # Told by its first chunk's size alone: what it claims is not read.
    assert server.rest_port is not None
    with socket.create_connection(("127.0.0.1", server.rest_port), 10) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Expected a body of at most 10000 bytes" in answer
    # Small on the wire, and too large once it is opened.
    response, content = get(server.rest_port, path, "POST", gzip.compress(body), Content_Encoding="gzip")
    assert (response.status, "at most 10000 bytes out of" in json.loads(content)["error"]) == (413, True)


def test_other_origins_may_ask_only_when_told(half: Path, start_server: Start, many_server: Server) -> None:
    path = "/v1/models/default"
    server = start_server(half, rest_api_enable_cors_support=True)
    response, content = get(server.rest_port, path, "OPTIONS", Origin="https://example.org")
    assert (response.status, content) == (200, b"")
    assert response.getheader("Access-Control-Allow-Origin") == "*"
    assert "POST" in response.getheader("Access-Control-Allow-Methods")
    assert get(server.rest_port, path)[0].getheader("Access-Control-Allow-Origin") == "*"
    response, _ = get(many_server.rest_port, "/v1/models/text", "OPTIONS")
    assert (response.status, response.getheader("Access-Control-Allow-Origin")) == (400, None)


def test_a_deluge_is_refused_and_not_stored_but_counted(
    publish: Publish,
    start_server: Start,
    tmp_path: Path,
    channel_to: Callable[[Server], grpc.Channel],
    monitoring: str,
) -> None:
    publish("many", tmp_path / "1")
    limits = {"grpc_max_threads": 1, "max_queued_requests": 2}
    server = start_server(tmp_path, monitoring_config_file=monitoring, **limits)
    channel = channel_to(server)
    call = channel.unary_unary(PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString)
    request = PredictRequest()
    request.model_spec.name = "default"
    request.model_spec.signature_name = "spin"
    request.inputs["rounds"].CopyFrom(to_proto(np.array(2**31 - 1, np.int32)))
    calls = [call.future(request, timeout=3) for _ in range(8)]
    codes = sorted(future.exception().code().name for future in calls)
    assert codes == ["DEADLINE_EXCEEDED"] * 3 + ["RESOURCE_EXHAUSTED"] * 5
    # What was refused last is counted when the next call comes, and here that one may be refused, too.
    refused = 5
    deadline = time.monotonic() + 30
    while rpc_error(lambda: predict(channel, predict_request(name="nobody")))[0] != "NOT_FOUND":
        refused += 1
        assert time.monotonic() < deadline
    after = metrics_of(server)
    labels = 'api="Predict",code="RESOURCE_EXHAUSTED",entrypoint="GRPC"'
    ours = f'graftserve_requests_total{{{labels},model_name="(unknown)",signature="",version=""}}'
    there = ':tensorflow:serving:request_count{model_name="(unknown)",status="RESOURCE_EXHAUSTED"}'
    assert after[ours] == after[there] == refused


def test_what_rest_refuses_as_one_too_many_is_counted(half: Path, start_server: Start) -> None:
    server = start_server(half, rest_api_num_threads=1, max_queued_requests=1)

    def refused() -> tuple[float | None, float | None]:
        """Ours, and TensorFlow Serving's. The page that tells them would wait for the thread."""
        of_all = {"model_name": "(unknown)"}
        ours = {"version": "", "signature": "", "api": "", "entrypoint": "REST", "code": "RESOURCE_EXHAUSTED"}
        read = server.metrics.registry.get_sample_value
        return (
            read("graftserve_requests_total", of_all | ours),
            read(":tensorflow:serving:request_count", of_all | {"status": "RESOURCE_EXHAUSTED"}),
        )

    assert server.rest_port is not None
    assert server._rest is not None
    address = ("127.0.0.1", server.rest_port)
    with socket.create_connection(address, timeout=30) as slow:
        slow.sendall(b"POST /v1/models/default:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n")
        deadline_s = time.monotonic() + 30
        while server._rest._server.requests.idle:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        # One waits for the thread, the others find the line full.
        connections = [http.client.HTTPConnection(*address, timeout=30) for _ in range(4)]
        for connection in connections:
            connection.request("GET", "/v1/models/default", headers={"Connection": "close"})
        while refused() != (3, 3):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        slow.sendall(b'{"instances": [1.0]}')
        assert slow.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert sorted(connection.getresponse().status for connection in connections) == [200, 503, 503, 503]
    for connection in connections:
        connection.close()
    assert refused() == (3, 3)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("ipv4:127.0.0.1:4711", {"network.peer.address": "127.0.0.1", "network.peer.port": 4711}),
        ("ipv6:%5B::1%5D:4711", {"network.peer.address": "::1", "network.peer.port": 4711}),
        ("ipv6:[::1]:4711", {"network.peer.address": "::1", "network.peer.port": 4711}),
        ("unix:/run/s.sock", {"network.peer.address": "/run/s.sock"}),
        ("unix:", {"network.peer.address": ""}),
    ],
)
def test_callers_are_named_as_the_conventions_of_traces_want(name: str, peer: dict[str, Any]) -> None:
    assert _peer(name) == peer


def test_bytes_that_are_no_request_are_the_clients_fault(
    many_server: Server, channel_to: Callable[[Server], grpc.Channel]
) -> None:
    channel = channel_to(many_server)
    for method in METHODS:
        call = channel.unary_unary(method.path)
        code, message = rpc_error(lambda call=call: call(b"\xff" * 9, timeout=10))
        assert (code, message) == (
            "INVALID_ARGUMENT",
            f"Expected a serialized {method.request.DESCRIPTOR.name}, got 9 other bytes",
        )


def metrics_of(server: Server) -> dict[str, float]:
    """Every series by its name and labels."""
    response, content = get(server.rest_port, "/monitoring/prometheus/metrics")
    assert response.status == 200
    assert response.getheader("Content-Type").startswith("text/plain; version=0.0.4")
    return {
        name: float(value)
        for name, value in re.findall(r"^([^#\s{]+(?:\{.*\})?) (\S+)$", content.decode(), re.MULTILINE)
    }


@pytest.fixture
def monitoring(tmp_path: Path) -> str:
    (tmp_path / "monitoring.config").write_text(
        'prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }'
    )
    return str(tmp_path / "monitoring.config")


def test_metrics_of_our_own_beside_the_real_servers(
    half: Path, start_server: Start, channel_to: Callable[[Server], grpc.Channel], monitoring: str
) -> None:
    server = start_server(half, monitoring_config_file=monitoring)
    channel = channel_to(server)
    for _ in range(3):
        predict(channel, predict_request())
    text = get(server.rest_port, "/monitoring/prometheus/metrics")[1].decode()
    assert "# TYPE :tensorflow:serving:request_count counter\n" in text
    assert "# TYPE :tensorflow:serving:request_latency histogram\n" in text
    assert "_created" not in text
    metrics = metrics_of(server)
    ours = 'api="Predict",code="OK",entrypoint="GRPC",model_name="default",signature="serving_default"'
    assert metrics[f'graftserve_requests_total{{{ours},version="2"}}'] == 3
    assert metrics['graftserve_model_state{model_name="default",state="AVAILABLE",version="2"}'] == 1
    assert metrics['graftserve_model_state{model_name="default",state="END",version="2"}'] == 0
    assert metrics['graftserve_model_engine_info{engine="tensorflow",model_name="default",version="2"}'] == 1
    assert metrics["graftserve_in_flight_requests"] == 0
    assert metrics["process_resident_memory_bytes"] > 1e7


def test_metrics_are_off_unless_a_file_turns_them_on(
    half: Path, start_server: Start, many_server: Server, tmp_path: Path
) -> None:
    assert get(many_server.rest_port, "/monitoring/prometheus/metrics")[0].status == 404
    (tmp_path / "elsewhere").write_text('prometheus_config { enable: true path: "/metrics" }')
    server = start_server(half, monitoring_config_file=str(tmp_path / "elsewhere"))
    assert b"graftserve_requests" in get(server.rest_port, "/metrics")[1]
    assert get(server.rest_port, "/monitoring/prometheus/metrics")[0].status == 404


def test_the_access_log_has_one_line_of_json_for_each_request(
    half: Path,
    start_server: Start,
    channel_to: Callable[[Server], grpc.Channel],
    base_options: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    server = Server(Options(model_base_path=str(half), access_log=True, **base_options))
    assert server.metrics._access_log is not None
    monkeypatch.setattr(server.metrics._access_log, "info", lines.append)
    try:
        server.start()
        predict(channel_to(server), predict_request())
        get(server.rest_port, "/v1/models/nope:predict", "POST", b'{"instances": [1]}')
    finally:
        server.stop(0)
    good, bad = map(json.loads, lines)
    assert (good["api"], good["entrypoint"], good["model"], good["version"]) == (
        *("Predict", "GRPC", "default"),
        2,
    )
    assert (good["code"], good["signature"], good["engine"]) == ("OK", "serving_default", "tensorflow")
    assert 0 < good["runtime_seconds"] < good["seconds"] < 30
    assert good["peer"] == bad["peer"] == "127.0.0.1"
    assert (bad["code"], bad["entrypoint"], bad["version"]) == ("NOT_FOUND", "REST", None)
    assert bad["error"] == "Servable not found for request: Latest(nope)"


def test_the_overview_counts_what_was_asked_and_names_what_takes_images(many_server: Server) -> None:
    path = "/v1/models/text:predict"
    get(many_server.rest_port, path, "POST", b'{"instances": ["a"]}')
    get(many_server.rest_port, path, "POST", b'{"instances": [1]}')

    def overview() -> Any:
        response, content = get(many_server.rest_port, "/overview.json")
        assert response.getheader("Cache-Control") == "no-store"
        return json.loads(content)

    before = overview()
    (model,) = before["models"]
    assert (model["name"], model["labels"]) == ("text", {})
    assert model["versions"] == [{"version": "3", "state": "AVAILABLE", "error": "", "engine": "tensorflow"}]
    assert [entry["name"] for entry in model["image_signatures"] if not entry["scalar"]] == [
        *("echo", "serving_default", "text")
    ]
    get(many_server.rest_port, path, "POST", b'{"instances": [1]}')
    (after,) = overview()["models"]
    assert (after["requests"] - model["requests"], after["errors"] - model["errors"]) == (1, 1)
    assert 0 < after["latency_sum_s"] - model["latency_sum_s"] < 30
    assert after["latency_buckets"][-1][1] == after["requests"]
    assert before["max_message_bytes"] == 256 * 2**20
    assert before["server"]["uptime_s"] > 0


def test_outputs_are_in_the_order_of_their_names(many_server: Server) -> None:
    request = b'{"signature_name": "echo", "instances": [["A"]]}'
    _, answer = get(many_server.rest_port, "/v1/models/text:predict", "POST", request)
    assert answer == b'{"predictions": [{"again": ["a"], "raw_bytes": [{"b64": "QQ=="}], "text": ["A"]}]}'


def test_every_code_has_a_status_at_both_doors() -> None:
    assert set(_STATUS) == set(HTTP_STATUS) == set(Code)
