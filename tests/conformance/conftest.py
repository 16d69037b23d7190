"""One black-box suite for every server that speaks TensorFlow Serving's protocol.

It knows models on disk, command-line flags, gRPC (through tensorflow-serving-api's messages and stubs) and
HTTP. Each test runs once for each server at hand:

    graftserve                always: a real `graftserve serve`
    tensorflow_model_server   where the program is on the PATH; the suite starts it with the same flags
    remote                    where GRAFTSERVE_TFSERVING (and GRAFTSERVE_TFSERVING_REST) name host:port of a
                              server that was started on the models of GRAFTSERVE_CONFORMANCE_MODELS;
                              models.py writes those and prints the command for a container

Tests marked `better` want what the real server does not do, on purpose; BETTER says why. They run against
graftserve only. Tests that start servers of their own (`launch`) leave the remote one out.
"""

import http.client
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import hypothesis
import pytest
from google.protobuf import text_format

BETTER = {
    "any bytes": "answers INVALID_ARGUMENT to bytes that are no message; there gRPC itself says INTERNAL",
    "any request": "cannot be made to fail, hang or grow without bound by a request; there nested lists "
    "overflow the stack, and a shape of a few bytes allocates terabytes",
    "binary text": "writes strings that are not UTF-8 as {'b64': ...}; there the answer is not JSON any more",
    "exact integers": "refuses JSON integers that the dtype cannot hold; there int8 and its kin wrap around",
    "gzip of answers": "compresses answers over REST where the caller accepts it",
    "half and uint16 in JSON": "reads and writes them; there they are not implemented",
    "json words": "says in Python's words why JSON cannot be read, and shows the first 200 characters of a "
    "value on one line; there RapidJSON's words, and whole documents over many lines",
    "known names only": "counts requests for models that are not there as (unknown); there each name makes "
    "metrics that stay",
    "missing folder": "refuses a reload that names a folder that is not there; there it blocks for ever, and "
    "so do later ones",
    "model health": "makes each model a service of grpc.health.v1, beside the real server's names",
    "model state metric": "has a gauge of each version's state",
    "no more than asked": "refuses more values than the shape has; there the rest is dropped",
    "start-up errors": "says why it cannot start, and ends; there it waits for a missing folder",
    "zero rows": "answers a request of no rows; there it hangs with --enable_batching",
}
"""What graftserve does on purpose otherwise than tensorflow_model_server: the marks of `better`."""

_START_TIMEOUT_S = 120.0
_SERVER = "tensorflow_model_server"
_REMOTE_VARIABLE = "GRAFTSERVE_TFSERVING"
_MODELS_VARIABLE = "GRAFTSERVE_CONFORMANCE_MODELS"

models = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("models.py")), run_name="models"))


@dataclass(frozen=True)
class Running:
    """A server that answers, at host:port each."""

    grpc_address: str
    rest_address: str


class StartError(Exception):
    """The server ended before it answered; the text is what it wrote."""


Launch = Callable[..., Running]


def _kinds() -> list[str]:
    kinds = ["graftserve"]
    if shutil.which(_SERVER):
        kinds.append(_SERVER)
    if os.environ.get(_REMOTE_VARIABLE):
        kinds.append("remote")
    return kinds


