"""What every benchmark's result holds: the machine it ran on, and ratios with their spread."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

__all__ = ["spread", "write_result"]


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the rounds' ratios."""
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def write_result(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    """Write `folder`/`name`.json: the machine, and then the values."""
    described = {
        "machine": {
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "tensorflow": tf.__version__,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(described | dict(values), indent=2) + "\n")
    print(f"written to {path}")
