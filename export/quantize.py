"""network.int8.tflite: the network in 8-bit integers, 0.3 of the size and about twice as fast, at a price.

Weights (a scale for each channel) and activations (one for each tensor) are quantised after training, with
ranges seen on images of the training split; so are the cast and the normalisation of the pixels, which loses
nothing that could be measured. Only the softmax stays in float: its int8 output has steps of 1/256, in which
most of 1,000 classes come to 0. (ImageNet's classes on 80 crops of photographs: rows sum to 0.68 to 0.99, and
of float32's five best classes 0.86 are found; with the softmax in float 0.91.) Pixels stay uint8 and outputs
float32, so the file stands in for network.tflite.

Measured with EfficientNet-Lite0 on 170 held-out digits, one thread: 4.0 MB instead of 13.5, 2.1 ms an image
instead of 4.8, accuracy 0.965 instead of 0.971.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference"; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.
"""

import csv
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from graftserve.training.dataset import Dataset, Split, open_dataset
from graftserve.training.errors import DataError
from graftserve.training.files import write_atomically
from graftserve.training.preprocess import decode_images, explain_failure
from graftserve.training.quiet import quiet
from graftserve.training.run import RunDirectory

from .errors import GateError, SourceError
from .goldens import EXTRA
from .network import PROBABILITIES_OUTPUT, Network
from .tflite import LiteError, converter_of, explain, open_lite

__all__ = [
    "INT8_FILE",
    "QuantizationCost",
    "accuracy_cost",
    "add_int8",
    "calibration_pixels",
    "int8_difference",
    "quantize",
]

INT8_FILE = f"{EXTRA}/network.int8.tflite"

# Which 200 they are moved the accuracy on the digits from 0.952 to 0.963; 100, 400 and 800 were no better.
_CALIBRATION_IMAGES = 200
_JUDGED_IMAGES = 1000
_BATCH = 16

_Pixels = npt.NDArray[np.uint8]
_Example = tuple[str, int]  # path, index of the label


@dataclass(frozen=True)
class QuantizationCost:
    """What it costs, on so many held-out images.

    float_accuracy, int8_accuracy: 0 to 1. agreement: the share whose best class stays the same.
    """

    images: int
    float_accuracy: float
    int8_accuracy: float
    agreement: float

    @property
    def drop(self) -> float:
        """What the accuracy loses; below 0 if it gains."""
        return round(self.float_accuracy - self.int8_accuracy, 9)  # so that from 0.97 to 0.96 it is 0.01


def add_int8(
    folder: Path, run: RunDirectory, network: Network, max_accuracy_drop: float = 0.01
) -> QuantizationCost:
    """Write network.int8.tflite into a version's folder.

    folder: has assets.extra. network: the one of the run. max_accuracy_drop: 0 to 1.
    Raises GateError if the accuracy drops by more, SourceError if the run's images are gone or none were held
    out, LiteError if the network cannot be quantised; nothing is written then.
    """
    _held_out(run)  # first: quantising takes long
    model = quantize(network, calibration_pixels(run))
    cost = accuracy_cost(run, network, model)
    if cost.drop > max_accuracy_drop:
        raise GateError(
            f"int8: expected the accuracy to drop by at most {max_accuracy_drop:g}, got {cost.drop:.4f}: "
            f"from {cost.float_accuracy:.4f} to {cost.int8_accuracy:.4f} on {cost.images} held-out images; "
            "raise --max-accuracy-drop, or leave out --quantize"
        )
    with write_atomically(folder / INT8_FILE, "wb") as file:
        file.write(model)
    return cost


def int8_difference(folder: Path, pixels: _Pixels, expected: npt.NDArray[np.float32]) -> float:
    """How far the probabilities of network.int8.tflite in a version's folder are from the original model's.

    pixels: uint8 [n, side_px, side_px, 3], n above 0. expected: float32 [n, C], for them. Returns the largest
    difference, 0 to 1. Raises LiteError if the network does not run.
    """
    run = open_lite((folder / INT8_FILE).read_bytes())
    given = [run(pixels[row : row + 1])[PROBABILITIES_OUTPUT] for row in range(len(pixels))]
    return float(np.abs(np.concatenate(given) - expected).max())


def quantize(network: Network, calibration: Iterable[_Pixels]) -> bytes:
    """The network in int8, as a .tflite file's content, with the signature that `tflite` describes.

    calibration: images uint8 [side_px, side_px, 3], at least one, that show what the network is to expect.
    Raises ValueError for images of another kind, LiteError if the network cannot be quantised.
    """
    images = list(calibration)
    shape = (network.side_px, network.side_px, 3)
    if not images:
        raise ValueError("calibration: expected at least one image, got none")
    for image in images:
        if image.shape != shape or image.dtype != np.uint8:
            raise ValueError(
                f"calibration: expected images uint8 {list(shape)}, got {image.dtype} {list(image.shape)}"
            )
    # Two values make sure of the pixels' range, or what is brighter than all of these would be cut off: from
    # digits at a quarter of their brightness came an accuracy of 0.622, with this one of 0.958. To change the
    # extremes changes the least.
    pixels = np.stack(images)
    pixels.flat[pixels.argmin()] = 0
    pixels.flat[pixels.argmax()] = 255
    converter = converter_of(network)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ({"pixels": image[None]} for image in pixels)
    selective = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=["SOFTMAX"])
    try:
        with quiet(), warnings.catch_warnings():
            # TensorFlow calibrates with an interpreter of its own, whose removal it announces to its users.
            warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated")
            debugger = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_options=selective)
            model: bytes = debugger.get_nondebug_quantized_model()
    except Exception as error:  # the converter raises whatever it met
        raise LiteError(f"int8: the network cannot be quantised: {explain(error)}") from error
    return model


