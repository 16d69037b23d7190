"""Callers of a server, in a process of their own, so that they share no interpreter with what they measure.

    python benchmarks/load.py predict 127.0.0.1:8500 --callers 32 --seconds 10 --images photo.jpg
    python benchmarks/load.py http 127.0.0.1:8000 --callers 64 --rate 30 --seconds 20 --images photo.jpg

Without --rate each caller asks again as soon as it is answered (a closed loop). With it, requests come at
random moments, so many a second on average, whether or not earlier ones are answered (an open loop), and the
time that one waits for a free caller counts. With --corrupt-every 100 every hundredth image is cut off in the
middle; whatever a server says to those is right, and they do not count.

Prints JSON: answers, how many a second, seconds at the 50th, 95th, 99th percentile and at the most; how many
whole images got an error instead, and what the first one said; and requests, all that were sent, those before
the time began included.
"""

import argparse
import base64
import http.client
import itertools
import json
import math
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np

from graftserve.client.wire import PredictRequest
from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, IMAGE_BYTES
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.tensors import to_proto

Send = Callable[[bytes], object]
Content = tuple[bytes, bool]
"""A request, and whether its image is whole."""
Outcome = tuple[float, str]
"""Seconds until the answer to a whole image, and the error that it was, if it was one."""


def predict_with(model: str) -> Callable[[bytes], bytes]:
    """What asks `model` for the classes of an image; for no image, for the half of 1, 2 and 5."""

    def request(content: bytes) -> bytes:
        message = PredictRequest()
        message.model_spec.name = model
        if content:
            message.inputs[IMAGE_BYTES].CopyFrom(to_proto(np.array([content], object)))
            message.output_filter.extend(CLASSIFY_OUTPUTS)
        else:
            message.inputs["x"].CopyFrom(to_proto(np.array([1, 2, 5], np.float32)))
        return message.SerializeToString()

    return request


def open_grpc(target: str, path: str) -> Send:
    """A channel of its own for each caller, as separate programs have."""
    channel = grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
    return channel.unary_unary(path)


def to_json(content: bytes) -> bytes:
    return json.dumps({"image": base64.b64encode(content).decode()}).encode()


def open_http(target: str, path: str, content_type: str) -> Send:
    connection = http.client.HTTPConnection(target)

    def send(content: bytes) -> bytes:
        try:
            connection.request("POST", path, content, {"Content-Type": content_type})
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()  # the next request opens it again
            raise
        if response.status != 200:
            connection.close()  # as some servers do without saying so
            raise RuntimeError(f"{response.status}: {body[:200]!r}")
        return body

    return send


