"""Feature extraction against the bare engines, and from the cache, side by side in one run.

    python benchmarks/feature_extraction.py --output benchmarks/results

Cut-outs of real photographs, 500 x 375 JPEG, through one backbone. The bare engines compute on pixels that
lie decoded in memory, in the arrangement that extraction uses; extraction reads, hashes and decodes files,
computes, and writes the cache. The ways take turns over several rounds, so that a machine whose speed drifts
treats them alike; what is compared are the ratios within a round. "decoding" is the decode function alone, in
as many threads as there are cores. CPU time is counted too, which says more where others use the cores.
"""

import argparse
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from result import ratios, spread, write_result
from skimage import data
from sklearn.datasets import load_sample_images

from graftserve.training.backbones import BACKBONES, load_backbone
from graftserve.training.cache import RowStore
from graftserve.training.engine import core_count, open_engine
from graftserve.training.features import compute_features, fingerprint
from graftserve.training.images import FolderImages, content_key
from graftserve.training.preprocess import decode_image
from graftserve.training.recipe import DEFAULT_BACKBONE

WIDTH_PX, HEIGHT_PX = 500, 375
CACHED_ROWS = 10_000


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="any other has random weights")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.images, arguments.backbone)
        result = {
            "backbone": arguments.backbone,
            "images": arguments.images,
            "size_px": [WIDTH_PX, HEIGHT_PX],
            "first_use_of_litert_s": bench.convert(),
            **bench.compare(arguments.rounds),
            "from_the_cache": bench.from_the_cache(arguments.rounds),
        }
    write_result(arguments.output, "feature_extraction", result, rounds=arguments.rounds)
    print(json.dumps(result, indent=2))


