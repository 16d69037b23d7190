"""The command, in this process, and a model server to ask."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli.app import _run


@pytest.fixture
def graftserve(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """graftserve(*args) -> (exit status, stdout, stderr), in this process."""

    def graftserve(*args: str | Path) -> tuple[int, str, str]:
        status = _run([str(arg) for arg in args])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return graftserve


@pytest.fixture(scope="session")
def client_tests() -> Any:
    """The equipment of the client's tests."""
    path = Path(__file__).parents[1] / "client" / "conftest.py"
    spec = importlib.util.spec_from_file_location("client_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start_server(client_tests: Any) -> Iterator[Callable[..., Any]]:
    servers: list[Any] = []

    def start(port: int = 0) -> Any:
        servers.append(client_tests.FakeServer(port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start_server: Callable[..., Any]) -> Any:
    """Serves "flowers": an image's label is "c" and its length modulo 10; "bad..." does not decode."""
    return start_server()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """stdin(content) is what the command finds there."""
    opened = []

    def give(content: bytes) -> None:
        reader, writer = os.pipe()
        opened.append(os.fdopen(reader, "r"))
        monkeypatch.setattr("sys.stdin", opened[-1])
        with os.fdopen(writer, "wb") as file:
            file.write(content)

    yield give
    for file in opened:
        file.close()
