"""What the manifests in k8s/ run in a pod, run here: flags, configuration, probes, components' scripts."""

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from graftserve.client import Client
from graftserve.client.testing import FakeServer
from graftserve.client.wire import SSLConfig
from graftserve.serving.app import Server
from graftserve.serving.flags import Options

yaml = pytest.importorskip("yaml", reason="needs PyYAML")

_K8S = Path(__file__).parents[2] / "k8s"
_TLS = _K8S / "components/tls"
_AGREEMENT = _K8S / "components/progressive/agreement.py"


def _pod(path: str) -> Any:
    return yaml.safe_load((_K8S / path).read_text())["spec"]["template"]["spec"]


@pytest.fixture
def start_pod(publish: Callable[[str, Path], Path], base_options: Mapping[str, Any], tmp_path: Path) -> Any:
    """start_pod() -> a server with component embedded's arguments, "flowers" 3 pinned beside others."""
    servers = []

    def start(max_age_ms: int | None = None) -> Server:
        models, config = tmp_path / "models", tmp_path / "serving"
        for version in (2, 3, 4):
            publish("half_plus_two", models / str(version))
        config.mkdir()
        for path in (_K8S / "base/pod").glob("*.config"):
            shutil.copy(path, config)
        # As component versions does it.
        lines = (config / "models.config").read_text().replace("/models", str(models)).split("\n")
        lines[8] = "3"
        (config / "models.config").write_text("\n".join(lines))
        (container,) = _pod("components/embedded/server.yaml")["containers"]
        args = [
            arg.replace("/etc/serving", str(config)).replace("$(CPU_LIMIT)", "2") for arg in container["args"]
        ]
        if max_age_ms is not None:
            assert any("max_connection_age_ms=30000," in arg for arg in args)
            args = [arg.replace("age_ms=30000,", f"age_ms={max_age_ms},") for arg in args]
        given = Options.from_args([*args, f"--monitoring_config_file={config}/monitoring.config"])
        values = {flag: getattr(given, flag) for flag in given.__dataclass_fields__}
        servers.append(Server(Options(**{**values, **base_options, "enable_grpc_healthcheck_service": True})))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop(0)


def _probe(command: list[str], port: int, *, name: str = "flowers", version: str = "3") -> int:
    """Run a probe as the kubelet would, at another port; returns its status."""
    assert any("8501" in part for part in command)
    program = {"bash": shutil.which("bash"), "/opt/graftserve/bin/python": sys.executable}[command[0]]
    assert program
    environment = {"MODEL_NAME": name, "MODEL_VERSION": version, "PATH": os.environ["PATH"]}
    parts = [part.replace("8501", str(port)) for part in command[1:]]
    return subprocess.run([program, *parts], env=environment, capture_output=True, timeout=20).returncode


@pytest.fixture(params=["base", "tls"])
def ready_command(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "base":
        (container,) = _pod("base/pod/deployment.yaml")["containers"]
        command = container["readinessProbe"]["exec"]["command"]
        assert command == container["startupProbe"]["exec"]["command"]
    else:
        patches = yaml.safe_load((_TLS / "embedded.yaml").read_text())
        commands = [
            patch["value"]["exec"]["command"] for patch in patches if "exec" in (patch.get("value") or {})
        ]
        command = commands[0]
        assert commands == [command, command]
    return command


def test_a_pod_is_ready_when_its_own_version_is_available(start_pod: Any, ready_command: list[str]) -> None:
    server = start_pod()
    port = server.rest_port
    assert _probe(ready_command, port) == 0
    # Another version's page, and another model's, are no errors of the server's.
    assert _probe(ready_command, port, version="4") != 0
    assert _probe(ready_command, port, name="birds") != 0
    server.stop(0)
    assert _probe(ready_command, port) != 0


def test_a_pod_is_not_ready_while_its_version_is_not_available(
    start_server: Callable[..., Server], tmp_path: Path, ready_command: list[str], publish: Any
) -> None:
    """The status page of a version that did not load is there, with status 200."""
    publish("half_plus_two", tmp_path / "flowers" / "1")
    server = start_server(
        tmp_path / "flowers", model_name="flowers", file_system_poll_wait_seconds=1, max_num_load_retries=0
    )
    assert _probe(ready_command, server.rest_port, version="1") == 0
    broken = tmp_path / "flowers" / "2"
    temporary = tmp_path / "flowers" / "temp"
    shutil.copytree(tmp_path / "flowers" / "1", temporary)
    (temporary / "saved_model.pb").write_bytes(b"broken")
    temporary.rename(broken)

    def state() -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=10)) as connection:
            connection.request("GET", "/v1/models/flowers/versions/2")
            answer = connection.getresponse()
            body = json.loads(answer.read())
        return answer.status, body.get("model_version_status", [{}])[0].get("state", "")

    deadline = time.monotonic() + 60
    while state() != (200, "END") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert state() == (200, "END")
    assert _probe(ready_command, server.rest_port, version="2") != 0


def test_the_pinned_version_alone_is_loaded_and_its_health_is_the_models(start_pod: Any) -> None:
    server = start_pod()
    with Client(f"127.0.0.1:{server.grpc_port}", model="flowers") as client:
        assert [entry.version for entry in client.status()] == [3]
    (container,) = _pod("components/embedded/server.yaml")["containers"]
    service = container["readinessProbe"]["grpc"]["service"]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            stub.Check(health_pb2.HealthCheckRequest(service="birds"), timeout=10)


