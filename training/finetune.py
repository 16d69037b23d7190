"""The method "fine-tune": the recipe's stages, one after the other, each from where the last one ended."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .backbones import BACKBONES, load_backbone
from .checkpoint import Checkpoint, restore, snapshot
from .dataset import unlabeled_images
from .errors import DataError
from .graft import build_head
from .history import Epoch, StageResult, Sweep
from .images import ImageStore
from .inputs import FeatureInputs, Inputs, PixelInputs
from .job import Fitted, Job
from .learner import Learner, StageData, Unlabeled
from .loop import run_stage, sweep_learning_rate
from .recipe import Stage

__all__ = ["fine_tune"]

_log = logging.getLogger(__name__)


def fine_tune(job: Job) -> Fitted:
    """Go through the stages; a run that was killed goes on from its checkpoint.

    The job's backbone is what learns. Raises FitError as `loop.run_stage` does, and RunError for a checkpoint
    that is damaged or of another recipe.
    """
    recipe, workers = job.recipe, job.workers
    backbone, head = _learners(job)
    unlabeled = _find_unlabeled(job)
    checkpoint = Checkpoint(job.run.path / "checkpoint.npz")
    saved = checkpoint.load()
    done = [_result(values) for values in saved[0]["results"]] if saved else []
    sweeps = {name: Sweep(**values) for name, values in saved[0]["sweeps"].items()} if saved else {}
    tuned = False
    with _tensorboard(job) as on_epoch:
        for index, stage in enumerate(recipe.stages):
            stage = _resolved(stage, recipe.backbone)
            learns = stage.unfreeze != "none"
            tuned = tuned or learns
            on_pixels = learns or recipe.augmentation_of(stage).changes_pixels
            learner = Learner(backbone, head, on_pixels, tuned, BACKBONES[recipe.backbone].depth_layers)
            if index < len(done):
                continue
            inside = saved is not None and saved[0]["stage"] == index
            if saved and inside and "state" in saved[0]:
                stage = Stage(**saved[0]["settings"] | {"scopes": tuple(saved[0]["settings"]["scopes"])})
                restore(learner.variables, saved[1]["learner"])  # what features are computed with, too
            elif saved and inside:
                restore(head.variables, saved[1]["head"])
                restore(backbone.variables if saved[1]["backbone"] else [], saved[1]["backbone"])
            data = _stage_data(job, stage, learner, unlabeled)
            if stage.find_learning_rate:
                sweep = sweep_learning_rate(
                    recipe, index, stage, learner, data, workers=workers, listener=job.listener
                )
                _log.info("stage %s: learning rate %.2g, by a sweep", stage.name, sweep.suggested)
                sweeps[stage.name] = sweep
                stage = replace(stage, learning_rate=sweep.suggested, find_learning_rate=False)
            result = run_stage(
                recipe,
                index,
                stage,
                learner,
                data,
                checkpoint,
                carry=_carry(done, sweeps),
                workers=workers,
                listener=job.listener,
                on_epoch=on_epoch,
            )
            done.append(result)
            _say(job, result)
            if workers.is_chief:
                learnt = {"head": head.variables, "backbone": backbone.variables if tuned else []}
                values = {name: snapshot(variables) for name, variables in learnt.items()}
                checkpoint.save(_carry(done, sweeps) | {"stage": index + 1}, values)
    return _fitted(job, backbone, head, tuned=tuned, stages=done, sweeps=sweeps)


def _learners(job: Job) -> tuple[keras.Model, keras.Model]:
    """The models that learn: the job's own backbone, or a copy where strategy or precision need one."""
    recipe, backbone = job.recipe, job.backbone
    with job.workers.scope():
        if job.workers.strategy or recipe.mixed_precision:
            usual = keras.config.dtype_policy()
            keras.config.set_dtype_policy("mixed_float16" if recipe.mixed_precision else usual)
            try:
                backbone = load_backbone(recipe.backbone, "none", truncate_at=recipe.truncate_at)
            finally:
                keras.config.set_dtype_policy(usual)
            backbone.set_weights(job.backbone.get_weights())
        head = build_head(backbone.output_shape[-1], len(job.dataset.labels), recipe.head, recipe.seed)
    return backbone, head


def _fitted(
    job: Job,
    backbone: keras.Model,
    head: keras.Model,
    *,
    tuned: bool,
    stages: list[StageResult],
    sweeps: dict[str, Sweep],
) -> Fitted:
    """Plain models in float32, whatever they learnt as, and the features that the backbone now gives."""
    if backbone is not job.backbone:
        job.backbone.set_weights(backbone.get_weights())
        plain = build_head(head.input_shape[-1], head.output_shape[-1], job.recipe.head)
        plain.set_weights(head.get_weights())
        head = plain
    features = job.compute(job.backbone, job.features.kept) if tuned else job.features
    return Fitted(
        "fine-tune", job.backbone, head, features, stages=tuple(stages), sweeps=tuple(sweeps.items())
    )


