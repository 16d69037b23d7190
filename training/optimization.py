"""What a stage's layers learn by: which of them, at which rates, with which optimizer, averaged or not."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .errors import FitError, RecipeError
from .recipe import Stage, nearest

__all__ = [
    "Group",
    "GroupedOptimizer",
    "MovingAverage",
    "learning_rate",
    "out_of_memory",
    "parameter_groups",
    "suggest_rate",
    "trainable_layers",
]

Rate = Callable[[Any], tf.Tensor]

_KERNELS = frozenset({"kernel", "depthwise_kernel", "pointwise_kernel"})
_SMOOTHING = 0.9  # of the losses of a sweep, as in fastai's lr_find
_STEEPEST_SKIPS = 5  # the first losses of a sweep are noise


@dataclass(frozen=True)
class Group:
    """Variables that learn at the same rate: `scale` times the stage's."""

    scale: float
    variables: tuple[keras.Variable, ...]


def trainable_layers(network: keras.Model, stage: Stage) -> list[keras.layers.Layer]:
    """The backbone's layers that learn in a stage, from low to high.

    Raises RecipeError for a layer or an index that the network has none of.
    """
    layers = list(network.layers)
    names = [layer.name for layer in layers]
    if stage.unfreeze == "none":
        return []
    if stage.unfreeze.isdecimal():
        first = int(stage.unfreeze)
        if first >= len(layers):
            raise RecipeError(
                f"stages.unfreeze: expected the index of a layer, 0 to {len(layers) - 1}, got {first}"
            )
    elif stage.unfreeze == "all":
        first = 0
    elif stage.unfreeze in names:
        first = names.index(stage.unfreeze)
    else:
        raise RecipeError(
            f"stages.unfreeze: {network.name} has no layer {stage.unfreeze!r}{nearest(stage.unfreeze, names)}"
        )
    return [layer for layer in layers[first:] if _in_scope(layer.name, stage)]


def parameter_groups(
    stage: Stage, network: keras.Model | None, head: keras.Model, block_ends: Sequence[str] = ()
) -> list[Group]:
    """What learns in a stage, by its rate: the head at 1, the backbone below it (None: it is not there).

    block_ends: the last layers of the backbone's blocks, which is where layer_decay takes effect; without
    any, every layer with weights is a block.
    Raises RecipeError as `trainable_layers` does, and FitError if nothing is left to learn.
    """
    by_scale: dict[float, list[keras.Variable]] = {}
    if _in_scope("head", stage):
        by_scale[1.0] = list(head.trainable_variables)
    scale = stage.backbone_rate
    learning = {layer.name for layer in trainable_layers(network, stage)} if network else set()
    is_above = bool(block_ends)
    for layer in reversed(network.layers if network else []):
        if layer.name in block_ends:
            scale, is_above = scale if is_above else scale * stage.layer_decay, False
        if layer.name in learning and layer.trainable_variables and scale > 0:
            by_scale.setdefault(scale, []).extend(layer.trainable_variables)
        if not block_ends and layer.weights:
            scale *= stage.layer_decay
    groups = [Group(scale, tuple(variables)) for scale, variables in by_scale.items() if variables]
    if not groups:
        raise FitError(
            f"stage {stage.name!r}: nothing is left to learn (unfreeze {stage.unfreeze!r}, scopes "
            f"{list(stage.scopes)}); unfreeze more, or add head to the scopes"
        )
    return groups