class Bench:
    """The photographs, the backbone, and the ways from the one through the other."""

    def __init__(self, work_dir: Path, count: int, backbone: str) -> None:
        self.work_dir, self.cache = work_dir, work_dir / "cache"
        self.backbone = load_backbone(backbone, "imagenet" if backbone == DEFAULT_BACKBONE else "none")
        self.preprocess = BACKBONES[backbone].preprocess
        self.images = FolderImages(work_dir)
        self.paths = [f"{index}.jpg" for index in range(count)]
        for path, content in zip(self.paths, _photographs(count), strict=True):
            (work_dir / path).write_bytes(content)
        graph = tf.function(lambda content: decode_image(content, self.preprocess), autograph=False)
        self.graph = graph.get_concrete_function(tf.TensorSpec([], tf.string))
        self.pixels = [self.decode(path) for path in self.paths]

    def decode(self, path: str) -> np.ndarray:
        return self.graph(tf.constant(self.images.read(path))).numpy()

    def convert(self) -> float:
        """Seconds until LiteRT has said its first word."""
        started = time.perf_counter()
        self._compute(self.paths[:1], "litert")
        return round(time.perf_counter() - started, 2)

    def compare(self, rounds: int) -> dict[str, object]:
        """Images a second and CPU time an image by each way, and the ratios that matter."""
        ways: dict[str, Callable[[], object]] = {
            "litert, bare": self._bare("litert"),
            "litert, extraction": lambda: self._extract("litert"),
            "tensorflow, bare": self._bare("tensorflow"),
            "tensorflow, extraction": lambda: self._extract("tensorflow"),
            "decoding": self._decode_all,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        cpu_ms: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                cpu_s, started = _cpu_s(), time.perf_counter()
                run()
                rates[name].append(len(self.paths) / (time.perf_counter() - started))
                cpu_ms[name].append((_cpu_s() - cpu_s) * 1e3 / len(self.paths))
                print(f"{name}: {rates[name][-1]:.1f} images/s, {cpu_ms[name][-1]:.2f} ms", flush=True)
        for engine in ("litert", "tensorflow"):  # what the two need one after the other, on the same cores
            pairs = zip(rates[f"{engine}, bare"], rates["decoding"], strict=True)
            rates[f"{engine}, bare, and decoding"] = [1 / (1 / one + 1 / other) for one, other in pairs]
        return {
            "images_per_s": {name: spread(values, 1) for name, values in rates.items()},
            "cpu_ms_per_image": {name: spread(values, 2) for name, values in cpu_ms.items()},
            "ratios_of_images_per_s": {
                f"{one} / {other}": ratios(rates[one], rates[other])
                for one, other in (
                    ("litert, extraction", "litert, bare"),
                    ("litert, extraction", "litert, bare, and decoding"),
                    ("tensorflow, extraction", "tensorflow, bare"),
                    ("tensorflow, extraction", "tensorflow, bare, and decoding"),
                    ("litert, extraction", "tensorflow, extraction"),
                )
            },
            "ratios_of_cpu_time": {
                f"{engine}, bare / {engine}, extraction": ratios(
                    cpu_ms[f"{engine}, bare"], cpu_ms[f"{engine}, extraction"]
                )
                for engine in ("litert", "tensorflow")
            },
        }

    def from_the_cache(self, rounds: int) -> dict[str, object]:
        """Rows a second of images that are known, against loading the same matrix from one .npy file."""
        folder = self.work_dir / "known"
        folder.mkdir()
        paths = [f"known/{index}" for index in range(CACHED_ROWS)]
        keys = []
        for index, path in enumerate(paths):
            content = index.to_bytes(50_000, "little")
            (self.work_dir / path).write_bytes(content)
            os.utime(self.work_dir / path, (1e9, 1e9))
            keys.append(content_key(content))
        feature_count = self.backbone.output_shape[-1]
        rows = np.random.default_rng(0).random((CACHED_ROWS, feature_count), np.float32)
        entry = self.cache / fingerprint(self.backbone, self.preprocess, "litert")
        store = RowStore({entry: {"kind": "features"}}, (feature_count,), np.float32)
        for start in range(0, CACHED_ROWS, 512):
            store.add(entry, keys[start : start + 512], rows[start : start + 512])
        np.save(self.work_dir / "rows.npy", rows)

        def rate(run: Callable[[], object]) -> float:
            started = time.perf_counter()
            run()
            return CACHED_ROWS / (time.perf_counter() - started)

        first = rate(lambda: self._compute(paths, "auto"))
        again = [rate(lambda: self._compute(paths, "auto")) for _ in range(rounds)]
        load = [rate(lambda: np.load(self.work_dir / "rows.npy")) for _ in range(rounds)]
        return {
            "rows": CACHED_ROWS,
            "rows_per_s_where_files_are_read": round(first),
            "rows_per_s": spread(again, 0),
            "rows_per_s_of_numpy_load": spread(load, 0),
        }

    def _compute(self, paths: Sequence[str], engine: str) -> object:
        result = compute_features(
            self.backbone, self.preprocess, self.images, paths, self.cache, engine=engine
        )
        assert len(result.kept) == len(paths)  # noqa: S101
        return result

    def _extract(self, engine: str) -> None:
        for entry in self.cache.iterdir():
            if not entry.name.startswith("network-"):
                shutil.rmtree(entry)
        self._compute(self.paths, engine)

    def _bare(self, name: str) -> Callable[[], object]:
        (network,) = self.cache.glob("network-*")
        samples = np.stack(self.pixels[:4])
        engine = open_engine(name, self.backbone, len(self.paths), lambda: samples, network, {})
        size = engine.batch_images
        batches = [self.pixels[start : start + size] for start in range(0, len(self.pixels), size)]

        def run() -> None:
            waiting = iter(batches)
            with ThreadPoolExecutor(len(engine.lanes)) as pool:
                for done in [pool.submit(_drain, lane, waiting) for lane in engine.lanes]:
                    done.result()

        run()  # TensorFlow traces at its first call
        return run

    def _decode_all(self) -> None:
        with ThreadPoolExecutor(core_count()) as pool:
            for _ in pool.map(self.decode, self.paths):
                pass


def _drain(lane: Callable[[list[np.ndarray]], object], batches: object) -> None:
    for batch in batches:
        lane(batch)


def _photographs(count: int) -> list[bytes]:
    """JPEG files, each another part of one of six photographs."""
    sources = [data.chelsea(), data.coffee(), data.rocket(), data.astronaut(), *load_sample_images().images]
    rng = np.random.default_rng(0)
    files = []
    for index in range(count):
        photo = Image.fromarray(sources[index % len(sources)])
        width = min(photo.width, photo.height * WIDTH_PX / HEIGHT_PX) * rng.uniform(0.6, 1.0)
        height = width * HEIGHT_PX / WIDTH_PX
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        file = io.BytesIO()
        photo.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.LANCZOS, box).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    main()
