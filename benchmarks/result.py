"""What every benchmark's result holds: how and where it was measured, and ratios with their spread.

Imports nothing but the standard library, so that a process that measures can use it, too.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["LIBRARIES", "describe", "ratios", "spread", "write_result"]

LIBRARIES = (
    *("ai-edge-litert", "grpcio", "keras", "numpy", "pillow", "protobuf", "tensorflow"),
    *("scikit-image", "scikit-learn", "tensorflow-serving-api"),
)
_ROOT = Path(__file__).parents[1]
_BEGAN_LOAD = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and largest of what the rounds gave."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """`values` to `others`, round by round."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def describe(rounds: int) -> dict[str, Any]:
    """The command, when, of which graftserve, on which machine, with which libraries, in how many rounds.

    load_average: of the machine's last minute when this program began; much above 0 says that it was not
    alone.
    """
    script, *arguments = sys.argv
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "graftserve": {"version": _version("graftserve"), "commit": _commit()},
        "machine": {
            "cpu": _cpu_model(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "processor": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "load_average": _BEGAN_LOAD,
        },
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "rounds": rounds,
    }


def write_result(folder: Path, name: str, values: Mapping[str, Any], *, rounds: int) -> None:
    """Write `folder`/`name`.json: what `describe` says, and then the values."""
    description = describe(rounds)
    if both := description.keys() & values.keys():
        raise ValueError(f"expected other names than the description's, got {', '.join(sorted(both))}")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(description | dict(values), indent=2) + "\n")
    print(f"written to {path}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's, with a plus where files other than the results differ from it; None without Git."""
    # Results that were just written say nothing about what was measured.
    changes = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    try:
        commit, changed = (
            subprocess.run(["git", *line], cwd=_ROOT, capture_output=True, text=True, check=True).stdout
            for line in (("rev-parse", "--short", "HEAD"), changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
