"""What things cost as there is more to do: curves, and where they bend.

    python benchmarks/growth.py --output benchmarks/results
    python benchmarks/growth.py --output /tmp --only versions models

- images: training a probe on EfficientNet-Lite0 with pictures like handwritten digits, without a cache and
  again from it; and the feature cache alone, with made-up rows of 1,280 numbers: to write them, to open the
  cache, and to read each once in random order, in batches of 32;
- classes: fitting the linear head on 10,000 made-up rows of 64 numbers; exporting a small Keras model with so
  many classes, the bytes of its answer as the client asks for it (the best five) and with all probabilities,
  and how long those answers take;
- versions: so many folders in a model's base path, of which the newest is served: one look of the server for
  new ones, a list of them, and a start;
- models: so many in one server, each a copy of the same export: a start, memory, and what an image of one of
  them costs while the others are there;
- connections: so many open channels to one server, each used once: memory, and what an image costs on others;
- replicas: a client that balances over so many servers: the time of a call to classify and its CPU time.

Each point is a median of rounds, except that training without a cache, exports and starts are done once in
each round of their own, of which there is one by default (--slow-rounds). `exponent` is log of the costs'
ratio to log of the works', from the point before: 0 is a cost that stays as it is, 1 one that grows as the
work does. `bends_at` is the first point with an exponent above 1.2. `last_to_first` is a ratio of costs.

What is not fair: small points hold what is paid once (converting the network, a server's imports), which
makes the first exponents too small; and of one version's folder, which is served, a look does not read the
files, which makes the first exponent there too large. Made-up rows are far easier to tell apart than
pictures, so a head is fitted in fewer steps. The shipped fake server stands for the replicas, in one
process, which has to share the CPUs with the client; its time is in the time of a call, not in the CPU
time. Folders and models are hard links to one export, so that the system's cache holds them all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from curves import curve
from PIL import Image
from result import write_result

from graftserve.client import Client
from graftserve.client.testing import FakeServer
from graftserve.client.wire import GetModelStatusRequest, PredictRequest, PredictResponse
from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, IMAGE_BYTES
from graftserve.client.wire.methods import GET_MODEL_STATUS, PREDICT
from graftserve.client.wire.tensors import to_proto

FEATURES = 1280
SEGMENT_ROWS, BATCH_ROWS = 512, 32  # as feature extraction writes them, and training reads them
HEAD_ROWS, HEAD_FEATURES = 10_000, 64
SIDE_PX = 64  # of the small model
CALLERS = 8
CALLS = 200

Curves = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How to measure. folder: to work in. version: exported, to be served. sizes: instead of the usual."""

    folder: Path
    version: Path | None
    rounds: int
    slow_rounds: int
    seconds: float
    sizes: tuple[int, ...]

    def size(self, *usual: int) -> tuple[int, ...]:
        return self.sizes or usual

    def exported(self) -> Path:
        from servers import export_digits

        made = self.folder / "exported" / "models" / "bench" / "1"
        if self.version is None and not made.is_dir():
            export_digits(self.folder / "exported")
        return self.version or made

    def photo(self) -> Path:
        from servers import write_photos

        return write_photos(self.folder)[0]


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the result")
    parser.add_argument("--only", choices=GROWTH, nargs="+", default=list(GROWTH), help="default: all")
    parser.add_argument("--sizes", type=int, nargs="+", default=[], help="of the work, instead of the usual")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4, help="of each load in each round")
    parser.add_argument("--version", type=Path, help="an exported version (default: one is made)")
    parser.add_argument("--serve-fakes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_fakes:
        _serve_fakes(arguments.serve_fakes)
        return
    if arguments.output is None:
        parser.error("expected --output, a folder for the result")
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            *(Path(folder), arguments.version, arguments.rounds, arguments.slow_rounds),
            *(arguments.seconds, tuple(sorted(arguments.sizes))),
        )
        for name in arguments.only:
            result[name] = GROWTH[name](plan)
            print(name, json.dumps(result[name], indent=2), flush=True)
    write_result(arguments.output, "growth", result, rounds=arguments.rounds)


# -- images


