"""A Keras model that somebody brings, as something to export."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from .brought import Brought, open_brought
from .errors import SourceError
from .network import FEATURES_OUTPUT, PROBABILITIES_OUTPUT
from .run_source import check_finite
from .source import Source

__all__ = ["INPUT_DTYPES", "LOGITS_OUTPUT", "choose_outputs", "first_sentence", "open_keras", "shown_shape"]

INPUT_DTYPES = (tf.float32, tf.float16, tf.uint8)
"""Of images, as a model may take them."""

LOGITS_OUTPUT = "logits"
_FEATURES = (FEATURES_OUTPUT, "embedding", "embeddings", "feature_vector")


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

    It takes images [N, side, side, 3] in float32, float16 or uint8 and gives [N, C]: probabilities, or
    logits. Of several outputs, see `choose_outputs`.
    labels: a file, one a line. preprocess: see `brought.parse_preprocess`. goldens: a folder of images;
        without it, made-up patterns are used. feature_layer: whose output [N, D] or [N, h, w, D] (averaged)
        becomes the features; by default an output named so, else what the last Dense layer takes.
        activation: "auto", "softmax", "sigmoid", "none".
    Raises SourceError for what cannot be exported.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    model = _load(path)
    check_finite(model.variables, path)
    side_px, dtype = _input(model, path)
    graph = _open_graph(model)
    outputs = _named(graph.outputs)
    classes, named_features = choose_outputs(outputs, path)
    probabilities = outputs[classes]
    if feature_layer is not None:
        features = _features_of(graph, feature_layer, path)
    else:
        features = outputs[named_features] if named_features else _before_head(graph, probabilities)
    chosen = {PROBABILITIES_OUTPUT: probabilities}
    if features is not None:
        chosen[FEATURES_OUTPUT] = features
    try:
        both = keras.Model(graph.pixels, chosen)
    except ValueError as error:  # what layers of a model within the model give is not of this graph
        raise SourceError(
            f"{path}: feature layer: {feature_layer} is a model by itself; name the layer after it"
        ) from error

    def forward(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(both(pixels, training=False))

    brought = Brought(
        "keras", path.stem, side_px, dtype, probabilities.shape[-1], forward, features is not None,
        classes == LOGITS_OUTPUT or _is_linear(graph, probabilities),
    )  # fmt: skip
    try:
        return open_brought(brought, path, labels, preprocess, goldens, activation, temperature)
    except (tf.errors.OpError, ValueError) as error:
        raise SourceError(f"{path}: does not run, or cannot be frozen: {first_sentence(error)}") from error


def choose_outputs(outputs: Mapping[str, Any], path: Path) -> tuple[str, str | None]:
    """The names of a model's probabilities or logits [N, C] and of its features [N, D], if it gives any.

    outputs: whatever has a shape and a dtype, by name. The first is the one named probabilities, or else
    logits, or else the only one left of rank 2 and a float; the second is named features, embedding or
    feature_vector. Raises SourceError if there is no such choice; `path` is for its message.
    """
    ranked = {name: tf.TensorShape(output.shape) for name, output in outputs.items()}
    rows = {
        name: shape[-1]
        for name, shape in ranked.items()
        if shape.rank == 2 and tf.as_dtype(outputs[name].dtype).is_floating
    }
    features = next((name for name in _FEATURES if rows.get(name)), None)
    known = [name for name in (PROBABILITIES_OUTPUT, LOGITS_OUTPUT) if name in rows]
    candidates = known[:1] or [name for name in rows if name not in _FEATURES]
    if len(candidates) != 1 or rows[candidates[0]] is None:
        shown = ", ".join(
            f"{name} {tf.as_dtype(output.dtype).name} {shown_shape(ranked[name])}"
            for name, output in outputs.items()
        )
        raise SourceError(
            f"{path}: expected one output [N, classes] of floats, or one named {PROBABILITIES_OUTPUT} or "
            f"{LOGITS_OUTPUT}, got {shown or 'none'}"
        )
    return candidates[0], features


def shown_shape(shape: Any) -> str:
    """A shape with N for a batch of any size and ? for any other length."""
    ranked = tf.TensorShape(shape)
    if ranked.rank is None:
        return "of unknown rank"
    sides = ["?" if side is None else str(side) for side in ranked]
    if sides and sides[0] == "?":
        sides[0] = "N"
    return f"[{', '.join(sides)}]"


def first_sentence(error: BaseException) -> str:
    """What an error began with: the first sentence of the one that it was raised from."""
    while error.__context__ is not None:
        error = error.__context__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")


@dataclass(frozen=True)
class _Step:
    """A layer, or another operation, in a model's graph: what it takes and gives, each maybe several."""

    operation: Any
    takes: Any
    gives: Any


