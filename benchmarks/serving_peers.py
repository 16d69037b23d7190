"""The embedded server against what people write by hand, each in an environment of its own, on each engine.

    python benchmarks/serving_peers.py --output benchmarks/results

On one exported EfficientNet-Lite0 and photographs of 500 pixels, one image to a request: a naive gRPC
servicer, FastAPI, LitServe, BentoML and Ray Serve (peers/handwritten.py), with the same model in LiteRT
(decoded by Pillow) and in TensorFlow (the version's signature), as ours has it, in the same releases:

- closed loop: 1, 8, 32 and 64 callers who ask again as soon as they are answered;
- open loop: requests at random moments (Poisson), at 50, 70 and 90% of what the best peer on that engine can
  do at most; the time that one waits for a free caller counts;
- corrupt: every hundredth image is cut off in the middle; errors are those that whole images got.

Seconds until a server answers, memory once it has (all its processes, shared pages once), and CPU seconds
for 1,000 images are the server's. Environments are made in build/peers with pip on the first run; a peer that
does not install, start or answer has an error in the result. Each server runs alone, and the rounds take them
in turn. Ratios are of ours to each peer in the same round.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from environments import Environment, PeerError
from result import ratios, write_result
from servers import (
    ENGINES,
    PEERS,
    Served,
    export_digits,
    peer_environment,
    serve_ours,
    serve_peer,
    write_photos,
)

OURS = "graftserve"
CALLERS = (1, 8, 32, 64)
SHARES = (0.5, 0.7, 0.9)
CORRUPT_CALLERS = 32
CORRUPT_EVERY = 100

Start = Callable[[], AbstractContextManager[Served]]
Rounds = dict[str, list[dict[str, Any]]]
"""By server: what each round gave."""


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of each loop in each round")
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=list(ENGINES), help="default: both")
    parser.add_argument("--peer", choices=PEERS, nargs="+", default=list(PEERS), help="default: all")
    parser.add_argument("--callers", type=int, nargs="+", default=CALLERS)
    parser.add_argument("--version", type=Path, help="an exported version (default: one is made)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        version = arguments.version or export_digits(Path(folder))
        photos = write_photos(Path(folder))
        result: dict[str, list[Any]] = {"closed_loop": [], "open_loop": [], "corrupt": [], "servers": []}
        for engine in arguments.engine:
            contest = _Contest(engine, version, arguments.peer, photos)
            for name, rows in contest.run(arguments.callers, arguments.rounds, arguments.seconds).items():
                result[name] += rows
                print(name, json.dumps(rows, indent=2), flush=True)
    write_result(arguments.output, "serving_peers", result, rounds=arguments.rounds)


class _Contest:
    """Ours and the peers on one engine; a peer that fails is out, with the reason in `errors`."""

    def __init__(self, engine: str, version: Path, peers: list[str], photos: list[Path]) -> None:
        self._engine, self._images = engine, ("--images", *photos)
        self._starts: dict[str, Start] = {OURS: lambda: serve_ours(version.parent, engine)}
        self._environments: dict[str, Environment] = {}
        self.errors: dict[str, str] = {}
        for name in peers:
            environment = self._environments[name] = peer_environment(name, engine)
            if environment.error:
                self.errors[name] = environment.error
            self._starts[name] = lambda name=name, python=environment.python: serve_peer(
                name, version, engine, python
            )

    def run(self, callers: list[int], rounds: int, seconds: float) -> dict[str, list[dict[str, Any]]]:
        """Rows of the result."""
        closed = {("callers", count): ("--callers", count, "--seconds", seconds) for count in callers}
        corrupt = ("corrupt", CORRUPT_EVERY)
        flags = ("--callers", CORRUPT_CALLERS, "--seconds", seconds, "--corrupt-every", CORRUPT_EVERY)
        taken, started = self._measure(closed | {corrupt: flags}, rounds)
        at_most = {
            name: max(statistics.median(row["per_s"] for row in taken[key][name]) for key in closed)
            for name in self._starts
            if name not in self.errors
        }
        best = max((value for name, value in at_most.items() if name != OURS), default=at_most[OURS])
        waiting = ("--callers", 64, "--seconds", 2 * seconds, "--rate")
        shares = {("share", share): (*waiting, round(share * best, 2)) for share in SHARES}
        opened, _ = self._measure(shares, rounds)
        return {
            "closed_loop": [self._row(key, taken[key], "per_s") for key in closed],
            "open_loop": [
                self._row(key, opened[key], "p99_s", images_per_s=flags[-1]) for key, flags in shares.items()
            ],
            "corrupt": [{**self._row(corrupt, taken[corrupt], "per_s"), "callers": CORRUPT_CALLERS}],
            "servers": [self._server(name, started[name], at_most.get(name)) for name in self._starts],
        }

    def _measure(
        self, loads: dict[tuple[str, Any], tuple[Any, ...]], rounds: int
    ) -> tuple[dict[tuple[str, Any], Rounds], Rounds]:
        """All loads in turn on each server, which starts anew in each round."""
        taken: dict[tuple[str, Any], Rounds] = {key: {name: [] for name in self._starts} for key in loads}
        started: Rounds = {name: [] for name in self._starts}
        for _, (name, start) in itertools.product(range(rounds), self._starts.items()):
            if name in self.errors:
                continue
            try:
                with start() as server:
                    for key, flags in loads.items():
                        taken[key][name].append(server.load(*flags, *self._images))
                    started[name].append({"start_s": server.start_s, "memory_mib": server.memory_mib()})
            except PeerError as exc:
                self.errors[name] = str(exc)
                print(f"{name} on {self._engine}: {exc}", flush=True)
        return taken, started

    def _row(self, key: tuple[str, Any], taken: Rounds, compared: str, **more: Any) -> dict[str, Any]:
        whole = {name: rows for name, rows in taken.items() if rows and name not in self.errors}

        def medians(field: str, scale: float = 1.0) -> dict[str, float]:
            return {
                name: round(statistics.median(row[field] for row in rows) * scale, 1)
                for name, rows in whole.items()
            }

        def to_peers(field: str) -> dict[str, dict[str, float]]:
            ours = [row[field] for row in whole[OURS]]
            return {
                name: ratios(ours, [row[field] for row in rows])
                for name, rows in whole.items()
                if name != OURS
            }

        what = {"per_s": "images_per_s", "p99_s": "p99"}[compared]
        return {
            "engine": self._engine,
            key[0]: key[1],
            **({"rate_per_s": more["images_per_s"]} if more else {}),
            f"{what}_of_graftserve_to": to_peers(compared),
            "cpu_of_graftserve_to": to_peers("cpu_s"),
            "images_per_s": medians("per_s"),
            **{f"{cut}_ms": medians(f"{cut}_s", 1e3) for cut in ("p50", "p95", "p99")},
            "cpu_s_per_1000_images": medians("cpu_s", 1e3),
            "errors": {name: sum(row["errors"] for row in rows) for name, rows in whole.items()},
            "answers": {name: sum(row["answers"] for row in rows) for name, rows in whole.items()},
            "first_errors": {
                name: next(row["first_error"] for row in rows if row["errors"])
                for name, rows in whole.items()
                if any(row["errors"] for row in rows)
            },
        }

    def _server(self, name: str, started: list[dict[str, float]], at_most: float | None) -> dict[str, Any]:
        row: dict[str, Any] = {"engine": self._engine, "server": name}
        if name in self.errors:
            row["error"] = self.errors[name]
        elif at_most is not None:
            row["images_per_s_at_most"] = round(at_most, 1)
        for field in ("start_s", "memory_mib"):
            if started:
                row[field] = round(statistics.median(values[field] for values in started), 1)
        environment = self._environments.get(name)
        if environment is not None and not environment.error:
            row["installed_mb"] = round(environment.installed_mb())
            row["packages"] = len(environment.packages)
            release = PEERS[name][0].partition("[")[0]
            row["release"] = environment.packages.get(release, release)
        return row


if __name__ == "__main__":
    main()
