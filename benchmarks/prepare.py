"""What making photographs small on the client saves, costs, and changes in the answers.

    taskset -c 0 python benchmarks/prepare.py --output benchmarks/results

Photographs that packages ship, each whole and in five crops, scaled up to 12 megapixels and written as a
camera would (JPEG of quality 92). They hold less detail than a camera's, so the bytes saved are understated,
and many show nothing that ImageNet has a class for, so the first class is often an uncertain one. Every one
is asked as it is and prepared, on one core; what counts are the ratios.

- bytes: what is sent, prepared to as it is;
- time: preparing and then decoding on the server, to decoding what is sent as it is; and the server's part
  of that alone;
- break-even: the bandwidth below which preparing takes less time than sending what it saves;
- answers: EfficientNet-Lite0 with its ImageNet weights and classes, behind the server's own decoding: how
  often the first class stays (also where it had a probability of 0.5 or more), and by how much its
  probability moves.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import sklearn.datasets
import tensorflow as tf
from PIL import Image
from result import spread, write_result
from skimage import data

from graftserve.client.prepare import Prepare
from graftserve.training.backbones import BACKBONES, load_backbone
from graftserve.training.preprocess import image_decoder
from graftserve.training.torch_checkpoint import read_state_dict

BACKBONE = BACKBONES["efficientnet-lite0"]
SIZE_PX = (4032, 3024)
PREPARES = [
    Prepare(max_side_px, quality) for max_side_px in (256, 384, 512, 1024) for quality in (75, 90, 95)
]
# Left, upper, width and height of each crop, as shares of the photograph.
CROPS = (
    (0.0, 0.0, 1.0, 1.0),
    (0.0, 0.0, 0.7, 0.7),
    (0.3, 0.0, 0.7, 0.7),
    (0.0, 0.3, 0.7, 0.7),
    (0.3, 0.3, 0.7, 0.7),
    (0.2, 0.2, 0.6, 0.6),
)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--photos", type=int, default=0, help="take only the first ones; 0 means all")
    parser.add_argument("--rounds", type=int, default=3, help="of timing each photograph")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    photos = list(_photos())[: arguments.photos or None]
    network = _classifier()
    decode = image_decoder(BACKBONE.preprocess)
    as_it_is = network([decode(photo).numpy() for photo in photos])
    rows = []
    for prepare in PREPARES:
        prepared = [prepare(photo) for photo in photos]
        row = {
            "max_side_px": prepare.max_side_px,
            "quality": prepare.quality,
            **_cost(prepare, decode, photos, prepared, arguments.rounds),
            **_changes(as_it_is, network([decode(image).numpy() for image in prepared])),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    best = as_it_is.max(axis=1)
    write_result(
        arguments.output,
        "prepare",
        {
            "photos": len(photos),
            "size_px": SIZE_PX,
            "bytes_as_it_is": round(statistics.mean(map(len, photos))),
            "photos_where_sure": int((best >= 0.5).sum()),
            "probability_as_it_is": spread(best.tolist()),
            "rows": rows,
        },
        rounds=arguments.rounds,
    )


def _cost(
    prepare: Prepare,
    decode: Callable[[Any], object],
    photos: list[bytes],
    prepared: list[bytes],
    rounds: int,
) -> dict[str, Any]:
    ratios, server_ratios, prepare_s, break_even = [], [], [], []
    for photo, image in zip(photos, prepared, strict=True):
        taken = {"prepare": [], "decode_prepared": [], "decode_as_it_is": []}
        for _ in range(rounds):
            taken["prepare"].append(_seconds(lambda photo=photo: prepare(photo)))
            taken["decode_prepared"].append(_seconds(lambda image=image: decode(tf.constant(image))))
            taken["decode_as_it_is"].append(_seconds(lambda photo=photo: decode(tf.constant(photo))))
        median = {name: statistics.median(values) for name, values in taken.items()}
        prepare_s.append(median["prepare"])
        ratios.append((median["prepare"] + median["decode_prepared"]) / median["decode_as_it_is"])
        server_ratios.append(median["decode_prepared"] / median["decode_as_it_is"])
        break_even.append((len(photo) - len(image)) * 8 / median["prepare"] / 1e6)
    return {
        "bytes": round(statistics.mean(map(len, prepared))),
        "times_bytes": spread(
            [len(image) / len(photo) for photo, image in zip(photos, prepared, strict=True)]
        ),
        "prepare_ms": round(statistics.median(prepare_s) * 1000, 1),
        "times_time": spread(ratios),
        "times_server_time": spread(server_ratios),
        "break_even_mbit_s": round(statistics.median(break_even)),
    }


def _changes(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> dict[str, float]:
    best = before.argmax(axis=1)
    rows = np.arange(len(before))
    moved = np.abs(before[rows, best] - after[rows, best])
    same = best == after.argmax(axis=1)
    return {
        "top_1_agreement": round(float(same.mean()), 4),
        "top_1_agreement_where_sure": round(float(same[before[rows, best] >= 0.5].mean()), 4),
        "probability_moved_mean": round(float(moved.mean()), 4),
        "probability_moved_max": round(float(moved.max()), 4),
    }


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _classifier() -> Callable[[list[Any]], npt.NDArray[np.float32]]:
    """From pixels [224, 224, 3] to the probabilities of ImageNet's 1,000 classes."""
    backbone = load_backbone(BACKBONE.name)
    weights = read_state_dict(BACKBONE.packaged_weights())
    kernel, bias = np.asarray(weights["_fc.weight"]).T, np.asarray(weights["_fc.bias"])

    def classify(images: list[Any]) -> npt.NDArray[np.float32]:
        features = np.concatenate(
            [
                np.asarray(backbone(np.stack(images[start : start + 16]), training=False))
                for start in range(0, len(images), 16)
            ]
        )
        return np.asarray(tf.nn.softmax(features @ kernel + bias))

    return classify


def _photos() -> Iterator[bytes]:
    """JPEG files of 12 megapixels."""
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    originals = [
        data.chelsea(),
        data.coffee(),
        data.rocket(),
        data.astronaut(),
        data.stereo_motorcycle()[0],
        data.hubble_deep_field(),
        data.retina(),
        *sklearn.datasets.load_sample_images().images,
        np.asarray(Image.open(samples / "grace_hopper.jpg").convert("RGB")),
    ]
    for pixels in originals:
        photo = Image.fromarray(pixels)
        for left, upper, width, height in CROPS:
            box = (
                left * photo.width,
                upper * photo.height,
                (left + width) * photo.width,
                (upper + height) * photo.height,
            )
            size_px = SIZE_PX if width * photo.width >= height * photo.height else SIZE_PX[::-1]
            buffer = io.BytesIO()
            scale = min(size_px[0] / (box[2] - box[0]), size_px[1] / (box[3] - box[1]))
            size = (round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale))
            photo.resize(size, Image.Resampling.LANCZOS, box).save(buffer, "JPEG", quality=92)
            yield buffer.getvalue()


if __name__ == "__main__":
    main()
