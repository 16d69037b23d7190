"""The embedded server against what people write by hand, each in an environment of its own.

    python benchmarks/serving_peers.py --output benchmarks/results

On one exported EfficientNet-Lite0 and photographs of 500 pixels, one image to a request: a naive gRPC
servicer, FastAPI, LitServe, BentoML and Ray Serve (peers/handwritten.py), with the same model in LiteRT
(decoded by Pillow), as ours has it, in the same release; or by --engine tensorflow, with the version's
signature, which serving.py compares, too:

- closed loop: 1, 8, 32 and 64 callers who ask again as soon as they are answered;
- open loop: requests at random moments (Poisson), at 50, 70 and 90% of what the best peer on that engine can
  do at most; the time that one waits for a free caller counts;
- corrupt: every hundredth image is cut off in the middle; errors are those that whole images got;
- large: 8 callers with a photograph of 12 megapixels.

Beside ours on LiteRT, and with ratios of its own, stands ours with --engine=litert_int8: the same server with
the same version's network in 8-bit integers, which answers a little differently. No peer has that network.

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
from photos import photo_sheet
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

OURS, OURS_INT8 = "graftserve", "graftserve int8"
CALLERS = (1, 8, 32, 64)
SHARES = (0.5, 0.7, 0.9)
CORRUPT_CALLERS = 32
CORRUPT_EVERY = 100
LARGE_MEGAPIXELS = 12
LARGE_CALLERS = 8

Start = Callable[[], AbstractContextManager[Served]]
Rounds = dict[str, list[dict[str, Any]]]
"""By server: what each round gave."""


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of each loop in each round")
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=["litert"], help="default: litert")
    parser.add_argument("--peer", choices=PEERS, nargs="+", default=list(PEERS), help="default: all")
    parser.add_argument("--callers", type=int, nargs="+", default=CALLERS)
    parser.add_argument("--version", type=Path, help="an exported version (default: one is made)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        version = arguments.version or export_digits(Path(folder), quantize=True, max_accuracy_drop=1.0)
        photos = write_photos(Path(folder))
        large = Path(folder, "large.jpg")
        photo_sheet().save(large, quality=90)
        kinds = ("closed_loop", "open_loop", "corrupt", "large", "servers")
        result: dict[str, list[Any]] = {kind: [] for kind in kinds}
        for engine in arguments.engine:
            contest = _Contest(engine, version, arguments.peer, photos, large)
            for name, rows in contest.run(arguments.callers, arguments.rounds, arguments.seconds).items():
                result[name] += rows
                print(name, json.dumps(rows, indent=2), flush=True)
    write_result(arguments.output, "serving_peers", result, rounds=arguments.rounds)


class _Contest:
    """Ours and the peers on one engine; a peer that fails is out, with the reason in `errors`."""

    def __init__(self, engine: str, version: Path, peers: list[str], photos: list[Path], large: Path) -> None:
        self._engine, self._images, self._large = engine, ("--images", *photos), ("--images", large)
        self._starts: dict[str, Start] = {OURS: lambda: serve_ours(version.parent, engine)}
        if engine == "litert":
            self._starts[OURS_INT8] = lambda: serve_ours(version.parent, "litert_int8")
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
        images = self._images
        closed = {
            ("callers", count): ("--callers", count, "--seconds", seconds, *images) for count in callers
        }
        corrupt = ("corrupt", CORRUPT_EVERY)
        large = ("megapixels", LARGE_MEGAPIXELS)
        others = {
            corrupt: (
                *("--callers", CORRUPT_CALLERS, "--seconds", seconds, "--corrupt-every", CORRUPT_EVERY),
                *images,
            ),
            large: ("--callers", LARGE_CALLERS, "--seconds", seconds, *self._large),
        }
        taken, started = self._measure(closed | others, rounds)
        at_most = {
            name: max(statistics.median(row["per_s"] for row in taken[key][name]) for key in closed)
            for name in self._starts
            if name not in self.errors
        }
        best = max((value for name, value in at_most.items() if not _is_ours(name)), default=at_most[OURS])
        rates = {("share", share): round(share * best, 2) for share in SHARES}
        waiting = ("--callers", 64, "--seconds", 2 * seconds, *images, "--rate")
        shares = {key: (*waiting, rate) for key, rate in rates.items()}
        opened, _ = self._measure(shares, rounds)
        return {
            "closed_loop": [self._row(key, taken[key], "per_s") for key in closed],
            "open_loop": [
                self._row(key, opened[key], "p99_s", rate_per_s=rate) for key, rate in rates.items()
            ],
            "corrupt": [self._row(corrupt, taken[corrupt], "per_s", callers=CORRUPT_CALLERS)],
            "large": [self._row(large, taken[large], "per_s", callers=LARGE_CALLERS)],
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
                        taken[key][name].append(server.load(*flags))
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

        def to_peers(ours: str, field: str) -> dict[str, dict[str, float]]:
            values = [row[field] for row in whole[ours]]
            return {
                name: ratios(values, [row[field] for row in rows])
                for name, rows in whole.items()
                if not _is_ours(name)
            }

        what = {"per_s": "images_per_s", "p99_s": "p99"}[compared]
        compared_to: dict[str, Any] = {}
        for ours in filter(_is_ours, whole):
            short = ours.replace(" ", "_")
            compared_to[f"{what}_of_{short}_to"] = to_peers(ours, compared)
            compared_to[f"cpu_of_{short}_to"] = to_peers(ours, "cpu_s")
        return {
            "engine": self._engine,
            key[0]: key[1],
            **more,
            **compared_to,
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


def _is_ours(name: str) -> bool:
    return name in (OURS, OURS_INT8)


if __name__ == "__main__":
    main()