def with_corrupt(images: list[bytes], every: int) -> list[Content]:
    """To be asked one after the other, again and again; every: 0 for none that is corrupt."""
    if not every:
        return [(image, True) for image in images]
    turns = itertools.cycle(images)
    contents = []
    for image in images:
        contents += [(next(turns), True) for _ in range(every - 1)]
        contents.append((image[: len(image) // 2], False))
    return contents


def ask(send: Send, content: bytes) -> str:
    """Send it; returns what went wrong."""
    try:
        send(content)
    except grpc.RpcError as exc:
        return f"{exc.code().name}: {exc.details()}"
    except (OSError, RuntimeError, http.client.HTTPException) as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def closed_loop(connect: Callable[[], Send], contents: list[Content], callers: int, seconds: float) -> dict:
    """Every caller asks one thing after the other.

    What counts is between the moment at which the last caller had its first answer under load and `seconds`
    later, the same for all: before, not everybody waits yet. The rate is of answers that came in between; the
    times are of what was asked in between, until its answer, so that a late one is not left out.
    """
    taken: list[list[tuple[float, Outcome]]] = [[] for _ in range(callers)]  # with when it was asked
    ready = threading.Barrier(callers)
    lock = threading.Lock()
    waiting, start_s = callers, math.inf

    def run(number: int) -> None:
        nonlocal waiting, start_s
        send = connect()
        ask(send, contents[0][0])
        ready.wait()
        ask(send, contents[0][0])
        with lock:
            waiting -= 1
            if not waiting:
                start_s = time.perf_counter()
        # Each begins elsewhere, so that they do not come to the corrupt ones together.
        first = number * max(1, len(contents) // callers)
        for content, is_whole in itertools.islice(itertools.cycle(contents), first, None):
            began_s = time.perf_counter()
            if began_s >= start_s + seconds:
                return
            error = ask(send, content)
            if is_whole:
                taken[number].append((began_s, (time.perf_counter() - began_s, error)))

    _run_all(run, callers)
    everything = list(itertools.chain(*taken))
    in_between = sum(
        start_s <= began_s + taken_s < start_s + seconds
        for began_s, (taken_s, error) in everything
        if not error
    )
    return _summary([outcome for began_s, outcome in everything if began_s >= start_s], in_between / seconds)


def open_loop(
    connect: Callable[[], Send], contents: list[Content], callers: int, rate_per_s: float, seconds: float
) -> dict:
    """Requests come by themselves; the same moments for the same rate."""
    moments: queue.Queue[tuple[float, Content] | None] = queue.Queue()
    taken: list[Outcome] = []
    ready = threading.Barrier(callers + 1)

    def run(number: int) -> None:
        send = connect()
        ask(send, contents[0][0])
        ready.wait()
        while (next_one := moments.get()) is not None:
            due_s, (content, is_whole) = next_one
            error = ask(send, content)
            if is_whole:
                taken.append((time.perf_counter() - due_s, error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    ready.wait()
    chance = random.Random(5)
    began_s = due_s = time.perf_counter()
    for content in itertools.cycle(contents):
        due_s += chance.expovariate(rate_per_s)
        if due_s >= began_s + seconds:
            break
        time.sleep(max(0.0, due_s - time.perf_counter()))
        moments.put((due_s, content))
    for _ in threads:
        moments.put(None)
    for thread in threads:
        thread.join()
    answers = sum(not error for _, error in taken)
    return _summary(taken, answers / (time.perf_counter() - began_s))


def _run_all(run: Callable[[int], None], callers: int) -> None:
    threads = [threading.Thread(target=run, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _summary(outcomes: list[Outcome], per_s: float) -> dict:
    errors = [error for _, error in outcomes if error]
    taken_s = [taken for taken, error in outcomes if not error]
    if len(taken_s) < 2:
        raise SystemExit(f"expected answers, got {len(taken_s)}; the first error: {(errors or ['none'])[0]}")
    cuts = statistics.quantiles(taken_s, n=100, method="inclusive")
    return {
        "answers": len(taken_s),
        "per_s": per_s,
        "p50_s": cuts[49],
        "p95_s": cuts[94],
        "p99_s": cuts[98],
        "max_s": max(taken_s),
        "errors": len(errors),
        "first_error": errors[0][:200] if errors else "",
    }


def main() -> None:
    """Ask, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["predict", "grpc", "http", "json"], help="how to ask")
    parser.add_argument("target", help="host:port")
    parser.add_argument("--images", type=Path, nargs="*", default=[])
    parser.add_argument("--path", default=PREDICT.path, help="the method's or the page's")
    parser.add_argument("--model", default="default")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rate", type=float, help="requests a second; default: a closed loop")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--corrupt-every", type=int, default=0, metavar="N", help="default: none is corrupt")
    arguments = parser.parse_args()
    images = [image.read_bytes() for image in arguments.images] or [b""]
    convert = {"predict": predict_with(arguments.model), "json": to_json}.get(arguments.kind, bytes)
    contents = [(convert(image), whole) for image, whole in with_corrupt(images, arguments.corrupt_every)]
    content_type = {"http": "image/jpeg", "json": "application/json"}.get(arguments.kind)

    requests = itertools.count()

    def connect() -> Send:
        if content_type is not None:
            send = open_http(arguments.target, arguments.path, content_type)
        else:
            send = open_grpc(arguments.target, arguments.path)
        return lambda content: (next(requests), send(content))

    if arguments.rate is None:
        result = closed_loop(connect, contents, arguments.callers, arguments.seconds)
    else:
        result = open_loop(connect, contents, arguments.callers, arguments.rate, arguments.seconds)
    print(json.dumps(result | {"requests": next(requests)}))


if __name__ == "__main__":
    main()
