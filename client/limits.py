"""How many requests to keep under way and how large to make them: pure, time is passed in.

**Requests under way.** Rows that wait are shared out evenly among the requests that may be under way, so
this number decides between few large ones (a GPU, which runs a batch almost as fast as a single row) and
many small ones (replicas, or a CPU). Latency alone cannot find it: it rises with a batch that gains
throughput and with a queue that gains nothing, and the "latency without load" of TCP Vegas or Netflix'
concurrency-limits has no meaning where requests differ in size. So the number climbs the hill of
Kleinrock's power, throughput over mean time from submission to answer ("Power and deterministic rules of
thumb", ICC 1979). With a fixed number of callers that is throughput squared; with a fixed rate of
arrivals it is latency. A step up must bring 5% of throughput (or 10% of latency), a step down may cost
3%; then it rests. Overload halves the number at once, as AIMD does everywhere, and once for
all requests that were under way then.

**Size of a request.** What has gathered while others were under way, up to the limits of the model. With a
target for the latency, additive increase and multiplicative decrease find the largest size that meets it,
as in Clipper (Crankshaw et al., "Clipper: A Low-Latency Online Prediction Serving System", NSDI 2017,
section 4.3).
"""

import math
from dataclasses import dataclass
from typing import Final

__all__ = ["BatchSize", "Concurrency"]

_RUNGS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_GAIN: Final = 1.05
_LOSS: Final = 0.97
_STRETCH_REQUESTS: Final = 16
_STRETCH_S: Final = 0.05
_ALARM_REQUESTS: Final = 4
_ALARM: Final = 1.5
_FIRST_REST: Final = 4  # stretches
_LONGEST_REST: Final = 64


@dataclass(frozen=True)
class _Stretch:
    """What a stretch of time gave."""

    rate: float  # rows/s
    spent_s: float  # mean from submission to answer
    queued: bool  # rows waited for room all the time

    def gain_over(self, other: "_Stretch") -> float:
        """How many times as good; in units of throughput with a fixed number of callers."""
        gain = self.rate / other.rate
        if not (self.queued and other.queued):
            gain *= other.spent_s / self.spent_s
            gain = math.sqrt(gain)
        # Otherwise the queue may be growing, whatever the number, and time in it says nothing.
        return gain


class Concurrency:
    """The number of requests to keep under way: a rung of 1, 2, 3, 4, 6, 8, 12, ... up to `maximum`.

    It moves only while it is reached, by comparing one stretch of time (at least 16 requests, two for each
    under way, and 50 ms) with the one before.
    """

    def __init__(self, initial: int, maximum: int) -> None:
        self._rungs = sorted({size for size in _RUNGS if size < maximum} | {maximum})
        self._rung = max(i for i, size in enumerate(self._rungs) if size <= max(1, min(initial, maximum)))
        self._before: _Stretch | None = None  # before the step on trial
        self._step = 0  # that step
        self._next_step = 1
        self._rest = 0  # stretches to go before the next trial
        self._next_rest = _FIRST_REST
        self._halved = -math.inf
        self._start: float | None = None
        self._requests = 0
        self._rows = 0
        self._spent_s = 0.0
        self._reached = False
        self._queued = True

    @property
    def limit(self) -> int:
        """The most requests under way."""
        return self._rungs[self._rung]

    def answered(self, rows: int, spent_s: float, now: float, *, reached: bool, queued: bool) -> None:
        """A request was answered.

        rows: in the request; spent_s: the time since submission, summed over them.
        reached: as many requests were under way as are allowed; queued: and rows waited for that to change.
        """
        if self._start is None:
            self._start = now
            return
        self._requests += 1
        self._rows += rows
        self._spent_s += spent_s
        self._reached = self._reached or reached
        self._queued = self._queued and queued
        if (
            self._step < 0
            and self._before is not None
            and self._requests >= _ALARM_REQUESTS
            and self._spent_s > _ALARM * self._before.spent_s * self._rows
        ):
            # A queue grows by the whole stretch that it takes to be sure.
            self._begin()
            self._back()
            return
        elapsed_s = now - self._start
        if self._requests < max(_STRETCH_REQUESTS, 2 * self.limit) or elapsed_s < _STRETCH_S:
            return
        stretch = _Stretch(self._rows / elapsed_s, max(self._spent_s, 1e-9) / self._rows, self._queued)
        reached = self._reached
        self._begin()
        if reached:
            self._judge(stretch)
        elif self._step > 0:
            self._back()

    def overloaded(self, sent: float, now: float) -> None:
        """The server refused a request, sent at that moment, for want of room."""
        if sent < self._halved:
            return  # one of those that were too many already then
        self._halved = now
        half = max(1, self.limit // 2)
        self._rung = max(i for i, size in enumerate(self._rungs) if size <= half)
        self._before, self._step, self._rest = None, 0, _FIRST_REST
        self._begin()

    def _judge(self, stretch: _Stretch) -> None:
        if self._before is not None:
            gain = stretch.gain_over(self._before)
            if gain < (_GAIN if self._step > 0 else _LOSS):
                self._back()
                return
            self._next_step, self._next_rest = self._step, _FIRST_REST
            self._before = None
        if self._rest:
            # A queue presses.
            self._rest = self._rest // 4 if stretch.queued else self._rest - 1
            return
        if not 0 <= self._rung + self._next_step < len(self._rungs):
            self._next_step = -self._next_step
            self._settle()
            return
        self._before, self._step = stretch, self._next_step
        self._rung += self._step

    def _back(self) -> None:
        """The step on trial was none for the better."""
        self._rung -= self._step
        self._next_step = -self._step
        self._settle()

    def _settle(self) -> None:
        self._before, self._step = None, 0
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)

    def _begin(self) -> None:
        self._start = None
        self._requests = self._rows = 0
        self._spent_s = 0.0
        self._reached = False
        self._queued = True


class BatchSize:
    """The number of rows that one request may have, from 1 to `maximum`.

    target_latency_s: what a request may take; None leaves the size at its maximum.
    """

    def __init__(self, maximum: int, target_latency_s: float | None) -> None:
        self._target_s = target_latency_s
        self._maximum = maximum
        self._limit = float(maximum if target_latency_s is None else 1)

    @property
    def limit(self) -> int:
        """The most rows for the next request."""
        return int(self._limit)

    def answered(self, rows: int, latency_s: float) -> None:
        """A request of so many rows took so long."""
        if self._target_s is None:
            return
        if latency_s > self._target_s:
            # Clipper backs off by a tenth. Only sizes that were tried say something.
            self._limit = max(1.0, min(self._limit, 0.9 * rows))
        elif rows >= self.limit:
            self._limit = min(float(self._maximum), self._limit + 1)

    def learned(self, maximum: int) -> None:
        """The server takes no more than so many rows."""
        self._maximum = max(1, min(self._maximum, maximum))
        self._limit = min(self._limit, float(self._maximum))
