"""The command, in this process."""

from collections.abc import Callable
from pathlib import Path

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
