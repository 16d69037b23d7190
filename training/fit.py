"""Train: the main path from a folder of images to a finished run directory, in the order it happens.

graftserve train flowers/ --output runs/flowers
"""

import logging
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .backbones import BACKBONES, load_backbone
from .dataset import SPLITS, Dataset, Example, Split, drop_examples, scan_folder, write_skipped, write_split
from .errors import DataError, RunError
from .evaluate import evaluate
from .features import Features, compute_features
from .files import naming, write_atomically
from .head import attach_head, fit_linear_head
from .preprocess import decode_images
from .progress import Listener, silent
from .recipe import Recipe
from .report import render_report
from .run import RunDirectory

__all__ = ["train"]

_log = logging.getLogger(__name__)

_GOLDENS = 8
_LISTED = 5


@dataclass(frozen=True)
class _Rows:
    """One split's features float32 [n, D] and labels int64 [n]."""

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def train(
    recipe: Recipe,
    output: Path,
    *,
    cache_dir: Path,
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener = silent,
) -> RunDirectory:
    """Do what the recipe says and leave a finished run in `output`.

    cache_dir: where features are kept between runs. strict: any file that is no readable image is an error.
    resume: continue an unfinished run of the same recipe, or return a finished one as it is.
    overwrite: replace a run that is there; anything else that is there is left alone.
    Raises DataError, WeightsError, RunError (see `errors`), or ValueError for a recipe out of its ranges.
    """
    started = time.monotonic()
    run = _prepare(recipe, output, resume=resume, overwrite=overwrite)
    if resume and run.finished:
        _log.info("%s is finished already; nothing to do", output)
        return run

    dataset = scan_folder(
        Path(recipe.data_dir),
        validation_percent=recipe.validation_percent,
        test_percent=recipe.test_percent,
    )
    _check_skipped(dataset, strict=strict)
    backbone = load_backbone(recipe.backbone, recipe.weights)
    preprocess = BACKBONES[recipe.backbone].preprocess

    output.mkdir(parents=True, exist_ok=True)
    run.write_recipe(recipe, version("graftserve"))

    features_started = time.monotonic()
    paths = [example.path for example in dataset.examples]
    features = compute_features(backbone, preprocess, dataset.root, paths, cache_dir, listener)
    features_s = time.monotonic() - features_started
    sniffed = len(dataset.skipped)
    dataset = drop_examples(dataset, features.unreadable)
    write_skipped(dataset, output / "skipped.csv")
    _check_skipped(dataset, strict=strict, since=sniffed)
    _warn_of_unmeasured(dataset)

    head_started = time.monotonic()
    rows = _rows_of_splits(dataset, features)
    head = fit_linear_head(
        rows["train"].features,
        rows["train"].labels,
        rows["validation"].features,
        rows["validation"].labels,
        len(dataset.labels),
        listener,
    )
    head_s = time.monotonic() - head_started
    evaluations = {
        split: evaluate(head.probabilities(rows[split].features), rows[split].labels) for split in SPLITS
    }

    model = attach_head(backbone, head)
    with write_atomically(output / "labels.txt") as file:
        file.writelines(f"{label}\n" for label in dataset.labels)
    write_split(dataset, output / "split.csv")
    _save_model(model, output / "model.keras")
    _save_goldens(model, dataset, recipe, run)

    metrics: dict[str, Any] = {
        "backbone": recipe.backbone,
        "preprocess": preprocess.to_dict(),
        "head": {"kind": "linear", "strength": head.strength},
        "images": dataset.counts(),
        "skipped": len(dataset.skipped),
        "evaluation": {split: result.to_dict() if result else None for split, result in evaluations.items()},
        "features": {
            "computed": features.computed,
            "cached": features.cached,
            "seconds": round(features_s, 3),
        },
        "head_seconds": round(head_s, 3),
        "total_seconds": round(time.monotonic() - started, 3),
    }
    with write_atomically(output / "report.md") as file:
        file.write(render_report(recipe, dataset, evaluations, metrics))
    run.write_document("metrics.json", metrics)
    return RunDirectory(output)


