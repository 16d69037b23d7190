"""Both clients against the real server and a real model, through a network that fails."""

import itertools
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from graftserve.cli.server_process import ServerProcess
from graftserve.client import Client, InvalidImageError, RetryPolicy
from tests.client.async_in_thread import AsyncInThread
from tests.client.proxy import FaultyProxy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.parametrize("client_class", [Client, AsyncInThread]),
]

PATIENT = RetryPolicy(max_attempts=1000, budget_per_s=1000)
CALLERS = 16


@pytest.fixture(scope="module")
def images(digits_dir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(digits_dir.rglob("*.jpg"))[::4]]


class Callers:
    """Threads that ask for one image after the other, one in fifty corrupt, and compare each answer."""

    def __init__(self, client, images, expected):
        self._client, self._images, self._expected = client, images, expected
        self._numbers = itertools.count(1)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.outcomes = Counter()
        self._pool = ThreadPoolExecutor(CALLERS)
        self._futures = [self._pool.submit(self._run) for _ in range(CALLERS)]

    def wait_for(self, answers):
        answers += sum(self.outcomes.values())
        end = time.monotonic() + 240
        while sum(self.outcomes.values()) < answers and not any(future.done() for future in self._futures):
            assert time.monotonic() < end, self.outcomes
            time.sleep(0.01)

    def finish(self):
        self._stop.set()
        for future in self._futures:
            future.result(240)
        self._pool.shutdown()
        return self.outcomes

    def _run(self):
        while not self._stop.is_set():
            with self._lock:
                number = next(self._numbers)
            index = number % len(self._images)
            image = self._images[index]
            if number % 50 == 0:
                with pytest.raises(InvalidImageError):
                    self._client.classify(image[: len(image) // 2], timeout_s=200)
                outcome = "corrupt"
            else:
                answer = self._client.classify(image, timeout_s=200)
                assert answer.label == self._expected[index].label
                assert answer.score == pytest.approx(self._expected[index].score, abs=1e-3)
                outcome = "answer"
            with self._lock:
                self.outcomes[outcome] += 1


def test_a_killed_server_a_slow_network_and_broken_connections(exported, images, client_class):
    chance = random.Random(7)
    server = ServerProcess("digits", exported.path.parent)
    address = server.addresses()["gRPC"]
    port = int(address.rpartition(":")[2])
    try:
        with (
            FaultyProxy(port) as proxy,
            client_class(proxy.address, "digits", retry=PATIENT, wait_for_ready=True) as client,
        ):
            assert client.wait_until_ready(60) == 1
            expected = client.classify_many(images)
            vectors = client.embed(images[:8])
            callers = Callers(client, images, expected)
            callers.wait_for(200)

            assert server.end(signal.SIGKILL) == -signal.SIGKILL
            server = ServerProcess("digits", exported.path.parent, f"--port={port}")
            server.addresses()
            callers.wait_for(100)

            proxy.delay_s = 0.05
            callers.wait_for(100)
            proxy.delay_s = 0.0
            for direction in ("to_server", "to_client") * 3:
                proxy.reset_after(chance.randrange(1, 2000), direction)
                callers.wait_for(30)

            outcomes = callers.finish()
            np.testing.assert_allclose(client.embed(images[:8]), vectors, atol=1e-4)
            stats = client.stats()
            assert (stats.queued, stats.in_flight) == (0, 0)
            assert set(stats.errors) == {"InvalidImageError"}
    finally:
        server.end()
    assert set(outcomes) == {"answer", "corrupt"}
    assert outcomes["corrupt"] >= 5
