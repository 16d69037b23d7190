"""What a model that graftserve did not train has to be told: labels, pixels, images to check it with."""

import difflib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from PIL import Image

from graftserve.training.backbones import BACKBONES, PIXEL_RANGES, Normalization, PixelRange
from graftserve.training.calibration import apply_temperature
from graftserve.training.errors import DataError
from graftserve.training.folder import unlabeled_images
from graftserve.training.preprocess import Preprocess, decode_images, explain_failure

from .errors import SourceError
from .goldens import GoldenImage
from .network import PROBABILITIES_OUTPUT, Network, freeze_network
from .source import Source

__all__ = ["ACTIVATIONS", "Brought", "Forward", "open_brought", "parse_preprocess", "read_labels"]

ACTIVATIONS = ("auto", "softmax", "sigmoid", "none")

_GOLDENS = 8
_AGREEMENT = 1e-4
_SUM_TOLERANCE = 1e-3  # float16 probabilities of a thousand classes come as close to a sum of 1
_BFLOAT16_SUM_TOLERANCE = 1e-2  # 8 bits of mantissa

Forward = Callable[[tf.Tensor], dict[str, tf.Tensor]]
"""From pixels as the model wants them, [N, side_px, side_px, 3], to "probabilities", as the model gives them,
and maybe "features"."""


@dataclass(frozen=True)
class Brought:
    """A model as it was loaded.

    side_px: of its input; None if it takes any. dtype: of its input. classes: columns of its output. forward:
    the original, eagerly or for a graph. is_linear: whether its last layer is without activation; None if
    that cannot be told.
    """

    kind: Literal["keras", "saved_model"]
    name: str
    side_px: int | None
    dtype: tf.DType
    classes: int
    forward: Forward
    has_features: bool
    is_linear: bool | None
    notes: tuple[str, ...] = ()


