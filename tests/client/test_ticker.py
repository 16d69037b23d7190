"""The thread that wakes: on real time, waiting for events only."""

import threading
import time

import pytest

from graftserve.client import ticker as module
from graftserve.client.ticker import Ticker

WAIT_S = 20.0  # for what happens in milliseconds


class Ticks:
    """Counts them; `reached(n)` waits for the nth."""

    def __init__(self):
        self.moments = []
        self.threads = []
        self._changed = threading.Condition()

    def __call__(self):
        with self._changed:
            self.moments.append(time.monotonic())
            self.threads.append(threading.current_thread())
            self._changed.notify_all()

    def reached(self, count):
        with self._changed:
            return self._changed.wait_for(lambda: len(self.moments) >= count, WAIT_S)


@pytest.fixture
def ticks():
    return Ticks()


@pytest.fixture
def ticker(ticks):
    ticker = Ticker(ticks)
    yield ticker
    ticker.stop()


def test_it_wakes_at_the_moment_and_not_before(ticker, ticks):
    at = time.monotonic() + 0.05
    ticker.by(at)
    assert ticks.reached(1)
    assert ticks.moments[0] >= at


def test_the_sooner_moment_counts(ticker, ticks):
    ticker.by(time.monotonic() + 3600)
    ticker.by(time.monotonic())
    assert ticks.reached(1)
    assert len(ticks.moments) == 1


def test_a_later_moment_changes_nothing(ticker, ticks):
    at = time.monotonic() + 0.05
    ticker.by(at)
    ticker.by(at + 3600)
    assert ticks.reached(1)


def test_one_thread_serves_all(ticker, ticks):
    for count in range(1, 6):
        ticker.by(time.monotonic())
        assert ticks.reached(count)
    assert len(set(ticks.threads)) == 1
    assert ticks.threads[0].daemon


def test_a_moment_may_be_given_while_it_ticks():
    again = threading.Event()
    count = 0

    def tick():
        nonlocal count
        count += 1
        if count == 3:
            again.set()
        else:
            ticker.by(time.monotonic())

    ticker = Ticker(tick)
    ticker.by(time.monotonic())
    assert again.wait(WAIT_S)
    ticker.stop()


def test_the_thread_ends_when_there_is_nothing_to_do_and_begins_again(ticker, ticks, monkeypatch):
    monkeypatch.setattr(module, "_IDLE_S", 0.0)
    ticker.by(time.monotonic())
    assert ticks.reached(1)
    ticks.threads[0].join(WAIT_S)
    assert not ticks.threads[0].is_alive()
    ticker.by(time.monotonic())
    assert ticks.reached(2)
    assert ticks.threads[1] is not ticks.threads[0]


def test_stopping_ends_the_thread(ticker, ticks):
    ticker.by(time.monotonic())
    assert ticks.reached(1)
    ticker.by(time.monotonic() + 3600)
    ticker.stop()
    ticks.threads[0].join(WAIT_S)
    assert not ticks.threads[0].is_alive()
    ticker.by(time.monotonic())
    assert len(ticks.moments) == 1


def test_a_tick_that_fails_does_not_end_the_next(ticks, caplog):
    def tick():
        ticks()
        if len(ticks.moments) == 1:
            raise ArithmeticError("in a tick")

    ticker = Ticker(tick)
    ticker.by(time.monotonic())
    assert ticks.reached(1)
    ticker.by(time.monotonic())
    assert ticks.reached(2)
    ticker.stop()
    ticks.threads[0].join(WAIT_S)
    assert "in a tick" in caplog.text
