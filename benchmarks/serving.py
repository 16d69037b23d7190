"""The embedded server against what people write by hand, and against the bare engines, in one run.

    python benchmarks/serving.py --output benchmarks/results

On one exported EfficientNet-Lite0 and photographs of 500 pixels, with 8 and 32 callers that ask for one image
at a time: the server with either engine, the peers on TensorFlow (peers/handwritten.py), each in an
environment of its own in build/peers, TensorFlow Serving where tensorflow_model_server is on the PATH, and,
without any server, the signature called in process and decoding with LiteRT's interpreters. Then the latency
of all servers at 70% of what the best peer by hand can do, and what a request for next to nothing costs the
server.

All ways are taken in turn over several rounds, so that a machine whose speed drifts treats them alike, and
servers whose turn it is not are stopped (SIGSTOP). What counts are the ratios; the rates are this machine's.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import tensorflow as tf
from bare import cpu_count, decode_graph, litert, measure
from environments import PeerError
from result import ratios, write_result
from servers import (
    PEERS,
    Served,
    export_digits,
    peer_environment,
    serve_model_server,
    serve_ours,
    serve_peer,
    write_photos,
)

from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, SERVING_DEFAULT
from graftserve.export.verify import open_signatures

CALLERS = (8, 32)

Way = Callable[[int, float], float]
"""Way(callers, seconds) gives images a second."""


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of each way in each round")
    parser.add_argument("--version", type=Path, help="an exported version (default: one is made)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rounds, seconds = arguments.rounds, arguments.seconds
    # A Session's own number of threads counts then. Source: tensorflow/core/common_runtime/local_device.cc.
    os.environ["TF_OVERRIDE_GLOBAL_THREADPOOL"] = "1"

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        version = arguments.version or export_digits(Path(folder))
        photos = write_photos(Path(folder))
        servers = {
            f"graftserve {engine}": stack.enter_context(_stopped(serve_ours(version.parent, engine)))
            for engine in ("litert", "tensorflow")
        }
        others = {peer: _serve_in_environment(peer, version) for peer in PEERS}
        others["tensorflow_model_server"] = serve_model_server(version.parent)
        errors = {}
        for name, server in others.items():
            try:
                servers[name] = stack.enter_context(_stopped(server))
            except PeerError as exc:
                errors[name] = str(exc)
        peers = [peer for peer in PEERS if peer in servers]
        if not peers:
            raise SystemExit(f"expected a peer to compare with, but none starts: {errors}")
        contents = [photo.read_bytes() for photo in photos]
        signatures = stack.enter_context(open_signatures(version))
        ways: dict[str, Way] = {
            "bare signature": _bare(
                lambda row: signatures.run(SERVING_DEFAULT, [contents[row % len(contents)]], CLASSIFY_OUTPUTS)
            ),
            "bare LiteRT": _bare_litert(version, contents),
        }

        def rate(name: str, callers: int) -> tuple[float, float]:
            if name in ways:
                return ways[name](callers, seconds), 0.0
            with _running(servers[name]):
                got = servers[name].load("--callers", callers, "--seconds", seconds, "--images", *photos)
            return got["per_s"], got["cpu_s"]

        throughput = []
        for callers in CALLERS:
            names = [*servers, *ways]
            rates: dict[str, list[float]] = {name: [] for name in names}
            costs: dict[str, list[float]] = {name: [] for name in servers}
            for _, name in itertools.product(range(rounds), names):
                images_per_s, cpu_s = rate(name, callers)
                rates[name].append(images_per_s)
                if name in servers:
                    costs[name].append(cpu_s * 1e3)
            throughput.append(_throughput_row(callers, rates, costs, peers))
            print(json.dumps(throughput[-1], indent=2), flush=True)

        latency = _latency(servers, peers, throughput, photos, rounds, seconds)
        print(json.dumps(latency, indent=2), flush=True)
        split = _split(version, contents, rounds, seconds)
        print(json.dumps(split), flush=True)
        trivial = _trivial(Path(folder), stack, rounds, seconds)
        print(json.dumps(trivial, indent=2), flush=True)

    write_result(
        arguments.output,
        "serving",
        {
            "throughput": throughput,
            "latency": latency,
            "litert_split": split,
            "trivial": trivial,
            **({"error": errors} if errors else {}),
        },
        rounds=rounds,
    )


@contextmanager
def _serve_in_environment(peer: str, version: Path) -> Iterator[Served]:
    environment = peer_environment(peer, "tensorflow")
    if environment.error:
        raise PeerError(environment.error)
    with serve_peer(peer, version, "tensorflow", environment.python) as served:
        yield served


@contextmanager
def _stopped(server: AbstractContextManager[Served]) -> Iterator[Served]:
    """It starts, and does nothing until `_running` lets it."""
    with server as served:
        served.signal(signal.SIGSTOP)
        try:
            yield served
        finally:
            served.signal(signal.SIGCONT)


@contextmanager
def _running(served: Served) -> Iterator[None]:
    served.signal(signal.SIGCONT)
    try:
        yield
    finally:
        served.signal(signal.SIGSTOP)


def _bare(call: Callable[[int], object]) -> Way:
    return lambda callers, seconds: measure(call, callers, seconds).per_s


def _bare_litert(
    version: Path, contents: Sequence[bytes], workers: int | None = None, threads: int = 1
) -> Way:
    """decode.pb on one thread, and an interpreter for each worker; None: a worker for each CPU."""
    decode = decode_graph(version)
    network = litert(version / "assets.extra" / "network.tflite", threads)
    way = _bare(lambda row: network(decode(contents[row % len(contents)])[None]))
    return lambda callers, seconds: way(workers or cpu_count(), seconds)


def _throughput_row(
    callers: int, rates: dict[str, list[float]], costs: dict[str, list[float]], peers: Sequence[str]
) -> dict[str, object]:
    peer = max(peers, key=lambda name: statistics.median(rates[name]))

    def ratio(name: str, other: str) -> dict[str, float]:
        return ratios(rates[name], rates[other])

    return {
        "callers": callers,
        "images_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "server_cpu_ms_per_image": {
            name: round(statistics.median(values), 1) for name, values in costs.items()
        },
        "best_peer": peer,
        "litert_to_best_peer": ratio("graftserve litert", peer),
        "litert_to_bare_litert": ratio("graftserve litert", "bare LiteRT"),
        "tensorflow_to_best_peer": ratio("graftserve tensorflow", peer),
        "tensorflow_to_bare_signature": ratio("graftserve tensorflow", "bare signature"),
    }


def _latency(
    servers: dict[str, Served],
    peers: Sequence[str],
    throughput: Sequence[dict],
    photos: Sequence[Path],
    rounds: int,
    seconds: float,
) -> dict[str, object]:
    """At 70% of the most that any peer could do."""
    rates = [row["images_per_s"] for row in throughput]
    rate = 0.7 * max(row[peer] for row in rates for peer in peers)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for _, (name, server) in itertools.product(range(rounds), servers.items()):
        with _running(server):
            flags = ("--rate", rate, "--callers", 64, "--seconds", 2 * seconds, "--images")
            taken[name].append(server.load(*flags, *photos))
    p99s = {name: [entry["p99_s"] for entry in entries] for name, entries in taken.items()}
    peer = min(peers, key=lambda name: statistics.median(p99s[name]))

    def ratio(name: str) -> dict[str, float]:
        return ratios(p99s[name], p99s[peer])

    return {
        "images_per_s": round(rate, 1),
        "ms": {
            name: {
                key: round(1e3 * statistics.median(entry[f"{key}_s"] for entry in entries), 1)
                for key in ("p50", "p95", "p99")
            }
            for name, entries in taken.items()
        },
        "best_peer": peer,
        "litert_p99_to_best_peer": ratio("graftserve litert"),
        "tensorflow_p99_to_best_peer": ratio("graftserve tensorflow"),
    }


def _split(version: Path, contents: Sequence[bytes], rounds: int, seconds: float) -> dict[str, float]:
    """Images a second of LiteRT by how the CPUs are shared: interpreters times threads of each."""
    cpus = cpu_count()
    ways = {
        f"{workers} x {threads}": _bare_litert(version, contents, workers, threads)
        for workers, threads in dict.fromkeys([(1, 1), (1, cpus), (cpus, 1), (2 * cpus, 1), (cpus, cpus)])
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        rates[name].append(way(0, seconds / 2))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def _trivial(folder: Path, stack: ExitStack, rounds: int, seconds: float) -> list[dict[str, object]]:
    """Half of three numbers plus two, beside a gRPC server in Python that returns what it was sent."""

    class Half(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = tf.Variable(2.0)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": x * 0.5 + self.two}

    module = Half()
    tf.saved_model.save(module, str(folder / "half" / "1"), signatures={SERVING_DEFAULT: module.serve})
    servers = {
        "graftserve": stack.enter_context(_stopped(serve_ours(folder / "half", "auto"))),
        "echo": stack.enter_context(_stopped(serve_peer("echo", folder, "tensorflow"))),
    }
    rows: list[dict[str, object]] = []
    for callers in (1, *CALLERS):
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for _, (name, server) in itertools.product(range(rounds), servers.items()):
            with _running(server):
                taken[name].append(server.load("--callers", callers, "--seconds", seconds / 2))
        cpu_s = {name: [entry["cpu_s"] for entry in entries] for name, entries in taken.items()}
        rows.append(
            {
                "callers": callers,
                "requests_per_s": {
                    name: round(statistics.median(entry["per_s"] for entry in entries))
                    for name, entries in taken.items()
                },
                "cpu_us_per_request": {
                    name: round(1e6 * statistics.median(values)) for name, values in cpu_s.items()
                },
                "cpu_to_echo": ratios(cpu_s["graftserve"], cpu_s["echo"]),
            }
        )
    return rows


if __name__ == "__main__":
    main()
