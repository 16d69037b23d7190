"""Which batching suits a machine: found by running the exported network on it.

First the network alone, in batches of growing size, from one thread and from several: on a CPU the curve
bends early, on a GPU late. Then the choice against what the version has now, as it will be used: by many
callers with one image each.
"""

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from graftserve.client.wire.contract import PIXELS, SERVING_DEFAULT
from graftserve.training.engine import core_count
from graftserve.training.preprocess import decode_images
from graftserve.training.progress import Listener, Progress, silent

from .batching import Batching
from .contract import read_contract
from .errors import GateError, VerificationError
from .goldens import read_goldens
from .rebatch import read_batching, write_batching
from .verify import Signatures, open_signatures

__all__ = ["CALLERS", "SIZES", "Point", "Trial", "Tuning", "allowed_sizes", "choose", "tune"]

CALLERS = 32
"""Callers in the trial, each with one image at a time."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batches to try, unless larger ones bring nothing any more."""

_LARGEST_BATCH_S = 2.0  # a batch that takes longer is of no use to anybody who waits
_NEAR = 0.95  # points this close to the best count as equal: the noise of a busy machine
_BETTER = 1.03  # what a change must bring
_ROUNDS = 3
_EVERY_SIZE_TO = 8  # padding is work on a CPU, where small batches are the best; above, only powers of two


@dataclass(frozen=True)
class Point:
    """What `threads` threads achieve with batches of `batch_images` images; latencies are of a batch."""

    batch_images: int
    threads: int
    images_per_s: float
    latency_p50_ms: float
    latency_p95_ms: float


@dataclass(frozen=True)
class Trial:
    """Images a second that 32 callers with one image each got, with the version's batching and the chosen."""

    current_images_per_s: float
    chosen_images_per_s: float


@dataclass(frozen=True)
class Tuning:
    """best: the point that the choice rests on. chosen: what to use; `current` itself where nothing better
    was found. device: "GPU" or "CPU"."""

    device: str
    cores: int
    points: tuple[Point, ...]
    best: Point
    current: Batching
    chosen: Batching
    trial: Trial

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def tune(
    folder: Path,
    *,
    sizes: Sequence[int] = SIZES,
    threads: Sequence[int] | None = None,
    max_latency_ms: float | None = None,
    seconds_per_point: float = 1.0,
    listener: Listener = silent,
) -> Tuning:
    """Measure the version in `folder`, which is left as it is, and choose its batching.

    sizes: of batches to try, ascending; no more once two in a row brought nothing, or one takes two seconds.
    threads: numbers of batches at a time to try; by default from 1 to the cores, or 1 and 2 on a GPU.
    max_latency_ms: what the 95th percentile of a batch may take.
    seconds_per_point: of each of three rounds.
    Raises VerificationError if it has no batching in the graph, GateError if even one image takes too long.
    """
    current = read_batching(folder)
    if current is None:
        raise VerificationError(f"{folder}: its network is not batched in the graph; export it with batching")
    device = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    tried = tuple(threads or ((1, 2) if device == "GPU" else _doubling(core_count())))
    with tempfile.TemporaryDirectory(prefix="graftserve-") as work:
        everything = replace(
            current, threads=max(tried), sizes=tuple(sizes), timeout_us=0,
            max_request_images=max(sizes[-1], current.max_request_images),
        )  # fmt: skip
        with open_signatures(_copy(folder, Path(work) / "all", everything)) as signatures:
            points = _measure(signatures, folder, sizes, tried, seconds_per_point, listener)
        best = choose(points, max_latency_ms)
        chosen = replace(current, threads=best.threads, sizes=allowed_sizes(best.batch_images), timeout_us=0)
        trial = _try(folder, Path(work), current, chosen, seconds_per_point, listener)
    is_better = trial.chosen_images_per_s >= _BETTER * trial.current_images_per_s
    if not is_better and max_latency_ms is None:
        chosen = current
    return Tuning(device, core_count(), tuple(points), best, current, chosen, trial)


def choose(points: Sequence[Point], max_latency_ms: float | None = None) -> Point:
    """Of the points within 5% of the most images a second, the one of the lowest latency.

    Only of those whose 95th percentile is at most `max_latency_ms`. Raises GateError if there are none.
    """
    quick = [point for point in points if max_latency_ms is None or point.latency_p95_ms <= max_latency_ms]
    if not quick:
        least = min(point.latency_p95_ms for point in points)
        raise GateError(
            f"latency: expected at most {max_latency_ms:g} ms for a batch, but the quickest takes "
            f"{least:.1f} ms; choose a smaller backbone, or raise --max-latency-ms"
        )
    most = max(point.images_per_s for point in quick)
    near = [point for point in quick if point.images_per_s >= _NEAR * most]
    return min(near, key=lambda point: (point.latency_p95_ms, point.batch_images, point.threads))


