"""A load trial: many callers on a real server while its versions are swapped, relabelled and damaged.

    python benchmarks/soak.py --output benchmarks/results

For each engine, first every caller sends its next call when it has an answer (a closed loop, which finds the
capacity); then calls come at a share of that capacity, whatever the answers take (an open loop, as traffic
from outside is). Meanwhile versions are published and go, labels are moved by reloads, and damaged versions
are dropped in. One call in a hundred brings a corrupt image. Each version names its labels in its own way,
so that every answer shows which version it came from. What is compared are calls during swaps with calls
between them, of the same run. Ends with status 1 if a call was lost or answered wrongly.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from callers import Plan, Row, label_of
from google.protobuf import text_format
from photos import write_few_digits
from result import write_result
from tensorflow.core.protobuf import saved_model_pb2

from graftserve.cli.server_process import ServerProcess
from graftserve.client import Client, VersionState
from graftserve.client.wire import ReloadConfigRequest, ReloadConfigResponse
from graftserve.client.wire.methods import HANDLE_RELOAD_CONFIG_REQUEST
from graftserve.export import export_run
from graftserve.export.contract import read_contract
from graftserve.export.goldens import read_goldens
from graftserve.export.manifest import write_manifest
from graftserve.training import Recipe, train

MODEL = "soak"
ENGINES = ("litert", "tensorflow")
DAMAGED_EVERY = 3  # swaps
DAMAGED = 1000  # added to a damaged version's number
SETTLED_AT_SWAP = 10  # from here on memory must be flat
STEP_TIMEOUT_S = 300.0
LABELS = ("stable", "canary", "", "")  # that callers ask for, in turn


@dataclass
class Swaps:
    """What was done to the server. windows: begin and end of each swap, on time.monotonic's clock, from the
    rename by which a version appears to the end of the one that it replaces. memory_mb: resident, after
    each."""

    windows: list[tuple[float, float]] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    damaged: int = 0
    reloads: int = 0


def main() -> None:
    """Measure, print what was found, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each loop")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.7, help="of the capacity, in the open loop")
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument("--loop", choices=("closed", "open"), nargs="+", default=("closed", "open"))
    parser.add_argument("--rate", type=float, help="calls a second of the open loop, instead of --share")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between two swaps")
    parser.add_argument("--version", type=Path, help="an exported version; by default one is trained")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        version = arguments.version or _train(work_dir)
        rows: list[dict[str, Any]] = []
        for engine in arguments.engine:
            rate = arguments.rate or 0.0
            for loop in arguments.loop:
                if loop == "open" and not rate:
                    rate = arguments.share * next(
                        row["between_swaps"]["calls_per_s"] for row in rows if row["engine"] == engine
                    )
                trial = work_dir / f"{engine}-{loop}"
                row = _run(trial, version, engine, rate if loop == "open" else 0.0, arguments)
                rows.append({"engine": engine, "loop": loop, **row})
                print(_line(rows[-1]), flush=True)
    write_result(arguments.output, "soak", {"callers": arguments.callers, "rows": rows}, rounds=1)
    if any(row["faults"] for row in rows):
        sys.exit(1)


def _train(work_dir: Path) -> Path:
    digits = write_few_digits(work_dir / "digits", 200)  # the head that few images train is as large as any
    run = train(Recipe(str(digits)), work_dir / "run", cache_dir=work_dir / "cache")
    return export_run(run.path, work_dir / "export").path