def _resolved(stage: Stage, backbone: str) -> Stage:
    """The stage with the backbone's own boundary for "boundary"."""
    return replace(stage, unfreeze=BACKBONES[backbone].boundary) if stage.unfreeze == "boundary" else stage


def _stage_data(
    job: Job, stage: Stage, learner: Learner, unlabeled: tuple[ImageStore, tuple[str, ...]] | None
) -> StageData:
    train, validation = job.paths("train"), job.paths("validation")
    labels = job.labels("train"), job.labels("validation")
    images = job.dataset.images

    if learner.on_pixels:

        def pixels(store: ImageStore, paths: tuple[str, ...]) -> Inputs:
            return PixelInputs(store, paths, job.preprocess)

        more = Unlabeled(pixels(*unlabeled), len(unlabeled[1])) if unlabeled else None
        return StageData(
            pixels(images, train), labels[0], pixels(images, validation), labels[1], unlabeled=more
        )

    features = job.compute(learner.backbone, job.features.kept) if learner.tuned else job.features
    flip = job.recipe.augmentation_of(stage).horizontal_flip
    parts = [job.rows(features, "train")]
    if flip:
        parts.append(job.compute(learner.backbone, train, flip=True).features)
    if unlabeled:
        parts.append(job.compute(learner.backbone, unlabeled[1], images=unlabeled[0]).features)
    inputs = FeatureInputs(np.concatenate(parts))
    views = 2 if flip else 1
    behind = inputs.after(views * len(train))
    return StageData(
        inputs,
        labels[0],
        FeatureInputs(job.rows(features, "validation")),
        labels[1],
        views=views,
        unlabeled=Unlabeled(behind, len(unlabeled[1])) if unlabeled else None,
    )


def _find_unlabeled(job: Job) -> tuple[ImageStore, tuple[str, ...]] | None:
    """The readable images without labels. Raises DataError if the folder has none."""
    folder = job.recipe.pseudo_labels.unlabeled_dir
    if not folder:
        return None
    images, paths = unlabeled_images(Path(folder))
    readable = job.compute(job.backbone, paths, images=images).kept
    if not readable:
        raise DataError(f"{folder}: expected images to give pseudo-labels to, found none that can be read")
    return images, readable


def _carry(done: list[StageResult], sweeps: dict[str, Sweep]) -> dict[str, Any]:
    return {
        "results": [asdict(result) for result in done],
        "sweeps": {name: asdict(sweep) for name, sweep in sweeps.items()},
    }


def _result(values: dict[str, Any]) -> StageResult:
    history = tuple(Epoch(**epoch) for epoch in values["history"])
    pseudo_labels = {int(label): count for label, count in values["pseudo_labels"].items()}
    return StageResult(
        **values | {"history": history, "layers": tuple(values["layers"]), "pseudo_labels": pseudo_labels}
    )


def _say(job: Job, result: StageResult) -> None:
    last = result.history[-1]
    accuracy = "" if last.validation_accuracy is None else f", validation {last.validation_accuracy:.4f}"
    _log.info(
        "stage %s: %d steps, %s%s; %d of %d parameters learnt",
        result.name,
        result.steps,
        result.stopped,
        accuracy,
        result.trainable_parameters,
        result.parameters,
    )
    if job.recipe.pseudo_labels.unlabeled_dir:
        labels = job.dataset.labels
        counts = ", ".join(f"{labels[label]} {count}" for label, count in result.pseudo_labels.items())
        _log.info("stage %s: pseudo-labels: %s", result.name, counts or "none sure enough")


@contextmanager
def _tensorboard(job: Job) -> Iterator[Callable[[Epoch], None]]:
    """Where the epochs' numbers go, if they are asked for."""
    if not (job.tensorboard and job.workers.is_chief):
        yield lambda _: None
        return

    def write(epoch: Epoch) -> None:
        values = {
            "loss/train": epoch.loss,
            "loss/validation": epoch.validation_loss,
            "accuracy/validation": epoch.validation_accuracy,
            "learning_rate": epoch.learning_rate,
        }
        for name, value in values.items():
            if value is not None:
                tf.summary.scalar(f"{epoch.stage}/{name}", value, epoch.step)

    writer = tf.summary.create_file_writer(str(job.run.path / "tensorboard"))
    with writer.as_default():
        yield write
    writer.close()
