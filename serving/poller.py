"""The thread that looks at something again and again."""

import logging
import threading
from collections.abc import Callable

__all__ = ["Poller"]

_log = logging.getLogger(__name__)


class Poller:
    """Calls `look` every `wait_s` seconds, from a thread of its own. Its errors are logged.

    name: of the thread.
    Raises ValueError unless wait_s is more than 0.
    """

    def __init__(self, look: Callable[[], object], wait_s: float, name: str) -> None:
        if wait_s <= 0:
            raise ValueError(f"wait_s: expected more than 0, got {wait_s}")
        self._look = look
        self._wait_s = wait_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; once. The first look is `wait_s` later."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end after the look that it is at. May be called at any time, and again."""
        self._stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; returns whether it has, or was never started."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._wait_s):
            try:
                self._look()
            except Exception:
                # One bad look must not end the watch.
                _log.exception("polling failed")
