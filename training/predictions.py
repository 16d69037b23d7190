"""What the model says of each image, one row an image: predictions.csv, and the worst of its mistakes."""

import csv
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .evaluate import label_ranks
from .files import write_atomically

__all__ = ["Mistake", "Prediction", "predictions", "worst_mistakes", "write_predictions"]

Mistake = tuple[str, str, str, float]
"""Path, label, what it was taken for, and that answer's score."""


@dataclass(frozen=True)
class Prediction:
    """One image: its true label, the top answer, and where the true label stands.

    score: the probability of `predicted`. label_rank: place of the label among the answers, 1 is the top.
    label_score: the label's probability.
    """

    path: str
    split: str
    label: str
    predicted: str
    score: float
    label_rank: int
    label_score: float


def predictions(
    paths: Sequence[str],
    splits: Sequence[str],
    truth: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    labels: Sequence[str],
) -> Iterator[Prediction]:
    """A row for each path, in their order.

    splits: one name for each path. truth: int64 [N], indexes into `labels`. probabilities: float32 [N, C].
    """
    predicted = probabilities.argmax(axis=1)
    rows = np.arange(len(truth))
    columns = zip(
        paths,
        splits,
        truth.tolist(),
        predicted.tolist(),
        probabilities[rows, predicted].tolist(),
        label_ranks(probabilities, truth).tolist(),
        probabilities[rows, truth].tolist(),
        strict=True,
    )
    for path, split, label, answer, score, rank, label_score in columns:
        yield Prediction(path, split, labels[label], labels[answer], score, rank, label_score)


def write_predictions(path: Path, rows: Iterable[Prediction]) -> None:
    """Write the rows as CSV, one by one; the columns are the fields of Prediction."""
    with write_atomically(path) as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Prediction))
        writer.writerows(
            [f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)] for row in rows
        )


def worst_mistakes(rows: Iterable[Prediction], count: int = 24) -> list[Mistake]:
    """The images that were taken for something else with the highest scores, the surest first."""
    mistakes = ((row.path, row.label, row.predicted, row.score) for row in rows if row.label_rank > 1)
    return heapq.nsmallest(count, mistakes, key=lambda mistake: (-mistake[3], mistake[0]))