def learning_rate(stage: Stage, epoch_steps: float, total_steps: int) -> Rate:
    """The head's rate at a step (0 is the first): float32, of a number or a tensor.

    epoch_steps: steps in an epoch.
    """
    warmup = round(stage.warmup_epochs * epoch_steps)
    length = max(total_steps - warmup, 1)
    top, end = stage.learning_rate, stage.end_learning_rate
    schedules = keras.optimizers.schedules
    after: Callable[[Any], Any]
    if stage.schedule == "exponential":
        decay_steps = max(round(stage.decay_epochs * epoch_steps), 1)
        falling = schedules.ExponentialDecay(top, decay_steps, stage.decay_rate, staircase=True)
        after = _not_below(falling, min(end, top))
    elif stage.schedule == "polynomial":
        after = schedules.PolynomialDecay(top, length, end)
    elif stage.schedule == "cosine":
        after = schedules.CosineDecay(top, length, alpha=end / top)
    else:
        after = functools.partial(_constant, top)
    if not warmup:  # every operation of a rate is felt where a step takes a fraction of a millisecond
        return after

    def rate(step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        rising = top * (step + 1) / (warmup + 1)
        return tf.where(step < warmup, rising, tf.cast(after(tf.maximum(step - warmup, 0)), tf.float32))

    return rate


class GroupedOptimizer:
    """One Keras optimizer for each group, all of the stage's kind, each at its share of the rate.

    weight_decay is decoupled from the gradient (Loshchilov and Hutter 2017) and on kernels only. rmsprop's
    epsilon stands inside the root, as TF-Slim's; its mean square begins at 0, where TF-Slim's begins at 1.
    Made within a strategy's scope, it sums the gradients of the replicas.
    """

    def __init__(self, stage: Stage, groups: Sequence[Group], rate: Rate) -> None:
        self._groups = list(groups)
        self._optimizers = [_optimizer(stage, group, rate) for group in groups]

    @property
    def variables(self) -> list[keras.Variable]:
        """All their state, to be saved with a run."""
        return [variable for optimizer in self._optimizers for variable in optimizer.variables]

    def apply(self, gradients: Sequence[Any], *, clip_norm: float = 0.0) -> None:
        """One step. gradients: for each variable of each group in turn; clip_norm: largest norm of all of
        them together, over all replicas (0: any)."""
        if clip_norm:
            gradients = _clipped(gradients, clip_norm)
        remaining = iter(gradients)
        for optimizer, group in zip(self._optimizers, self._groups, strict=True):
            optimizer.apply_gradients([(next(remaining), variable) for variable in group.variables])


class MovingAverage:
    """Exponential moving averages of variables, begun at their values.

    The decay rises to its full value, min(decay, (1 + n) / (10 + n)) after n updates, as TensorFlow's
    ExponentialMovingAverage has it with num_updates, so that a short run is not averaged with its start.
    """

    def __init__(self, variables: Sequence[keras.Variable], decay: float) -> None:
        self._sources, self._decay = list(variables), decay
        self._averages = [keras.Variable(np.array(source), trainable=False) for source in variables]
        self._updates = keras.Variable(0.0, trainable=False, name="updates")

    @property
    def variables(self) -> list[keras.Variable]:
        """To be saved with a run."""
        return [*self._averages, self._updates]

    def update(self) -> None:
        """Move the averages; runs in a graph, once for all replicas."""
        updates = self._updates.value
        decay = tf.minimum(self._decay, (1 + updates) / (10 + updates))
        for average, source in zip(self._averages, self._sources, strict=True):
            average.assign(average.value + (1 - decay) * (source.value - average.value))
        self._updates.assign(updates + 1)

    def assign(self) -> None:
        """Give the variables their averages."""
        for average, source in zip(self._averages, self._sources, strict=True):
            source.assign(np.array(average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the variables are their averages."""
        before = [np.array(source) for source in self._sources]
        self.assign()
        try:
            yield
        finally:
            for source, value in zip(self._sources, before, strict=True):
                source.assign(value)


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Where the loss of a sweep falls fastest, or a tenth of the rate where it is least, if that is lower.

    The steepest place alone is too bold where the sweep ends before the loss rises. Losses that are no
    numbers, and what comes after the least one, are left out; of a sweep too short to tell, a tenth of its
    last rate.
    Source: Smith 2015, "Cyclical Learning Rates for Training Neural Networks"; fastai's lr_find, "steep" and
    "minimum".
    """
    smooth: list[float] = []
    average = 0.0
    for count, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            break
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smooth.append(average / (1 - _SMOOTHING**count))
    if len(smooth) < 2 * _STEEPEST_SKIPS:
        return rates[max(len(smooth) - 1, 0)] / 10
    least = _STEEPEST_SKIPS + int(np.argmin(smooth[_STEEPEST_SKIPS:]))
    falling = smooth[_STEEPEST_SKIPS : least + 1]
    if len(falling) < 2:
        return rates[least] / 10
    slopes = np.gradient(falling, np.log(rates[_STEEPEST_SKIPS : least + 1]))
    return min(rates[_STEEPEST_SKIPS + int(np.argmin(slopes))], rates[least] / 10)


def out_of_memory(error: Exception, batch_size: int) -> FitError:
    """What to tell the user when a batch of that size did not fit."""
    advice = f"give --batch-size {batch_size // 2}" if batch_size > 1 else "take a smaller backbone"
    what = str(getattr(error, "message", None) or error).strip().splitlines()
    return FitError(
        f"a batch of {batch_size} images needs more memory than there is; {advice} ({what[0][:200]})"
    )


def _constant(rate: float, _: Any) -> tf.Tensor:
    return tf.constant(rate)


def _not_below(rate: Rate, least: float) -> Rate:
    return lambda step: tf.maximum(rate(step), least)


def _in_scope(name: str, stage: Stage) -> bool:
    return not stage.scopes or name.startswith(stage.scopes)


def _optimizer(stage: Stage, group: Group, rate: Rate) -> keras.optimizers.Optimizer:
    schedule = _Scaled(rate, group.scale)
    decay = {"weight_decay": stage.weight_decay or None}
    if stage.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(schedule, momentum=stage.momentum, **decay)
    elif stage.optimizer == "rmsprop":
        options = {"rho": stage.rho, "momentum": stage.momentum, "epsilon": stage.epsilon}
        optimizer = keras.optimizers.RMSprop(schedule, **options, **decay)
    elif stage.optimizer == "adam":
        optimizer = keras.optimizers.Adam(schedule, epsilon=stage.epsilon, **decay)
    else:
        optimizer = keras.optimizers.AdamW(schedule, epsilon=stage.epsilon, weight_decay=stage.weight_decay)
    if stage.weight_decay:
        spared = [variable for variable in group.variables if variable.name not in _KERNELS]
        if spared:
            optimizer.exclude_from_weight_decay(var_list=spared)
    optimizer.build(list(group.variables))
    return optimizer


class _Scaled(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    def __init__(self, rate: Rate, scale: float) -> None:
        super().__init__()
        self._rate, self._scale = rate, scale

    def __call__(self, step: Any) -> tf.Tensor:
        rate = self._rate(step)
        return rate if self._scale == 1 else rate * self._scale


def _clipped(gradients: Sequence[Any], norm: float) -> list[Any]:
    """Clipped by the norm of their sum over the replicas, and shared out so that they sum to it again."""
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync if context else 1
    if replicas > 1:
        gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, list(gradients))
    clipped, _ = tf.clip_by_global_norm(list(gradients), norm)
    return [gradient / replicas for gradient in clipped]
