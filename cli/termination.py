"""SIGTERM, for commands that have programs of their own to end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["terminated_in_order"]

_TERMINATED: Final = 128 + signal.SIGTERM


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, its children first."""

    def end(*_: object) -> None:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
