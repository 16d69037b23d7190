"""A folder of class folders becomes labelled examples, split by a stable hash.

    flowers/daisy/1.jpg      label daisy
    flowers/roses/b/2.png    label roses: folders inside a class are part of it

What a file holds decides whether it is an image, not what it is called.
"""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .errors import DataError
from .files import write_atomically
from .preprocess import image_format

__all__ = [
    "SPLITS",
    "Dataset",
    "Example",
    "Skipped",
    "Split",
    "drop_examples",
    "scan_folder",
    "write_skipped",
    "write_split",
]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_BUCKETS = 10_000  # splits are exact to a hundredth of a percent


@dataclass(frozen=True)
class Example:
    """One labelled image; `path` is relative to the data folder, with forward slashes."""

    path: str
    label: int
    split: Split


@dataclass(frozen=True)
class Skipped:
    """A file that is no example, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """labels: the class folders' names, sorted; an example's label is an index into them."""

    root: Path
    labels: tuple[str, ...]
    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]

    def of(self, split: Split) -> tuple[Example, ...]:
        """The examples of one split, in the order of their paths."""
        return tuple(example for example in self.examples if example.split == split)

    def counts(self) -> dict[str, dict[Split, int]]:
        """Images for each class and split."""
        counter = Counter((example.label, example.split) for example in self.examples)
        return {
            label: {split: counter[index, split] for split in SPLITS}
            for index, label in enumerate(self.labels)
        }


def scan_folder(root: Path, *, validation_percent: float = 10.0, test_percent: float = 10.0) -> Dataset:
    """Every image below the class folders of `root`, with its split.

    An image's split follows from its relative path alone, so it stays where it is when others come or go. A
    class whose images would all be held out keeps one for training. Hidden files and folders are passed over.
    Raises DataError if `root` is no folder, has fewer than two classes, or a class has no image;
    ValueError if the percentages are negative or leave nothing to train on.
    """
    if validation_percent < 0 or test_percent < 0 or validation_percent + test_percent >= 100:
        raise ValueError(
            "validation and test percentages: expected both at least 0 and together below 100, "
            f"got {validation_percent:g} and {test_percent:g}"
        )
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    labels = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not _hidden(path)))
    if not labels:
        raise DataError(
            f"{root}: no class folders. Expected one folder of images for each class, as in "
            f"{root.name}/daisy/1.jpg and {root.name}/roses/2.jpg"
        )
    if len(labels) == 1:
        raise DataError(
            f"{root}: one class only ({labels[0]}); a classifier needs at least two class folders"
        )

    for label in labels:
        if not label.isprintable():
            raise DataError(
                f"{root}: class folder {label!r}: a label must be printable text in one line; rename it"
            )

    examples: list[Example] = []
    skipped = [
        Skipped(path.name, "not in a class folder")
        for path in sorted(root.iterdir())
        if not path.is_dir() and not _hidden(path)
    ]
    for index, name in enumerate(labels):
        paths: list[str] = []
        for file in _files(root / name):
            relative = file.relative_to(root).as_posix()
            if reason := _not_an_image(file):
                skipped.append(Skipped(relative, reason))
            else:
                paths.append(relative)
        examples += _assign_splits(paths, index, validation_percent, test_percent)
    dataset = Dataset(root, labels, tuple(examples), tuple(skipped))
    _check_classes(dataset)
    return dataset


def drop_examples(dataset: Dataset, unreadable: Iterable[Skipped]) -> Dataset:
    """The dataset without the files that turned out to be unreadable.

    Raises DataError if that leaves a class without an image.
    """
    reasons = {skipped.path: skipped for skipped in unreadable}
    by_label: dict[int, list[Example]] = {}
    for example in dataset.examples:
        if example.path not in reasons:
            by_label.setdefault(example.label, []).append(example)
    examples = tuple(example for group in by_label.values() for example in _keep_one_for_training(group))
    kept = Dataset(dataset.root, dataset.labels, examples, (*dataset.skipped, *reasons.values()))
    _check_classes(kept)
    return kept


def write_split(dataset: Dataset, path: Path) -> None:
    """Write the examples as CSV with the columns path, label (a name) and split."""
    with write_atomically(path) as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        writer.writerows((e.path, dataset.labels[e.label], e.split) for e in dataset.examples)


def write_skipped(dataset: Dataset, path: Path) -> None:
    """Write the files passed over as CSV with the columns path and reason."""
    with write_atomically(path) as file:
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        writer.writerows((skipped.path, skipped.reason) for skipped in dataset.skipped)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _files(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if not name.startswith("."))


def _not_an_image(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            head = opened.read(4)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not head:
        return "the file is empty"
    return None if image_format(head) else "not a JPEG, PNG, GIF or BMP image"


def _hash_bucket(relative: str) -> int:
    return int.from_bytes(hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()[:8]) % _BUCKETS


def _assign_splits(
    paths: list[str], label: int, validation_percent: float, test_percent: float
) -> list[Example]:
    """The rule of TensorFlow's retrain.py: the hash of the path picks the split."""
    below_validation = validation_percent * _BUCKETS / 100
    below_test = below_validation + test_percent * _BUCKETS / 100

    def split(relative: str) -> Split:
        bucket = _hash_bucket(relative)
        return "validation" if bucket < below_validation else "test" if bucket < below_test else "train"

    return _keep_one_for_training([Example(relative, label, split(relative)) for relative in paths])


def _keep_one_for_training(examples: list[Example]) -> list[Example]:
    """One class's examples; if all are held out, the one furthest from being so is trained on after all."""
    if examples and all(example.split != "train" for example in examples):
        keep = max(examples, key=lambda example: _hash_bucket(example.path))
        examples[examples.index(keep)] = replace(keep, split="train")
    return examples


def _check_classes(dataset: Dataset) -> None:
    counts = dataset.counts()
    empty = [label for label, splits in counts.items() if not sum(splits.values())]
    if empty:
        skipped = len(dataset.skipped)
        raise DataError(
            f"{dataset.root}: no readable image in {'class' if len(empty) == 1 else 'classes'} "
            f"{', '.join(empty)}{f' ({skipped} files skipped)' if skipped else ''}; "
            "add images or remove the folder"
        )