def _images(plan: Plan) -> Curves:
    from graftserve.training import Recipe, train

    cold: dict[int, list[float]] = {}
    warm: dict[int, list[float]] = {}
    fitting: dict[int, list[float]] = {}
    for count in plan.size(1_000, 3_000, 10_000):
        data = plan.folder / f"digits-{count}"
        _write_digits_like(data, count)
        recipe = Recipe(str(data))
        for number in range(plan.slow_rounds):
            cache = plan.folder / f"cache-{count}-{number}"
            for taken in (cold, warm):
                run_dir = plan.folder / "run"
                began_s = time.perf_counter()
                run = train(recipe, run_dir, cache_dir=cache, overwrite=True)
                taken.setdefault(count, []).append(time.perf_counter() - began_s)
                fitting.setdefault(count, []).append(run.metrics["seconds"]["fitting"])
    return {
        "training_without_a_cache": curve("images", "s", cold),
        "training_from_the_cache": curve("images", "s", warm),
        "of_that_fitting": curve("images", "s", fitting),
        **_cache(plan),
    }


def _write_digits_like(folder: Path, count: int) -> None:
    """scikit-learn's digits, again and again, each time elsewhere on the canvas and a little turned."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chance = np.random.default_rng(0)
    for index in range(count):
        number = index % len(digits.target)
        path = folder / str(digits.target[number]) / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        digit = Image.fromarray((digits.images[number] * (255 / 16)).astype(np.uint8))
        digit = digit.resize((64, 64), Image.Resampling.BICUBIC).rotate(chance.uniform(-10, 10))
        canvas = Image.new("L", (112, 112))
        canvas.paste(digit, (int(chance.integers(8, 40)), int(chance.integers(8, 40))))
        canvas.save(path, quality=92)


def _cache(plan: Plan) -> Curves:
    from graftserve.training.cache import RowStore
    from graftserve.training.images import content_key

    taken: dict[str, dict[int, list[float]]] = {"write": {}, "open": {}, "read": {}}
    block = np.random.default_rng(0).random((SEGMENT_ROWS, FEATURES), np.float32)
    for count in plan.size(1_000, 10_000, 100_000):
        keys = [content_key(index.to_bytes(8, "little")) for index in range(count)]
        order = np.random.default_rng(0).permutation(count)
        for number in range(plan.slow_rounds):
            entry = plan.folder / f"rows-{count}-{number}" / "entry"
            meta = {entry: {"kind": "features"}}

            def write(entry: Path = entry, meta: Any = meta, keys: Sequence[bytes] = keys) -> None:
                store = RowStore(meta, (FEATURES,), np.float32)
                for start in range(0, len(keys), SEGMENT_ROWS):
                    part = keys[start : start + SEGMENT_ROWS]
                    store.add(entry, part, block[: len(part)])

            taken["write"].setdefault(count, []).append(_seconds(write))
        for _ in range(plan.rounds):
            began_s = time.perf_counter()
            store = RowStore(meta, (FEATURES,), np.float32)
            found = len(store)
            taken["open"].setdefault(count, []).append(time.perf_counter() - began_s)
            if found != count:
                raise SystemExit(f"expected {count} rows in the cache, got {found}")
            began_s = time.perf_counter()
            for start in range(0, count, BATCH_ROWS):
                store.get([keys[row] for row in order[start : start + BATCH_ROWS]])
            taken["read"].setdefault(count, []).append(time.perf_counter() - began_s)
        del store
    return {f"cache_{name}": curve("rows", "s", samples) for name, samples in taken.items()}


# -- classes


def _classes(plan: Plan) -> Curves:
    from servers import serve_ours

    from graftserve.training.head import fit_linear_head

    counts = plan.size(10, 100, 1_000, 10_000)
    chance = np.random.default_rng(0)
    costs: dict[tuple[str, str], dict[int, list[float]]] = {}

    def add(what: str, unit: str, count: int, values: Sequence[float]) -> None:
        costs.setdefault((what, unit), {}).setdefault(count, []).extend(values)

    photo = plan.photo().read_bytes()
    _export_small(plan.folder / "first" / "bench", 2)  # which imports what it takes
    for count in counts:
        # As many of each class, around a centre of its own.
        labels = np.arange(HEAD_ROWS) % count
        centres = chance.normal(size=(count, HEAD_FEATURES))
        rows = (centres[labels] + chance.normal(size=(HEAD_ROWS, HEAD_FEATURES))).astype(np.float32)
        none = rows[:0], labels[:0]
        for _ in range(plan.slow_rounds):
            fit = _seconds(lambda rows=rows, labels=labels, none=none, count=count: fit_linear_head(
                rows, labels, *none, count
            ))  # fmt: skip
            add("fitting_the_head", "s", count, [fit])
            base = plan.folder / "classes" / str(count) / "bench"
            add("exporting", "s", count, [_export_small(base, count)])
        with (
            serve_ours(base, "auto") as server,
            grpc.insecure_channel(server.target, [("grpc.max_receive_message_length", -1)]) as channel,
        ):
            ask = channel.unary_unary(PREDICT.path)
            for name, outputs in (("best_five", CLASSIFY_OUTPUTS), ("all_probabilities", ["probabilities"])):
                request = PredictRequest()
                request.model_spec.name = "bench"
                request.inputs[IMAGE_BYTES].CopyFrom(to_proto(np.array([photo], object)))
                request.output_filter.extend(outputs)
                content = request.SerializeToString()
                answer = ask(content)
                values = PredictResponse.FromString(answer).outputs
                if set(values) != set(outputs):
                    raise SystemExit(f"expected {', '.join(outputs)}, got {', '.join(values)}")
                add(f"answer_with_{name}", "bytes", count, [len(answer)])
                taken_s = [_seconds(lambda ask=ask, content=content: ask(content)) for _ in range(CALLS)]
                add(f"latency_with_{name}", "ms", count, [1e3 * value for value in taken_s])
    return {what: curve("classes", unit, samples) for (what, unit), samples in costs.items()}


def _export_small(model_base_path: Path, classes: int) -> float:
    """Seconds to export a model with next to nothing below its head."""
    import keras

    from graftserve.export import ExportOptions, export_model, open_keras

    pixels = keras.Input((SIDE_PX, SIDE_PX, 3), dtype="uint8")
    scaled = keras.layers.Rescaling(1 / 255)(pixels)
    blobs = keras.layers.Conv2D(64, 8, strides=8, activation="relu")(scaled)
    features = keras.layers.Dense(256, activation="relu")(keras.layers.GlobalAveragePooling2D()(blobs))
    model = keras.Model(pixels, keras.layers.Dense(classes, activation="softmax")(features))
    model_base_path.mkdir(parents=True, exist_ok=True)
    file, labels = model_base_path.parent / "model.keras", model_base_path.parent / "labels.txt"
    model.save(file)
    labels.write_text("".join(f"class {number}\n" for number in range(classes)))
    return _seconds(
        lambda: export_model(open_keras(file, labels, "pixels=0..255"), model_base_path, ExportOptions())
    )


# -- versions and models


def _versions(plan: Plan) -> Curves:
    from servers import serve_ours

    from graftserve.export import published_versions
    from graftserve.serving.source import FileSystemStoragePathSource, MonitoredServable

    looks: dict[int, list[float]] = {}
    lists: dict[int, list[float]] = {}
    starts: dict[int, list[float]] = {}
    for count in plan.size(1, 10, 100):
        base = plan.folder / "versions" / str(count) / "bench"
        for number in range(1, count + 1):
            _link(plan.exported(), base / str(number))
        source = FileSystemStoragePathSource([MonitoredServable("bench", base)])
        known = {"bench": {count}}  # the server passes on what it serves
        source.poll(known)  # the second look takes new folders for complete
        looks[count] = [_seconds(lambda source=source, known=known: source.poll(known)) for _ in range(CALLS)]
        lists[count] = [_seconds(lambda base=base: published_versions(base)) for _ in range(CALLS)]
        for _ in range(plan.slow_rounds):
            with serve_ours(base, "litert") as server:
                starts.setdefault(count, []).append(server.start_s)
    return {
        "look_for_versions": curve("versions", "ms", _scaled(looks, 1e3)),
        "list_of_versions": curve("versions", "ms", _scaled(lists, 1e3)),
        "start": curve("versions", "s", starts),
    }


def _models(plan: Plan) -> Curves:
    from servers import MODEL, serve_ours

    starts: dict[int, list[float]] = {}
    memory: dict[int, list[float]] = {}
    costs: dict[int, list[float]] = {}
    photo = plan.photo()
    for count in plan.size(1, 5, 20):
        folder = plan.folder / "models" / str(count)
        names = [MODEL, *(f"other-{number}" for number in range(1, count))]
        for name in names:
            _link(plan.exported(), folder / name / "1")
        config = folder / "models.config"
        config.write_text(
            "model_config_list {"
            + "".join(f'config {{ name: "{name}" base_path: "{folder / name}" }}' for name in names)
            + "}"
        )
        for _ in range(plan.slow_rounds):
            with serve_ours(folder / MODEL, "litert", f"--model_config_file={config}") as server:
                starts.setdefault(count, []).append(server.start_s)
                memory.setdefault(count, []).append(server.memory_mib())
                costs.setdefault(count, []).extend(_image_costs_ms(server, photo, plan))
    each = {
        f"{before} to {count}": round(
            (statistics.median(memory[count]) - statistics.median(memory[before])) / (count - before), 1
        )
        for before, count in zip(memory, list(memory)[1:], strict=False)
    }
    return {
        "start": curve("models", "s", starts),
        "memory": curve("models", "MiB", memory, 1),
        "memory_of_each_further_model_mib": each,
        "image_of_one_of_them": curve("models", "ms", costs),
    }


def _link(version: Path, folder: Path) -> None:
    """A copy of a version, whose files are hard links."""
    for file in version.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(version)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                try:
                    os.link(file, target)
                except OSError:  # another file system
                    target.write_bytes(file.read_bytes())


def _image_costs_ms(server: Any, photo: Path, plan: Plan) -> list[float]:
    """Of all callers together, round by round."""
    flags = ("--callers", CALLERS, "--seconds", plan.seconds, "--images", photo)
    return [1e3 / server.load(*flags)["per_s"] for _ in range(plan.rounds)]


# -- connections


def _connections(plan: Plan) -> Curves:
    from servers import serve_ours

    memory: dict[int, list[float]] = {}
    costs: dict[int, list[float]] = {}
    opening: dict[int, list[float]] = {}
    photo = plan.photo()
    with serve_ours(plan.exported().parent, "litert") as server, ExitStack() as stack:
        server.load("--callers", CALLERS, "--seconds", 1, "--images", photo)
        opened = 0
        for count in plan.size(1, 100, 1_000):
            began_s = time.perf_counter()
            for _ in range(count - opened):
                channel = stack.enter_context(
                    grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)])
                )
                request = GetModelStatusRequest()
                request.model_spec.name = "bench"
                channel.unary_unary(GET_MODEL_STATUS.path)(request.SerializeToString())
            opening[count] = [1e3 * (time.perf_counter() - began_s) / (count - opened)]
            opened = count
            memory[count] = [server.memory_mib()]
            costs[count] = _image_costs_ms(server, photo, plan)
    return {
        "opening_each": curve("connections", "ms", opening),
        "memory": curve("connections", "MiB", memory, 1),
        "image_on_others": curve("connections", "ms", costs),
    }


# -- replicas


def _replicas(plan: Plan) -> Curves:
    times: dict[int, list[float]] = {}
    cpu: dict[int, list[float]] = {}
    counts = plan.size(1, 4, 16)
    for _, count in ((number, count) for number in range(plan.rounds) for count in counts):
        with _fakes(count) as targets, Client(targets, "flowers") as client:
            for _ in range(10 * count):  # until each has answered
                client.classify(b"an image")
            cpu_s = time.process_time()
            taken_s = [_seconds(lambda client=client: client.classify(b"an image")) for _ in range(5 * CALLS)]
            cpu.setdefault(count, []).append(1e6 * (time.process_time() - cpu_s) / len(taken_s))
            times.setdefault(count, []).append(1e6 * statistics.median(taken_s))
    return {"call": curve("replicas", "us", times, 1), "cpu_of_client": curve("replicas", "us", cpu, 1)}


@contextmanager
def _fakes(count: int) -> Iterator[list[str]]:
    """Targets of fake servers in a process of their own."""
    command = [sys.executable, __file__, "--serve-fakes", str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            yield json.loads(line)
            return
        raise SystemExit("the process of the fake servers ended; its error is above")


def _serve_fakes(count: int) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(FakeServer()) for _ in range(count)]
        print(json.dumps([server.target for server in servers]), flush=True)
        sys.stdin.read()


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def _scaled(samples: dict[int, list[float]], factor: float) -> dict[int, list[float]]:
    return {work: [factor * value for value in values] for work, values in samples.items()}


GROWTH: dict[str, Callable[[Plan], Curves]] = {
    "images": _images,
    "classes": _classes,
    "versions": _versions,
    "models": _models,
    "connections": _connections,
    "replicas": _replicas,
}


if __name__ == "__main__":
    main()
