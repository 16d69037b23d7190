"""report.html: the run on one page that needs nothing else, neither a network nor JavaScript.

Everything that comes from the user's data is escaped, and the page's own policy forbids scripts and requests.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from .evaluate import ClassScores, Evaluation
from .figures import learning_curves, reliability_diagram, sweep_figures
from .files import write_atomically
from .page import is_list, plain, render_page, thumbnail
from .report import ReportData

__all__ = ["render_html", "write_report_html"]

_THUMBNAILS = 24
_LARGEST_CONFUSION = 40
_CONFUSED_PAIRS = 15
_CLASSES_SHOWN = 40
_CLASSES_LISTED = 1000
_SKIPPED_SHOWN = 20
_DUPLICATES_SHOWN = 20


def write_report_html(path: Path, data: ReportData) -> None:
    """Write the page, atomically. The same data give the same bytes."""
    page = render_html(data)
    with write_atomically(path) as file:
        file.write(page)


def render_html(data: ReportData) -> str:
    """The page, with thumbnails of the mistakes as far as the images can be read and decoded."""
    split, result = data.verdict or (None, None)
    return render_page(
        files(__package__).joinpath("report.html").read_text(encoding="utf-8"),
        data=data,
        split=split,
        result=result,
        curves={
            title: Markup(svg)
            for title, svg in (learning_curves(data.history) | sweep_figures(data.sweeps)).items()
        },
        reliability=Markup(reliability_diagram(result, data.tempered)) if result else None,
        confusion=_confusion(result, data.labels) if result else None,
        pairs=_pairs(result, data.labels) if result else [],
        mistakes=[(*mistake, _thumbnail(data, mistake[0])) for mistake in data.mistakes[:_THUMBNAILS]],
        classes=_class_rows(data),
        classes_shown=_CLASSES_SHOWN,
        classes_listed=_CLASSES_LISTED,
        settings=list(_flat(data.recipe)),
        skipped_shown=_SKIPPED_SHOWN,
        duplicates_shown=_DUPLICATES_SHOWN,
    )


@dataclass(frozen=True)
class _Confusion:
    """rows: the true label's name and, for each of `labels`, (images, share of the true label's images)."""

    labels: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    of: int


@dataclass(frozen=True)
class _ClassRow:
    """bars: (split, images, share of the largest class's images)."""

    label: str
    images: int
    bars: list[tuple[str, int, float]]
    scores: ClassScores | None


def _confusion(result: Evaluation, labels: Sequence[str]) -> _Confusion:
    """The whole matrix, or that of the classes with the most mistakes from and to them."""
    confusion = result.confusion
    mistakes = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()
    chosen = np.sort(np.argsort(-mistakes, kind="stable")[:_LARGEST_CONFUSION])
    totals = np.maximum(confusion.sum(axis=1), 1)
    rows = [
        (
            labels[true],
            [(int(confusion[true, answer]), confusion[true, answer] / totals[true]) for answer in chosen],
        )
        for true in chosen
    ]
    return _Confusion([labels[answer] for answer in chosen], rows, len(labels))


def _pairs(result: Evaluation, labels: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """(true label, answer, images, of so many of the true label)."""
    return [
        (labels[true], labels[answer], images, result.classes[true].images)
        for true, answer, images in result.most_confused(_CONFUSED_PAIRS)
    ]


def _class_rows(data: ReportData) -> list[_ClassRow]:
    """The classes from the worst F1 to the best, then those without a score."""
    totals = {label: sum(counts.values()) for label, counts in data.counts.items()}
    largest = max(totals.values(), default=0) or 1
    scores = data.verdict[1].classes if data.verdict else (None,) * len(data.labels)
    rows = [
        _ClassRow(
            label,
            totals.get(label, 0),
            [(str(split), images, images / largest) for split, images in data.counts.get(label, {}).items()],
            score,
        )
        for label, score in zip(data.labels, scores, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.scores.f1 or 0.0) if row.scores and row.scores.images else 2.0)


def _thumbnail(data: ReportData, path: str) -> str | None:
    try:
        return None if data.read_image is None else thumbnail(data.read_image(path))
    except Exception:  # what the images are kept in raises what it likes; the page names such an image
        return None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every plain value with its path, as `--set` names it."""
    if isinstance(value, Mapping) or (is_list(value) and any(isinstance(item, Mapping) for item in value)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, plain(value)
