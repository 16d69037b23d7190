"""Float16 without losing small gradients: the loss is scaled up before it is differentiated."""

from typing import Any

import keras
import tensorflow as tf

__all__ = ["LossScale"]

_INITIAL = 2.0**15
_GROW_AFTER_STEPS = 2000


class LossScale:
    """A scale that halves when gradients overflow and doubles after 2,000 steps without.

    A step that overflows counts as one with zero gradients: skipping it would need a branch around the
    optimizer, which TensorFlow's strategies do not allow.
    Source: Micikevicius et al. 2017, "Mixed Precision Training", section 3.2, and Keras' LossScaleOptimizer.
    """

    def __init__(self) -> None:
        options = {"trainable": False, "aggregation": "only_first_replica"}  # all replicas come to the same
        self._scale = keras.Variable(_INITIAL, name="loss_scale", **options)
        self._good_steps = keras.Variable(0, dtype="int32", name="good_steps", **options)

    @property
    def variables(self) -> list[keras.Variable]:
        """To be saved with a run."""
        return [self._scale, self._good_steps]

    def up(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss to differentiate."""
        return loss * self._scale

    def down(self, gradients: list[Any]) -> list[Any]:
        """The gradients of the loss itself; zeros if one overflowed, on any replica. Adapts the scale."""
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
        context = tf.distribute.get_replica_context()
        if context and context.num_replicas_in_sync > 1:
            finite = context.all_reduce(tf.distribute.ReduceOp.MEAN, tf.cast(finite, tf.float32)) == 1.0
        inverse = 1.0 / self._scale.value
        scaled_down = [tf.where(finite, gradient * inverse, 0.0) for gradient in gradients]
        steps = tf.where(finite, self._good_steps.value + 1, 0)
        grows = steps >= _GROW_AFTER_STEPS
        factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
        self._scale.assign(tf.clip_by_value(self._scale.value * factor, 1.0, 2.0**24))
        self._good_steps.assign(tf.where(grows, 0, steps))
        return scaled_down
