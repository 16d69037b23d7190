"""Load on a server: so many callers at a time, or requests at moments of their own.

In a closed loop each caller asks again when it is answered, so a server that stalls is asked less, and the
stall hides in a few latencies: "coordinated omission" (Gil Tene, "How NOT to Measure Latency", 2013). In an
open loop requests are due at moments that do not depend on the answers, and a latency counts from when its
request was due, as in Tene's wrk2, so that waiting for a free caller is part of it.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, Final, Self

from .latency import PERCENTILES, Histogram

__all__ = ["Clock", "Level", "Recorder", "closed_loop", "dispatch", "open_loop", "poisson_arrivals"]

Ask = Callable[[int], object]
"""Sends the request of that number and waits for the answer; raises if there is none."""

# Sent so much after it was due, a request found no free caller, or this process no time.
LATE_S: Final = 0.01
_AWAKE_S: Final = 0.1
_STOP_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True)
class Clock:
    """now_s: seconds from any moment. sleep_s: wait so many. cpu_s: seconds that this process computed."""

    now_s: Callable[[], float] = time.perf_counter
    sleep_s: Callable[[float], None] = time.sleep
    cpu_s: Callable[[], float] = time.process_time


@dataclass(frozen=True)
class Level:
    """What came of one level of load.

    callers: at a time, the most of them in an open loop.
    rate_per_s: the requests due, None in a closed loop.
    duration_s: from the first counted request's moment to the last answer.
    latencies: of the requests that were answered, and of those not sent until the end: then percentiles are
        lower bounds.
    errors: how many failed, by class; they are in no latency.
    late: sent LATE_S or more after they were due, in an open loop.
    not_sent: due, but still waiting for a caller at the end.
    cpus: how many CPUs this process kept busy.
    interrupted: the level ended early.
    """

    callers: int
    rate_per_s: float | None
    duration_s: float
    latencies: Histogram
    answers: int
    errors: Mapping[str, int]
    late: int
    not_sent: int
    cpus: float
    interrupted: bool

    @property
    def name(self) -> str:
        """For people: "8 callers", "50/s"."""
        if self.rate_per_s is not None:
            return f"{self.rate_per_s:g}/s"
        return f"{self.callers} caller{'' if self.callers == 1 else 's'}"

    @property
    def images_per_s(self) -> float:
        """Answers a second."""
        return self.answers / self.duration_s if self.duration_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, latencies in ms; None where there are none."""
        found = self.latencies
        percentiles = {f"p{percent:g}": found.percentile_s(percent) for percent in PERCENTILES}
        latency_s = {"mean": found.mean_s, **percentiles, "min": found.min_s, "max": found.max_s}
        return {
            "loop": "closed" if self.rate_per_s is None else "open",
            "callers": self.callers,
            "rate_per_s": self.rate_per_s,
            "duration_s": self.duration_s,
            "answers": self.answers,
            "images_per_s": self.images_per_s,
            "latency_ms": {name: value * 1e3 if found.count else None for name, value in latency_s.items()},
            "errors": dict(self.errors),
            "late": self.late,
            "not_sent": self.not_sent,
            "client_cpus": self.cpus,
            "interrupted": self.interrupted,
            "histogram": found.to_dict(),
        }


