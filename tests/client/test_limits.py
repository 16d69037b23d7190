"""The limits against simulated servers: a virtual clock, and chance from a seed."""

import heapq
import itertools
import math
import random
from dataclasses import dataclass

import pytest

from graftserve.client.batching import share
from graftserve.client.limits import BatchSize, Concurrency

MAX_ROWS = 32
SETTLING_S = 30.0
MEASURED_S = 30.0
NETWORK_S = 0.002
NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Server:
    """Workers that each take one request at a time, for fixed_s and row_s a row."""

    workers: int
    fixed_s: float
    row_s: float


SERVERS = {
    "gpu": Server(1, 0.005, 0.0002),
    "two CPUs": Server(2, 0.0, 0.012),
    "eight replicas": Server(8, 0.005, 0.01),
    "three workers": Server(3, 0.02, 0.002),
}


class Fixed:
    """A number of requests that stays as it is."""

    def __init__(self, limit):
        self.limit = limit

    def answered(self, *_, **__):
        pass


def simulate(server, concurrency, *, callers=0, rate=0.0):
    """Rows a second, and the mean seconds from submission to answer, after the settling time.

    callers: ask again as soon as they are answered; rate: rows that arrive a second, whatever happens.
    """
    chance = random.Random(1)
    now = 0.0
    waiting = [0.0] * callers
    next_arrival = chance.expovariate(rate) if rate else math.inf
    answers = []
    order = itertools.count()
    free_at = [0.0] * server.workers
    in_flight = in_flight_rows = 0
    rows = 0
    spent_s = 0.0
    while now < SETTLING_S + MEASURED_S:
        while waiting and in_flight < concurrency.limit:
            count = share(len(waiting) + in_flight_rows, concurrency.limit, MAX_ROWS)
            batch, waiting = waiting[:count], waiting[count:]
            in_flight += 1
            in_flight_rows += len(batch)
            worker = min(range(server.workers), key=free_at.__getitem__)
            service_s = (server.fixed_s + server.row_s * len(batch)) * chance.uniform(0.95, 1.1)
            free_at[worker] = max(free_at[worker], now + NETWORK_S / 2) + service_s
            heapq.heappush(answers, (free_at[worker] + NETWORK_S / 2, next(order), batch))
        if next_arrival < (answers[0][0] if answers else math.inf):
            now = next_arrival
            waiting.append(now)
            next_arrival = now + chance.expovariate(rate)
            continue
        now, _, batch = heapq.heappop(answers)
        spent = sum(now - submitted for submitted in batch)
        reached = in_flight >= concurrency.limit
        in_flight -= 1
        in_flight_rows -= len(batch)
        concurrency.answered(len(batch), spent, now, reached=reached, queued=bool(waiting))
        if now > SETTLING_S:
            rows += len(batch)
            spent_s += spent
        if callers:
            waiting += [now] * len(batch)
    return rows / (now - SETTLING_S), spent_s / rows


@pytest.mark.parametrize("callers", [1, 8, 64, 256])
@pytest.mark.parametrize("name", SERVERS)
def test_the_throughput_is_near_that_of_the_best_number(name, callers):
    found, _ = simulate(SERVERS[name], Concurrency(4, 16), callers=callers)
    best = max(simulate(SERVERS[name], Fixed(number), callers=callers)[0] for number in NUMBERS)
    assert found >= 0.9 * best


@pytest.mark.parametrize("load", [0.3, 0.7])
@pytest.mark.parametrize("name", SERVERS)
def test_the_latency_is_near_that_of_the_best_number(name, load):
    server = SERVERS[name]
    capacity = max(simulate(server, Fixed(number), callers=256)[0] for number in NUMBERS)
    _, found_s = simulate(server, Concurrency(4, 16), rate=load * capacity)
    best_s = min(simulate(server, Fixed(number), rate=load * capacity)[1] for number in NUMBERS)
    assert found_s <= 1.5 * best_s


@pytest.mark.parametrize(
    ("initial", "maximum", "limit"), [(4, 16, 4), (8, 5, 5), (5, 16, 4), (100, 1000, 64), (4, 1, 1)]
)
def test_it_begins_at_a_rung(initial, maximum, limit):
    assert Concurrency(initial, maximum).limit == limit


def test_overload_halves():
    concurrency = Concurrency(16, 16)
    limits = []
    for second in range(6):
        concurrency.overloaded(sent=float(second), now=second + 0.5)
        limits.append(concurrency.limit)
    assert limits == [8, 4, 2, 1, 1, 1]


def test_overload_halves_once_for_what_was_under_way():
    concurrency = Concurrency(16, 16)
    for moment in (1.0, 1.001, 1.002):
        concurrency.overloaded(sent=0.9, now=moment)
    assert concurrency.limit == 8
    concurrency.overloaded(sent=1.0, now=1.1)
    assert concurrency.limit == 4


def test_a_number_that_is_not_reached_stays():
    concurrency = Concurrency(4, 16)
    for step in range(10_000):
        concurrency.answered(1, 0.01, 0.01 * step, reached=False, queued=False)
    assert concurrency.limit == 4


@pytest.mark.parametrize("target_s", [0.02, 0.05, 0.2])
def test_the_size_of_requests_meets_the_target(target_s):
    size = BatchSize(64, target_s)
    latencies = []
    for _ in range(1000):
        rows = size.limit
        latency_s = 0.005 + 0.002 * rows
        latencies.append(latency_s)
        size.answered(rows, latency_s)
    settled = latencies[500:]
    largest = min(64, int((target_s - 0.005) / 0.002))
    assert sum(latency_s <= target_s for latency_s in settled) >= 0.5 * len(settled)
    assert max(settled) <= target_s + 0.002
    assert min(settled) >= 0.005 + 0.002 * math.floor(0.85 * largest)


def test_a_slow_small_request_says_that_smaller_ones_are_needed():
    size = BatchSize(64, 0.05)
    for _ in range(40):
        size.answered(size.limit, 0.01)
    assert size.limit == 41
    size.answered(10, 0.06)
    assert size.limit == 9
    size.answered(3, 0.01)  # below the limit: says nothing of it
    assert size.limit == 9


def test_one_row_may_always_be_sent():
    size = BatchSize(64, 0.001)
    for _ in range(10):
        size.answered(size.limit, 1.0)
    assert size.limit == 1


@pytest.mark.parametrize("target_s", [None, 10.0])
def test_the_server_s_limit_is_never_passed(target_s):
    size = BatchSize(64, target_s)
    size.learned(8)
    size.learned(16)
    for _ in range(100):
        size.answered(size.limit, 0.01)
    assert size.limit == 8
    size.learned(0)
    assert size.limit == 1
