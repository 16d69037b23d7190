"""Train: the main path from a folder of images to a finished run directory, in the order it happens.

graftserve train flowers/ --output runs/flowers
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np

from .auto import fit_auto
from .backbones import BACKBONES, load_backbone
from .calibration import apply_temperature, fit_temperature
from .checkpoint import Checkpoint
from .dataset import (
    SPLITS,
    Dataset,
    Example,
    Split,
    drop_examples,
    find_duplicates,
    open_dataset,
    small_classes,
    write_duplicates,
    write_skipped,
    write_split,
)
from .distribution import start_workers
from .errors import DataError, RunError
from .evaluate import evaluate
from .features import compute_features
from .files import naming, write_atomically
from .finetune import fine_tune
from .graft import graft
from .html_report import write_report_html
from .job import Job
from .predictions import predictions, worst_mistakes, write_predictions
from .preprocess import decode_images
from .probe import fit_probe
from .progress import Listener, silent
from .recipe import Recipe
from .report import ReportData, render_report
from .run import RunDirectory
from .weights import WeightTable

__all__ = ["train"]

_log = logging.getLogger(__name__)

_METHODS = {"probe": fit_probe, "fine-tune": fine_tune, "auto": fit_auto}
_GOLDENS = 8
_LISTED = 5


def train(
    recipe: Recipe,
    output: Path,
    *,
    cache_dir: Path,
    engine: str = "auto",
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    listener: Listener = silent,
) -> RunDirectory:
    """Do what the recipe says and leave a finished run in `output`.

    cache_dir: where features are kept between runs. engine: what computes them, "auto", "tensorflow" or
    "litert". strict: any file that is no readable image is an error. resume: continue an unfinished run of
    the same recipe, or return a finished one as it is. overwrite: replace a run that is there; anything else
    that is there is left alone. tensorboard: write the epochs' numbers for it, too.
    Where TF_CONFIG names several workers, each of them calls this; the first one writes `output`.
    Raises DataError, WeightsError, RecipeError, FitError, RunError (see `errors`).
    """
    started = time.monotonic()
    workers = start_workers()
    run = RunDirectory(output)
    if resume and run.finished:
        _check_same_recipe(run, recipe)
        _log.info("%s is finished already; nothing to do", output)
        return run
    if workers.is_chief:
        _check_output(run, recipe, resume=resume, overwrite=overwrite)

    with _notes() as notes:
        # Data and backbone
        dataset = open_dataset(
            Path(recipe.data_dir),
            validation_percent=recipe.validation_percent,
            test_percent=recipe.test_percent,
        )
        _check_skipped(dataset, strict=strict)
        keras.utils.set_random_seed(recipe.seed)  # for weights = "none", the same on every worker
        tables: list[WeightTable] = []
        backbone = load_backbone(
            recipe.backbone,
            recipe.weights,
            until=recipe.weights_until,
            exclude=recipe.weights_exclude,
            truncate_at=recipe.truncate_at,
            listener=tables.append,
        )
        preprocess = BACKBONES[recipe.backbone].preprocess
        if workers.is_chief:
            _begin(run, recipe, tables, resume=resume)

        # Features of every image: what a probe learns from, and what finds the unreadable and the twice
        features_started = time.monotonic()
        features = compute_features(
            backbone,
            preprocess,
            dataset.images,
            [example.path for example in dataset.examples],
            cache_dir,
            listener,
            engine=engine,
            peers=workers,
        )
        features_s = time.monotonic() - features_started
        sniffed = len(dataset.skipped)
        dataset = drop_examples(dataset, features.unreadable)
        _check_skipped(dataset, strict=strict, since=sniffed)
        duplicates = find_duplicates(dataset.examples, features.keys)
        _warn_of_data(dataset, duplicates)

        # Fit
        fit_started = time.monotonic()
        job = Job(
            recipe=recipe,
            run=run,
            dataset=dataset,
            backbone=backbone,
            preprocess=preprocess,
            features=features,
            cache_dir=cache_dir,
            engine=engine,
            workers=workers,
            tensorboard=tensorboard,
            listener=listener,
        )
        fitted = _METHODS[recipe.method](job)
        fit_s = time.monotonic() - fit_started
        if not workers.is_chief:
            workers.barrier()
            return run

    # Judge
    probabilities = {split: fitted.probabilities(job, split) for split in SPLITS}
    evaluations = {
        split: evaluate(probabilities[split], job.labels(split), seed=recipe.seed) for split in SPLITS
    }
    temperature = fit_temperature(probabilities["validation"], job.labels("validation"))
    judged: Split = "test" if evaluations["test"] else "validation"
    calibrated = evaluate(
        apply_temperature(probabilities[judged], temperature), job.labels(judged), seed=recipe.seed
    )

    # Write, the metrics last: a run that has them is finished
    model = graft(fitted.backbone, fitted.head)
    with write_atomically(output / "labels.txt") as file:
        file.writelines(f"{label}\n" for label in dataset.labels)
    write_split(dataset, output / "split.csv")
    write_skipped(dataset, output / "skipped.csv")
    write_duplicates(duplicates, dataset, output / "duplicates.csv")
    _save_model(model, output / "model.keras")
    _save_goldens(model, job)
    rows = [
        row
        for split in ("validation", "test")
        for row in predictions(
            job.paths(split),
            [split] * len(job.paths(split)),
            job.labels(split),
            probabilities[split],
            dataset.labels,
        )
    ]
    write_predictions(output / "predictions.csv", rows)
    timings = {
        "features": round(features_s, 3),
        "fitting": round(fit_s, 3),
        "total": round(time.monotonic() - started, 3),
    }
    metrics: dict[str, Any] = {
        "backbone": recipe.backbone,
        "preprocess": preprocess.to_dict(),
        "method": fitted.method,
        "head": {"kind": "linear" if not recipe.head.hidden else "dense", "strength": fitted.strength},
        "images": dataset.counts(),
        "skipped": len(dataset.skipped),
        "evaluation": {split: result.to_dict() if result else None for split, result in evaluations.items()},
        "temperature": temperature,
        "calibrated": calibrated.to_dict() if calibrated else None,
        "features": {"computed": features.computed, "cached": features.cached, "engine": features.engine},
        "stages": [asdict(stage) for stage in fitted.stages],
        "sweeps": {name: asdict(sweep) for name, sweep in fitted.sweeps},
        "auto": fitted.auto,
        "notes": notes,
        "seconds": timings,
    }
    report = ReportData(
        title=f"{recipe.backbone} on {dataset.root.name}",
        recipe=recipe.to_dict(),
        labels=dataset.labels,
        counts=dataset.counts(),
        evaluations=evaluations,
        judged=judged,
        temperature=temperature,
        calibrated=calibrated,
        history=[asdict(epoch) for stage in fitted.stages for epoch in stage.history],
        stages=metrics["stages"],
        sweeps=metrics["sweeps"],
        mistakes=worst_mistakes(row for row in rows if row.split == judged),
        read_image=dataset.images.read,
        skipped=[(skipped.path, skipped.reason) for skipped in dataset.skipped],
        duplicates=[
            [(example.path, dataset.labels[example.label], example.split) for example in group]
            for group in duplicates
        ],
        timings=timings,
        notes=notes,
        auto=fitted.auto,
        weights=tables[0].render() if tables else None,
    )
    with write_atomically(output / "report.md") as file:
        file.write(render_report(report))
    write_report_html(output / "report.html", report)
    run.write_document("metrics.json", metrics)
    Checkpoint(output / "checkpoint.npz").remove()
    workers.barrier()
    return RunDirectory(output)


@contextmanager
def _notes() -> Iterator[list[str]]:
    """The warnings given meanwhile, for the report."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(__package__)
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


