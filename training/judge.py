"""Judge a finished run on images it has not seen: those it held out, or any others with labels it knows.

graftserve evaluate runs/flowers new-photos/

evaluation.json   the numbers, for machines; written last
predictions.csv   what the model says of each image
report.html       the page for people
"""

import csv
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .calibration import apply_temperature
from .dataset import SPLITS, Dataset, Skipped, Split, open_dataset
from .errors import DataError, RunError
from .evaluate import Evaluation, evaluate
from .features import compute_features
from .files import sync_directory, write_json
from .graft import split_model
from .html_report import write_report_html
from .predictions import predictions, worst_mistakes, write_predictions
from .progress import Listener, silent
from .report import ReportData
from .run import RunDirectory

__all__ = ["Judgement", "judge_run"]

_DOCUMENT = "evaluation.json"
_FORMAT = 1
_ROWS = 1024
_NAMED = 5


@dataclass(frozen=True)
class Judgement:
    """How a run did. name: of the split or of the data; calibrated: with the scores at the run's temperature.

    output: the folder that holds the files.
    """

    name: str
    labels: tuple[str, ...]
    evaluation: Evaluation
    temperature: float
    calibrated: Evaluation
    skipped: tuple[Skipped, ...]
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format": _FORMAT,
            "name": self.name,
            "labels": list(self.labels),
            "skipped": len(self.skipped),
            "evaluation": self.evaluation.to_dict(),
            "temperature": self.temperature,
            "calibrated": self.calibrated.to_dict(),
        }


def judge_run(
    run: RunDirectory,
    source: Path | None = None,
    *,
    split: Split = "test",
    output: Path | None = None,
    cache_dir: Path,
    listener: Listener = silent,
) -> Judgement:
    """Evaluate a finished run and write the files into `output`, replacing an evaluation that is there.

    source: a data set, of which every image is judged by; without one, the images that the run put into
        `split`, as far as they are still there.
    output: by default a folder in the run, named after the data. cache_dir: where features are kept.
    Raises DataError if there is no image to judge by, or a label that the run does not know; RunError if the
    run is damaged, or `output` is something else than an evaluation.
    """
    started = time.monotonic()
    name = _name(source) if source else split
    output = output or run.path / f"evaluation-{name}"
    _check_output(output)
    dataset = _all_of(source, run) if source else _own_split(run, split)

    feature_model, head = split_model(run.load_model())
    features_started = time.monotonic()
    paths = [example.path for example in dataset.examples]
    features = compute_features(feature_model, run.preprocess, dataset.images, paths, cache_dir, listener)
    features_s = time.monotonic() - features_started
    skipped = (*dataset.skipped, *features.unreadable)
    label_of = {example.path: example.label for example in dataset.examples}
    truth = np.array([label_of[path] for path in features.kept], np.int64)
    if features.kept:
        probabilities = head.predict(features.features, batch_size=_ROWS, verbose=0)
    else:
        probabilities = np.empty((0, len(run.labels)), np.float32)
    evaluation = evaluate(probabilities, truth, seed=run.recipe.seed)
    calibrated = evaluate(apply_temperature(probabilities, run.temperature), truth, seed=run.recipe.seed)
    if evaluation is None or calibrated is None:
        first = f"{features.unreadable[0].path}: {features.unreadable[0].reason}"
        raise DataError(f"{dataset.root}: none of the {len(paths)} images can be read; the first: {first}")
    judgement = Judgement(name, run.labels, evaluation, run.temperature, calibrated, skipped, output)
    rows = list(predictions(features.kept, [name] * len(truth), truth, probabilities, run.labels))
    counts = Counter(truth.tolist())
    report = ReportData(
        title=f"{run.path.resolve().name} on {name if source else f'its {split} images'}",
        recipe=run.recipe.to_dict(),
        labels=run.labels,
        counts={label: {name: counts[index]} for index, label in enumerate(run.labels)},
        evaluations={name: evaluation},
        judged=name,
        temperature=run.temperature,
        calibrated=calibrated,
        mistakes=worst_mistakes(rows),
        read_image=dataset.images.read,
        skipped=[(each.path, each.reason) for each in skipped],
        timings={"features": features_s, "total": time.monotonic() - started},
        notes=_notes(run.labels, counts),
    )
    with _replacing(output) as folder:
        write_predictions(folder / "predictions.csv", rows)
        write_report_html(folder / "report.html", report)
        write_json(folder / _DOCUMENT, judgement.to_dict())
    return judgement


def _all_of(source: Path, run: RunDirectory) -> Dataset:
    dataset = open_dataset(source, labels=run.labels)
    if not dataset.examples:
        raise DataError(f"{source}: no images to judge by")
    return dataset


def _own_split(run: RunDirectory, split: Split) -> Dataset:
    """The run's data, of which only the examples of `split` are left; `skipped` names those that are gone."""
    wanted = _paths_of_split(run, split)
    if not wanted:
        others = " or ".join(f"--split {other}" for other in SPLITS if other != split)
        raise DataError(
            f"{run.path}: no image is in its {split} split; give {others}, or other images as DATA"
        )
    recipe = run.recipe
    try:
        dataset = open_dataset(
            Path(recipe.data_dir),
            validation_percent=recipe.validation_percent,
            test_percent=recipe.test_percent,
            labels=run.labels,
        )
    except DataError as error:
        raise DataError(
            f"{error} (the data that the run was trained on; others can be given as DATA)"
        ) from error
    example_of = {example.path: example for example in dataset.examples}
    examples = tuple(example_of[path] for path in wanted if path in example_of)
    if not examples:
        raise DataError(
            f"{recipe.data_dir}: none of the run's {len(wanted)} {split} images is there; give others as DATA"
        )
    gone = (path for path in wanted if path not in example_of)
    skipped = tuple(Skipped(path, f"no longer in {recipe.data_dir}") for path in gone)
    return replace(dataset, examples=examples, skipped=skipped)


def _paths_of_split(run: RunDirectory, split: Split) -> list[str]:
    path = run.path / "split.csv"
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return [row["path"] for row in csv.DictReader(file) if row["split"] == split]
    except (OSError, KeyError, csv.Error) as error:
        raise RunError(f"{path}: missing or damaged ({error}); train again with --overwrite") from error


def _name(source: Path) -> str:
    """A name for a folder: the data's own, with its parent's before it where it is a split's."""
    source = source.resolve()
    name = source.stem if source.is_file() else source.name
    if name in SPLITS:
        name = f"{source.parent.name}-{name}"
    return re.sub(r"[^\w.-]+", "-", name) or "data"


def _notes(labels: Sequence[str], counts: Counter[int]) -> list[str]:
    absent = [label for index, label in enumerate(labels) if not counts[index]]
    if not absent:
        return []
    listed = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
    return [
        f"no image, so nothing is known of the accuracy, for {len(absent)} of {len(labels)} classes: {listed}"
    ]


def _check_output(output: Path) -> None:
    is_empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty and not (output / _DOCUMENT).is_file():
        raise RunError(f"{output}: exists and is no evaluation; give another --output")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder`; on an error that is as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    sync_directory(folder.parent)
