"""Servers in processes of their own, ours and peers', and what asking them costs them."""

import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import Environment, PeerError, environ, make_environment
from peers.model import GRPC_METHOD, HTTP_PATH
from photos import write_few_digits
from PIL import Image
from skimage import data

from graftserve.cli.server_process import ServerProcess
from graftserve.client.wire.methods import PREDICT
from graftserve.export import export_run
from graftserve.training import Recipe, train

__all__ = [
    "ENGINES",
    "FLAGS",
    "MODEL",
    "PEERS",
    "Served",
    "export_digits",
    "peer_environment",
    "serve_model_server",
    "serve_ours",
    "serve_peer",
    "write_photos",
]

# What pip installs for an engine, in the release that is here, and for a peer.
ENGINES = {"litert": ("ai-edge-litert", "numpy", "pillow"), "tensorflow": ("tensorflow", "numpy")}
PEERS = {
    "grpc": ("grpcio",),
    "fastapi": ("fastapi", "uvicorn[standard]"),
    "litserve": ("litserve",),
    "bentoml": ("bentoml",),
    "ray": ("ray[serve]",),
}

MODEL = "bench"
FLAGS = ("--grpc_max_threads=64", "--max_num_load_retries=0", "--file_system_poll_wait_seconds=0")
_HERE = Path(__file__).parent
_MARK = "GRAFTSERVE_BENCHMARK_SERVER"
_START_TIMEOUT_S = 180.0
_HOW_TO_ASK = {
    "grpc": ("grpc", GRPC_METHOD),
    "fastapi": ("http", HTTP_PATH),
    "litserve": ("json", HTTP_PATH),
    "bentoml": ("http", HTTP_PATH),
    "ray": ("http", HTTP_PATH),
    "echo": ("predict", PREDICT.path),
}


@dataclass(frozen=True)
class Served:
    """A server: the process `pid`, and whatever carries `mark` in its environment, as processes inherit it.

    start_s: until it answered.
    """

    kind: str
    target: str
    path: str
    pid: int
    mark: str
    start_s: float

    def signal(self, number: signal.Signals) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def load(self, *arguments: object) -> dict[str, Any]:
        """What `load.py` measures, and the CPU seconds that a request cost the server.

        Raises PeerError if nothing was answered.
        """
        command = [sys.executable, _HERE / "load.py", self.kind, self.target, "--path", self.path]
        command += ["--model", MODEL, *arguments]
        before_s = self._cpu_s()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise PeerError(done.stderr.strip().rpartition("\n")[2])
        result: dict[str, Any] = json.loads(done.stdout)
        return result | {"cpu_s": (self._cpu_s() - before_s) / result["requests"]}

    def memory_mib(self) -> float:
        """Resident memory of all its processes; pages that several share count once."""
        kib = 0
        for pid in self._pids():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return kib / 1024

    def _pids(self) -> list[int]:
        pids = {self.pid}
        if self.mark:
            pids |= _marked(f"{_MARK}={self.mark}".encode())
        return sorted(pids)

    def _cpu_s(self) -> float:
        """User and system time of all its processes so far."""
        ticks = 0
        for pid in self._pids():
            with suppress(OSError):  # it has ended meanwhile
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def _marked(variable: bytes) -> set[int]:
    pids = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if variable in (entry / "environ").read_bytes().split(b"\0"):
                    pids.add(int(entry.name))
    return pids


@contextmanager
def serve_ours(model_base_path: Path, engine: str, *flags: str) -> Iterator[Served]:
    """The embedded server; flags: more of its own."""
    began_s = time.monotonic()
    with ServerProcess(MODEL, model_base_path, f"--engine={engine}", *FLAGS, *flags) as server:
        target = server.addresses()["gRPC"]
        yield Served("predict", target, PREDICT.path, server.pid, "", time.monotonic() - began_s)


@contextmanager
def serve_model_server(model_base_path: Path) -> Iterator[Served]:
    """TensorFlow Serving, as it runs a model by itself.

    Raises PeerError if tensorflow_model_server is not on the PATH, or does not open its port.
    """
    program = shutil.which("tensorflow_model_server")
    if program is None:
        raise PeerError("tensorflow_model_server is not on the PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began_s = time.monotonic()
    process = subprocess.Popen(
        [program, f"--port={port}", f"--model_name={MODEL}", f"--model_base_path={model_base_path}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not _is_open(port):  # which it is once the model is loaded
            if process.poll() is not None or time.monotonic() > began_s + _START_TIMEOUT_S:
                raise PeerError(f"tensorflow_model_server did not start: status {process.poll()}")
            time.sleep(0.05)
        start_s = time.monotonic() - began_s
        yield Served("predict", f"127.0.0.1:{port}", PREDICT.path, process.pid, "", start_s)
    finally:
        process.kill()
        process.wait()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def peer_environment(name: str, engine: str) -> Environment:
    """The peer with an engine."""
    releases = (f"{package}=={importlib.metadata.version(package)}" for package in ENGINES[engine])
    return make_environment(f"{name}-{engine}", [*PEERS[name], *releases])


@contextmanager
def serve_peer(
    name: str, version: Path, engine: str, python: Path = Path(sys.executable)
) -> Iterator[Served]:
    """One of peers/handwritten.py. Raises PeerError with its last words if it does not start."""
    began_s = time.monotonic()
    mark = secrets.token_hex(8)
    # What Ray and BentoML leave behind goes with the server.
    work_dir = tempfile.TemporaryDirectory(prefix="peer", ignore_cleanup_errors=True)
    places = dict.fromkeys(("TMPDIR", "RAY_TMPDIR", "BENTOML_HOME"), work_dir.name)
    process = subprocess.Popen(
        [python, _HERE / "peers" / "handwritten.py", name, engine, version],
        env=environ() | places | {_MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    kind, path = _HOW_TO_ASK[name]
    served = Served(kind, "", path, process.pid, mark, 0.0)
    log: list[str] = []
    ready = threading.Event()  # or ended

    def read() -> None:
        assert process.stdout is not None  # noqa: S101  # it was asked for
        for line in process.stdout:
            log.append(line.strip())
            if line.startswith("ready "):
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        ready.wait(_START_TIMEOUT_S)
        port = next((line.split()[1] for line in log if line.startswith("ready ")), None)
        if port is None:
            last = next((line for line in reversed(log) if line), "it said nothing")
            raise PeerError(f"did not start: {last}")
        start_s = time.monotonic() - began_s
        yield Served(kind, f"127.0.0.1:{port}", path, process.pid, mark, start_s)
    finally:
        served.signal(signal.SIGKILL)
        process.wait()
        work_dir.cleanup()


def export_digits(folder: Path, **options: Any) -> Path:
    """A version to serve; options: of the export."""
    digits = write_few_digits(folder / "digits", 200)  # the head that few images train is as large as any
    run = train(Recipe(str(digits)), folder / "run", cache_dir=folder / "cache")
    version: Path = export_run(run.path, folder / "models" / MODEL, **options).path
    return version


def write_photos(folder: Path) -> list[Path]:
    """Photographs of 500 pixels."""
    photos = []
    for name in ("chelsea", "coffee", "rocket"):
        image = Image.fromarray(getattr(data, name)())
        image.thumbnail((500, 500))
        photos.append(folder / f"{name}.jpg")
        image.save(photos[-1], quality=90)
    return photos
