"""A version on trial: a real server loads it, warms it up, and answers its golden images over gRPC."""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graftserve.client import Client, ClientError

from .output import CommandError
from .replay import replay
from .server_process import ServerProcess

if TYPE_CHECKING:
    from graftserve.export.publish import ServingCheck

__all__ = ["serving_check"]

_REAL_SERVER = "tensorflow_model_server"
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 30.0
_TOLERANCE = 1e-4


def serving_check(model_base_path: Path, model_name: str) -> "ServingCheck":
    """Serve the one version below `model_base_path` and compare its answers with its golden images'.

    The server is TensorFlow Serving where tensorflow_model_server is on the PATH, else the embedded one, with
    the engine that both have.
    Raises VerificationError if it does not start or answers differently.
    """
    from graftserve.export import VerificationError
    from graftserve.export.publish import ServingCheck

    (folder,) = (path for path in model_base_path.iterdir() if path.name.isdecimal())
    real = shutil.which(_REAL_SERVER)
    name = _REAL_SERVER if real else "graftserve serve"
    try:
        with (
            _real_server(real, model_base_path, model_name)
            if real
            else _embedded_server(model_base_path, model_name) as target,
            Client(target, model_name, timeout_s=_START_TIMEOUT_S) as client,
        ):
            client.wait_until_ready(_START_TIMEOUT_S)
            result = replay(folder, client, model_name)
    except (CommandError, ClientError) as error:
        raise VerificationError(f"{name} does not serve the new version: {error}") from error
    if not result.largest_difference <= _TOLERANCE:
        raise VerificationError(
            f"{name} answers differently from the trained model: {result.largest_difference:.3g} on "
            f"{result.worst} (tolerance {_TOLERANCE:g})"
        )
    return ServingCheck(name, result.largest_difference)


@contextmanager
def _embedded_server(model_base_path: Path, model_name: str) -> Iterator[str]:
    flags = "--engine=tensorflow", "--max_num_load_retries=0", "--file_system_poll_wait_seconds=0"
    with ServerProcess(model_name, model_base_path, *flags) as server:
        yield server.addresses()["gRPC"]


@contextmanager
def _real_server(binary: str, model_base_path: Path, model_name: str) -> Iterator[str]:
    port = _free_port()
    command = [binary, f"--port={port}", f"--model_name={model_name}"]
    command += [f"--model_base_path={model_base_path.resolve()}", "--max_num_load_retries=0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for_port(process, port)
            yield f"127.0.0.1:{port}"
        except CommandError as error:
            log.seek(0)
            raise CommandError(f"{error}: {' | '.join(log.read().splitlines()[-5:])}") from error
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    """A port that was free a moment ago: the real server cannot choose one by itself."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for_port(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Wait until the port is open, which the real server does once the model is available."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CommandError(f"it ended with status {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise CommandError(f"it opened no port within {_START_TIMEOUT_S:.0f} s")