def open_brought(
    model: Brought,
    path: Path,
    labels_file: Path | None,
    preprocess_text: str | None,
    goldens_dir: Path | None,
    activation: str,
    temperature: float,
) -> Source:
    """Join a model with what its user says of it; raises SourceError where the two contradict each other."""
    if activation not in ACTIVATIONS:
        raise SourceError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not temperature > 0:
        raise SourceError(f"temperature: expected a number above 0, got {temperature}")
    labels = read_labels(labels_file, path)
    is_binary = model.classes == 1 and len(labels) == 2
    if not is_binary and model.classes != len(labels):
        raise SourceError(
            f"{path}: the head has {model.classes} classes, but {labels_file} has {len(labels)} labels; give "
            "one label for each output, in their order"
        )
    preprocess, pixel_range = parse_preprocess(preprocess_text, model.side_px, path)
    if model.dtype.is_integer and pixel_range != PIXEL_RANGES["0..255"]:
        raise SourceError(
            f"{path}: takes pixels in {model.dtype.name}, so it normalises by itself: give --preprocess "
            "pixels=0..255,..."
        )
    images = _load_goldens(goldens_dir, labels, preprocess)
    pixels = decode_images([content for _, content, _ in images], preprocess)

    normalise = Normalization(pixel_range.mean, pixel_range.scale, bgr=pixel_range.bgr)

    def normalised(batch: tf.Tensor) -> tf.Tensor:
        return tf.cast(normalise(batch), model.dtype)

    answers = model.forward(normalised(pixels))
    raw = {name: np.asarray(tf.cast(rows, tf.float32)) for name, rows in answers.items()}
    for name, rows in raw.items():
        if not np.isfinite(rows).all():
            raise SourceError(
                f"{path}: {name} are no finite numbers; train it anew with a lower learning rate"
            )
    is_coarse = answers[PROBABILITIES_OUTPUT].dtype == tf.bfloat16
    tolerance = _BFLOAT16_SUM_TOLERANCE if is_coarse else _SUM_TOLERANCE
    chosen, notes = _activation(model, raw[PROBABILITIES_OUTPUT], activation, path, is_binary, tolerance)

    def call(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = model.forward(normalised(batch))
        outputs[PROBABILITIES_OUTPUT] = _activated(
            tf.cast(outputs[PROBABILITIES_OUTPUT], tf.float32), chosen, is_binary
        )
        return outputs

    probabilities = np.asarray(_activated(tf.constant(raw[PROBABILITIES_OUTPUT]), chosen, is_binary))
    if temperature != 1 and not (np.abs(probabilities.sum(axis=1) - 1) < _BFLOAT16_SUM_TOLERANCE).all():
        raise SourceError("temperature: classes that do not exclude each other have none; leave it out")
    network = freeze_network(call, preprocess.side_px, temperature)
    if temperature != 1:
        probabilities = apply_temperature(probabilities, temperature)
    _check_frozen(network, pixels.numpy(), probabilities, path)
    if not model.has_features:
        notes += (
            "no features signature: the layer before the head was not found; name it with --feature-layer",
        )
    return Source(
        kind=model.kind,
        name=model.name,
        network=network,
        labels=labels,
        preprocess=preprocess,
        goldens=tuple(
            GoldenImage(name, content, label, tuple(row))
            for (name, content, label), row in zip(images, probabilities.tolist(), strict=True)
        ),
        are_goldens_real=goldens_dir is not None,
        temperature=temperature,
        notes=(*model.notes, *notes),
    )


def read_labels(path: Path | None, model: Path) -> tuple[str, ...]:
    """One label a line, UTF-8; raises SourceError for empty lines, a label that comes twice, or none."""
    if path is None:
        raise SourceError(f"{model}: its labels are not known: give --labels, a file with one a line")
    try:
        labels = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: expected UTF-8, one label a line: {error}") from error
    seen: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not label.strip():
            raise SourceError(f"{path}, line {number}: expected a label, got an empty line")
        if label in seen:
            raise SourceError(f"{path}, line {number}: {label!r} stands in line {seen[label]}, too")
        seen[label] = number
    if len(labels) < 2:
        raise SourceError(f"{path}: expected at least two labels, one a line, got {len(labels)}")
    return tuple(labels)


def parse_preprocess(text: str | None, side_px: int | None, model: Path) -> tuple[Preprocess, PixelRange]:
    """What --preprocess says: a backbone's name, or `key=value,...` with pixels, resize, crop_fraction,
    max_pixels and, for a model that takes any size, side_px.

    side_px: of the model's input. Raises SourceError.
    """
    ranges = ", ".join(PIXEL_RANGES)
    if text is None:
        raise SourceError(
            f"{model}: what pixels it expects cannot be guessed: give --preprocess, the backbone's name (as "
            f"in graftserve train --list-backbones) or pixels=..., one of {ranges}; 0..255 if the model "
            "normalises by itself"
        )
    if "=" not in text:
        if text not in BACKBONES:
            raise SourceError(f"preprocess: {_unknown(text, BACKBONES)}, or key=value pairs")
        row = BACKBONES[text]
        side = side_px or row.side_px
        return Preprocess(side, row.resize, row.crop_fraction), row.pixel_range
    values: dict[str, str] = {}
    known = ("pixels", "resize", "crop_fraction", "max_pixels", "side_px")
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or key not in known:
            raise SourceError(f"preprocess: {_unknown(key, known)}, as key=value")
        if key in values:
            raise SourceError(f"preprocess: {key} stands there twice; leave out one")
        values[key] = value
    name = values.pop("pixels", None)
    if name not in PIXEL_RANGES:
        raise SourceError(f"preprocess: pixels: expected one of {ranges}, got {name or 'nothing'}")
    try:
        given = int(values.pop("side_px", side_px or 0))
        if side_px is not None and given != side_px:
            raise SourceError(f"preprocess: side_px: the model takes {side_px}, got {given}; leave it out")
        if given < 1:
            raise SourceError(f"{model}: takes images of any size: say which, --preprocess side_px=224,...")
        settings: dict[str, Any] = {key: value for key, value in values.items() if key == "resize"}
        if "crop_fraction" in values:
            settings["crop_fraction"] = float(values["crop_fraction"])
        if "max_pixels" in values:
            settings["max_pixels"] = int(values["max_pixels"])
        return Preprocess(given, **settings), PIXEL_RANGES[name]
    except ValueError as error:
        raise SourceError(f"preprocess: {error}") from error


def _unknown(value: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(value, list(known), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"expected one of {', '.join(known)}, got {value!r}{hint}"


def _activation(
    model: Brought,
    rows: npt.NDArray[np.float32],
    asked: str,
    path: Path,
    is_binary: bool,
    tolerance: float,
) -> tuple[str, tuple[str, ...]]:
    """Which activation to apply, and what there is to tell of it."""
    in_range = bool((rows >= 0).all() and (rows <= 1).all())
    if is_binary and (asked == "softmax" or (asked == "none" and not in_range)):
        raise SourceError(
            f"{path}: activation: expected auto or sigmoid for one output and two labels, or none if it is a "
            f"probability (it goes from {float(rows.min()):.3g} to {float(rows.max()):.3g}), got {asked}"
        )
    if asked != "auto":
        told = ("classes do not exclude each other: scores do not add up to 1",) if asked == "sigmoid" else ()
        return asked, () if is_binary else told
    if is_binary:
        if in_range and model.is_linear is not True:
            return "none", ()
        return "sigmoid", ("its output is taken for a logit of the second label, and the sigmoid is applied",)
    if in_range and bool((np.abs(rows.sum(axis=1) - 1) < tolerance).all()):
        return "none", ()
    if model.is_linear is False or (in_range and model.is_linear is None):
        raise SourceError(
            f"{path}: its outputs are no probabilities of classes that exclude each other (a row adds up to "
            f"{float(rows[0].sum()):.3g}); say --activation none if it is meant to be so, softmax or sigmoid "
            "if they are logits"
        )
    return "softmax", ("its outputs are taken for logits, and the softmax is applied",)


def _activated(rows: tf.Tensor, activation: str, is_binary: bool) -> tf.Tensor:
    """float32 [N, C] probabilities; of a binary model's one column, both."""
    if activation == "softmax":
        rows = tf.nn.softmax(rows)
    elif activation == "sigmoid":
        rows = tf.sigmoid(rows)
    return tf.concat([1 - rows, rows], axis=1) if is_binary else rows


def _check_frozen(
    network: Network, pixels: npt.NDArray[np.uint8], expected: npt.NDArray[np.float32], path: Path
) -> None:
    differences = [np.abs(network.run(pixels)[PROBABILITIES_OUTPUT] - expected) for _ in range(2)]
    difference = float(np.max(differences))
    if not difference <= _AGREEMENT:
        raise SourceError(
            f"{path}: answers differently once its weights are frozen, by {difference:.3g}: it draws random "
            "numbers, or keeps a state"
        )


def _load_goldens(
    folder: Path | None, labels: Sequence[str], preprocess: Preprocess
) -> list[tuple[str, bytes, str | None]]:
    """Name, content and label (None if not known) of up to eight images."""
    if folder is None:
        return _patterns()
    try:
        store, paths = unlabeled_images(folder)
    except DataError as error:
        raise SourceError(f"goldens: {error}") from error
    others = sorted(_visible_files(folder) - set(paths))
    if others:
        raise SourceError(f"goldens: {folder / others[0]}: expected images only; take it out")
    by_folder: dict[str, list[str]] = {}
    for path in sorted(paths):
        by_folder.setdefault(path.rpartition("/")[0], []).append(path)
    in_turn = sorted((rank, path) for group in by_folder.values() for rank, path in enumerate(group))
    images: list[tuple[str, bytes, str | None]] = []
    for index, (_, path) in enumerate(in_turn[:_GOLDENS]):
        content = store.read(path)
        failure = explain_failure(content, preprocess)
        if failure is not None:
            raise SourceError(f"{folder / path}: cannot serve as a golden image: {failure}")
        class_folder = path.partition("/")[0] if "/" in path else None
        name = f"{index}{Path(path).suffix.lower()}"
        images.append((name, content, class_folder if class_folder in labels else None))
    return images


def _visible_files(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts)}


def _patterns() -> list[tuple[str, bytes, str | None]]:
    """Made-up JPEG files of several sizes: gradients, stripes, discs and noise. Always the same."""
    random = np.random.default_rng(0)
    images: list[tuple[str, bytes, str | None]] = []
    for index, (height, width) in enumerate(
        [(240, 320), (320, 240), (224, 224), (480, 640), (100, 300), (600, 400), (256, 256), (333, 500)]
    ):
        y, x = np.mgrid[0:height, 0:width] / max(height, width)
        phases = random.uniform(0, 2 * np.pi, 3)
        waves = np.stack(
            [np.sin(2 * np.pi * (index + 1) * (x + y * turn) + turn) for turn in phases], axis=-1
        )
        disc = (((x - 0.4) ** 2 + (y - 0.3) ** 2) < 0.05)[..., None]
        noise = random.normal(0, 12, (height, width, 3))
        pixels = 128 + 70 * waves + 50 * disc * random.uniform(-1, 1, 3) + noise
        buffer = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append((f"pattern-{index}.jpg", buffer.getvalue(), None))
    return images
