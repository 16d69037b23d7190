"""network.tflite: the network alone, for LiteRT, which runs it faster than TensorFlow on a CPU.

Its one signature, "serving_default", takes "pixels" uint8 [N, side_px, side_px, 3] and gives the network's
float32 outputs by name: "probabilities" [N, C], and "features" [N, D] where the model has them. Find tensors
by these names, through the signature: the converter promises no order of the outputs. N is 1 until
`resize_tensor_input`, or a signature runner, makes it another. There are built-in operators only, so that any
build of LiteRT runs it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from graftserve.training.engine import AGREEMENT
from graftserve.training.files import write_atomically
from graftserve.training.quiet import quiet

from .errors import ExportError
from .goldens import EXTRA
from .network import Network

__all__ = [
    "NETWORK_FILE",
    "LiteError",
    "LiteResult",
    "add_lite",
    "check_lite",
    "convert_network",
    "converter_of",
    "explain",
    "open_lite",
]

NETWORK_FILE = f"{EXTRA}/network.tflite"

_SIGNATURE = "serving_default"
_INPUT = "pixels"
_UNKNOWN_OPERATION = re.compile(r"'tf\.(\w+)' op is neither a custom op nor a flex op")

_Pixels = npt.NDArray[np.uint8]
_Outputs = Mapping[str, npt.NDArray[np.float32]]


class LiteError(ExportError):
    """The network cannot be converted for LiteRT, does not run there, or gives other answers."""


@dataclass(frozen=True)
class LiteResult:
    """path: of the file, of size_bytes; None if it was left out, for that reason, in one line.

    largest_difference: see `check_lite`.
    """

    path: Path | None
    size_bytes: int = 0
    largest_difference: float | None = None
    reason: str | None = None


def add_lite(folder: Path, network: Network, pixels: _Pixels, expected: _Outputs) -> LiteResult:
    """Write network.tflite into a version's folder, unless the network cannot be converted or differs.

    folder: has assets.extra. pixels: uint8 [n, side_px, side_px, 3], n above 0. expected: float32 [n, width],
    what the original model gives for them, by output.
    """
    try:
        _interpreter_class()  # first: converting takes seconds
        model = convert_network(network)
        difference = check_lite(model, pixels, expected)
    except LiteError as error:
        return LiteResult(None, reason=str(error))
    path = folder / NETWORK_FILE
    with write_atomically(path, "wb") as file:
        file.write(model)
    return LiteResult(path, len(model), difference)


def convert_network(network: Network) -> bytes:
    """The network in float32, as a .tflite file's content; see the module.

    Raises LiteError if it cannot be converted: as a rule an operation that LiteRT has not.
    """
    try:
        with quiet():
            model: bytes = converter_of(network).convert()
    except Exception as error:  # the converter raises whatever it met
        raise LiteError(f"cannot be converted for LiteRT: {explain(error)}") from error
    return model


def converter_of(network: Network) -> Any:
    """TensorFlow's converter for the network, with a signature that names its outputs.

    Without one they are told apart by made-up names only; naming them costs no time.
    """

    def call(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(zip(network.widths, tf.nest.flatten(network.function(pixels)), strict=True))

    spec = tf.TensorSpec((None, network.side_px, network.side_px, 3), tf.uint8, name=_INPUT)
    module = tf.Module()
    module.call = tf.function(call, input_signature=[spec], autograph=False)
    return tf.lite.TFLiteConverter.from_concrete_functions([module.call.get_concrete_function()], module)


def check_lite(model: bytes, pixels: _Pixels, expected: _Outputs) -> float:
    """The largest difference of an output from what is expected.

    The images go in one by one, as LiteRT runs them fastest, and all at once. An output's differences are
    divided by its largest value where that exceeds 1, as features do.
    model: a .tflite file's content. pixels: uint8 [n, side_px, side_px, 3], n above 0. expected: float32
    [n, width], by output.
    Raises LiteError if the difference is more than `training.engine.AGREEMENT`, an output is missing, or the
    model does not run; ValueError if there are no images.
    """
    if not len(pixels):
        raise ValueError("pixels: expected at least one image to compare on, got none")
    run = open_lite(model)
    one_by_one = [run(pixels[row : row + 1]) for row in range(len(pixels))]
    together = run(pixels)
    largest = 0.0
    for name, values in expected.items():
        if name not in together:
            raise LiteError(f"expected the output {name}, got only {', '.join(sorted(together))}")
        alone = np.concatenate([outputs[name] for outputs in one_by_one])
        scale = max(1.0, float(np.abs(values).max()))
        for got in (alone, together[name]):
            if got.shape != values.shape:
                raise LiteError(f"{name}: expected the shape {list(values.shape)}, got {list(got.shape)}")
            difference = float(np.abs(got - values).max()) / scale
            if not difference <= AGREEMENT:  # also when it is no number
                raise LiteError(
                    f"gives other answers in LiteRT: {name} differ by {difference:.1e}, expected at most "
                    f"{AGREEMENT:.0e}"
                )
            largest = max(largest, difference)
    return largest


def open_lite(model: bytes) -> Callable[[_Pixels], dict[str, npt.NDArray[np.float32]]]:
    """A .tflite file's content, to run on one thread: from pixels uint8 [n, side_px, side_px, 3] to outputs.

    One thread at a time may call it. Raises LiteError, now or when it is called, if the model does not run.
    """
    interpreter_class = _interpreter_class()
    try:
        with quiet():  # the delegate says that it was made
            interpreter = interpreter_class(model_content=model, num_threads=1)
            interpreter.allocate_tensors()
            runner = interpreter.get_signature_runner(_SIGNATURE)
    except (RuntimeError, ValueError) as error:
        raise LiteError(f"cannot be loaded by LiteRT: {explain(error)}") from error

    def run(pixels: _Pixels) -> dict[str, npt.NDArray[np.float32]]:
        try:
            return dict(runner(**{_INPUT: pixels}))
        except (RuntimeError, ValueError) as error:
            raise LiteError(f"does not run in LiteRT: {explain(error)}") from error

    return run


def explain(error: Exception) -> str:
    """What an error of the converter or interpreter comes to, in one line, without the report after it."""
    text = str(error).strip()
    unknown = sorted(set(_UNKNOWN_OPERATION.findall(text)))
    if unknown:
        return f"it has no operator for {', '.join(unknown)}"
    return (text or type(error).__name__).splitlines()[0].strip()


def _interpreter_class() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise LiteError(
            "ai-edge-litert, which is to check it, cannot be imported "
            f"({explain(error)}): pip install 'graftserve[training]'"
        ) from error
    return Interpreter
