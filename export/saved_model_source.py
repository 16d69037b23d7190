"""A bare SavedModel of a network, as something to export."""

from pathlib import Path
from typing import Any

import tensorflow as tf

from .brought import Brought, open_brought
from .errors import SourceError
from .network import FEATURES_OUTPUT, PROBABILITIES_OUTPUT
from .run_source import check_finite
from .source import Source

__all__ = ["open_saved_model"]

_FEATURES = (FEATURES_OUTPUT, "embedding", "embeddings", "feature_vector")
_IMAGES = (tf.float32, tf.float16, tf.uint8)


def open_saved_model(
    path: Path,
    labels: Path | None,
    preprocess: str | None,
    *,
    goldens: Path | None = None,
    signature: str = "serving_default",
    activation: str = "auto",
    temperature: float = 1.0,
) -> Source:
    """The SavedModel in the folder `path`, by one of its signatures.

    That takes images [N, side, side, 3] in float32, float16 or uint8, and gives [N, C]: probabilities, or
    logits; and maybe [N, D] named features, embedding or feature_vector. The other arguments are those of
    `keras_source.open_keras`. Raises SourceError for what cannot be exported.
    """
    try:
        model = tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"{path}: TensorFlow {tf.__version__} cannot load it: {reason}") from error
    if signature not in model.signatures:
        there = ", ".join(model.signatures) or "none"
        raise SourceError(f"{path}: signature: expected one of {there}, got {signature!r}")
    function = model.signatures[signature]
    check_finite([value for value in function.variables if value.dtype.is_floating], path)
    name, side_px, dtype = _input(function, path)
    outputs = function.structured_outputs
    features = next((key for key in _FEATURES if key in outputs and len(outputs[key].shape) == 2), None)
    classes = _classes_output(outputs, features, path)

    def forward(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        answers = function(**{name: pixels})
        chosen = {PROBABILITIES_OUTPUT: answers[classes]}
        return chosen | ({FEATURES_OUTPUT: answers[features]} if features else {})

    width = outputs[classes].shape[-1]
    notes = () if features else ("no features signature: the SavedModel gives none",)
    brought = Brought(
        "saved_model", path.resolve().name, side_px, dtype, width, forward, True, _is_logits(classes), notes
    )
    try:
        return open_brought(brought, path, labels, preprocess, goldens, activation, temperature)
    except (tf.errors.OpError, ValueError) as error:
        raise SourceError(
            f"{path}: signature {signature} does not run, or cannot be frozen: {error}"
        ) from error


def _input(function: Any, path: Path) -> tuple[str, int | None, tf.DType]:
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1:
        raise SourceError(f"{path}: expected one input of images, got {', '.join(inputs) or 'none'}")
    ((name, spec),) = inputs.items()
    if spec.dtype == tf.string:
        raise SourceError(
            f"{path}: takes strings, so it decodes images by itself: serve it as it is, or export the "
            "network in it"
        )
    if spec.shape.rank is None or spec.shape.rank != 4 or spec.dtype not in _IMAGES:
        raise SourceError(
            f"{path}: expected an input [N, side, side, 3] in float32, float16 or uint8, got {name} "
            f"{spec.dtype.name} {spec.shape}"
        )
    batch, height, width, channels = spec.shape
    if channels != 3 and height == 3:
        raise SourceError(f"{path}: takes channels first, {spec.shape}: expected [N, side, side, 3]")
    if channels != 3:
        raise SourceError(f"{path}: expected three channels, RGB, got an input {spec.shape}")
    if batch is not None:
        raise SourceError(
            f"{path}: takes exactly {batch} images at a time; save it with a batch size of None"
        )
    if height != width:
        raise SourceError(f"{path}: expected square images, got an input of {height} x {width}")
    return name, height, spec.dtype


def _classes_output(outputs: Any, features: str | None, path: Path) -> str:
    """The name of the output [N, C]."""
    rows = [str(key) for key, value in outputs.items() if value.shape.rank == 2 and key != features]
    for known in (PROBABILITIES_OUTPUT, "logits"):
        if known in rows:
            return known
    if len(rows) != 1 or outputs[rows[0]].shape[-1] is None:
        shown = ", ".join(f"{key} {value.shape}" for key, value in outputs.items())
        raise SourceError(
            f"{path}: expected one output [N, classes], or one named probabilities, got {shown}"
        )
    return rows[0]


def _is_logits(name: str) -> bool | None:
    return True if name == "logits" else None
