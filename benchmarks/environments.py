"""An environment of its own for each peer, so that its dependencies meet nobody else's.

`make_environment("ovmsclient", ["ovmsclient"])` makes `build/peers/ovmsclient` with what pip finds in the
index that it is configured for, or takes it as it is if the same was asked for before. A peer that does not
install is an `Environment` with an error, for the result to show.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PEERS_DIR", "Environment", "PeerError", "environ", "last_error", "make_environment"]

PEERS_DIR = Path(__file__).parents[1] / "build" / "peers"
_INSTALL_TIMEOUT_S = 1800.0


class PeerError(Exception):
    """A peer does not do what it was asked for; the text says what it said."""


@dataclass(frozen=True)
class Environment:
    """python: its interpreter. packages: what is installed, to its version. error: why it did not install."""

    name: str
    path: Path
    packages: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def installed_mb(self) -> float:
        """What its packages take on the disk, without bytecode."""
        files = (path for path in self.site_packages.rglob("*") if path.suffix != ".pyc" and path.is_file())
        return sum(path.lstat().st_size for path in files) / 1e6

    def run(self, *command: object, timeout_s: float = 600.0) -> Any:
        """What its Python prints last, read as JSON. Raises PeerError if there is none."""
        try:
            done = subprocess.run(
                [str(self.python), *map(str, command)],
                env=environ(),
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"took more than {timeout_s:.0f} s") from None
        if done.returncode:
            raise PeerError(last_error(done.stderr) or f"ended with status {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])


def environ() -> dict[str, str]:
    """This process' variables for a peer: bytecode is written, and no path of ours is searched."""
    hidden = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {
        "TF_CPP_MIN_LOG_LEVEL": "3"
    }


def make_environment(name: str, requirements: Sequence[str], folder: Path = PEERS_DIR) -> Environment:
    """requirements: as pip takes them; a wheel's path counts as another one when the file has changed."""
    path = folder / name
    asked = json.dumps([*map(_identity, requirements), sys.version])
    installed = Environment(name, path)
    marker = path / "requirements.json"
    if not (marker.is_file() and marker.read_text() == asked):
        print(f"installing {name}: {' '.join(requirements)}", flush=True)
        shutil.rmtree(path, ignore_errors=True)
        try:
            venv.create(path, symlinks=True)
            # The pip that is here installs into it, so that none counts as the peer's.
            pip = [sys.executable, "-m", "pip", "--python", str(installed.python)]
            flags = ["--disable-pip-version-check", "--quiet"]
            done = subprocess.run(
                [*pip, "install", *flags, *requirements],
                env=environ(),
                capture_output=True,
                text=True,
                timeout=_INSTALL_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            return Environment(name, path, error=f"{type(exc).__name__}: {exc}")
        if done.returncode:
            return Environment(name, path, error=f"does not install: {last_error(done.stderr)}")
        marker.write_text(asked)
    distributions = importlib.metadata.distributions(path=[str(installed.site_packages)])
    return Environment(name, path, dict(sorted((each.name, each.version) for each in distributions)))


def last_error(stderr: str) -> str:
    """The line that says why: pip's first error, or the end of a traceback."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or [""])[0].removeprefix("ERROR: ")[:400]


def _identity(requirement: str) -> str:
    file = Path(requirement)
    if file.suffix == ".whl" and file.is_file():
        return f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
    return requirement
