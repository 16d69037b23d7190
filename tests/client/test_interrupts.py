"""Ctrl-C at any moment: the process ends, and a client that is kept goes on."""

import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from graftserve.client.interrupts import Uninterrupted
from graftserve.client.testing import FakeServer


@pytest.fixture(autouse=True)
def _interruptible():
    """Where the tests run in the background SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_comes_at_the_end_of_the_block():
    steps = []

    def block():
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
                steps.append("inner")
            steps.append("outer")
        steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert steps == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_and_threads_are_left_alone():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Uninterrupted():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []

    def other():
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


# What a notebook does: a cell is interrupted, the next one uses the same client.
CELLS = """
import itertools, signal, sys
from graftserve.client import Client
signal.signal(signal.SIGINT, signal.default_int_handler)
with Client(sys.argv[1], "flowers", timeout_s=60) as client:
    client.classify(b"1")
    try:
        print("ready", flush=True)
        {cell}
    except KeyboardInterrupt:
        print("interrupted", len(client.classify_many([b"1"] * 300)), flush=True)
    stats = client.stats()
    print(stats.queued, stats.in_flight, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        "while True: client.classify(b'1')",
        "while True: client.classify_many([b'1'] * 300)",
        "for _ in client.stream(b'1' for _ in itertools.count()): pass",
    ],
    ids=["one", "many", "stream"],
)
def test_a_client_survives_ctrl_c(cell):
    chance = random.Random(1)
    with FakeServer("flowers", latency_s=0.003) as server:
        for _ in range(15):
            process = subprocess.Popen(
                [sys.executable, "-c", CELLS.format(cell=cell), server.target],
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                assert process.stdout.readline() == "ready\n"
                time.sleep(0.2 * chance.random())
                process.send_signal(signal.SIGINT)
                stdout, _ = process.communicate(timeout=60)
            finally:
                process.kill()
                process.communicate()
            assert (process.returncode, stdout) == (0, "interrupted 300\n0 0\n")
