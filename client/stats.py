"""What a client has done and is doing."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc

from .errors import CallCancelledError, ClientError, DeadlineExceededError, OverloadedError

__all__ = ["Counters", "Stats", "TargetStats"]

_WINDOW: Final = 1024


@dataclass(frozen=True)
class TargetStats:
    """One target: its address, the requests that it has under way, whether its circuit breaker is open."""

    target: str
    in_flight: int
    circuit_open: bool


@dataclass(frozen=True)
class Stats:
    """Counts since the client was made, and what is true now.

    items: images, and calls that are none (predict, status, metadata); succeeded, failed: how they ended;
        among the failed expired (DeadlineExceededError), cancelled (CallCancelledError) and overloaded
        (OverloadedError).
    requests: RPCs sent, among them retries, hedges (second copies) and explanations (questions for the
        signatures after a refusal); searches: batches asked in parts to find who spoils them.
    codes: failed RPCs by gRPC status.
    errors: failed items by the name of their error's class.
    batch_images: the mean over the last requests; queue_s_*, network_s_*: the time that the last 1,024
        answered requests waited to be sent and took then, of which 50, 95 and 99 percent were faster;
        None before the first.
    queued: rows that wait; in_flight: requests under way; max_in_flight, max_batch_images: the limits in
        force.
    """

    items: int
    succeeded: int
    failed: int
    expired: int
    cancelled: int
    overloaded: int
    requests: int
    retries: int
    hedges: int
    explanations: int
    searches: int
    codes: Mapping[str, int]
    errors: Mapping[str, int]
    batch_images: float | None
    queue_s_p50: float | None
    queue_s_p95: float | None
    queue_s_p99: float | None
    network_s_p50: float | None
    network_s_p95: float | None
    network_s_p99: float | None
    queued: int
    in_flight: int
    max_in_flight: int
    max_batch_images: int
    targets: tuple[TargetStats, ...]


class Counters:
    """Counts as things happen; not safe for threads."""

    def __init__(self) -> None:
        self.items = 0
        self.succeeded = 0
        self.searches = 0
        self._requests = 0
        self._retries = 0
        self._hedges = 0
        self._explanations = 0
        self._codes: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._rows: deque[int] = deque(maxlen=_WINDOW)
        self._queue_s: deque[float] = deque(maxlen=_WINDOW)
        self._network_s: deque[float] = deque(maxlen=_WINDOW)

    def sent(self, rows: int, *, explains: bool, hedge: bool, again: bool) -> None:
        """A request goes out; again: for the second time and more."""
        self._requests += 1
        self._explanations += explains
        self._hedges += hedge
        self._retries += again and not explains

    def answered(self, rows: int, network_s: float, queue_s: float) -> None:
        """A request was answered."""
        self._rows.append(rows)
        self._network_s.append(network_s)
        self._queue_s.append(queue_s)

    def failed(self, code: grpc.StatusCode | None) -> None:
        """A request failed."""
        if code is not None:
            self._codes[code.name] += 1

    def finished(self, result: Any) -> None:
        """An item has its result."""
        if isinstance(result, ClientError):
            self._errors[type(result).__name__] += 1
        else:
            self.succeeded += 1

    def stats(
        self,
        *,
        queued: int,
        in_flight: int,
        max_in_flight: int,
        max_batch_images: int,
        targets: tuple[TargetStats, ...],
    ) -> Stats:
        """The counts, with what is true now."""
        queue_s, network_s = sorted(self._queue_s), sorted(self._network_s)
        return Stats(
            items=self.items,
            succeeded=self.succeeded,
            failed=sum(self._errors.values()),
            expired=self._errors[DeadlineExceededError.__name__],
            cancelled=self._errors[CallCancelledError.__name__],
            overloaded=self._errors[OverloadedError.__name__],
            requests=self._requests,
            retries=self._retries,
            hedges=self._hedges,
            explanations=self._explanations,
            searches=self.searches,
            codes=dict(self._codes),
            errors=dict(self._errors),
            batch_images=sum(self._rows) / len(self._rows) if self._rows else None,
            queue_s_p50=_quantile(queue_s, 0.5),
            queue_s_p95=_quantile(queue_s, 0.95),
            queue_s_p99=_quantile(queue_s, 0.99),
            network_s_p50=_quantile(network_s, 0.5),
            network_s_p95=_quantile(network_s, 0.95),
            network_s_p99=_quantile(network_s, 0.99),
            queued=queued,
            in_flight=in_flight,
            max_in_flight=max_in_flight,
            max_batch_images=max_batch_images,
            targets=targets,
        )


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