class Recorder:
    """What the requests of one level came to; safe to use from many threads.

    start_s: requests due earlier warm the server up and do not count.
    """

    def __init__(self, start_s: float) -> None:
        self.start_s = self.end_s = start_s
        self.latencies = Histogram()
        self.errors: Counter[str] = Counter()
        self.answers = self.late = self.not_sent = 0
        self._closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Count no more."""
        with self._lock:
            self._closed = True

    def ask(self, ask: Ask, number: int, due_s: float, clock: Clock) -> None:
        """Send a request that was due at `due_s`, and count what comes of it."""
        sent_s = clock.now_s()
        error = None
        try:
            ask(number)
        except Exception as caught:
            error = caught
        answered_s = clock.now_s()
        with self._lock:
            if self._closed or due_s < self.start_s:
                return
            self.end_s = max(self.end_s, answered_s)
            self.late += sent_s - due_s >= LATE_S
            if error is None:
                self.answers += 1
                self.latencies.add(answered_s - due_s)
            else:
                self.errors[type(error).__name__] += 1

    def give_up(self, due_s: float, now_s: float) -> None:
        """Count a request that was never sent: it has waited until now, at least."""
        with self._lock:
            if not self._closed and due_s >= self.start_s:
                self.not_sent += 1
                self.latencies.add(now_s - due_s)


def poisson_arrivals(rate_per_s: float, duration_s: float, chance: random.Random) -> Iterator[float]:
    """Moments in [0, duration_s) at which requests are due that know nothing of each other."""
    due_s = chance.expovariate(rate_per_s)
    while due_s < duration_s:
        yield due_s
        due_s += chance.expovariate(rate_per_s)


def dispatch(moments: Iterable[float], submit: Callable[[int, float], None], clock: Clock) -> None:
    """Call submit(number, moment) when each moment has come, or at once if it has passed.

    moments: of the clock, ascending. None is put off, however late the one before was.
    """
    for number, due_s in enumerate(moments):
        while (left_s := due_s - clock.now_s()) > 0:
            clock.sleep_s(left_s)
        submit(number, due_s)


def closed_loop(
    ask: Ask, callers: int, *, warm_up_s: float, duration_s: float, cancel: Callable[[], object], clock: Clock
) -> Level:
    """`callers` threads, each asking one thing after the other until the time is over.

    cancel: ends the calls under way; called after Ctrl-C, which ends the level early.
    """
    numbers = count()  # next() of it is atomic
    recorder = Recorder(clock.now_s() + warm_up_s)
    end_s = recorder.start_s + duration_s
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set() and (now_s := clock.now_s()) < end_s:
            recorder.ask(ask, next(numbers), now_s, clock)

    threads: list[threading.Thread] = []
    with _Measurement(recorder, clock) as measurement:
        try:
            for _ in range(callers):
                threads.append(_start(call))
            _join(threads)
        except KeyboardInterrupt:
            stop.set()
            measurement.interrupt(threads, cancel)
    return measurement.level(callers, None)


def open_loop(
    ask: Ask,
    rate_per_s: float,
    *,
    max_callers: int,
    warm_up_s: float,
    duration_s: float,
    drain_s: float,
    chance: random.Random,
    cancel: Callable[[], object],
    clock: Clock,
) -> Level:
    """Requests at moments of their own, sent by at most `max_callers` threads.

    drain_s: how long, after the last request was due, those that wait for a caller are still sent.
    cancel: ends the calls under way; called after Ctrl-C, which ends the level early.
    """
    begin_s = clock.now_s()
    moments = (begin_s + due_s for due_s in poisson_arrivals(rate_per_s, warm_up_s + duration_s, chance))
    recorder = Recorder(begin_s + warm_up_s)
    waiting: SimpleQueue[tuple[int, float] | None] = SimpleQueue()
    free = threading.Semaphore(0)
    threads: list[threading.Thread] = []

    def call() -> None:
        while (item := waiting.get()) is not None:
            recorder.ask(ask, *item, clock)
            free.release()

    def submit(number: int, due_s: float) -> None:
        waiting.put((number, due_s))
        if not free.acquire(blocking=False) and len(threads) < max_callers:
            threads.append(_start(call))

    def give_up_waiting() -> None:
        now_s = clock.now_s()
        while True:
            try:
                item = waiting.get_nowait()
            except Empty:
                break
            if item is not None:
                recorder.give_up(item[1], now_s)
        for _ in threads:
            waiting.put(None)

    with _Measurement(recorder, clock) as measurement:
        try:
            dispatch(moments, submit, clock)
            end_s = clock.now_s() + drain_s
            while not waiting.empty() and clock.now_s() < end_s:
                clock.sleep_s(_AWAKE_S)
            give_up_waiting()
            _join(threads)
        except KeyboardInterrupt:
            give_up_waiting()
            measurement.interrupt(threads, cancel)
    return measurement.level(max_callers, rate_per_s)


class _Measurement:
    """A level while it lasts."""

    def __init__(self, recorder: Recorder, clock: Clock) -> None:
        self._recorder, self._clock = recorder, clock
        self._interrupted = False
        self._cpus = 0.0

    def __enter__(self) -> Self:
        self._began_s, self._cpu_s = self._clock.now_s(), self._clock.cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        wall_s = self._clock.now_s() - self._began_s
        self._cpus = (self._clock.cpu_s() - self._cpu_s) / wall_s if wall_s > 0 else 0.0

    def interrupt(self, threads: Iterable[threading.Thread], cancel: Callable[[], object]) -> None:
        """End the calls under way, which do not count."""
        self._interrupted = True
        self._recorder.close()
        cancel()
        for thread in threads:
            thread.join(_STOP_TIMEOUT_S)

    def level(self, callers: int, rate_per_s: float | None) -> Level:
        """What came of it."""
        found = self._recorder
        return Level(
            callers=callers,
            rate_per_s=rate_per_s,
            duration_s=found.end_s - found.start_s,
            latencies=found.latencies,
            answers=found.answers,
            errors=dict(found.errors.most_common()),
            late=found.late,
            not_sent=found.not_sent,
            cpus=self._cpus,
            interrupted=self._interrupted,
        )


def _start(run: Callable[[], None]) -> threading.Thread:
    # A daemon: a call that cannot be cancelled does not keep the process.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        while thread.is_alive():
            thread.join(_AWAKE_S)  # Python acts on Ctrl-C between two of them
