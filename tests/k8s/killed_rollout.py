"""A rollout that dies by SIGKILL at the n-th of its points: before and after each file and each request.

    python killed_rollout.py TARGET CONFIG_FILE JOURNAL IMAGES N

Prints "done" if there are fewer points.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from graftserve.k8s.rollout import (
    Driver,
    Gate,
    Journal,
    Limits,
    ModelConfigFile,
    ModelServer,
    Report,
    begin,
    compare,
)

_MODEL = "flowers"
_left = int(sys.argv[5])


def _point() -> None:
    global _left
    _left -= 1
    if not _left:
        os.kill(os.getpid(), signal.SIGKILL)


def _make_fatal(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        _point()
        result = original(*args, **kwargs)
        _point()
        return result

    setattr(owner, name, call)


def main() -> None:
    target, config_file, journal, images = sys.argv[1], *map(Path, sys.argv[2:5])
    _make_fatal(os, "fsync")
    _make_fatal(Path, "replace")
    _make_fatal(ModelServer, "_send")
    with (
        Journal(journal, target, _MODEL).writing("the one that dies", {}) as writer,
        ModelServer(target, _MODEL, ModelConfigFile(config_file, _MODEL)) as stage,
    ):

        def shadow(canary: int, stable: int) -> Report:
            with stage.client(stable, 20) as old, stage.client(canary, 20) as new:
                return compare(old, new, sorted(images.iterdir()), seed=0, max_errors=0)

        begin(stage, writer, version=4, gate=Gate(max_latency_ratio=1000), auto=True)
        limits = Limits(load_timeout_s=30, drain_s=0)
        Driver(stage, writer, check=lambda version: "looked", shadow=shadow, limits=limits, poll_s=0.02).run()
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
