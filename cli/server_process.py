"""`graftserve serve` as a child process: for the demo, for benchmarks, for anybody's tests."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from .output import CommandError

__all__ = ["ServerProcess"]

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0


class ServerProcess:
    """A server on this machine's loopback; a context manager that ends it with SIGTERM.

    flags: more of `graftserve serve`'s flags. Ports that they do not name are free ones; REST is off.
    log: the lines that it has written to stderr so far.
    """

    def __init__(self, model_name: str, model_base_path: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "graftserve.cli", "serve", f"--model_name={model_name}"]
        command += [f"--model_base_path={model_base_path}", "--host=127.0.0.1", "--port=0", *flags]
        self.log: list[str] = []
        self._ready: str | None = None
        self._settled = threading.Event()  # it is ready, or it has ended
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = self.end()
        if error is None and status != 0:
            raise CommandError(f"the server ended with status {status}: {self._last_lines()}")

    def addresses(self) -> dict[str, str]:
        """Wait until it is ready; "gRPC" and "REST" to host:port ("off" where it is off).

        Raises CommandError with its last lines if it ended, or took more than two minutes.
        """
        self._settled.wait(_START_TIMEOUT_S)
        if self._ready is None:
            raise CommandError(f"the server did not start: {self._last_lines()}")
        return dict(part.split(" ") for part in self._ready.split(", ")[-2:])

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal, unless it has ended, and wait; returns its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended by itself; returns its exit status. It is killed after a minute."""
        try:
            status = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join()
        return status

    def _read(self) -> None:
        if self._process.stderr is not None:
            with self._process.stderr as lines:
                for line in lines:
                    self.log.append(line.rstrip())
                    if line.startswith("ready: "):
                        self._ready = line.strip()
                        self._settled.set()
        self._settled.set()

    def _last_lines(self) -> str:
        return " | ".join(self.log[-5:]) or "it wrote nothing"
