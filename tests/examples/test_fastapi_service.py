"""examples/fastapi_service: every answer that it can give, with a fake server; and one with the real one."""

import asyncio
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import ModuleType
from typing import Any

import grpc
import pytest

from graftserve.cli.server_process import ServerProcess
from graftserve.client.testing import FakeServer
from tests.examples.conftest import EXAMPLES

pytest.importorskip("fastapi", reason="needs the extra dev")
httpx = pytest.importorskip("httpx", reason="needs the extra dev")


@pytest.fixture(scope="module")
def service(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("fastapi_service/app.py")


@asynccontextmanager
async def _running(
    service: ModuleType, target: str, model: str = "flowers", **settings: Any
) -> AsyncIterator[Any]:
    """An HTTP client of the service, which runs in this loop."""
    app = service.create_app(service.Settings(target, model, **settings))
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(app.router.lifespan_context(app))

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            # What a server does with what the lifespan gave; httpx has no lifespan.
            await app(scope | {"state": dict(state)}, receive, send)

        transport = httpx.ASGITransport(with_state)
        yield await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://service")
        )


def _ask(service: ModuleType, question: Callable[[Any], Awaitable[Any]], target: str, **settings: Any) -> Any:
    async def ask() -> Any:
        async with _running(service, target, **settings) as http:
            return await question(http)

    return asyncio.run(ask())


def _post(service: ModuleType, target: str, body: bytes = b"a photo", **settings: Any) -> Any:
    return _ask(service, lambda http: http.post("/classify", content=body), target, **settings)


def test_an_image_gets_its_label(service: ModuleType) -> None:
    with FakeServer("flowers", answer=lambda image: {"rose": 0.75, "tulip": 0.25}) as server:
        response = _post(service, server.target)
        assert server.images == [b"a photo"]
    assert response.status_code == 200
    answer = response.json()
    assert (answer["label"], answer["score"], answer["version"]) == ("rose", 0.75, 1)
    assert answer["top"][:2] == [["rose", 0.75], ["tulip", 0.25]]


def test_requests_at_the_same_time_share_batches(service: ModuleType) -> None:
    async def twenty(http: Any) -> Any:
        return await asyncio.gather(*(http.post("/classify", content=b"%d" % n) for n in range(20)))

    with FakeServer("flowers", latency_s=0.05) as server:
        responses = _ask(service, twenty, server.target, timeout_s=20)
        assert len(server.batches) < 20
    assert {response.status_code for response in responses} == {200}


@pytest.mark.parametrize("body", [b"no image", b""])
def test_a_bad_image_is_the_callers_to_mend(service: ModuleType, body: bytes) -> None:
    with FakeServer("flowers", answer=lambda image: None) as server:
        response = _post(service, server.target, body)
    assert response.status_code == 422
    assert response.json()["detail"]


def test_an_image_that_is_too_large_is_not_sent_on(service: ModuleType) -> None:
    with FakeServer() as server:
        response = _post(service, server.target, b"x" * 101, max_image_bytes=100)
        assert response.status_code == 413
        assert server.images == []
        assert _post(service, server.target, b"x" * 100, max_image_bytes=100).status_code == 200


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED"])
def test_what_will_pass_is_503_with_a_time(service: ModuleType, code: str) -> None:
    with FakeServer() as server:
        server.fail(grpc.StatusCode[code], "secret words of the server", times=None)
        response = _post(service, server.target, timeout_s=20)
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert "secret" not in response.text


def test_a_deadline_that_passes_is_504(service: ModuleType) -> None:
    with FakeServer() as server, server.holding():
        response = _post(service, server.target, timeout_s=0.2)
    assert response.status_code == 504


def test_what_only_we_can_mend_is_502_and_logged(
    service: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeServer("flowers") as server:
        response = _post(service, server.target, model="flowres")
    assert response.status_code == 502
    assert "flowres" not in response.text
    assert "flowres" in caplog.text


def test_health(service: ModuleType) -> None:
    async def both(http: Any) -> tuple[Any, Any]:
        return await http.get("/healthz"), await http.get("/readyz")

    with FakeServer("flowers") as server:
        alive, ready = _ask(service, both, server.target)
        assert (alive.status_code, ready.status_code) == (200, 200)
        assert ready.json()["versions"] == [1]
        server.model.versions.clear()
        alive, ready = _ask(service, both, server.target)
        assert (alive.status_code, ready.status_code) == (200, 503)
    alive, ready = _ask(service, both, server.target)
    assert (alive.status_code, ready.status_code) == (200, 503)


@pytest.mark.slow
def test_with_workers_and_a_real_model(trained: Any, exported: Any) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra dev")
    golden = trained.goldens[0]
    with ServerProcess("digits", exported.path.parent) as server:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        line = [
            sys.executable,
            "-m",
            "uvicorn",
            "app:create_app",
            "--factory",
            f"--port={port}",
            "--workers=2",
        ]
        environment = os.environ | {
            "MODEL_TARGET": server.addresses()["gRPC"],
            "MODEL_NAME": "digits",
            "MODEL_TIMEOUT_S": "60",
        }
        process = subprocess.Popen(
            line, cwd=EXAMPLES / "fastapi_service", env=environment, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            started = 0
            while started < 2:
                said = process.stderr.readline()
                assert said, "the service ended"
                started += "Application startup complete" in said
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/classify", golden.file.read_bytes(), method="POST"
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                assert b'"label":"' + golden.label.encode() + b'"' in response.read()
        finally:
            process.terminate()
            process.communicate(timeout=60)
        assert process.returncode == 0
