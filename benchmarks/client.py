"""The client against raw stubs, one by one and in batches made by hand, in one run.

    python benchmarks/client.py --output benchmarks/results

Callers ask for one image at a time; 1, 8 and 64 of them in a closed loop (each asks again when it is
answered), and at random moments, 70% as often as the raw stub can at most (an open loop: the time that one
waits for a free caller counts). What they ask with:

    raw      a stub, one image to a request
    batcher  what people write by hand: a queue, and a thread that takes up to 32 images from it, waits 5 ms
             at most for them to come, and sends them as one request; four such threads
    packed   a stub, 32 images to a request, callers / 32 of them: for those who have the images at hand
    client   Client.classify
    asyncio  AsyncClient.classify, as many tasks as callers

Servers: the embedded one with both engines, on EfficientNet-Lite0 and photographs of 500 pixels; and one
that only sleeps, as long as an accelerator computes: 5 ms a request and 0.2 ms an image, one request after
the other.

Every way runs in a process of its own, in turn over several rounds. What counts are the ratios of ways
within a round.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client_ways import MODEL, WAYS
from result import ratios, write_result
from servers import FLAGS, export_digits, write_photos

from graftserve.cli.server_process import ServerProcess

CALLERS = (1, 8, 64)
LOAD = 0.7
SERVERS = ("litert", "tensorflow", "accelerator")
_WAYS_FILE = Path(__file__).with_name("client_ways.py")


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of each way in each round")
    parser.add_argument("--version", type=Path, help="an exported version (default: one is made)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        version = arguments.version or export_digits(Path(folder))
        photos = write_photos(Path(folder))[0].parent
        results = {}
        for name in SERVERS:
            with _serving(name, version) as target:
                results[name] = _compare(target, photos, arguments.rounds, arguments.seconds)
            print(name, json.dumps(results[name], indent=2), flush=True)
    write_result(arguments.output, "client", results, rounds=arguments.rounds)


def _compare(target: str, photos: Path, rounds: int, seconds: float) -> dict[str, object]:
    closed = [
        {"callers": callers} | _measure(target, photos, callers, 0.0, rounds, seconds) for callers in CALLERS
    ]
    rate = LOAD * max(row["images_per_s"]["raw"] for row in closed)
    ways = tuple(way for way in WAYS if way != "packed")  # whoever has the images at hand waits for none
    opened = _measure(target, photos, CALLERS[-1], rate, rounds, 2 * seconds, ways)
    return {"closed_loop": closed, "open_loop": {"rate_per_s": round(rate, 1)} | opened}


def _measure(
    target: str,
    photos: Path,
    callers: int,
    rate: float,
    rounds: int,
    seconds: float,
    ways: tuple[str, ...] = WAYS,
) -> dict[str, object]:
    """Medians of what every way gives, and its ratios to the raw stub of the same round."""
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _, way in itertools.product(range(rounds), ways):
        command = [sys.executable, _WAYS_FILE, way, target, "--photos", photos, "--callers", callers]
        command += ["--rate", rate, "--seconds", seconds]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
        taken[way].append(json.loads(done.stdout))

    def column(way: str, key: str) -> list[float]:
        return [row[key] for row in taken[way]]

    keys = ("images_per_s", "p50_ms", "p99_ms", "client_cpu_us")
    result: dict[str, object] = {
        key: {way: round(statistics.median(row[key] for row in rows), 1) for way, rows in taken.items()}
        for key in keys
    }
    for way, other in itertools.product(("client", "asyncio"), ("raw", "batcher")):
        for key in ("p50_ms", "p99_ms") if rate else ("images_per_s", "p50_ms", "p99_ms"):
            result[f"{way}_to_{other}_{key.removesuffix('_ms')}"] = ratios(
                column(way, key), column(other, key)
            )
    return result


@contextmanager
def _serving(name: str, version: Path) -> Iterator[str]:
    if name != "accelerator":
        with ServerProcess(MODEL, version.parent, f"--engine={name}", *FLAGS) as server:
            yield server.addresses()["gRPC"]
        return
    process = subprocess.Popen(
        [sys.executable, _WAYS_FILE, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None  # noqa: S101  # it was asked for
        yield process.stdout.readline().strip()
        process.communicate("")


if __name__ == "__main__":
    main()
