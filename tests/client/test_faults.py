"""Crowds of callers while servers and networks fail, with both clients.

What holds throughout: every call is answered once, with its own result or its own error, in its time.
"""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from graftserve.client import (
    Client,
    ClientError,
    InvalidImageError,
    RetryPolicy,
    UnavailableError,
)
from graftserve.client.testing import FakeServer
from tests.client.async_in_thread import AsyncInThread
from tests.client.dns import FakeDns
from tests.client.proxy import FaultyProxy

SLACK_S = 10.0  # for a busy machine to get a thread to say that its time is over
PATIENT = RetryPolicy(max_attempts=100, budget_per_s=1000)

pytestmark = pytest.mark.parametrize("client_class", [Client, AsyncInThread])


def own_label(image):
    """An answer that is no other image's."""
    return None if image.startswith(b"bad") else image[:20].decode()


@pytest.fixture
def server():
    with FakeServer("flowers", answer=own_label) as server:
        yield server


class Crowd:
    """Threads that call and check, until all `calls` are made, or until they are stopped."""

    def __init__(self, client, *, calls=None, threads=64, timeout_s=30.0, image_bytes=100, bad_every=None):
        self._client = client
        self._timeout_s = timeout_s
        self._image_bytes = image_bytes
        self._bad_every = bad_every
        self._numbers = itertools.count() if calls is None else iter(range(calls))
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.outcomes = Counter()
        self._pool = ThreadPoolExecutor(threads)
        self._futures = [self._pool.submit(self._run, seed) for seed in range(threads)]

    @property
    def answered(self):
        return sum(self.outcomes.values())

    def wait_for(self, answers):
        """Until so many more are answered."""
        answers += self.answered
        end = time.monotonic() + 60
        while self.answered < answers and not all(future.done() for future in self._futures):
            assert time.monotonic() < end, self.outcomes
            time.sleep(0.002)

    def finish(self, *, stop=False):
        """Wait for the calls to end; how they did, by the names of classes."""
        if stop:
            self._stop.set()
        for future in self._futures:
            future.result(120)
        self._pool.shutdown()
        return self.outcomes

    def _run(self, seed):
        chance = random.Random(seed)
        while not self._stop.is_set():
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            bad = bool(self._bad_every) and number % self._bad_every == 0
            image = f"{'bad ' if bad else ''}{number}".encode().ljust(self._image_bytes)
            timeout_s = self._timeout_s(chance) if callable(self._timeout_s) else self._timeout_s
            error = label = None
            begin = time.monotonic()
            try:
                label = self._client.classify(image, timeout_s=timeout_s).label
            except ClientError as raised:
                error = raised
            if error is None:
                outcome = "answer"
                assert label == own_label(image), (label, number)
            else:
                outcome = type(error).__name__
                assert isinstance(error, InvalidImageError) == bad, error
            assert time.monotonic() - begin < timeout_s + SLACK_S
            with self._lock:
                self.outcomes[outcome] += 1


def settled(client):
    """Nothing is left of the calls that have ended."""
    end = time.monotonic() + 20
    while client.stats().in_flight or client.stats().queued:
        assert time.monotonic() < end, client.stats()
        time.sleep(0.005)


def test_ten_thousand_calls_from_64_threads_with_one_image_in_fifty_corrupt(server, client_class):
    with client_class(server.target, "flowers") as client:
        outcomes = Crowd(client, calls=10_000, bad_every=50).finish()
        stats = client.stats()
        settled(client)
    assert outcomes == {"answer": 9_800, "InvalidImageError": 200}
    assert stats.requests < 5_000
    assert sum(len(batch) for batch in server.batches) == 10_000


def test_a_server_that_goes_and_comes_back_under_load(server, client_class):
    with client_class(server.target, "flowers", retry=PATIENT, wait_for_ready=True, timeout_s=60) as client:
        crowd = Crowd(client)
        for _ in range(5):
            crowd.wait_for(500)
            server.stop()
            server.start()
        crowd.wait_for(500)
        outcomes = crowd.finish(stop=True)
        settled(client)
        assert client.stats().retries > 0
    assert set(outcomes) == {"answer"}


def test_a_server_that_stays_away_is_said_to_be_away_until_it_is_back(server, client_class):
    with client_class(server.target, "flowers") as client:
        crowd = Crowd(client, threads=16)
        crowd.wait_for(200)
        server.stop()
        end = time.monotonic() + 60
        while not any(target.circuit_open for target in client.stats().targets):
            assert time.monotonic() < end
            time.sleep(0.01)
        begin = time.monotonic()
        with pytest.raises(UnavailableError):
            client.classify(b"1", timeout_s=30)
        assert time.monotonic() - begin < 20
        server.start()
        end = time.monotonic() + 60
        while any(target.circuit_open for target in client.stats().targets):
            assert time.monotonic() < end
            time.sleep(0.01)
        crowd.wait_for(200)
        outcomes = crowd.finish(stop=True)
        settled(client)
    assert set(outcomes) == {"answer", "UnavailableError"}


