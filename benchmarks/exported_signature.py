"""What the exported signature costs over its parts, side by side in one run.

    python benchmarks/exported_signature.py --output benchmarks/results

Photographs of 500 x 375 pixels as JPEG, EfficientNet-Lite0, everything in one process and taken in turn over
several rounds; what counts are the ratios within a round.

- parts: decoding 32 images, and the frozen network on 32 decoded ones in batches of 8;
- request: the signature on 32 images, with validity, labels, ranking and batching, in a Session;
- callers: 32 threads that ask for one image at a time, against the network's best batch throughput;
- weights: what a Session takes for each set of outputs, with the weights as shared variables of the folded
  graph and as constants, each in a process of its own.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image
from result import spread, write_result
from skimage import data

from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, PIXELS, SERVING_DEFAULT
from graftserve.export.batching import Batching, batch_network
from graftserve.export.network import Network, freeze_network
from graftserve.export.signatures import ServingModule, available_outputs, save_model
from graftserve.export.verify import open_signatures
from graftserve.training.backbones import BACKBONES, load_backbone
from graftserve.training.graft import build_head, graft
from graftserve.training.preprocess import Preprocess, image_decoder
from graftserve.training.recipe import Head

BACKBONE = "efficientnet-lite0"
CLASSES = 10
REQUEST = 32
CALLS = 6  # of each caller
BATCH = 8


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--memory-of", type=Path, help=argparse.SUPPRESS
    )  # what this runs in processes of its own
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(_memory(arguments.memory_of)))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)

    preprocess = BACKBONES[BACKBONE].preprocess
    network = _network(preprocess)
    with tempfile.TemporaryDirectory() as folder:
        shared, constant = Path(folder) / "shared", Path(folder) / "constant"
        _save(network, preprocess, shared)
        _save_constant(network, preprocess, constant)
        result: dict[str, Any] = {
            "weights": {path.name: _in_a_process(path) for path in (shared, constant)},
        }
        result |= _throughput(shared, network, preprocess, arguments.rounds)
    for name, values in result.items():
        print(f"{name}: {json.dumps(values)}")
    write_result(arguments.output, "exported_signature", result, rounds=arguments.rounds)


def _network(preprocess: Preprocess) -> Network:
    backbone = load_backbone(BACKBONE, "imagenet")
    model = graft(backbone, build_head(backbone.output.shape[-1], CLASSES, Head()))
    return freeze_network(lambda pixels: model(pixels, training=False), preprocess.side_px)


def _save(network: Network, preprocess: Preprocess, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        labels = Path(work) / "labels.txt"
        labels.write_text("".join(f"{index}\n" for index in range(CLASSES)))
        names = [str(index) for index in range(CLASSES)]
        outputs = available_outputs(network)
        module = ServingModule(network, names, labels, preprocess, Batching(), 5, outputs)
        save_model(module, folder)


def _save_constant(network: Network, preprocess: Preprocess, folder: Path) -> None:
    """The signature `pixels` as it is without folding and sharing: the frozen network as it came."""
    batched = batch_network(network.function, Batching())
    side_px = preprocess.side_px

    def pixels(images: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = dict(zip(network.widths, batched(images), strict=True))
        scores, _ = tf.math.top_k(outputs["probabilities"], 5)
        return {"scores": scores, "probabilities": outputs["probabilities"], "classes": tf.as_string(scores)}

    module = tf.Module()
    spec = tf.TensorSpec([None, side_px, side_px, 3], tf.uint8, name="images")
    module.pixels = tf.function(pixels, input_signature=[spec], autograph=False)
    tf.saved_model.save(module, str(folder), signatures={PIXELS: module.pixels})


def _in_a_process(folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--output", str(folder), "--memory-of", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def _memory(folder: Path) -> dict[str, float]:
    pixels = np.zeros((1, 224, 224, 3), np.uint8)
    sets = (["scores"], ["probabilities"], ["scores", "classes"], ["scores", "probabilities"])
    before = _resident_mb()
    with open_signatures(folder) as signatures:
        signatures.run(PIXELS, pixels, ["classes"])
        first = _resident_mb()
        started = time.perf_counter()
        for outputs in sets:
            signatures.run(PIXELS, pixels, outputs)
        elapsed_s = time.perf_counter() - started
        return {
            "first_mb": round(first - before, 1),
            "each_further_mb": round((_resident_mb() - first) / len(sets), 1),
            "each_further_s": round(elapsed_s / len(sets), 2),
        }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _throughput(folder: Path, network: Network, preprocess: Preprocess, rounds: int) -> dict[str, Any]:
    images = [_jpeg(offset) for offset in range(REQUEST)]
    decode = image_decoder(preprocess)
    pixels = np.stack([decode(tf.constant(image)).numpy() for image in images])
    decode_rows = _decode_together(preprocess)

    def run_network() -> None:
        for start in range(0, REQUEST, BATCH):
            network.function(tf.constant(pixels[start : start + BATCH]))

    with open_signatures(folder) as signatures:
        rows = np.array(images, object)

        def request() -> None:
            signatures.run(SERVING_DEFAULT, rows, CLASSIFY_OUTPUTS)

        def caller(row: int) -> None:
            for _ in range(CALLS):
                signatures.run(SERVING_DEFAULT, rows[row : row + 1], CLASSIFY_OUTPUTS)

        def callers() -> None:
            _join([threading.Thread(target=caller, args=(row,)) for row in range(REQUEST)])

        def best() -> None:
            _join([threading.Thread(target=run_network) for _ in range(2)])

        ways: dict[str, tuple[Callable[[], None], int]] = {
            "decode": (lambda: decode_rows(tf.constant(rows)), REQUEST),
            "network": (run_network, REQUEST),
            "network_two_threads": (best, 2 * REQUEST),
            "request": (request, REQUEST),
            "callers": (callers, CALLS * REQUEST),
        }
        for call, _ in ways.values():
            call()
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (call, count) in ways.items():
                started = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - started) / count)
    over_parts = [
        request / (decode + network)
        for request, decode, network in zip(taken["request"], taken["decode"], taken["network"], strict=True)
    ]
    of_best = [
        min(one, two) / callers
        for one, two, callers in zip(
            taken["network"], taken["network_two_threads"], taken["callers"], strict=True
        )
    ]
    return {
        "ms_per_image": {name: round(statistics.median(values) * 1000, 2) for name, values in taken.items()},
        "request_to_decode_and_network": spread(over_parts),
        "callers_to_best_network": spread(of_best),
    }


def _decode_together(preprocess: Preprocess) -> Callable[[tf.Tensor], tf.Tensor]:
    """32 images, in parallel as the signature decodes them."""
    decode = image_decoder(preprocess)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def together(rows: tf.Tensor) -> tf.Tensor:
        decoded = tf.data.Dataset.from_tensor_slices(rows).map(decode, num_parallel_calls=8)
        return decoded.batch(REQUEST).get_single_element()

    concrete: Callable[[tf.Tensor], tf.Tensor] = together.get_concrete_function()
    return concrete


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _jpeg(offset: int) -> bytes:
    """A part of a photograph, another one for each offset."""
    photo = Image.fromarray(data.coffee() if offset % 2 else data.astronaut())
    box = offset, offset, photo.width - offset, photo.height - offset
    buffer = io.BytesIO()
    photo.crop(box).resize((500, 375), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