def _prepare(recipe: Recipe, output: Path, *, resume: bool, overwrite: bool) -> RunDirectory:
    run = RunDirectory(output)
    if not run.exists:
        return run
    if not run.started:
        raise RunError(f"{output}: exists and is no run directory; give another --output")
    if overwrite:
        return run
    if not resume:
        raise RunError(
            f"{output}: holds a {'finished' if run.finished else 'started'} run; continue it with --resume, "
            "replace it with --overwrite, or give another --output"
        )
    if run.recipe != recipe:
        changed = [key for key, value in recipe.to_dict().items() if run.recipe.to_dict()[key] != value]
        raise RunError(
            f"{output}: was started with another {', '.join(changed)}; give --resume the same, or --overwrite"
        )
    return run


def _check_skipped(dataset: Dataset, *, strict: bool, since: int = 0) -> None:
    new = dataset.skipped[since:]
    if not new:
        return
    listed = [f"{skipped.path}: {skipped.reason}" for skipped in new[:_LISTED]]
    if len(new) > _LISTED:
        listed.append(f"and {len(new) - _LISTED} more")
    summary = f"{len(new)} {'file is no readable image' if len(new) == 1 else 'files are no readable images'}"
    if strict:
        raise DataError(f"{dataset.root}: {summary} (--strict): " + "; ".join(listed))
    _log.warning("skipped: %s\n  %s", summary, "\n  ".join(listed))


def _warn_of_unmeasured(dataset: Dataset) -> None:
    unmeasured = [label for label, counts in dataset.counts().items() if not counts["test"]]
    if unmeasured:
        _log.warning(
            "no test image, so nothing is known of the accuracy, for %d of %d classes: %s",
            len(unmeasured),
            len(dataset.labels),
            ", ".join(unmeasured[:_LISTED]) + (", ..." if len(unmeasured) > _LISTED else ""),
        )


def _rows_of_splits(dataset: Dataset, features: Features) -> dict[Split, _Rows]:
    row_of = {path: row for row, path in enumerate(features.kept)}

    def rows(examples: tuple[Example, ...]) -> _Rows:
        indexes = [row_of[example.path] for example in examples]
        return _Rows(features.features[indexes], np.array([e.label for e in examples], np.int64))

    return {split: rows(dataset.of(split)) for split in SPLITS}


def _save_model(model: keras.Model, path: Path) -> None:
    temporary = path.with_name(".temporary.model.keras")  # Keras insists on the ending
    try:
        with naming(path):
            model.save(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_goldens(model: keras.Model, dataset: Dataset, recipe: Recipe, run: RunDirectory) -> None:
    """Copy an image for each of the first classes, held out if there is one, and say what the model sees."""
    chosen: dict[int, Example] = {}
    for split in reversed(SPLITS):
        for example in dataset.of(split):
            chosen.setdefault(example.label, example)
    examples = [chosen[label] for label in sorted(chosen)][:_GOLDENS]

    preprocess = BACKBONES[recipe.backbone].preprocess
    contents = [(dataset.root / example.path).read_bytes() for example in examples]
    probabilities = model(decode_images(contents, preprocess), training=False)["probabilities"].numpy()

    folder = run.path / "goldens"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = [f"{index}{Path(example.path).suffix.lower()}" for index, example in enumerate(examples)]
    for name, content in zip(names, contents, strict=True):
        with write_atomically(folder / name, "wb") as file:
            file.write(content)
    rows = [
        {"file": name, "label": dataset.labels[example.label], "probabilities": row.tolist()}
        for name, example, row in zip(names, examples, probabilities, strict=True)
    ]
    run.write_document("goldens/goldens.json", {"goldens": rows})