@dataclass(frozen=True)
class _Graph:
    pixels: Any
    outputs: Any
    steps: tuple[_Step, ...]

    def producer(self, tensor: Any) -> _Step | None:
        """The step that gives `tensor`; None if it lies in a model within the model."""
        for step in self.steps:
            if any(output is tensor for output in keras.tree.flatten(step.gives)):
                return step
        return None


def _load(path: Path) -> Any:
    try:
        # graftserve's own layers are registered under their full names, which leaves Keras's theirs.
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever its parsers met
        reason = first_sentence(error)
        advice = "A model with layers of your own has to be exported by the code that has them: as a " + (
            "SavedModel, by model.export"
        )
        if "No model config" in reason:
            advice = "Weights alone are no model: save it whole, by model.save"
        raise SourceError(f"{path}: Keras {keras.__version__} cannot load it: {reason}. {advice}") from error


def _input(model: Any, path: Path) -> tuple[int | None, tf.DType]:
    """Its side in pixels, None if it takes any, and its dtype."""
    if not getattr(model, "inputs", None):
        raise SourceError(f"{path}: its input is not known; save a model that was built, or called once")
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] != 3:
        shown = ", ".join(shown_shape(shape) for shape in shapes)
        raise SourceError(f"{path}: expected one input of images [N, side, side, 3], got {shown}")
    batch, height, width, _ = shapes[0]
    if batch is not None and not isinstance(model, keras.Sequential):
        raise SourceError(
            f"{path}: takes exactly {batch} images at a time; build it with a batch size of None"
        )
    if height != width:
        raise SourceError(
            f"{path}: expected square images, got an input of {height or 'any'} x {width or 'any'}"
        )
    dtype = tf.as_dtype(model.inputs[0].dtype)
    if dtype not in INPUT_DTYPES:
        raise SourceError(f"{path}: expected an input in float32, float16 or uint8, got {dtype.name}")
    return height, dtype


def _open_graph(model: Any) -> _Graph:
    (old,) = model.inputs
    if not isinstance(model, keras.Sequential):
        steps = tuple(_Step(operation, operation.input, operation.output) for operation in model.operations)
        return _Graph(old, model.output, steps)
    # Built by its first batch, a Sequential keeps that batch's size, which means nothing to its layers: they
    # are called once more, on any. Which also gives what a model within it gives here.
    pixels = tensor = keras.Input(tuple(old.shape[1:]), dtype=old.dtype)
    chain = []
    for layer in model.layers:
        taken, tensor = tensor, layer(tensor)
        chain.append(_Step(layer, taken, tensor))
    return _Graph(pixels, tensor, tuple(chain))


def _named(outputs: Any) -> dict[str, Any]:
    """The tensors of a structure by their keys or positions in it; "output" for one by itself."""
    leaves = keras.tree.flatten_with_path(outputs)
    return {"/".join(map(str, path)) or "output": tensor for path, tensor in leaves}


def _features_of(graph: _Graph, name: str, path: Path) -> Any:
    for step in graph.steps:
        if step.operation.name == name:
            flat = _flat(step.gives)
            if flat is None:
                shapes = ", ".join(shown_shape(tensor.shape) for tensor in keras.tree.flatten(step.gives))
                raise SourceError(
                    f"{path}: feature layer: expected one that gives [N, D] or [N, h, w, D], got {name}, "
                    f"which gives {shapes}"
                )
            return flat
    names = [step.operation.name for step in graph.steps]
    raise SourceError(
        f"{path}: feature layer: expected one of {', '.join(names[-10:])}"
        f"{', ...' if len(names) > 10 else ''}, got {name!r}"
    )


def _before_head(graph: _Graph, probabilities: Any) -> Any:
    """What the Dense layer takes that gives the logits, [N, D]; None if there is no such layer."""
    for step in _head(graph, probabilities):
        if isinstance(step.operation, keras.layers.Dense):
            return _flat(step.takes)
    return None


def _head(graph: _Graph, tensor: Any) -> Iterator[_Step]:
    """Backwards from the output [N, C], as long as there is one tensor of that shape: softmax and the like,
    and the layer that gives the logits.
    """
    shape = tuple(tensor.shape)
    while tuple(tensor.shape) == shape:
        step = graph.producer(tensor)
        if step is None:
            return
        yield step
        taken = keras.tree.flatten(step.takes)
        if len(taken) != 1 or taken[0] is tensor:
            return
        tensor = taken[0]


def _flat(tensor: Any) -> Any:
    """[N, D] of [N, D] or, by its mean, of [N, h, w, D]; None for anything else, or if D is not known."""
    shape: Any = getattr(tensor, "shape", ())
    if len(shape) not in (2, 4) or shape[-1] is None:
        return None
    return keras.ops.mean(tensor, axis=(1, 2)) if len(shape) == 4 else tensor


def _is_linear(graph: _Graph, probabilities: Any) -> bool | None:
    step = graph.producer(probabilities)
    activation = getattr(step.operation, "activation", None) if step else None
    return None if activation is None else activation is keras.activations.linear
