"""A thread that wakes when it is told to, and is there only while there is something to wake for."""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["Ticker"]

_LOGGER: Final = logging.getLogger("graftserve.client")
_IDLE_S: Final = 5.0


class Ticker:
    """Calls `tick` once at or after every moment (of time.monotonic()) that it was given; safe for threads.

    Its thread ends after five seconds without one, and begins again with the next.
    """

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._changed = threading.Condition()
        self._at = math.inf
        self._running = False
        self._stopped = False

    def by(self, at: float) -> None:
        """Wake at this moment, or sooner if that was asked before."""
        with self._changed:
            if at >= self._at or self._stopped:
                return
            self._at = at
            if self._running:
                self._changed.notify()
                return
            threading.Thread(target=self._run, name="graftserve-client", daemon=True).start()
            self._running = True

    def stop(self) -> None:
        """End the thread, without waiting for it."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        while self._wait():
            try:
                self._tick()
            except Exception:
                # All later moments depend on this thread.
                _LOGGER.exception("a client's tick failed; the client goes on")

    def _wait(self) -> bool:
        """Until it is time; False when there has been nothing for long."""
        with self._changed:
            idle_at = time.monotonic() + _IDLE_S
            while not self._stopped:
                now = time.monotonic()
                if self._at <= now:
                    self._at = math.inf
                    return True
                if self._at == math.inf and now >= idle_at:
                    break
                self._changed.wait(min(self._at, idle_at if self._at == math.inf else self._at) - now)
            self._running = False
            return False
