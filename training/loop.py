"""Gradient descent on a head, and on as much of the backbone as a stage unfreezes.

What every step does follows from the recipe's seed and the step's number alone (which images, how they are
augmented), so a run that was killed goes on with its last checkpoint as if nothing had happened.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .augmentation import DRAWS, Augmenter, mix
from .backbones import network_of
from .checkpoint import Checkpoint, Snapshot, restore, snapshot
from .distribution import Workers
from .errors import FitError
from .evaluate import log_loss
from .graft import logits_of
from .history import Epoch, StageResult, Sweep
from .inputs import Order
from .learner import Learner, StageData
from .optimization import (
    GroupedOptimizer,
    MovingAverage,
    learning_rate,
    out_of_memory,
    parameter_groups,
    suggest_rate,
    trainable_layers,
)
from .precision import LossScale
from .progress import Listener, Progress, silent
from .recipe import Augmentation, Recipe, Stage

__all__ = ["run_stage", "sweep_learning_rate"]

_FEATURE_STEPS = 100  # steps on features in one call: each takes a fraction of what a call costs
_CHECKPOINT_EVERY_S = 60.0
_CHECKPOINT_SHARE = 0.05  # of the time, at most, where epochs are short
_MOST_EVALUATIONS = 40
_SWEEP_STEPS = 100
_SWEEP_RATES = (1e-6, 1.0)
_SWEEP_ENDS_AT = 4.0  # times the least loss: from there on it only gets worse


def run_stage(
    recipe: Recipe,
    index: int,
    stage: Stage,
    learner: Learner,
    data: StageData,
    checkpoint: Checkpoint,
    *,
    carry: Mapping[str, Any] = MappingProxyType({}),
    workers: Workers | None = None,
    listener: Listener = silent,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> StageResult:
    """Train `learner` as stage number `index` of the recipe says; its variables are changed in place.

    stage: the recipe's, with "boundary" resolved to a layer. checkpoint: gone on with if it holds this
    stage, written every minute and after epochs, together with what `carry` holds.
    Raises FitError if nothing can learn, the batch is larger than the data, the loss is no number, or the
    memory is too small.
    """
    loop = _Loop(recipe, index, stage, learner, data, workers or Workers(), listener, carry=carry)
    try:
        with loop.layers_unfrozen():
            return loop.run(checkpoint, on_epoch)
    except tf.errors.ResourceExhaustedError as error:
        raise out_of_memory(error, recipe.batch_size) from error


def sweep_learning_rate(
    recipe: Recipe,
    index: int,
    stage: Stage,
    learner: Learner,
    data: StageData,
    *,
    workers: Workers | None = None,
    listener: Listener = silent,
) -> Sweep:
    """Try rising rates on a stage as `run_stage` would train it; the learner is left as it was.

    Source: Smith 2015, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
    """
    low, high = _SWEEP_RATES

    def schedule(step: Any) -> Any:
        return low * (high / low) ** (tf.cast(step, tf.float32) / (_SWEEP_STEPS - 1))

    loop = _Loop(recipe, index, stage, learner, data, workers or Workers(), listener, schedule=schedule)
    before = snapshot(learner.variables)
    try:
        with loop.layers_unfrozen():
            losses = loop.sweep()
    except tf.errors.ResourceExhaustedError as error:
        raise out_of_memory(error, recipe.batch_size) from error
    finally:
        restore(learner.variables, before)
    rates = tuple(float(schedule(step)) for step in range(len(losses)))
    return Sweep(rates, losses, suggest_rate(rates, losses))


@dataclass
class _State:
    """Where a stage stands; with the variables, all that a checkpoint holds."""

    step: int = 0
    position: int = 0  # in the sequence of labelled images
    pseudo_position: int = 0
    seconds: float = 0.0
    losses: float = 0.0  # their sum since the last evaluation
    losses_count: int = 0
    history: list[Epoch] = field(default_factory=list)
    best: int | None = None  # the best evaluation, as an index into the history
    pseudo_rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    pseudo_labels: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


class _Loop:
    def __init__(
        self,
        recipe: Recipe,
        index: int,
        stage: Stage,
        learner: Learner,
        data: StageData,
        workers: Workers,
        listener: Listener,
        *,
        carry: Mapping[str, Any] = MappingProxyType({}),
        schedule: Callable[[Any], Any] | None = None,
    ) -> None:
        self._recipe, self._index, self._stage = recipe, index, stage
        self._learner, self._data, self._workers, self._listener = learner, data, workers, listener
        self._carry = dict(carry)
        self._count, self._batch = len(data.train_labels), recipe.batch_size
        if self._batch > self._count:
            raise FitError(
                f"batch_size: expected at most the {self._count} training images there are, got "
                f"{self._batch}; give --batch-size {min(self._count, 16)}"
            )
        if self._batch % workers.replicas:
            raise FitError(
                f"batch_size: expected a multiple of the {workers.replicas} devices that share it, "
                f"got {self._batch}"
            )
        self._epoch_steps = self._count / self._batch
        self._total = stage.steps or math.ceil(stage.epochs * self._epoch_steps)
        self._order = Order(self._count, recipe.seed, index)
        self._pseudo_order: Order | None = None
        entropy = np.random.SeedSequence([recipe.seed, index]).generate_state(1)
        self._base_seed = int(entropy[0] >> 1)

        self._varies = recipe.augmentation_of(stage) != Augmentation()
        self._network = network_of(learner.backbone) if learner.on_pixels else None
        self._groups = parameter_groups(stage, self._network, learner.head, learner.block_ends)
        self._variables = [variable for group in self._groups for variable in group.variables]
        with workers.scope():
            self._schedule = schedule or learning_rate(stage, self._epoch_steps, self._total)
            self._optimizer = GroupedOptimizer(stage, self._groups, self._schedule)
            self._average = MovingAverage(self._variables, recipe.ema_decay) if recipe.ema_decay else None
            self._scale = LossScale() if recipe.mixed_precision else None
        self._train = self._make_train()
        self._state = _State()
        self._best: Snapshot = ()

    @contextmanager
    def layers_unfrozen(self) -> Iterator[None]:
        """Tell Keras which layers learn: a frozen BatchNorm then keeps its statistics whatever is asked."""
        learning = set(map(id, trainable_layers(self._network, self._stage))) if self._network else set()
        layers = self._network.layers if self._network else []
        try:
            for layer in layers:
                layer.trainable = id(layer) in learning
            yield
        finally:
            for layer in layers:
                layer.trainable = True

    def run(self, checkpoint: Checkpoint, on_epoch: Callable[[Epoch], None]) -> StageResult:
        state = self._state
        if not self._resume(checkpoint):
            self._evaluate(on_epoch)
            self._draw_pseudo_labels()
        started = time.monotonic() - state.seconds
        clock = _CheckpointClock()
        progress = Progress(f"training: {self._stage.name}", self._total, self._listener)
        progress.advance(state.step)
        stopped = self._out_of_patience()
        while state.step < self._total and not stopped:
            end = self._next_evaluation()
            for losses in self._advance(end):
                progress.advance(len(losses))
                state.seconds = time.monotonic() - started
                if self._workers.is_chief and clock.overdue:
                    clock.time(lambda: self._save(checkpoint))
            self._evaluate(on_epoch)
            self._draw_pseudo_labels()
            stopped = self._out_of_patience()
            if self._workers.is_chief and clock.affordable:
                clock.time(lambda: self._save(checkpoint))
        self._put_kept_weights()
        return self._result(stopped)

    def sweep(self) -> tuple[float, ...]:
        """The loss of each step of a learning-rate sweep, up to where it explodes."""
        self._total = _SWEEP_STEPS
        progress = Progress(f"finding a learning rate: {self._stage.name}", _SWEEP_STEPS, self._listener)
        found: list[float] = []
        for losses in self._advance(_SWEEP_STEPS, check=False):
            for loss in losses.tolist():
                found.append(loss)
                if not math.isfinite(loss) or loss > _SWEEP_ENDS_AT * min(found):
                    progress.advance(_SWEEP_STEPS - len(found) + 1)
                    return tuple(found)
            progress.advance(len(losses))
        return tuple(found)

    # Steps

    def _advance(self, end: int, *, check: bool = True) -> Iterator[npt.NDArray[np.float32]]:
        """Train up to step `end`; yields the losses of each call's steps."""
        state = self._state
        plans = self._plan(end)
        rows = (plan.rows for plan in plans)
        inputs = self._data.train.ahead(rows)
        pseudo = self._data.unlabeled
        pseudo_inputs = pseudo.inputs.ahead(plan.pseudo_rows for plan in plans) if pseudo else None
        for plan in plans:
            batch, labels = next(inputs), plan.labels
            if pseudo_inputs is not None:
                batch = np.concatenate([batch, next(pseudo_inputs)], axis=1)
            shares = self._workers.share((batch, labels, plan.draws), axis=1)
            losses: npt.NDArray[np.float32] = self._train(*shares, tf.constant(plan.seeds)).numpy()
            if check and not np.isfinite(losses).all():
                step = state.step + int(np.argmin(np.isfinite(losses)))
                raise FitError(
                    f"stage {self._stage.name!r}: the loss is no longer a number after {step} steps, at a "
                    f"learning rate of {float(self._schedule(step)):.3g}; give a lower --learning-rate, or "
                    "--set clip_norm=1"
                )
            state.step += len(losses)
            state.position += plan.rows.size
            state.pseudo_position += plan.pseudo_rows.size
            state.losses += float(losses.sum())
            state.losses_count += len(losses)
            yield losses

    def _plan(self, end: int) -> list["_Plan"]:
        """What each call of the steps up to `end` takes; nothing of it is random but by seed and position."""
        state, recipe = self._state, self._recipe
        per_call = 1 if self._learner.on_pixels or self._workers.strategy else _FEATURE_STEPS
        pseudo_count = round(self._batch * recipe.pseudo_labels.share) if len(state.pseudo_rows) else 0
        labelled_count = self._batch - pseudo_count
        plans = []
        for first in range(state.step, end, per_call):
            steps = np.arange(first, min(first + per_call, end))
            offset = (steps - state.step)[:, None]
            rows = self._order.rows(state.position + offset * labelled_count + np.arange(labelled_count))
            labels = self._data.train_labels[rows]
            pseudo_rows = np.empty((len(steps), 0), np.int64)
            if pseudo_count and self._pseudo_order:
                positions = state.pseudo_position + offset * pseudo_count + np.arange(pseudo_count)
                drawn = self._pseudo_order.rows(positions)
                pseudo_rows = state.pseudo_rows[drawn]
                labels = np.concatenate([labels, state.pseudo_labels[drawn]], axis=1)
            draws = self._draws(steps)
            if self._data.views > 1:
                views = (draws[:, :labelled_count, 0] * self._data.views).astype(np.int64)
                rows = rows + self._count * views
            seeds = np.stack([np.full_like(steps, self._base_seed), steps], axis=-1).astype(np.int32)
            plans.append(_Plan(rows, pseudo_rows, labels, draws, seeds))
        return plans

    def _draws(self, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32 [K, B, DRAWS] in [0, 1), by the seed and each step's number."""
        if not self._varies:
            return np.zeros((len(steps), self._batch, DRAWS), np.float32)
        shape = self._batch, DRAWS
        draws = [np.random.default_rng((self._base_seed, step)).random(shape) for step in steps.tolist()]
        return np.stack(draws).astype(np.float32)

    def _make_train(self) -> Callable[..., tf.Tensor]:
        """train(inputs [K, B, ...], labels [K, B], draws [K, B, DRAWS], seeds [K, 2]) -> losses [K].

        Under a strategy K is 1, and the first three are each replica's part of the batch.
        """
        recipe, learner, stage_batch = self._recipe, self._learner, self._batch
        augmentation = recipe.augmentation_of(self._stage)
        augment = Augmenter(augmentation)
        scale, average = self._scale, self._average
        strategy, optimizer, variables = self._workers.strategy, self._optimizer, self._variables
        logits_model, look_up = logits_of(learner.head), self._data.train.lookup
        classes = learner.head.output_shape[-1]
        smoothing = recipe.label_smoothing
        weights = _class_weights(recipe, self._data.train_labels, classes)
        train_statistics = recipe.batch_norm == "train"

        @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
        def train_once(inputs: Any, labels: Any, draws: Any, seed: Any) -> tf.Tensor:
            inputs = look_up(inputs)
            targets = tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
            if learner.on_pixels:
                inputs = augment(inputs, draws, seed)
                inputs, targets = mix(inputs, targets, seed, augmentation)
            with tf.GradientTape() as tape:
                features = (
                    learner.backbone(inputs, training=train_statistics) if learner.on_pixels else inputs
                )
                logits = logits_model(tf.cast(features, tf.float32), training=True)
                losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
                if weights is not None:
                    losses *= tf.linalg.matvec(targets, weights)
                loss = tf.reduce_sum(losses) / stage_batch
                scaled = scale.up(loss) if scale else loss
            gradients = tape.gradient(scaled, [variable.value for variable in variables])
            if scale:
                gradients = scale.down(gradients)
            optimizer.apply(gradients, clip_norm=recipe.clip_norm)
            return loss

        def in_replica(inputs: Any, labels: Any, draws: Any, seeds: Any) -> tf.Tensor:
            loss = train_once(inputs[0], labels[0], draws[0], seeds[0])
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, loss)

        @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
        def train(inputs: Any, labels: Any, draws: Any, seeds: Any) -> tf.Tensor:
            if strategy:
                loss = strategy.run(in_replica, args=(inputs, labels, draws, seeds))
                if average:
                    average.update()
                return strategy.experimental_local_results(loss)[0][None]
            count = tf.shape(labels)[0]
            losses = tf.TensorArray(tf.float32, count)
            for step in tf.range(count):
                losses = losses.write(step, train_once(inputs[step], labels[step], draws[step], seeds[step]))
                if average:
                    average.update()
            return losses.stack()

        compiled: Callable[..., tf.Tensor] = train
        return compiled

    # Evaluation

    def _next_evaluation(self) -> int:
        """The step of the next one: an epoch's end, or fewer of them where nothing depends on each."""
        every = self._epoch_steps
        if self._stage.keep == "last" and not self._stage.patience and self._data.unlabeled is None:
            every *= max(1, math.ceil(self._total / every / _MOST_EVALUATIONS))
        done = math.floor(self._state.step / every + 1e-9)
        return min(math.ceil((done + 1) * every - 1e-9), self._total)

    def _evaluate(self, on_epoch: Callable[[Epoch], None]) -> None:
        state, data = self._state, self._data
        loss = accuracy = None
        if len(data.validation_labels):
            with self._averaged():
                probabilities = self._learner.predict(data.validation, len(data.validation_labels))
            loss = log_loss(probabilities, data.validation_labels)
            accuracy = float((probabilities.argmax(axis=1) == data.validation_labels).mean())
            # Machines may round differently, and have to agree on when to stop: the first one is heard.
            loss, accuracy = self._workers.all_gather(np.array([[loss, accuracy]]))[0].tolist()
        epoch = Epoch(
            self._stage.name,
            round(state.step / self._epoch_steps, 3),
            state.step,
            state.losses / state.losses_count if state.losses_count else None,
            loss,
            accuracy,
            float(self._schedule(max(state.step - 1, 0))),
            round(state.seconds, 3),
        )
        state.history.append(epoch)
        state.losses, state.losses_count = 0.0, 0
        if accuracy is not None and loss is not None and self._stage.keep == "best":
            best = state.history[state.best] if state.best is not None else None
            rank = accuracy, -loss
            if best is None or rank > (best.validation_accuracy, -(best.validation_loss or 0.0)):
                state.best = len(state.history) - 1
                with self._averaged():
                    self._best = snapshot(self._learner.variables)
        on_epoch(epoch)

    def _averaged(self) -> Any:
        return self._average.applied() if self._average else nullcontext()

    def _out_of_patience(self) -> str:
        """Why the stage ends here; "" if it goes on."""
        state, patience = self._state, self._stage.patience
        measured = [
            (epoch.validation_accuracy, -epoch.validation_loss)
            for epoch in state.history
            if epoch.validation_accuracy is not None and epoch.validation_loss is not None
        ]
        if not patience or not measured:
            return ""
        since = len(measured) - 1 - measured.index(max(measured))
        return f"no better on validation for {patience} epochs" if since >= patience else ""

    def _draw_pseudo_labels(self) -> None:
        """Believe the model where it is sure, from the epoch on that the recipe says."""
        state, settings, unlabeled = self._state, self._recipe.pseudo_labels, self._data.unlabeled
        if unlabeled is None or state.step < settings.start_epoch * self._epoch_steps:
            return
        with self._averaged():
            probabilities = self._learner.predict(unlabeled.inputs, unlabeled.count)
        sure = np.flatnonzero(probabilities.max(axis=1) >= settings.confidence)
        state.pseudo_rows, state.pseudo_labels = sure, probabilities[sure].argmax(axis=1)
        self._order_pseudo_labels()

    def _order_pseudo_labels(self) -> None:
        count = len(self._state.pseudo_rows)
        self._pseudo_order = Order(count, self._recipe.seed, self._index, 1) if count else None

    def _put_kept_weights(self) -> None:
        if self._stage.keep == "best" and self._state.best is not None:
            restore(self._learner.variables, self._best)
        elif self._average:
            self._average.assign()

    def _result(self, stopped: str) -> StageResult:
        state, learner = self._state, self._learner
        classes, counts = np.unique(state.pseudo_labels, return_counts=True)
        learning = trainable_layers(self._network, self._stage) if self._network else []
        return StageResult(
            name=self._stage.name,
            unfreeze=self._stage.unfreeze,
            trainable_parameters=sum(math.prod(variable.shape) for variable in self._variables),
            parameters=learner.backbone.count_params() + learner.head.count_params(),
            layers=tuple(layer.name for layer in learning),
            steps=state.step,
            epochs=round(state.step / self._epoch_steps, 3),
            best_epoch=None if state.best is None else state.history[state.best].epoch,
            stopped=stopped or "done",
            learning_rate=self._stage.learning_rate,
            history=tuple(state.history),
            pseudo_labels=dict(zip(classes.tolist(), counts.tolist(), strict=True)),
        )

    # Checkpoints

    def _state_variables(self) -> dict[str, list[keras.Variable]]:
        groups = {"learner": self._learner.variables, "optimizer": list(self._optimizer.variables)}
        if self._average:
            groups["average"] = list(self._average.variables)
        if self._scale:
            groups["scale"] = list(self._scale.variables)
        return groups

    def _save(self, checkpoint: Checkpoint) -> None:
        state = self._state
        values = asdict(state)
        pseudo = values.pop("pseudo_rows"), values.pop("pseudo_labels")
        arrays = {name: snapshot(variables) for name, variables in self._state_variables().items()}
        document = self._carry | {"stage": self._index, "settings": asdict(self._stage), "state": values}
        checkpoint.save(document, arrays | {"best": self._best, "pseudo": pseudo})

    def _resume(self, checkpoint: Checkpoint) -> bool:
        saved = checkpoint.load()
        if saved is None or saved[0]["stage"] != self._index or "state" not in saved[0]:
            return False
        document, arrays = saved
        values = document["state"]
        history = [Epoch(**epoch) for epoch in values.pop("history")]
        rows, labels = arrays["pseudo"]
        self._state.__dict__.update(values, history=history, pseudo_rows=rows, pseudo_labels=labels)
        self._order_pseudo_labels()
        self._best = arrays["best"]
        for name, variables in self._state_variables().items():
            restore(variables, arrays[name])
        return True


@dataclass(frozen=True)
class _Plan:
    """K steps: rows [K, B'] and pseudo rows [K, B - B'], the labels of both [K, B], draws [K, B, DRAWS] for
    each image, seeds [K, 2] for each step."""

    rows: npt.NDArray[np.int64]
    pseudo_rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    draws: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.int32]


class _CheckpointClock:
    """When to write a checkpoint: after every minute, and after an epoch if that costs little."""

    def __init__(self) -> None:
        self._saved_at, self._cost_s = time.monotonic(), 0.0

    @property
    def overdue(self) -> bool:
        return time.monotonic() - self._saved_at > _CHECKPOINT_EVERY_S

    @property
    def affordable(self) -> bool:
        return self._cost_s <= _CHECKPOINT_SHARE * (time.monotonic() - self._saved_at)

    def time(self, save: Callable[[], None]) -> None:
        started = time.monotonic()
        save()
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - started


def _class_weights(
    recipe: Recipe, labels: npt.NDArray[np.int64], classes: int
) -> npt.NDArray[np.float32] | None:
    """float32 [C] with mean 1 over the training images; None if all weigh alike."""
    if recipe.class_weights == "none":
        return None
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32)
