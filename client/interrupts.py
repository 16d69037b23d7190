"""Ctrl-C, held back where it would leave something half done."""

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["Uninterrupted", "in_main_thread"]


def in_main_thread() -> bool:
    """Whether KeyboardInterrupt may be raised here."""
    return threading.current_thread() is threading.main_thread()


class Uninterrupted:
    """A with block that KeyboardInterrupt does not break off: it is raised at the end.

    Python raises it in the main thread between any two steps, and gRPC does not survive that while it begins
    a call: the channel's lock may stay taken, or `Channel.close` wait for ever. In other threads, and
    where SIGINT has no handler in Python, it does nothing. It costs some microseconds.
    """

    __slots__ = ("_caught", "_handler")

    def __enter__(self) -> Self:
        self._handler: Any = None
        self._caught: tuple[int, FrameType | None] | None = None
        if in_main_thread():
            handler = signal.signal(signal.SIGINT, self._catch)
            if callable(handler):
                self._handler = handler
            else:
                signal.signal(signal.SIGINT, handler)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._caught is not None:
                self._handler(*self._caught)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number, frame
