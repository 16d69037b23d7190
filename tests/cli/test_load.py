"""Schedules and statistics of load, by a clock that is set by hand."""

import math
import random
import threading
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from time import sleep
from typing import Any

import numpy as np
import pytest

from graftserve.cli.latency import Histogram
from graftserve.cli.load import (
    Clock,
    Level,
    Recorder,
    closed_loop,
    dispatch,
    open_loop,
    poisson_arrivals,
)


class Time:
    """A clock that goes on when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.cpu_s = 0.0

    def work(self, seconds: float) -> None:
        self.now_s += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, self.work, lambda: self.cpu_s)


def histogram(latencies_s: Any) -> Histogram:
    found = Histogram()
    for latency_s in latencies_s:
        found.add(latency_s)
    return found


@pytest.mark.parametrize(
    ("latencies_s", "percent", "expected_s"),
    [
        ([0.25], 50, 0.25),
        ([0.25], 99.9, 0.25),
        ([0.25, 0.5], 50, 0.25),
        ([0.25, 0.5], 51, 0.5),
        ([0.25] * 999 + [1.0], 99.9, 0.25),
        ([0.25] * 998 + [1.0] * 2, 99.9, 1.0),
        ([0.0, 0.0, 1.0], 50, 0.0),
        ([1e-9, 1e9], 100, 1e9),
        ([1.0, 2.0, 3.0, 4.0], 0, 1.0),
    ],
)
def test_percentiles(latencies_s: list[float], percent: float, expected_s: float) -> None:
    got_s = histogram(latencies_s).percentile_s(percent)
    assert expected_s <= got_s <= expected_s * (1 + 1 / 128)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_the_error_of_a_percentile_is_as_documented(sigma: float) -> None:
    latencies_s = np.random.default_rng(0).lognormal(-5, sigma, 20_000)
    found = histogram(latencies_s.tolist())
    in_order = np.sort(latencies_s)
    for percent in ("0.1", "1", "10", "50", "90", "99", "99.9", "99.99", "100"):
        exact_s = in_order[math.ceil(Fraction(percent) * 20_000 / 100) - 1]
        assert exact_s <= found.percentile_s(float(percent)) <= exact_s * (1 + 1 / 128)
    assert (found.min_s, found.max_s) == (latencies_s.min(), latencies_s.max())
    assert found.mean_s == pytest.approx(latencies_s.mean())
    bins = found.to_dict()["bins"]
    assert sum(count for _, count in bins) == found.count == 20_000
    assert all(edge < later for (edge, _), (later, _) in pairwise(bins))


def test_no_latencies() -> None:
    found = Histogram()
    assert math.isnan(found.percentile_s(50))
    assert math.isnan(found.mean_s)
    assert found.to_dict()["bins"] == []


def test_poissons_moments() -> None:
    moments = list(poisson_arrivals(200, 100, random.Random(1)))
    assert moments == list(poisson_arrivals(200, 100, random.Random(1)))
    assert moments != list(poisson_arrivals(200, 100, random.Random(2)))
    assert moments == sorted(moments)
    assert 0 < moments[0] < moments[-1] < 100
    # Mean 20,000, standard deviation 141; the waits are exponential: their deviation is their mean.
    assert abs(len(moments) - 20_000) < 5 * 141
    waits_s = np.diff(moments)
    assert waits_s.std() == pytest.approx(waits_s.mean(), rel=0.05)


@pytest.mark.parametrize(
    ("moments", "work_s", "expected_s"),
    [
        ([1, 2, 3], {}, [1, 2, 3]),
        ([1, 2, 3, 9], {0: 5}, [1, 6, 6, 9]),  # late ones at once, and then as planned
        ([0, 0, 0], {0: 1, 1: 1}, [0, 1, 2]),
        ([], {}, []),
    ],
)
def test_no_request_is_put_off(
    moments: list[float], work_s: dict[int, float], expected_s: list[float]
) -> None:
    time = Time()
    begin_s = time.now_s
    submitted = []

    def submit(number: int, due_s: float) -> None:
        submitted.append((number, due_s - begin_s, time.now_s - begin_s))
        time.work(work_s.get(number, 0))

    dispatch((begin_s + moment for moment in moments), submit, time.clock)
    assert submitted == [
        (number, due_s, at_s) for number, (due_s, at_s) in enumerate(zip(moments, expected_s, strict=True))
    ]


def test_a_stall_shows_in_an_open_loop_and_hides_in_a_closed_one() -> None:
    """1 ms an answer, but once 1 s: 100 requests a second were due meanwhile."""

    def server(time: Time) -> Callable[[int], None]:
        return lambda number: time.work(1.0 if number == 500 else 0.001)

    time = Time()
    closed = closed_loop(server(time), 1, warm_up_s=0, duration_s=10, cancel=lambda: None, clock=time.clock)
    assert closed.latencies.percentile_s(99) == pytest.approx(0.001, rel=0.01)
    assert closed.latencies.max_s == pytest.approx(1.0)

    time = Time()
    begin_s = time.now_s
    recorder = Recorder(begin_s)
    ask = server(time)
    dispatch(
        (begin_s + number / 100 for number in range(1000)),
        lambda number, due_s: recorder.ask(ask, number, due_s, time.clock),
        time.clock,
    )
    # The k-th request after the stalled one is due 10 k ms after it and answered after 1 s + k ms: it takes
    # 1 s - 9 ms k. 100 are slower than the 90th percentile, the stalled one and those up to k = 99.
    assert recorder.latencies.percentile_s(90) == pytest.approx(1 - 0.009 * 100, rel=0.01)
    assert recorder.latencies.percentile_s(99) == pytest.approx(1 - 0.009 * 10, rel=0.01)
    # It is sent 1 ms before it is answered, late by 10 ms or more up to k = 109.
    assert recorder.late == 109


def test_a_closed_loop_counts_after_the_warm_up() -> None:
    time = Time()
    asked = []

    def ask(number: int) -> None:
        asked.append(number)
        time.work(0.25)
        time.cpu_s += 0.125
        if number % 4 == 3:
            raise TimeoutError

    level = closed_loop(ask, 1, warm_up_s=1, duration_s=2, cancel=lambda: None, clock=time.clock)
    assert asked == list(range(12))
    assert (level.answers, dict(level.errors), level.duration_s) == (6, {"TimeoutError": 2}, 2.0)
    assert level.images_per_s == 3.0
    assert (level.latencies.count, level.latencies.min_s, level.latencies.max_s) == (6, 0.25, 0.25)
    assert level.cpus == 0.5
    assert not level.interrupted


def test_callers_ask_at_the_same_time() -> None:
    together = threading.Barrier(5)
    time = Time()

    def ask(_: int) -> None:
        if together.wait(30) == 0:
            time.work(1.0)
        together.wait(30)

    level = closed_loop(ask, 5, warm_up_s=0, duration_s=1, cancel=lambda: None, clock=time.clock)
    assert level.answers == 5


def _open(ask: Callable[[int], object], time: Time, **options: Any) -> Level:
    settings = {"max_callers": 2, "warm_up_s": 0, "duration_s": 10, "drain_s": 5} | options
    return open_loop(ask, 10, chance=random.Random(3), cancel=lambda: None, clock=time.clock, **settings)


def test_what_finds_no_caller_is_not_sent_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = list(poisson_arrivals(10, 10, random.Random(3)))
    time = Time()
    begin_s = time.now_s
    answered = threading.Event()
    asked = []

    def ask(number: int) -> None:
        asked.append(number)
        assert answered.wait(30)

    give_up = Recorder.give_up
    given_up = []

    def count(self: Recorder, due_s: float, now_s: float) -> None:
        give_up(self, due_s, now_s)
        given_up.append(due_s - begin_s)
        if len(given_up) == len(moments) - 2:
            answered.set()  # only now the two that were sent are answered

    monkeypatch.setattr(Recorder, "give_up", count)
    level = _open(ask, time)
    assert sorted(asked) == [0, 1]
    assert given_up == pytest.approx(moments[2:])
    assert level.not_sent == len(moments) - 2
    assert level.answers == 2
    # They count with what they have waited at least: 5 s after the last was due.
    assert level.latencies.count == len(moments)
    assert level.latencies.min_s >= 5.0
    assert level.latencies.max_s == pytest.approx(moments[-1] + 5.0 - moments[0], abs=0.2)


def test_no_more_threads_than_requests_that_wait_for_each_other() -> None:
    together = threading.Barrier(3)
    threads = set()

    def ask(number: int) -> None:
        threads.add(threading.get_ident())
        if number < 3:
            together.wait(30)  # the first three need three threads

    class Slow(Time):
        """Nobody is given up: each sleep leaves the callers some time."""

        def work(self, seconds: float) -> None:
            super().work(seconds)
            sleep(0.001)

    level = _open(ask, Slow(), max_callers=3, drain_s=1e9)
    assert level.answers == len(list(poisson_arrivals(10, 10, random.Random(3))))
    assert level.not_sent == 0
    assert len(threads) == 3


def test_levels_have_names_and_dictionaries_for_json() -> None:
    values = {
        "duration_s": 0.0,
        "latencies": Histogram(),
        "answers": 0,
        "errors": {},
        "late": 0,
        "not_sent": 0,
        "cpus": 0.0,
        "interrupted": False,
    }
    names = [
        Level(callers=callers, rate_per_s=rate, **values).name
        for callers, rate in ((1, None), (8, None), (8, 12.5), (8, 100.0))
    ]
    assert names == ["1 caller", "8 callers", "12.5/s", "100/s"]
    found = Level(callers=1, rate_per_s=None, **values).to_dict()
    assert found["images_per_s"] == 0
    assert set(found["latency_ms"].values()) == {None}