def _check_output(run: RunDirectory, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    if not run.exists or (run.started and overwrite):
        return
    if not run.started:
        raise RunError(f"{run.path}: exists and is no run directory; give another --output")
    if not resume:
        raise RunError(
            f"{run.path}: holds a {'finished' if run.finished else 'started'} run; continue it with "
            "--resume, replace it with --overwrite, or give another --output"
        )
    _check_same_recipe(run, recipe)


def _check_same_recipe(run: RunDirectory, recipe: Recipe) -> None:
    if run.recipe != recipe:
        before = run.recipe.to_dict()
        changed = [key for key, value in recipe.to_dict().items() if before[key] != value]
        raise RunError(
            f"{run.path}: was started with another {', '.join(changed)}; give --resume the same, or "
            "--overwrite"
        )


def _begin(run: RunDirectory, recipe: Recipe, tables: list[WeightTable], *, resume: bool) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    if not resume:
        for left_over in ("checkpoint.npz", "weights.txt"):
            (run.path / left_over).unlink(missing_ok=True)
    run.write_recipe(recipe, version("graftserve"))
    for table in tables:
        with write_atomically(run.path / "weights.txt") as file:
            file.write(table.render())


def _check_skipped(dataset: Dataset, *, strict: bool, since: int = 0) -> None:
    new = dataset.skipped[since:]
    if not new:
        return
    listed = [f"{skipped.path}: {skipped.reason}" for skipped in new[:_LISTED]]
    if len(new) > _LISTED:
        listed.append(f"and {len(new) - _LISTED} more")
    summary = f"{len(new)} {'file' if len(new) == 1 else 'files'} cannot be used"
    if strict:
        raise DataError(f"{dataset.root}: {summary} (--strict): " + "; ".join(listed))
    _log.warning("skipped: %s\n  %s", summary, "\n  ".join(listed))


def _warn_of_data(dataset: Dataset, duplicates: Any) -> None:
    """Say what the accuracy will not tell."""
    unmeasured = [label for label, counts in dataset.counts().items() if not counts["test"]]
    if unmeasured:
        _log.warning(
            "no test image, so nothing is known of the accuracy, for %d of %d classes: %s",
            len(unmeasured),
            len(dataset.labels),
            _some(unmeasured),
        )
    if small := small_classes(dataset):
        _log.warning("fewer than 20 images in %d classes: %s", len(small), _some(small))
    for where, differing in (
        ("in more than one split, which flatters the accuracy (duplicates.csv),", "split"),
        ("under more than one label (duplicates.csv)", "label"),
    ):
        groups = [group for group in duplicates if len({getattr(each, differing) for each in group}) > 1]
        if groups:
            _log.warning(
                "%s %s: %s",
                where,
                "stands 1 image" if len(groups) == 1 else f"stand {len(groups)} images",
                _some([" = ".join(each.path for each in group) for group in groups]),
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


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


def _save_goldens(model: keras.Model, job: Job) -> None:
    """Copy an image for each of the first classes, held out if there is one, and say what the model sees."""
    dataset, run = job.dataset, job.run
    chosen: dict[int, Example] = {}
    for split in reversed(SPLITS):
        for example in dataset.of(split):
            chosen.setdefault(example.label, example)
    examples = [chosen[label] for label in sorted(chosen)][:_GOLDENS]

    contents = [dataset.images.read(example.path) for example in examples]
    seen = model(decode_images(contents, job.preprocess), training=False)
    probabilities = np.asarray(seen["probabilities"])

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
