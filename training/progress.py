"""Progress of a long stage, reported to whoever draws it."""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

__all__ = ["Progress", "Report", "silent"]


@dataclass(frozen=True)
class Report:
    """Where a stage stands.

    eta_s: seconds to go at the pace since the stage began; None before the first item is done.
    """

    stage: str
    done: int
    total: int
    elapsed_s: float

    @property
    def rate(self) -> float:
        """Items a second since the stage began."""
        return self.done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """See the class."""
        return (self.total - self.done) / self.rate if self.done and self.rate else None


Listener = Callable[[Report], None]


def silent(_: Report) -> None:
    """A listener for those who want no reports."""


class Progress:
    """Counts a stage's items and tells the listener after each step."""

    def __init__(self, stage: str, total: int, listener: Listener) -> None:
        self._stage, self._total, self._listener = stage, total, listener
        self._done, self._start = 0, monotonic()
        self._tell()

    def advance(self, count: int = 1) -> None:
        """`count` more items are done."""
        self._done += count
        self._tell()

    def _tell(self) -> None:
        self._listener(Report(self._stage, self._done, self._total, monotonic() - self._start))
