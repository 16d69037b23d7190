"""What learns in a stage, and what it learns from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .inputs import Inputs

__all__ = ["Learner", "StageData", "Unlabeled"]

_PIXEL_ROWS, _FEATURE_ROWS = 64, 4096  # what one call of `predict` computes at once


@dataclass(frozen=True)
class Learner:
    """What learns. on_pixels: whether the backbone runs in every step, or its cached features do for it.
    tuned: whether the backbone has learnt by the end of the stage, and belongs in a checkpoint.
    block_ends: the last layers of the backbone's blocks, from low to high."""

    backbone: keras.Model
    head: keras.Model
    on_pixels: bool
    tuned: bool
    block_ends: tuple[str, ...] = ()

    @property
    def variables(self) -> list[keras.Variable]:
        """All that has changed when the stage ends, random states included."""
        return [*self.head.variables, *(self.backbone.variables if self.tuned else ())]

    def predict(self, inputs: Inputs, count: int) -> npt.NDArray[np.float32]:
        """Probabilities float32 [count, C] of rows 0 to count - 1, in inference mode."""
        if not count:
            return np.empty((0, self.head.output_shape[-1]), np.float32)
        most = _PIXEL_ROWS if self.on_pixels else _FEATURE_ROWS
        chunks = (np.arange(start, min(start + most, count)) for start in range(0, count, most))
        return np.concatenate(
            [np.asarray(self._infer(inputs.lookup(batch))) for batch in inputs.ahead(chunks)]
        )

    def __post_init__(self) -> None:
        @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
        def infer(batch: tf.Tensor) -> tf.Tensor:
            features = self.backbone(batch, training=False) if self.on_pixels else batch
            return self.head(tf.cast(features, tf.float32), training=False)

        object.__setattr__(self, "_infer", infer)

    _infer: Callable[[Any], tf.Tensor] = field(init=False, repr=False, compare=False)


@dataclass(frozen=True)
class Unlabeled:
    """Images without labels, for pseudo-labels."""

    inputs: Inputs
    count: int


@dataclass(frozen=True)
class StageData:
    """Inputs and labels int64 of the two splits.

    views: how many inputs a training image has, n rows apart (2 with features of its mirror image).
    unlabeled: handed over together with the training images, so `train` looks both up.
    """

    train: Inputs
    train_labels: npt.NDArray[np.int64]
    validation: Inputs
    validation_labels: npt.NDArray[np.int64]
    views: int = 1
    unlabeled: Unlabeled | None = None
