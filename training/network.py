"""A network as one frozen graph function, for extraction and export alike."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

__all__ = ["freeze", "freeze_call", "freeze_function"]


def freeze_call(call: Callable[[tf.Tensor], Any], spec: tf.TensorSpec) -> Any:
    """`call` with its variables as constants: a ConcreteFunction of one tensor like `spec`.

    Its outputs are those of `call`, flat, in the order of tf.nest.flatten.
    """

    def flat(inputs: tf.Tensor) -> list[tf.Tensor]:
        return [tf.convert_to_tensor(output) for output in tf.nest.flatten(call(inputs))]

    function = tf.function(flat, autograph=False)
    return convert_variables_to_constants_v2(function.get_concrete_function(spec))


def freeze_function(model: keras.Model, batch_size: int | None = None) -> Any:
    """The model with its weights as constants, a ConcreteFunction of one tensor [batch_size, ...].

    Constants fold into the operations around them, which makes it twice as fast as with the variables of
    batch normalisation, and a server that restores no variables cannot lose any. Inference mode.
    """
    (pixels,) = model.inputs
    spec = tf.TensorSpec((batch_size, *pixels.shape[1:]), pixels.dtype, name="input")
    return freeze_call(lambda inputs: model(inputs, training=False), spec)


def freeze(model: keras.Model) -> Callable[[tf.Tensor], tuple[tf.Tensor, ...]]:
    """`freeze_function` as a callable: input [N, ...] to the model's outputs, in their order; thread-safe."""
    frozen = freeze_function(model)

    def run(inputs: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tuple(tf.nest.flatten(frozen(inputs)))

    return run