def test_one_of_three_replicas_hangs(server, client_class):
    with (
        FaultyProxy(server.port) as one,
        FaultyProxy(server.port) as two,
        FaultyProxy(server.port) as three,
        client_class(f"ipv4:{one.address},{two.address},{three.address}", "flowers") as client,
    ):
        crowd = Crowd(client)
        crowd.wait_for(500)
        two.hang()
        crowd.wait_for(2000)
        two.resume()
        crowd.wait_for(500)
        outcomes = crowd.finish(stop=True)
        settled(client)
        assert client.stats().hedges > 0
    assert set(outcomes) == {"answer"}


def test_delayed_packets(server, client_class):
    with (
        FaultyProxy(server.port, delay_s=0.05) as proxy,
        client_class(proxy.address, "flowers") as client,
    ):
        outcomes = Crowd(client, calls=1000).finish()
        assert client.stats().network_s_p50 >= 0.1
    assert outcomes == {"answer": 1000}


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_connections_reset_in_the_middle_of_messages(server, client_class, direction):
    chance = random.Random(3)
    with (
        FaultyProxy(server.port) as proxy,
        client_class(proxy.address, "flowers", retry=PATIENT) as client,
    ):
        crowd = Crowd(client, image_bytes=20_000 if direction == "to_server" else 100)
        for _ in range(20):
            crowd.wait_for(50)
            proxy.reset_after(chance.randrange(1, 5000), direction)
        crowd.wait_for(50)
        outcomes = crowd.finish(stop=True)
        settled(client)
        assert proxy.resets >= 10
    assert set(outcomes) == {"answer"}


def test_a_name_that_leads_elsewhere(client_class):
    with (
        FakeServer("flowers", answer=own_label, host="127.0.0.2") as first,
        FakeDns({"flowers.test": ["127.0.0.2"]}) as dns,
        FakeServer("flowers", answer=own_label, host="127.0.0.3", port=first.port) as second,
        client_class(dns.target("flowers.test", first.port), "flowers", retry=PATIENT) as client,
    ):
        crowd = Crowd(client, threads=16)
        crowd.wait_for(200)
        assert not second.calls
        dns.addresses["flowers.test"] = ["127.0.0.3"]
        first.stop()
        crowd.wait_for(500)
        outcomes = crowd.finish(stop=True)
        assert second.calls
    assert set(outcomes) == {"answer"}


def test_a_storm_of_deadlines(server, client_class):
    server.latency_s = 0.1
    with client_class(server.target, "flowers", max_in_flight=2) as client:
        crowd = Crowd(client, calls=2000, timeout_s=lambda chance: chance.choice([0.001, 0.05, 0.15, 30]))
        outcomes = crowd.finish()
        settled(client)
        assert client.classify(b"1").label == "1"
    assert set(outcomes) == {"answer", "DeadlineExceededError"}
    assert outcomes["answer"] >= 400
    assert outcomes["DeadlineExceededError"] >= 400


def test_overload_is_passed_on_at_once(server, client_class):
    server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, times=None, every=3)
    with client_class(server.target, "flowers") as client:
        outcomes = Crowd(client, calls=2000).finish()
        assert client.stats().retries == 0
        settled(client)
    assert set(outcomes) == {"answer", "OverloadedError"}


LEAK = """
import gc, sys, threading
from pathlib import Path
from tests.client.async_in_thread import AsyncInThread
from tests.client.test_faults import Crowd
from graftserve.client import Client

def resident_kb():
    gc.collect()
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l).split()[1])

with {client}({target!r}, "flowers") as client:
    Crowd(client, calls=30_000, bad_every=50).finish()
    before = resident_kb(), threading.active_count()
    Crowd(client, calls=100_000, bad_every=50).finish()
    after = resident_kb(), threading.active_count()
    print(after[0] - before[0], after[1] - before[1], client.stats().in_flight)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_calls_leave_nothing_behind(client_class, tmp_path):
    program = "from graftserve.client.testing import FakeServer\nimport sys\n"
    program += "with FakeServer('flowers', answer=lambda image: None if image.startswith(b'bad') else "
    program += "image[:20].decode()) as server:\n"
    program += "    server.calls = type('None_', (list,), {'append': lambda *_: None})([None])\n"
    program += "    print(server.target, flush=True)\n    sys.stdin.read()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        code = LEAK.format(client=client_class.__name__, target=process.stdout.readline().strip())
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=580,
            env={**os.environ, "PYTHONPATH": "."},
        )
    finally:
        process.kill()
        process.communicate()
    assert done.returncode == 0, done.stderr
    grown_kb, more_threads, in_flight = map(int, done.stdout.split())
    assert grown_kb < 8_000
    assert more_threads <= 1  # the ticker may rest or not
    assert in_flight == 0