def allowed_sizes(largest: int) -> tuple[int, ...]:
    """The batch sizes to execute, up to `largest`: every one to 8, then powers of two."""
    small = range(1, min(largest, _EVERY_SIZE_TO) + 1)
    powers = (2**exponent for exponent in range(4, largest.bit_length()) if 2**exponent < largest)
    return tuple(sorted({*small, *powers, largest}))


def _doubling(most: int) -> list[int]:
    """1, 2, 4 ... and `most`."""
    return sorted({*(2**exponent for exponent in range(most.bit_length())), most})


def _copy(folder: Path, copy: Path, batching: Batching) -> Path:
    """The version with another batching; without what only a server needs."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.tflite", "tf_serving_warmup_requests"))
    write_batching(copy, batching)
    return copy


def _measure(
    signatures: Signatures,
    folder: Path,
    sizes: Sequence[int],
    threads: Sequence[int],
    seconds: float,
    listener: Listener,
) -> list[Point]:
    ask, rows = _question(signatures, folder)
    wanted = [(size, count) for count in threads for size in _useful(ask, rows, sizes)]
    progress = Progress("measuring batches", len(wanted) * _ROUNDS, listener)
    rates: dict[tuple[int, int], list[float]] = {point: [] for point in wanted}
    latencies: dict[tuple[int, int], list[float]] = {point: [] for point in wanted}
    for _ in range(_ROUNDS):  # a machine whose speed drifts treats all points alike
        for size, count in wanted:
            batch = rows[np.arange(size) % len(rows)]
            took, elapsed_s = _closed_loop(partial(ask, batch), count, seconds)
            rates[size, count].append(len(took) * size / elapsed_s)
            latencies[size, count] += took
            progress.advance()
    return [
        Point(
            size,
            count,
            statistics.median(rates[size, count]),
            float(np.quantile(latencies[size, count], 0.5)) * 1000,
            float(np.quantile(latencies[size, count], 0.95)) * 1000,
        )
        for size, count in wanted
    ]


def _useful(ask: Callable[[Any], object], rows: Any, sizes: Sequence[int]) -> list[int]:
    """The sizes up to where larger batches bring nothing any more."""
    useful: list[int] = []
    best, without_gain = 0.0, 0
    for size in sizes:
        batch = rows[np.arange(size) % len(rows)]
        ask(batch)
        started = time.perf_counter()
        ask(batch)
        elapsed_s = time.perf_counter() - started
        if useful and elapsed_s > _LARGEST_BATCH_S:
            break
        useful.append(size)
        without_gain = 0 if size / elapsed_s > best else without_gain + 1
        best = max(best, size / elapsed_s)
        if without_gain == 2:
            break
    return useful


def _question(signatures: Signatures, folder: Path) -> tuple[Callable[[Any], object], Any]:
    """Something to ask with a batch of rows, and rows: decoded images if the version takes such."""
    name = PIXELS if PIXELS in signatures.names else SERVING_DEFAULT
    if name not in signatures.names:
        raise VerificationError(f"{folder}: tuning asks {PIXELS} or {SERVING_DEFAULT}; export one of them")
    images = [golden.content for golden in read_goldens(folder)]
    outputs = [next(iter(signatures.meta_graph.signature_def[name].outputs))]
    if name == PIXELS:
        rows = decode_images(images, read_contract(folder).preprocess).numpy()
    else:
        rows = np.array(images, object)
    return lambda batch: signatures.run(name, batch, outputs), rows


def _closed_loop(call: Callable[[], object], callers: int, seconds: float) -> tuple[list[float], float]:
    """Seconds that each call took, and in all, of so many callers that ask again at once."""
    took: list[float] = []
    stop = time.perf_counter() + seconds

    def ask() -> None:
        while True:
            started = time.perf_counter()
            call()
            ended = time.perf_counter()
            took.append(ended - started)
            if ended >= stop:
                return

    started = time.perf_counter()
    pool = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return took, time.perf_counter() - started


def _try(
    folder: Path, work: Path, current: Batching, chosen: Batching, seconds: float, listener: Listener
) -> Trial:
    progress = Progress("trying the choice", 2 * _ROUNDS, listener)
    rates: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        asks = []
        for name, batching in (("current", current), ("chosen", chosen)):
            signatures = stack.enter_context(open_signatures(_copy(folder, work / name, batching)))
            ask, rows = _question(signatures, folder)
            ask(rows[:1])
            asks.append(partial(ask, rows[:1]))
        for _ in range(_ROUNDS):
            for ask_one, measured in zip(asks, rates, strict=True):
                took, elapsed_s = _closed_loop(ask_one, CALLERS, seconds)
                measured.append(len(took) / elapsed_s)
                progress.advance()
    return Trial(statistics.median(rates[0]), statistics.median(rates[1]))
