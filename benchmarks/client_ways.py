"""Ways to ask a server for the classes of images, and how fast they are: a process of their own.

    python benchmarks/client_ways.py client 127.0.0.1:8500 --callers 8 --photos folder
    python benchmarks/client_ways.py accelerator

The ways are those of `client.py`; the result is JSON. `accelerator` is a server that sleeps as long as an
accelerator computes; it prints its address and runs until its input ends.
"""

import argparse
import asyncio
import itertools
import json
import os
import queue
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import grpc

from graftserve.client import AsyncClient, Client
from graftserve.client.testing import FakeServer
from graftserve.client.wire import PredictRequest, PredictResponse
from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, IMAGE_BYTES, SERVING_DEFAULT
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.values import floats, strings, write_strings

__all__ = ["BATCH", "MODEL", "WAYS"]

MODEL = "bench"
WAYS = ("raw", "batcher", "packed", "client", "asyncio")
BATCH = 32
_TIMEOUT_S = 60.0
_REQUEST_S, _IMAGE_S = 0.005, 0.0002

Ask = Callable[[bytes], int]
"""Ask for an image; gives how many images were answered."""


class Raw:
    """A stub, as the messages come; a request holds the image so many times."""

    def __init__(self, target: str, images: int = 1) -> None:
        channel = grpc.insecure_channel(target, [("grpc.max_receive_message_length", -1)])
        self._stub = channel.unary_unary(
            PREDICT.path,
            request_serializer=PredictRequest.SerializeToString,
            response_deserializer=PredictResponse.FromString,
        )
        self._images = images

    def __call__(self, content: bytes) -> int:
        self.predict([content] * self._images)
        return self._images

    def predict(self, contents: Sequence[bytes]) -> list[bytes]:
        """The best class of each image."""
        request = PredictRequest(output_filter=CLASSIFY_OUTPUTS)
        request.model_spec.name, request.model_spec.signature_name = MODEL, SERVING_DEFAULT
        write_strings(contents, request.inputs[IMAGE_BYTES])
        response = self._stub(request, timeout=_TIMEOUT_S)
        labels, (rows, width) = strings(response.outputs["classes"])
        floats(response.outputs["scores"])
        return [labels[row * width] for row in range(rows)]


class Batcher:
    """A queue and threads that empty it."""

    def __init__(self, target: str, threads: int = 4, wait_s: float = 0.005) -> None:
        self._raw = Raw(target)
        self._wait_s = wait_s
        self._queue: queue.SimpleQueue[tuple[bytes, Future[bytes]]] = queue.SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, content: bytes) -> int:
        future: Future[bytes] = Future()
        self._queue.put((content, future))
        future.result()
        return 1

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            until_s = time.perf_counter() + self._wait_s
            while len(batch) < BATCH:
                try:
                    batch.append(self._queue.get(timeout=max(0.0, until_s - time.perf_counter())))
                except queue.Empty:
                    break
            labels = self._raw.predict([content for content, _ in batch])
            for (_, future), label in zip(batch, labels, strict=True):
                future.set_result(label)


def open_way(way: str, target: str) -> Ask:
    """What `way` asks with, from threads."""
    if way == "raw":
        return Raw(target)
    if way == "packed":
        return Raw(target, BATCH)
    if way == "batcher":
        return Batcher(target)
    client = Client(target, MODEL, timeout_s=_TIMEOUT_S)

    def ask(content: bytes) -> int:
        client.classify(content)
        return 1

    return ask