def test_connections_end_and_are_made_again_without_a_failed_call(start_pod: Any) -> None:
    """What a drain relies on: no connection is left, and nobody noticed."""
    server = start_pod(max_age_ms=200)
    states: list[grpc.ChannelConnectivity] = []
    request = health_pb2.HealthCheckRequest(service="flowers")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        channel.subscribe(states.append, try_to_connect=True)
        stub = health_pb2_grpc.HealthStub(channel)
        deadline = time.monotonic() + 30
        while states.count(grpc.ChannelConnectivity.READY) < 3 and time.monotonic() < deadline:
            assert stub.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
    assert states.count(grpc.ChannelConnectivity.READY) >= 3


# Component tls


@pytest.fixture
def secret(tmp_path: Path) -> tuple[Path, trustme.CA]:
    """A folder as cert-manager's Secret is mounted, and who signed it."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "tls.key").write_bytes(certificate.private_key_pem.bytes())
    (folder / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    (folder / "ca.crt").write_bytes(authority.cert_pem.bytes())
    return folder, authority


def _write_ssl_config(secret: Path, output: Path, *more: str) -> None:
    (init,) = _pod("components/tls/server.yaml")["initContainers"]
    options = [part for part in init["command"] if part.startswith("-")]
    command = [sys.executable, *options, str(_TLS / "ssl_config.py"), str(secret), str(output), *more]
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def test_a_secret_becomes_what_the_server_reads(
    secret: tuple[Path, trustme.CA], start_server: Callable[..., Server], publish: Any, tmp_path: Path
) -> None:
    folder, authority = secret
    file = tmp_path / "ssl.config"
    _write_ssl_config(folder, file)
    assert file.stat().st_mode & 0o077 == 0
    publish("half_plus_two", tmp_path / "half" / "1")
    server = start_server(
        tmp_path / "half", model_name="flowers", host="localhost", ssl_config_file=str(file)
    )
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with Client(f"localhost:{server.grpc_port}", model="flowers", credentials=credentials) as client:
        assert client.wait_until_ready(timeout_s=10) == 1


def test_callers_are_asked_for_certificates_where_that_is_wanted(
    secret: tuple[Path, trustme.CA], tmp_path: Path
) -> None:
    folder, _ = secret
    for more, expected in (((), False), (("--mutual",), True)):
        _write_ssl_config(folder, tmp_path / "ssl.config", *more)
        config = text_format.Parse((tmp_path / "ssl.config").read_text(), SSLConfig())
        assert config.client_verify is expected
        assert config.server_key == (folder / "tls.key").read_text()
        assert config.server_cert == (folder / "tls.crt").read_text()
        assert config.custom_ca == ((folder / "ca.crt").read_text() if expected else "")


# Component progressive


@pytest.fixture
def images(tmp_path: Path, photos: Mapping[str, Any], encode: Callable[..., bytes]) -> Path:
    """Photographs where a version has its golden images, and what is none."""
    folder = tmp_path / "models/3/assets.extra/goldens"
    folder.mkdir(parents=True)
    for name, pixels in photos.items():
        (folder / f"{name}.jpg").write_bytes(encode(pixels))
    (folder / "goldens.json").write_text("{}")
    return tmp_path / "models"


def _agreement(stable: str, canary: str, images: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(_AGREEMENT), f"--stable={stable}", f"--canary={canary}"]
    command += ["--model=flowers", f"--images={images}", "--min-agreement=0.95", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_two_that_say_the_same_agree(images: Path) -> None:
    with FakeServer() as stable, FakeServer() as canary:
        done = _agreement(stable.target, canary.target, images)
        assert len(stable.images) == len(canary.images) == 3
    assert (done.returncode, done.stdout) == (0, "1.0000 of 3 images get the same answer from both\n")


def test_one_other_answer_among_three_is_too_many(images: Path) -> None:
    odd = next(images.rglob("coffee.jpg")).read_bytes()
    with (
        FakeServer(answer=lambda image: "rose") as stable,
        FakeServer(answer=lambda image: "daisy" if image == odd else "rose") as canary,
    ):
        done = _agreement(stable.target, canary.target, images)
    assert done.returncode == 1
    assert "0.6667 of 3 images get the same answer from both, and 0.95 are required" in done.stderr


def test_a_canary_that_is_away_or_nothing_to_ask_is_a_failure(images: Path, tmp_path: Path) -> None:
    with FakeServer() as stable:
        nothing = _agreement(stable.target, stable.target, images / "3/assets.extra/goldens/none")
        canary = FakeServer(answer={})  # ends every request with an error
        with canary:
            broken = _agreement(stable.target, canary.target, images)
    assert nothing.returncode == 1
    assert "expected images, got none" in nothing.stderr
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
    assert "has no answer for" in broken.stderr


def test_they_are_asked_over_tls_where_that_is_on(secret: tuple[Path, trustme.CA], images: Path) -> None:
    folder, _ = secret
    pair = ((folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes())
    with FakeServer(host="localhost", credentials=grpc.ssl_server_credentials([pair])) as server:
        target = f"localhost:{server.port}"
        done = _agreement(target, target, images, f"--root-certificates={folder / 'ca.crt'}")
    assert done.returncode == 0, done.stderr
