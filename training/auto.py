"""The method "auto": which of the four classic situations a dataset is in, and what suits it.

                 similar to ImageNet            different
    few images   a linear head                  a linear head on a lower layer
    many         head, then the top blocks      head, then all layers, each at its own rate

Source: Stanford CS231n, "Transfer Learning and Fine-tuning Convolutional Neural Networks". Similarity is
measured: where features from the middle of the backbone separate the classes better than its last ones, its
last ones are about something else (Yosinski et al. 2014, "How transferable are features in deep neural
networks?").
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .backbones import BACKBONES, network_of, truncate
from .checkpoint import restore, snapshot
from .evaluate import log_loss
from .finetune import fine_tune
from .head import fit_linear_head
from .inputs import Order
from .job import Fitted, Job
from .probe import fit_probe
from .recipe import Recipe
from .recipe_files import load_recipe

__all__ = ["Sight", "fit_auto", "look"]

_log = logging.getLogger(__name__)

# Fine-tuning millions of weights on fewer images a class than this tends to cost accuracy; our own choice.
_MANY_PER_CLASS = 200
_SAMPLE_IMAGES = 2000
_FINE_TUNING = {"large-similar": "two-stage", "large-different": "discriminative"}


@dataclass(frozen=True)
class Sight:
    """What `look` saw. images_per_class: the median of the training split; accuracy_by_layer: of a linear
    head on each depth, on validation, from low to high, the last one the backbone's own features; layer: the
    depth that does best; situation: which of the four; reasons: why, in words."""

    situation: str
    images_per_class: int
    accuracy_by_layer: dict[str, float]
    layer: str
    reasons: tuple[str, ...]


def fit_auto(job: Job) -> Fitted:
    """Look, fit the probe and what suits the situation, and keep whichever does better on validation."""
    probe = fit_probe(job)
    sight = look(job)
    for reason in sight.reasons:
        _log.info("auto: %s", reason)
    before = snapshot(job.backbone.variables)
    if sight.situation == "small-different" and sight.layer:
        other = _probe_below(job, sight.layer)
    elif sight.situation in _FINE_TUNING:
        other = fine_tune(replace(job, recipe=_fine_tuning(job.recipe, sight.situation)))
    else:
        other = probe
    candidates = {"probe": probe} | ({sight.situation: other} if other is not probe else {})
    ranks = {name: _rank(job, fitted) for name, fitted in candidates.items()}
    kept = max(ranks, key=lambda name: ranks[name] or (0.0, 0.0))  # the probe, where they are equal
    if kept == "probe" and other is not probe:
        restore(job.backbone.variables, before)
        _log.info("auto: the probe does no worse on validation and is kept")
    saw: dict[str, Any] = asdict(sight) | {
        "kept": kept,
        "validation": {
            name: rank and {"accuracy": rank[0], "log_loss": -rank[1]} for name, rank in ranks.items()
        },
    }
    return replace(candidates[kept], stages=other.stages, sweeps=other.sweeps, auto=saw)


def look(job: Job) -> Sight:
    """Measure in which situation the dataset is, unless the recipe says so."""
    counts = np.bincount(job.labels("train"), minlength=len(job.dataset.labels))
    per_class = int(np.median(counts))
    size = "large" if per_class >= _MANY_PER_CLASS else "small"
    reasons = [
        f"{size} data: {per_class} training images in the median class, where {_MANY_PER_CLASS} are many"
    ]
    accuracy, layer, kind = _by_depth(job), "", "similar"
    if accuracy:
        top_name, top = list(accuracy.items())[-1]
        best_name = max(reversed(accuracy), key=lambda name: accuracy[name])  # the highest, of equal ones
        # Two standard errors of a share, so that chance does not make data different.
        margin = 2 * math.sqrt(top * (1 - top) / len(job.labels("validation")))
        if accuracy[best_name] > top + margin:
            kind, layer = "different", best_name
        reasons.append(
            f"{kind} data: a linear head is right for {accuracy[best_name]:.3f} of the validation images at "
            f"best, on {best_name}, and for {top:.3f} on {top_name}"
        )
    else:
        reasons.append("similar data, for want of validation images to tell")
    situation = f"{size}-{kind}"
    if job.recipe.situation != "measure":
        situation = job.recipe.situation
        reasons.append(f"{situation}, because the recipe says so")
        if situation == "small-different" and not layer and accuracy:
            layer = max(reversed(list(accuracy)[:-1]), key=lambda name: accuracy[name])
    return Sight(situation, per_class, accuracy, layer, tuple(reasons))


def _by_depth(job: Job) -> dict[str, float]:
    """Validation accuracy of a linear head on each depth of the backbone, from low to high."""
    layers = [] if job.recipe.truncate_at else list(BACKBONES[job.recipe.backbone].depth_layers[:-1])
    validation = _sample(job.paths("validation"))
    if not validation:
        return {}
    train = _sample(job.paths("train"))
    label_of = {example.path: example.label for example in job.dataset.examples}
    model, widths = _depths(job.backbone, layers)
    features = job.compute(model, [*train, *validation])
    row_of = {path: row for row, path in enumerate(features.kept)}
    train_rows, validation_rows = ([row_of[path] for path in paths] for paths in (train, validation))
    # A class may be missing from the sample, and the head must not know of it then.
    classes, train_labels = np.unique([label_of[path] for path in train], return_inverse=True)
    known = {int(label): index for index, label in enumerate(classes)}
    validation_labels = np.array([known.get(label_of[path], -1) for path in validation])
    accuracy: dict[str, float] = {}
    start = 0
    for name, width in zip([*layers, "features"], widths, strict=True):
        block = features.features[:, start : start + width]
        start += width
        head = fit_linear_head(
            block[train_rows],
            train_labels,
            block[validation_rows][validation_labels >= 0],
            validation_labels[validation_labels >= 0],
            len(classes),
            job.listener,
        )
        answers = head.probabilities(block[validation_rows]).argmax(axis=1)
        accuracy[name] = float((answers == validation_labels).mean())
    return accuracy


def _sample(paths: Sequence[str]) -> tuple[str, ...]:
    """At most 2,000 of them, spread evenly by chance, the same ones every time."""
    if not paths:
        return ()
    rows = Order(len(paths), 0).rows(np.arange(min(len(paths), _SAMPLE_IMAGES)))
    return tuple(paths[row] for row in rows)


def _depths(backbone: keras.Model, layers: Sequence[str]) -> tuple[keras.Model, list[int]]:
    """Pixels to the pooled outputs of the layers and the features, side by side, and the width of each."""
    network = network_of(backbone)
    pool = keras.layers.GlobalAveragePooling2D
    outputs = [*(pool()(network.get_layer(name).output) for name in layers), network.output]
    joined = keras.layers.Concatenate()(outputs) if layers else network.output
    inner = keras.Model(network.input, joined)
    pixels = backbone.input
    normalised = backbone.get_layer("normalization")(pixels)
    model = keras.Model(pixels, inner(normalised), name=f"{backbone.name}_at_{len(outputs)}_depths")
    return model, [output.shape[-1] for output in outputs]


def _probe_below(job: Job, layer: str) -> Fitted:
    lower = truncate(job.backbone, layer)
    return replace(fit_probe(job, job.compute(lower, job.features.kept)), backbone=lower)


def _fine_tuning(recipe: Recipe, situation: str) -> Recipe:
    """The recipe with the stages that suit the situation, unless it has stages of its own."""
    if recipe.stages:
        return replace(recipe, method="fine-tune", situation="measure")
    suits = load_recipe(_FINE_TUNING[situation], recipe.data_dir)
    names = "stages", "head", "augmentation", "label_smoothing", "clip_norm"
    return replace(
        recipe, method="fine-tune", situation="measure", **{name: getattr(suits, name) for name in names}
    )


def _rank(job: Job, fitted: Fitted) -> tuple[float, float] | None:
    """(accuracy, minus log-loss) on validation; None without validation images."""
    labels: npt.NDArray[np.int64] = job.labels("validation")
    if not len(labels):
        return None
    probabilities = fitted.probabilities(job, "validation")
    return float((probabilities.argmax(axis=1) == labels).mean()), -log_loss(probabilities, labels)