def calibration_pixels(run: RunDirectory, limit: int = _CALIBRATION_IMAGES) -> _Pixels:
    """Up to `limit` images of the training split, uint8 [n, side_px, side_px, 3], always the same.

    The classes take turns, so that of each there are about as many.
    Raises SourceError if the images are gone, ValueError if the limit is below 1.
    """
    _check_limit(limit)
    by_label: dict[int, list[_Example]] = {}
    for example in _examples(run, "train"):
        by_label.setdefault(example[1], []).append(example)
    in_turn = sorted(
        ((turn, label), example)
        for label, examples in by_label.items()
        for turn, example in enumerate(examples)
    )
    if not in_turn:
        raise SourceError(f"{run.path / 'split.csv'}: damaged: no image to train on; train again")
    chosen = [example for _, example in in_turn[:limit]]
    return np.concatenate([pixels for pixels, _ in _batches(run, chosen)])


def accuracy_cost(
    run: RunDirectory, network: Network, model: bytes, limit: int = _JUDGED_IMAGES
) -> QuantizationCost:
    """Judge the quantised model and the network that it was made of by the run's held-out images.

    They are up to `limit` test images, or of validation, if there are none; always the same.
    Raises SourceError if there are neither, or they are gone; ValueError if the limit is below 1.
    """
    _check_limit(limit)
    run_int8 = open_lite(model)
    right_by_float = right_by_int8 = same = images = 0
    for pixels, labels in _batches(run, _held_out(run)[:limit]):
        by_float = network.run(pixels)[PROBABILITIES_OUTPUT].argmax(axis=1)
        by_int8 = run_int8(pixels)[PROBABILITIES_OUTPUT].argmax(axis=1)
        right_by_float += int((by_float == labels).sum())
        right_by_int8 += int((by_int8 == labels).sum())
        same += int((by_float == by_int8).sum())
        images += len(labels)
    return QuantizationCost(images, right_by_float / images, right_by_int8 / images, same / images)


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")


def _held_out(run: RunDirectory) -> list[_Example]:
    examples = _examples(run, "test") or _examples(run, "validation")
    if not examples:
        raise SourceError(
            f"{run.path}: int8 needs held-out images to be judged by, and the run has none; train with some "
            "held out, or leave out --quantize"
        )
    return examples


def _examples(run: RunDirectory, split: Split) -> list[_Example]:
    """The split's images as the run saw them, in an order that has nothing to do with what they show."""
    path = run.path / "split.csv"
    indexes = {label: index for index, label in enumerate(run.labels)}
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            examples = [
                (row["path"], indexes[row["label"]]) for row in csv.DictReader(file) if row["split"] == split
            ]
    except (OSError, KeyError, csv.Error) as error:
        raise SourceError(f"{path}: missing or damaged ({error}); train again with --overwrite") from error
    return sorted(examples, key=_shuffled)


def _shuffled(example: _Example) -> bytes:
    return hashlib.sha256(example[0].encode("utf-8", "surrogateescape")).digest()


def _batches(
    run: RunDirectory, examples: Sequence[_Example]
) -> Iterator[tuple[_Pixels, npt.NDArray[np.int64]]]:
    """The examples' pixels uint8 [n, side_px, side_px, 3] and labels [n]."""
    dataset = _dataset(run)
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        pixels = np.concatenate([_pixels(run, dataset, path) for path, _ in batch])
        yield pixels, np.array([label for _, label in batch])


def _dataset(run: RunDirectory) -> Dataset:
    try:
        return open_dataset(Path(run.recipe.data_dir), labels=run.labels)
    except DataError as error:
        raise _gone(run, str(error)) from error


def _pixels(run: RunDirectory, dataset: Dataset, path: str) -> _Pixels:
    try:
        content = dataset.images.read(path)
    except OSError as error:
        raise _gone(run, f"{path}: {error.strerror or error}") from error
    try:
        pixels: _Pixels = decode_images([content], run.preprocess).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise _gone(run, f"{path}: {explain_failure(content, run.preprocess)}") from error
    return pixels


def _gone(run: RunDirectory, reason: str) -> SourceError:
    return SourceError(
        f"{run.path}: int8 needs the images that the run was trained on: {reason}; put them back, or leave "
        "out --quantize"
    )