def _run(
    folder: Path, version: Path, engine: str, rate: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    models = folder / "models"
    models.mkdir(parents=True)
    for number in (1, 2):
        _stage(version, models, number).rename(models / str(number))
    config = folder / "models.config"
    config.write_text(_config(models, {}))
    with ServerProcess(
        MODEL,
        models,
        *(f"--model_config_file={config}", f"--engine={engine}", "--max_num_load_retries=0"),
        f"--grpc_max_threads={arguments.callers}",
    ) as server:
        target = server.addresses()["gRPC"]
        plan = _plan(target, version, rate, arguments.callers)
        plan.write(folder / "plan.json")
        with Client(target, MODEL) as client, grpc.insecure_channel(target) as channel:
            swapper = _Swapper(version, models, client, channel, server.pid)
            swapper.begin()
            with _callers(folder / "plan.json") as calls:
                until_s = time.monotonic() + arguments.seconds
                time.sleep(arguments.pause)
                while time.monotonic() < until_s:
                    swapper.swap()
                    time.sleep(arguments.pause)
        return _summary(calls, swapper.swaps)


def _plan(target: str, version: Path, rate: float, callers: int) -> Plan:
    contract, goldens = read_contract(version), read_goldens(version)
    classes, scores = [], []
    for golden in goldens:
        best = sorted(zip(golden.probabilities, contract.labels, strict=True), key=lambda pair: -pair[0])[
            : contract.top_k
        ]
        scores.append([score for score, _ in best])
        classes.append([label for _, label in best])
    images = [str(version / "assets.extra" / "goldens" / golden.name) for golden in goldens]
    return Plan(target, MODEL, callers, rate, LABELS, images, classes, scores)


def _stage(version: Path, models: Path, number: int) -> Path:
    """A copy of the version whose labels name `number`, ready to be renamed."""
    staged = models / f"temp-{number}"
    shutil.copytree(version, staged)
    labels_file = staged / "assets" / "labels.txt"
    labels = labels_file.read_text().splitlines()
    names = [label_of(number, label).encode() for label in labels]
    labels_file.write_bytes(b"\n".join(names) + b"\n")
    graph_file = staged / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(graph_file.read_bytes())
    for meta_graph in saved_model.meta_graphs:
        graph = meta_graph.graph_def
        for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
            for node in nodes:
                strings = node.attr["value"].tensor.string_val if node.op == "Const" else []
                if [*strings] == [label.encode() for label in labels]:
                    strings[:] = names
    graph_file.write_bytes(saved_model.SerializeToString())
    write_manifest(staged)
    return staged


def _config(models: Path, labels: dict[str, int]) -> str:
    pairs = "".join(f' version_labels {{ key: "{key}" value: {value} }}' for key, value in labels.items())
    return (
        f'model_config_list {{ config {{ name: "{MODEL}" base_path: "{models}"'
        f" model_version_policy {{ latest {{ num_versions: 2 }} }}{pairs} }} }}"
    )


class _Swapper:
    """Publishes versions; two are loaded at any time, as a canary needs."""

    def __init__(self, version: Path, models: Path, client: Client, channel: grpc.Channel, pid: int) -> None:
        self._version, self._models, self._client, self._pid = version, models, client, pid
        self._newest = 2
        self._reload = channel.unary_unary(
            HANDLE_RELOAD_CONFIG_REQUEST.path,
            ReloadConfigRequest.SerializeToString,
            ReloadConfigResponse.FromString,
        )
        self.swaps = Swaps()

    def begin(self) -> None:
        """Wait for the first versions: the server is ready once it has one of them. Label them."""
        self._await(lambda states: list(states.values()) == [VersionState.AVAILABLE] * 2)
        self._set_labels(stable=1, canary=2)

    def swap(self) -> None:
        """Move both labels to the newest version, let the next one replace the oldest, give it a label; and
        every few times do so with a damaged one, which must replace nothing for long."""
        newest = self._newest
        self._set_labels(stable=newest, canary=newest)
        if len(self.swaps.windows) % DAMAGED_EVERY == DAMAGED_EVERY - 1:
            self._drop_damaged(newest)
        number = self._newest = newest + 1
        staged = _stage(self._version, self._models, number)
        began_s = time.monotonic()
        staged.rename(self._models / str(number))
        self._await(lambda states: states.get(number) is VersionState.AVAILABLE)
        self._await(lambda states: states.get(number - 2) is VersionState.END)
        self.swaps.windows.append((began_s, time.monotonic()))
        self.swaps.memory_mb.append(_resident_mb(self._pid))
        self._set_labels(stable=newest, canary=number)
        shutil.rmtree(self._models / str(number - 2))

    def _drop_damaged(self, newest: int) -> None:
        number = newest + DAMAGED
        staged = _stage(self._version, self._models, number)
        for name in ("saved_model.pb", "assets.extra/network.tflite"):
            content = (staged / name).read_bytes()
            (staged / name).write_bytes(content[: len(content) // 2])
        began_s = time.monotonic()
        staged.rename(self._models / str(number))
        self._await(lambda states: states.get(number) is VersionState.END)
        shutil.rmtree(self._models / str(number))
        self._await(lambda states: states.get(newest - 1) is VersionState.AVAILABLE)
        self.swaps.windows.append((began_s, time.monotonic()))
        self.swaps.memory_mb.append(_resident_mb(self._pid))
        self.swaps.damaged += 1

    def _set_labels(self, **labels: int) -> None:
        request = ReloadConfigRequest()
        text_format.Parse(_config(self._models, labels), request.config)
        self._reload(request, timeout=STEP_TIMEOUT_S)
        self.swaps.reloads += 1

    def _await(self, condition: Callable[[dict[int, VersionState]], bool]) -> None:
        give_up_s = time.monotonic() + STEP_TIMEOUT_S
        while True:
            states = {status.version: status.state for status in self._client.status()}
            if condition(states):
                return
            if time.monotonic() > give_up_s:
                sys.exit(f"the server did not get on with a swap: {states}")
            time.sleep(0.05)


@contextmanager
def _callers(plan: Path) -> Iterator[list[Row]]:
    """Callers during the `with` block; their calls after it."""
    calls: list[Row] = []
    command = [sys.executable, str(Path(__file__).with_name("callers.py")), str(plan)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield calls
            output, _ = process.communicate()  # which ends their input
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        sys.exit(f"the callers ended with status {process.returncode}")
    calls.extend(json.loads(output))


def _summary(calls: Sequence[Row], swaps: Swaps) -> dict[str, Any]:
    def overlaps(call: Row) -> bool:
        began_s, took_s = call[:2]
        return any(began_s <= end_s and began_s + took_s >= begin_s for begin_s, end_s in swaps.windows)

    during = [call for call in calls if overlaps(call)]
    between = [call for call in calls if not overlaps(call)]
    first_s, last_s = min(call[0] for call in calls), max(call[0] + call[1] for call in calls)
    swapping_s = sum(end_s - begin_s for begin_s, end_s in swaps.windows)
    slow, steady = _latency(during, swapping_s), _latency(between, last_s - first_s - swapping_s)
    faults = [call[4] for call in calls if call[4]]
    settled_mb = swaps.memory_mb[SETTLED_AT_SWAP - 1 :]
    return {
        "calls": len(calls),
        "images": sum(call[2] for call in calls),
        "faults": len(faults),
        "first_faults": sorted(set(faults))[:5],
        "swaps": len(swaps.windows),
        "damaged_versions": swaps.damaged,
        "reloads": swaps.reloads,
        "versions_that_answered": len({call[3] for call in calls}),
        "swap_s": round(statistics.median(end_s - begin_s for begin_s, end_s in swaps.windows), 2),
        "between_swaps": steady,
        "during_swaps": slow,
        "during_to_between": {
            name: round(slow[name] / steady[name], 2) for name in ("p50_s", "p99_s", "slowest_s")
        },
        "resident_mb": swaps.memory_mb,
        "growth_after_swap_10": round(settled_mb[-1] / settled_mb[0] - 1, 3) if len(settled_mb) > 1 else None,
    }


def _latency(calls: Sequence[Row], seconds: float) -> dict[str, float]:
    took_s = sorted(call[1] for call in calls)
    return {
        "calls_per_s": round(len(calls) / seconds, 1),
        "p50_s": round(statistics.median(took_s), 3),
        "p99_s": round(took_s[int(0.99 * (len(took_s) - 1))], 3),
        "slowest_s": round(took_s[-1], 3),
    }


def _resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    return round(int(match[1]) / 1024, 1) if match else 0.0


def _line(row: dict[str, Any]) -> str:
    between, during = row["between_swaps"], row["during_swaps"]
    return (
        f"{row['engine']}, {row['loop']} loop: {row['calls']} calls, {row['faults']} faults, "
        f"{row['swaps']} swaps of {row['swap_s']} s; between them {between['calls_per_s']} calls/s, p99 "
        f"{between['p99_s']} s, slowest {between['slowest_s']} s; during them {during['calls_per_s']} "
        f"calls/s, p99 {during['p99_s']} s, slowest {during['slowest_s']} s; memory {row['resident_mb']} MB"
    )


if __name__ == "__main__":
    main()
