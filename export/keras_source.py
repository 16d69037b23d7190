"""A Keras model that somebody brings, as something to export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from graftserve.training.backbones import Normalization

from .brought import Brought, open_brought
from .errors import SourceError
from .network import FEATURES_OUTPUT, PROBABILITIES_OUTPUT
from .run_source import check_finite
from .source import Source

__all__ = ["open_keras"]


def open_keras(
    path: Path,
    labels: Path | None,
    preprocess: str | None,
    *,
    goldens: Path | None = None,
    feature_layer: str | None = None,
    activation: str = "auto",
    temperature: float = 1.0,
) -> Source:
    """The model in `path` (.keras, or .h5 of Keras 2 and 3).

    It takes images [N, side, side, 3] and gives [N, C]: probabilities, or logits.
    labels: a file, one a line. preprocess: see `brought.parse_preprocess`. goldens: a folder of images;
        without it, made-up patterns are used. feature_layer: whose output [N, D] or [N, h, w, D] (averaged)
        becomes the features; by default what the last Dense layer takes. activation: "auto", "softmax",
        "sigmoid", "none".
    Raises SourceError for what cannot be exported.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    try:
        model = keras.saving.load_model(path, compile=False, custom_objects={"Normalization": Normalization})
    except Exception as error:  # Keras raises whatever its parsers met
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"{path}: Keras {keras.__version__} cannot load it: {reason}. A model with layers of your own "
            "has to be exported by the code that has them: as a SavedModel, by model.export"
        ) from error
    check_finite(model.variables, path)
    side_px, dtype = _input(model, path)
    probabilities, features = _outputs(model, feature_layer, path)
    outputs = {PROBABILITIES_OUTPUT: probabilities}
    if features is not None:
        outputs[FEATURES_OUTPUT] = features
    both = keras.Model(model.inputs, outputs)

    def forward(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(both(pixels, training=False))

    brought = Brought(
        "keras", path.stem, side_px, dtype, probabilities.shape[-1], forward, features is not None,
        _is_linear(model, probabilities),
    )  # fmt: skip
    return open_brought(brought, path, labels, preprocess, goldens, activation, temperature)


def _input(model: Any, path: Path) -> tuple[int | None, tf.DType]:
    if not getattr(model, "inputs", None):
        raise SourceError(f"{path}: its input is not known; save a model that was built, or called once")
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] != 3:
        raise SourceError(f"{path}: expected one input of images [N, side, side, 3], got {_shown(shapes)}")
    batch, height, width, _ = shapes[0]
    if batch is not None:
        raise SourceError(
            f"{path}: takes exactly {batch} images at a time; build it with a batch size of None"
        )
    if height != width:
        raise SourceError(f"{path}: expected square images, got an input of {height} x {width}")
    return height, tf.as_dtype(model.inputs[0].dtype)


def _outputs(model: Any, feature_layer: str | None, path: Path) -> tuple[Any, Any]:
    """The tensors [N, C], and [N, D] or None."""
    named = model.output if isinstance(model.output, Mapping) else {}
    if PROBABILITIES_OUTPUT in named:
        probabilities = named[PROBABILITIES_OUTPUT]
    else:
        rows = [tensor for tensor in model.outputs if len(tensor.shape) == 2]
        if len(model.outputs) != 1 or len(rows) != 1:
            raise SourceError(
                f"{path}: expected one output [N, classes], or one named {PROBABILITIES_OUTPUT}, got "
                f"{_shown([tuple(tensor.shape) for tensor in model.outputs])}"
            )
        probabilities = rows[0]
    if feature_layer is not None:
        try:
            return probabilities, _flat(model.get_layer(feature_layer).output)
        except (ValueError, AttributeError) as error:
            names = [layer.name for layer in model.layers]
            raise SourceError(
                f"{path}: feature layer: expected one of {', '.join(names[-10:])}, ..., got {feature_layer!r}"
            ) from error
    if FEATURES_OUTPUT in named:
        return probabilities, named[FEATURES_OUTPUT]
    for layer in reversed(model.layers):
        if isinstance(layer, keras.layers.Dense):
            return probabilities, _flat(layer.input)
    return probabilities, None


def _flat(tensor: Any) -> Any:
    """[N, D] of a layer's output; spatial ones are averaged. Raises ValueError for any other."""
    rank = len(tensor.shape)
    if rank == 4:
        return keras.ops.mean(tensor, axis=(1, 2))
    if rank != 2:
        raise ValueError(f"a tensor of rank {rank}")
    return tensor


def _is_linear(model: Any, probabilities: Any) -> bool | None:
    for layer in reversed(model.layers):
        if any(output is probabilities for output in tf.nest.flatten(layer.output)):
            activation = getattr(layer, "activation", None)
            return None if activation is None else activation is keras.activations.linear
    return None


def _shown(shapes: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(str(["N" if side is None else side for side in shape]) for shape in shapes) or "nothing"
