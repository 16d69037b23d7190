"""A bare SavedModel of a network, as something to export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.util import deprecation

from .brought import Brought, open_brought
from .errors import SourceError
from .keras_source import INPUT_DTYPES, LOGITS_OUTPUT, choose_outputs, first_sentence, shown_shape
from .network import FEATURES_OUTPUT, PROBABILITIES_OUTPUT
from .run_source import check_finite
from .source import Source

__all__ = ["open_saved_model"]

_REFERENCES = ("Variable", "VariableV2")  # TensorFlow 1's variables, before it had resources
_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
_CHANGES = ("Assign", "AssignAdd", "AssignSub")  # the beginning of their names, for resources


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
    """The SavedModel in the folder `path`, of TensorFlow 1 or 2, by one of its signatures.

    That takes images [N, side, side, 3] in float32, float16 or uint8, and gives [N, C]: probabilities, or
    logits; and maybe [N, D] named features, embedding or feature_vector. Of several outputs, see
    `keras_source.choose_outputs`; the other arguments are those of `keras_source.open_keras`.
    Raises SourceError for what cannot be exported; that is also a model with hash tables, with calls of
    Python, or one that changes its variables.
    """
    try:
        model = tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        reason = first_sentence(error)
        raise SourceError(f"{path}: TensorFlow {tf.__version__} cannot load it: {reason}") from error
    if signature not in model.signatures:
        there = ", ".join(model.signatures) or "none"
        raise SourceError(f"{path}: signature: expected one of {there}, got {signature!r}")
    function = model.signatures[signature]
    check_finite([value for value in function.variables if value.dtype.is_floating], path)
    operations = _operations(function.graph.as_graph_def())
    _check_operations(operations, path)
    name, side_px, dtype = _input(function, path)
    outputs = function.structured_outputs
    classes, features = choose_outputs(outputs, path)
    chosen = {PROBABILITIES_OUTPUT: classes} | ({FEATURES_OUTPUT: features} if features else {})

    frozen = _freeze_references(path, signature, name) if operations & {*_REFERENCES} else None

    def forward(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        in_graph = None if tf.executing_eagerly() else frozen
        answers = in_graph(pixels) if in_graph else function(**{name: pixels})
        # Loops lose their shapes when they are frozen.
        return {
            key: tf.ensure_shape(answers[output], outputs[output].shape) for key, output in chosen.items()
        }

    width = outputs[classes].shape[-1]
    notes = () if features else ("no features signature: the SavedModel gives none",)
    is_linear = True if classes == LOGITS_OUTPUT else None
    brought = Brought(
        "saved_model", path.resolve().name, side_px, dtype, width, forward, True, is_linear, notes
    )
    try:
        return open_brought(brought, path, labels, preprocess, goldens, activation, temperature)
    except (tf.errors.OpError, TypeError, ValueError) as error:
        raise SourceError(
            f"{path}: signature {signature} does not run, or cannot be frozen: {first_sentence(error)}"
        ) from error


def _input(function: Any, path: Path) -> tuple[str, int | None, tf.DType]:
    """The input's name, its side in pixels (None if it takes any) and its dtype."""
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1:
        raise SourceError(f"{path}: expected one input of images, got {', '.join(inputs) or 'none'}")
    ((name, spec),) = inputs.items()
    if spec.dtype == tf.string:
        raise SourceError(
            f"{path}: takes strings, so it decodes images by itself: serve it as it is, or export the "
            "network in it"
        )
    shown = shown_shape(spec.shape)
    if spec.shape.rank != 4 or spec.dtype not in INPUT_DTYPES:
        raise SourceError(
            f"{path}: expected an input [N, side, side, 3] in float32, float16 or uint8, got {name} "
            f"{spec.dtype.name} {shown}"
        )
    batch, height, width, channels = spec.shape
    if channels != 3 and height == 3:
        raise SourceError(f"{path}: takes channels first, {shown}: expected [N, side, side, 3]")
    if channels != 3:
        raise SourceError(f"{path}: expected three channels, RGB, got an input {shown}")
    if batch is not None:
        raise SourceError(
            f"{path}: takes exactly {batch} images at a time; save it with a batch size of None"
        )
    if height != width:
        raise SourceError(
            f"{path}: expected square images, got an input of {height or 'any'} x {width or 'any'}"
        )
    return name, height, spec.dtype


def _operations(graph: Any) -> set[str]:
    """The kinds of operations in a GraphDef, and in the functions that it calls."""
    nested = (node for function in graph.library.function for node in function.node_def)
    return {node.op for node in (*graph.node, *nested)}


def _check_operations(operations: set[str], path: Path) -> None:
    """Raise SourceError for what no frozen graph holds, or no server runs."""
    for operation in sorted(operations):
        if operation in _PYTHON:
            reason = "calls Python code, which a server does not have: write it as TensorFlow operations"
        elif "LookupTable" in operation:
            reason = (
                "looks something up in a hash table, which is lost when its weights are frozen: take it out"
            )
        elif operation in _CHANGES or (operation.startswith(_CHANGES) and operation.endswith("VariableOp")):
            reason = "changes its variables as it answers: save it for inference, with training=False"
        else:
            continue
        raise SourceError(f"{path}: {reason} ({operation})")


def _freeze_references(path: Path, signature: str, name: str) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """One signature of a model of TensorFlow 1, its variables as constants.

    They have to be read in a Session: tf.saved_model.load leaves them in the graph, where nothing finds them.
    """
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session, deprecation.silence():
        try:
            definition = v1.saved_model.load(session, [tf.saved_model.SERVING], str(path))
        except RuntimeError as error:
            raise SourceError(
                f"{path}: expected a model saved for serving: {first_sentence(error)}"
            ) from error
        called = definition.signature_def[signature]
        outputs = {key: output.name for key, output in called.outputs.items()}
        graph = v1.graph_util.convert_variables_to_constants(
            session, definition.graph_def, [tensor.rpartition(":")[0] for tensor in outputs.values()]
        )
    pixels_name = called.inputs[name].name

    def call(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        tensors = tf.graph_util.import_graph_def(graph, {pixels_name: pixels}, list(outputs.values()))
        return dict(zip(outputs, tensors, strict=True))

    return call