def pytest_configure(config: pytest.Config) -> None:
    for profile, max_examples in {"quick": 60, "thorough": 1000}.items():
        hypothesis.settings.register_profile(
            profile, max_examples=max_examples, deadline=None, database=None, derandomize=profile == "quick"
        )
    hypothesis.settings.load_profile("thorough" if config.getoption("--slow") else "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("better"):
            if marker.args[0] not in BETTER:
                raise pytest.UsageError(f"{item.nodeid}: expected a key of BETTER, got {marker.args[0]!r}")


@pytest.fixture(scope="session", params=_kinds())
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _only_where_it_is_meant(request: pytest.FixtureRequest, kind: str) -> None:
    marker = request.node.get_closest_marker("better")
    if marker is not None and kind != "graftserve":
        pytest.skip(f"graftserve {BETTER[marker.args[0]]}")


@pytest.fixture(scope="session")
def api() -> Any:
    """tensorflow-serving-api's messages and stubs, by name, and TensorFlow. They take seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
        from tensorflow.core.example import example_pb2
        from tensorflow.core.framework import tensor_pb2
        from tensorflow_serving.apis import (
            classification_pb2,
            get_model_metadata_pb2,
            get_model_status_pb2,
            inference_pb2,
            input_pb2,
            model_management_pb2,
            model_service_pb2_grpc,
            predict_pb2,
            prediction_log_pb2,
            prediction_service_pb2_grpc,
            regression_pb2,
        )
    modules = (
        *(classification_pb2, example_pb2, get_model_metadata_pb2, get_model_status_pb2, inference_pb2),
        *(input_pb2, model_management_pb2, predict_pb2, prediction_log_pb2, regression_pb2, tensor_pb2),
    )
    return SimpleNamespace(
        tf=tf,
        PredictionStub=prediction_service_pb2_grpc.PredictionServiceStub,
        ModelStub=model_service_pb2_grpc.ModelServiceStub,
        **{
            name: getattr(module, name)
            for module in modules
            for name in module.DESCRIPTOR.message_types_by_name
        },
    )


@pytest.fixture(scope="session")
def models_dir() -> Iterator[Path]:
    """The folder with the models; tests may add folders to it, which the server sees under the same path."""
    shared = os.environ.get(_MODELS_VARIABLE)
    folder = Path(shared or tempfile.mkdtemp(prefix="conformance-")).resolve()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.write_models(folder)
    yield folder
    if not shared:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server(kind: str, models_dir: Path) -> Iterator[Running]:
    """The server that all tests of the session ask, as `models.flags_of` says."""
    if kind == "remote":
        if not os.environ.get(_MODELS_VARIABLE):
            pytest.fail(
                f"{_MODELS_VARIABLE}: expected the folder that {_REMOTE_VARIABLE} serves, got nothing"
            )
        yield Running(os.environ[_REMOTE_VARIABLE], os.environ.get(f"{_REMOTE_VARIABLE}_REST", ""))
        return
    process, running = _start_process(kind, models.flags_of(models_dir))
    yield running
    assert process.poll() is None, "the server has ended by itself"
    process.terminate()
    status = process.wait(60)
    assert status == 0 or kind != "graftserve"


@pytest.fixture
def launch(kind: str) -> Iterator[Launch]:
    """launch(*flags) starts another server, which is stopped after the test. Raises StartError."""
    if kind == "remote":
        pytest.skip("only a server that the suite can start itself")
    stops: list[Callable[[], object]] = []

    def start(*flags: str) -> Running:
        if kind == "graftserve":
            stop, running = _start_here(flags)
            stops.append(stop)
        else:
            process, running = _start_process(kind, flags)
            stops.extend([process.kill, process.wait])
        return running

    yield start
    for stop in stops:
        stop()


def _start_here(flags: Sequence[str]) -> tuple[Callable[[], object], Running]:
    """The embedded server in this process, which has TensorFlow already: seconds less than another one."""
    from graftserve.serving.app import Server
    from graftserve.serving.errors import ServingError
    from graftserve.serving.flags import Options

    embedded = Server(Options.from_args(["--host=127.0.0.1", "--port=0", "--rest_api_port=-1", *flags]))
    try:
        embedded.start()
    except ServingError as exc:
        raise StartError(exc.message) from exc
    running = Running(f"127.0.0.1:{embedded.grpc_port}", f"127.0.0.1:{embedded.rest_port}")
    return lambda: embedded.stop(0), running


def _start_process(kind: str, flags: Sequence[str]) -> tuple["subprocess.Popen[bytes]", Running]:
    if kind == "graftserve":
        command = [sys.executable, "-m", "graftserve.cli", "serve", "--runtime=embedded"]
        command += ["--host=127.0.0.1", "--port=0", "--rest_api_port=-1"]
    else:
        ports = _free_ports()
        command = [_SERVER, f"--port={ports[0]}", f"--rest_api_port={ports[1]}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, *flags], stderr=log, stdout=log)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline_s:
            log.seek(0)
            ready = re.search(rb"ready: .* gRPC (\S+), REST (\S+)\n", log.read())
            if ready:
                return process, Running(ready[1].decode(), ready[2].decode())
            if kind != "graftserve" and all(map(_listens, ports)):
                return process, Running(*(f"127.0.0.1:{port}" for port in ports))
            time.sleep(0.05)
        process.kill()
        process.wait()
        log.seek(0)
        raise StartError(log.read().decode(errors="replace"))


def _free_ports() -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address) as opened:
        yield opened


@pytest.fixture
def prediction(api: Any, channel: grpc.Channel) -> Any:
    return api.PredictionStub(channel)


@pytest.fixture
def model_service(api: Any, channel: grpc.Channel) -> Any:
    return api.ModelStub(channel)


@pytest.fixture(scope="session")
def request_of(api: Any) -> Callable[..., Any]:
    """request_of(model, signature, version=..., label=..., **inputs) is a PredictRequest."""

    def make(
        model: str, signature: str = "", /, version: int | None = None, label: str = "", **inputs: Any
    ) -> Any:
        request = api.PredictRequest()
        request.model_spec.name = model
        request.model_spec.signature_name = signature
        if version is not None:
            request.model_spec.version.value = version
        if label:
            request.model_spec.version_label = label
        for key, value in inputs.items():
            proto = value if isinstance(value, api.TensorProto) else api.tf.make_tensor_proto(value)
            request.inputs[key].CopyFrom(proto)
        return request

    return make


@pytest.fixture(scope="session")
def failure() -> Callable[[Callable[[], Any]], tuple[str, str]]:
    """failure(call) is the code and the message that an RPC fails with."""

    def failure(call: Callable[[], Any]) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        return caught.value.code().name, caught.value.details()

    return failure


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@pytest.fixture(scope="session")
def rest_address(server: Running) -> str:
    """host:port of the REST API."""
    if not server.rest_address:
        pytest.skip(f"needs {_REMOTE_VARIABLE}_REST, the host:port of its REST API")
    return server.rest_address


@pytest.fixture
def http_request(rest_address: str) -> Iterator[Callable[..., HttpAnswer]]:
    """http_request(method, path, body, headers), over one connection that is kept open."""
    connection = http.client.HTTPConnection(rest_address, timeout=30)

    def ask(
        method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> HttpAnswer:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return HttpAnswer(response.status, dict(response.getheaders()), response.read())

    yield ask
    connection.close()


@pytest.fixture
def ask(http_request: Callable[..., HttpAnswer]) -> Callable[..., tuple[int, Any]]:
    """ask(path, body) gives the status and the parsed answer; GET without a body."""

    def ask(path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        answer = http_request(method or ("GET" if data is None else "POST"), path, data)
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(answer.body)

    return ask


@pytest.fixture
def reload(api: Any, models_dir: Path, model_service: Any) -> Iterator[Callable[..., Any]]:
    """reload(*entries) serves these beside the suite's own models; after the test, those alone."""
    own = (models_dir / "models.config").read_text()

    def reload(*entries: str) -> Any:
        request = api.ReloadConfigRequest()
        text_format.Parse(own, request.config)
        text_format.Merge(f"model_config_list {{ {' '.join(entries)} }}", request.config)
        return model_service.HandleReloadConfigRequest(request, timeout=60)

    yield reload
    reload()


@pytest.fixture
def folder(models_dir: Path) -> Iterator[Path]:
    """A model's folder of the test's own, where the server sees it; its name is one for a model, too."""
    path = Path(tempfile.mkdtemp(prefix="lifecycle-", dir=models_dir))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def publish(models_dir: Path) -> Callable[[str, Path], Path]:
    """publish(model, target) copies a model's version to a version folder, which appears by one rename."""

    def publish(model: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"temp-{target.name}"
        shutil.copytree(models_dir / model / str(models.VERSIONS[model]), temporary)
        return temporary.rename(target)

    return publish


@pytest.fixture
def states_of(api: Any, model_service: Any) -> Callable[[str], dict[int, Any]]:
    """states_of(model): what GetModelStatus says of each version."""

    def states_of(model: str) -> dict[int, Any]:
        request = api.GetModelStatusRequest()
        request.model_spec.name = model
        found = model_service.GetModelStatus(request, timeout=30).model_version_status
        return {entry.version: entry for entry in found}

    return states_of


@pytest.fixture
def await_state(states_of: Callable[[str], dict[int, Any]]) -> Callable[[str, int, str], Any]:
    """await_state(model, version, "AVAILABLE") waits for it, and gives what GetModelStatus says of it."""

    def await_state(model: str, version: int, state: str) -> Any:
        deadline_s = time.monotonic() + 30
        while True:
            states = states_of(model)
            entry = states.get(version)
            if entry is not None and entry.State.Name(entry.state) == state:
                return entry
            assert time.monotonic() < deadline_s, states
            time.sleep(0.05)

    return await_state


@pytest.fixture
def metrics(rest_address: str) -> Callable[[], dict[str, float]]:
    """metrics() is every series by its name and labels."""

    def metrics() -> dict[str, float]:
        url = f"http://{rest_address}/monitoring/prometheus/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            text = answer.read().decode()
        lines = re.findall(r"^([^#\s{]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in lines}

    return metrics


@pytest.fixture(scope="session")
def config_of() -> Callable[..., str]:
    """config_of(name, base_path, more) is a model's entry in a configuration."""
    return models.config_of  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def labels() -> list[str]:
    """The classes of the model `examples`."""
    return models.LABELS  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def start_error() -> type[Exception]:
    """What `launch` raises."""
    return StartError
