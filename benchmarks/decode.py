"""The decode stage against the usual one, and what its parts cost, side by side in one run.

    taskset -c 0 python benchmarks/decode.py --output benchmarks/results

Photographs as JPEG, one at a time, on one core (TensorFlow is told to use one thread), taken in turn over
several rounds; what counts are the ratios within a round.

- usual: decode_jpeg and tf.image.resize, as most exports have it: aliased, and blind to the orientation;
- usual, antialiased: the same with antialias=True, the quality that ours has;
- ours: decode_image, with the checks, the orientation and the crop;
- its parts: the JPEG decoder at the reduction that ours takes, the resize, the orientation, the header.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf
from photos import photo_sheet
from PIL import Image
from result import ratios, write_result
from skimage import data

from graftserve.training import preprocess as stage
from graftserve.training.preprocess import Preprocess, image_decoder

PREPROCESS = Preprocess(224)
TEXT = tf.TensorSpec([], tf.string)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.25, help="of each way in each round")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    rows = [_measure(name, image, arguments) for name, image in _photos().items()]
    result = {
        "rows": rows,
    }
    write_result(arguments.output, "decode", result, rounds=arguments.rounds)


def _measure(name: str, image: bytes, arguments: argparse.Namespace) -> dict[str, Any]:
    content = tf.constant(image)
    short_side_px = min(Image.open(io.BytesIO(image)).size)
    reduced = stage._decode_jpeg_reduced(content, tf.constant(short_side_px), PREPROCESS)
    resize = tf.function(
        lambda pixels: stage._resize(pixels, PREPROCESS),
        input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)],
        autograph=False,
    ).get_concrete_function()
    ways: dict[str, Callable[[], object]] = {
        "usual": _calling(lambda encoded: _usual(encoded, antialias=False), content),
        "usual_antialiased": _calling(lambda encoded: _usual(encoded, antialias=True), content),
        "ours": lambda: image_decoder(PREPROCESS)(content),
        "part_jpeg": _calling(
            lambda encoded: stage._decode_jpeg_reduced(encoded, tf.constant(short_side_px), PREPROCESS),
            content,
        ),
        "part_resize": lambda: resize(reduced),
        "part_orientation": _calling(stage._exif_orientation, content),
        "part_header": _calling(lambda encoded: stage._header_size(encoded, stage._sniff(encoded)), content),
        "call": _calling(lambda encoded: tf.shape(encoded), content),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for call in ways.values():
        call()
    for _ in range(arguments.rounds):
        for way, call in ways.items():
            taken[way].append(_seconds(call, arguments.seconds))
    row: dict[str, Any] = {
        "photo": name,
        "bytes": len(image),
        "ms": {way: round(statistics.median(values) * 1000, 3) for way, values in taken.items()},
    }
    for usual in ("usual", "usual_antialiased"):
        row[f"times_{usual}"] = ratios(taken[usual], taken["ours"])
    print(f"{name}: {json.dumps({key: value for key, value in row.items() if key != 'photo'})}", flush=True)
    return row


def _usual(encoded: tf.Tensor, *, antialias: bool) -> tf.Tensor:
    image = tf.io.decode_jpeg(encoded, channels=3)
    resized = tf.image.resize(image, [PREPROCESS.side_px] * 2, antialias=antialias)
    return tf.cast(resized, tf.uint8)


def _calling(function: Callable[[tf.Tensor], Any], content: tf.Tensor) -> Callable[[], object]:
    concrete = tf.function(function, input_signature=[TEXT], autograph=False).get_concrete_function()
    return lambda: concrete(content)


def _seconds(call: Callable[[], object], at_least_s: float) -> float:
    count, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < at_least_s:
        call()
        count += 1
    return elapsed_s / count


def _photos() -> dict[str, bytes]:
    """Small ones are scaled down; the large ones are as rich in detail."""
    coffee = Image.fromarray(data.coffee())
    photos = {
        f"{width} x {height}": _jpeg(coffee.resize((width, height), Image.Resampling.LANCZOS), 90)
        for width, height in ((224, 224), (256, 256), (500, 375))
    }
    sheet = photo_sheet()
    photos["4000 x 3000, quality 75, EXIF"] = _jpeg(sheet, 75, orientation=6)
    photos["4000 x 3000, quality 90, EXIF"] = _jpeg(sheet, 90, orientation=6)
    return photos


def _jpeg(image: Image.Image, quality: int, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[0x0112], exif[0x010F] = orientation, "maker"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