def from_threads(
    ask: Ask, contents: list[bytes], callers: int, rate: float, seconds: float
) -> tuple[list[tuple[float, int]], float]:
    """(seconds, images) of every answer, and the seconds until the last of them."""
    taken: list[tuple[float, int]] = []
    moments = _moments(rate, seconds)
    lock = threading.Lock()
    start_s = 0.0

    def start() -> None:
        nonlocal start_s
        start_s = time.perf_counter()

    ready = threading.Barrier(callers, start)

    def run(number: int) -> None:
        ask(contents[number % len(contents)])
        ready.wait()
        for content in itertools.islice(itertools.cycle(contents), number, None):
            began_s = time.perf_counter()
            if rate:
                with lock:
                    moment = next(moments, None)
                if moment is None:
                    return
                began_s = start_s + moment
                time.sleep(max(0.0, began_s - time.perf_counter()))
            elif began_s >= start_s + seconds:
                return
            images = ask(content)
            taken.append((time.perf_counter() - began_s, images))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, time.perf_counter() - start_s


async def from_tasks(
    target: str, contents: list[bytes], callers: int, rate: float, seconds: float
) -> tuple[list[tuple[float, int]], float]:
    """The same with AsyncClient."""
    taken: list[tuple[float, int]] = []
    moments = _moments(rate, seconds)

    async with AsyncClient(target, MODEL, timeout_s=_TIMEOUT_S) as client:
        first = (client.classify(contents[number % len(contents)]) for number in range(callers))
        await asyncio.gather(*first)
        start_s = time.perf_counter()

        async def run(number: int) -> None:
            for content in itertools.islice(itertools.cycle(contents), number, None):
                began_s = time.perf_counter()
                if rate:
                    moment = next(moments, None)
                    if moment is None:
                        return
                    began_s = start_s + moment
                    await asyncio.sleep(max(0.0, began_s - time.perf_counter()))
                elif began_s >= start_s + seconds:
                    return
                await client.classify(content)
                taken.append((time.perf_counter() - began_s, 1))

        await asyncio.gather(*(run(number) for number in range(callers)))
        return taken, time.perf_counter() - start_s


def _moments(rate: float, seconds: float) -> Iterator[float]:
    chance = random.Random(5)
    moment = chance.expovariate(rate) if rate else seconds
    while moment < seconds:
        yield moment
        moment += chance.expovariate(rate)


def measure(
    way: str, target: str, contents: list[bytes], callers: int, rate: float, seconds: float
) -> dict[str, float]:
    """Images a second, milliseconds to an answer, and what it costs the client."""
    if way == "packed":
        callers = max(1, callers // BATCH)
    cpu_s = time.process_time()
    if way == "asyncio":
        taken, until_last_s = asyncio.run(from_tasks(target, contents, callers, rate, seconds))
    else:
        taken, until_last_s = from_threads(open_way(way, target), contents, callers, rate, seconds)
    cpu_s = time.process_time() - cpu_s
    images = sum(count for _, count in taken)
    ordered = sorted(taken_s for taken_s, _ in taken)
    return {
        "images_per_s": images / until_last_s,
        "p50_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[int(0.99 * len(ordered))],
        "client_cpu_us": 1e6 * cpu_s / images,
    }


def accelerator() -> None:
    """Serve until the input ends; what it computes is time, one request after the other."""
    busy = threading.Lock()

    def compute(images: Sequence[bytes]) -> float:
        with busy:
            time.sleep(_REQUEST_S + _IMAGE_S * len(images))
        return 0.0

    with FakeServer(MODEL, latency_s=compute, max_workers=128) as server:
        print(server.target, flush=True)
        sys.stdin.read()


def main() -> None:
    """Ask and print, or serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("way", choices=[*WAYS, "accelerator"])
    parser.add_argument("target", nargs="?")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.0, help="images a second; 0: a closed loop")
    parser.add_argument("--seconds", type=float, default=6)
    arguments = parser.parse_args()
    if arguments.way == "accelerator":
        accelerator()
        return
    contents = [photo.read_bytes() for photo in sorted(arguments.photos.glob("*.jpg"))]
    result = measure(
        arguments.way, arguments.target, contents, arguments.callers, arguments.rate, arguments.seconds
    )
    print(json.dumps(result), flush=True)
    os._exit(0)  # the batcher's threads wait for ever


if __name__ == "__main__":
    main()
