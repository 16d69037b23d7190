"""Labelled images, wherever they lie, become examples, split by a stable hash unless their source says how.

A source is a folder of class folders (`folder`), a manifest (`manifest`) or TFRecord shards (`tfrecords`).
"""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .errors import DataError
from .files import write_atomically
from .folder import list_folder, unlabeled_images
from .images import ImageStore, content_key, in_threads
from .listing import SPLITS, Listing, Skipped, Split
from .manifest import list_manifest
from .progress import Listener, Progress, silent

__all__ = [
    "SPLITS",
    "Dataset",
    "Example",
    "Skipped",
    "Split",
    "content_keys",
    "drop_examples",
    "find_duplicates",
    "is_shard",
    "open_dataset",
    "small_classes",
    "source_kind",
    "unlabeled_images",
    "write_duplicates",
    "write_skipped",
    "write_split",
]

_BUCKETS = 10_000  # splits are exact to a hundredth of a percent
_NAMED = 5
_MANIFESTS = (".csv", ".jsonl", ".ndjson")
_SHARD = re.compile(r"[^.].*(\.tfrecords?(-\d+-of-\d+)?|-\d{5}-of-\d{5})(\.gz)?")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image.

    path: what the dataset's images are read by; in a folder relative to it, with forward slashes.
    label: an index into the dataset's labels. split_key: the text whose hash chose the split; None where the
    source named it, which is then final.
    """

    path: str
    label: int
    split: Split
    split_key: str | None = None


@dataclass(frozen=True)
class Dataset:
    """root: the folder or file that it was read from. labels: the classes' names, in their order.

    examples: in the order of their labels. images: gives the bytes of an example by its path.
    """

    root: Path
    labels: tuple[str, ...]
    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]
    images: ImageStore

    def of(self, split: Split) -> tuple[Example, ...]:
        """The examples of one split, in their order."""
        return tuple(example for example in self.examples if example.split == split)

    def counts(self) -> dict[str, dict[Split, int]]:
        """Images for each class and split."""
        counter = Counter((example.label, example.split) for example in self.examples)
        return {
            label: {split: counter[index, split] for split in SPLITS}
            for index, label in enumerate(self.labels)
        }


def open_dataset(
    source: Path,
    *,
    validation_percent: float = 10.0,
    test_percent: float = 10.0,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """The labelled images of `source`: a folder of class folders, a manifest, or TFRecord shards.

    A split that the source names is kept. If it names splits but no validation (or no test) image, those are
    taken from the training images. What is left to us is split by the hash of the image's path, so an image
    stays in its split when others come or go; names that are alike up to "_nohash_" stay together. A class
    whose images would all be held out keeps one for training.

    labels: those of a trained model, which the examples' labels are then indexes into; classes may then lack
        images, and nothing has to be there to train on.
    Raises DataError if `source` is none of these, there are fewer than two classes, a class has no image to
    train on, or a label is not among `labels`; ValueError if the percentages are negative or leave nothing to
    train on.
    """
    if validation_percent < 0 or test_percent < 0 or validation_percent + test_percent >= 100:
        raise ValueError(
            "validation and test percentages: expected both at least 0 and together below 100, "
            f"got {validation_percent:g} and {test_percent:g}"
        )
    listing = _list(source)
    if labels is None:
        _check_labels(source, listing.labels)
    else:
        _check_known(source, listing, labels)
    names = listing.labels if labels is None else tuple(labels)
    examples = _assign_splits(listing, names, validation_percent, test_percent)
    dataset = Dataset(source, names, examples, listing.skipped, listing.images)
    if labels is None:
        _check_trainable(dataset, range(len(names)))
    return dataset


def source_kind(source: Path) -> Literal["folder", "manifest", "shards"]:
    """How `source` is read. Raises DataError if it is none of what `open_dataset` reads."""
    if source.is_file():
        if source.suffix.lower() in _MANIFESTS:
            return "manifest"
        if is_shard(source.name):
            return "shards"
        raise DataError(
            f"{source}: not a folder, a manifest ({', '.join(_MANIFESTS)}) or a TFRecord file (.tfrecord)"
        )
    if not source.is_dir():
        raise DataError(f"{source}: no such folder or file")
    if not _shards_in(source):
        return "folder"
    folders = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name[0] != ".")
    if folders:
        raise DataError(
            f"{source}: holds both TFRecord shards and folders ({', '.join(folders[:_NAMED])}); expected "
            "one of them"
        )
    return "shards"


def is_shard(name: str) -> bool:
    """Whether a file of this name is taken for TFRecord: *.tfrecord, *.tfrecords, *-00000-of-00010."""
    return _SHARD.fullmatch(name) is not None


def drop_examples(dataset: Dataset, unreadable: Iterable[Skipped]) -> Dataset:
    """The dataset without the files that turned out to be unreadable.

    Raises DataError if that leaves a class that was trained on without an image to train on.
    """
    reasons = {skipped.path: skipped for skipped in unreadable}
    trained_on = {example.label for example in dataset.examples if example.split == "train"}
    by_label: dict[int, list[Example]] = {}
    for example in dataset.examples:
        if example.path not in reasons:
            by_label.setdefault(example.label, []).append(example)
    examples = tuple(example for group in by_label.values() for example in _keep_one_for_training(group))
    kept = replace(dataset, examples=examples, skipped=(*dataset.skipped, *reasons.values()))
    _check_trainable(kept, trained_on)
    return kept


def small_classes(dataset: Dataset, least: int = 20) -> list[str]:
    """The classes with fewer than `least` images in all splits together."""
    return [label for label, splits in dataset.counts().items() if sum(splits.values()) < least]


def content_keys(dataset: Dataset, listener: Listener = silent) -> tuple[dict[str, bytes], list[Skipped]]:
    """What names the content of each example, by its path, and the files that cannot be read."""
    progress = Progress("reading images", len(dataset.examples), listener)

    def key(path: str) -> bytes | Skipped:
        try:
            return content_key(dataset.images.read(path))
        except OSError as error:
            return Skipped(path, f"cannot be read: {error.strerror or error}")

    keys: dict[str, bytes] = {}
    unreadable: list[Skipped] = []
    paths = [example.path for example in dataset.examples]
    for path, result in zip(paths, in_threads(key, paths), strict=True):
        if isinstance(result, Skipped):
            unreadable.append(result)
        else:
            keys[path] = result
        progress.advance()
    return keys, unreadable


def find_duplicates(
    examples: Iterable[Example], keys: Mapping[str, bytes]
) -> tuple[tuple[Example, ...], ...]:
    """Groups of examples with the same content that are in more than one split or have more than one label.

    keys: what names the content of each path, as `content_keys` gives them.
    """
    groups: dict[bytes, list[Example]] = {}
    for example in examples:
        groups.setdefault(keys[example.path], []).append(example)
    return tuple(
        tuple(group)
        for group in groups.values()
        if len({(example.split, example.label) for example in group}) > 1
    )


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


def write_duplicates(duplicates: Iterable[Iterable[Example]], dataset: Dataset, path: Path) -> None:
    """Write groups of the same content as CSV with the columns group, path, label (a name) and split."""
    with write_atomically(path) as file:
        writer = csv.writer(file)
        writer.writerow(("group", "path", "label", "split"))
        for number, group in enumerate(duplicates, start=1):
            writer.writerows((number, e.path, dataset.labels[e.label], e.split) for e in group)


def _list(source: Path) -> Listing:
    kind = source_kind(source)
    if kind == "folder":
        return list_folder(source)
    if kind == "manifest":
        return list_manifest(source)
    from .tfrecords import list_shards  # imports TensorFlow

    return list_shards([source] if source.is_file() else _shards_in(source))


def _shards_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_shard(entry.name) and entry.is_file())
    return [folder / name for name in names]


def _hash_bucket(key: str) -> int:
    """TensorFlow's retrain.py, too, hashes the path without what follows _nohash_."""
    stem = key.partition("_nohash_")[0]
    return int.from_bytes(hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()[:8]) % _BUCKETS


def _assign_splits(
    listing: Listing, labels: Sequence[str], validation_percent: float, test_percent: float
) -> tuple[Example, ...]:
    """The rule of TensorFlow's retrain.py: the hash of the path picks the split."""
    named = {listed.split for listed in listing.listed}
    percents: dict[Split | None, tuple[float, float]] = {
        None: (validation_percent, test_percent),
        "train": (
            0.0 if named & {None, "validation"} else validation_percent,
            0.0 if named & {None, "test"} else test_percent,
        ),
    }
    indexes = {label: index for index, label in enumerate(labels)}
    groups: list[list[Example]] = [[] for _ in labels]
    for listed in listing.listed:
        label, named_split = indexes[listed.label], listed.split
        if named_split is None or named_split == "train":
            split = _hashed_split(listed.split_key, *percents[named_split])
            example = Example(listed.path, label, split, listed.split_key)
        else:
            example = Example(listed.path, label, named_split)
        groups[label].append(example)
    return tuple(example for group in groups for example in _keep_one_for_training(group))


def _hashed_split(key: str, validation_percent: float, test_percent: float) -> Split:
    below_validation = validation_percent * _BUCKETS / 100
    below_test = below_validation + test_percent * _BUCKETS / 100
    bucket = _hash_bucket(key)
    return "validation" if bucket < below_validation else "test" if bucket < below_test else "train"


def _keep_one_for_training(examples: list[Example]) -> list[Example]:
    """One class's examples; if all are held out, the one furthest from being so is trained on after all."""
    buckets = {
        example.path: _hash_bucket(example.split_key) for example in examples if example.split_key is not None
    }
    if not buckets or any(example.split == "train" for example in examples):
        return examples
    furthest = max(buckets.values())  # of several, if they have to stay together
    return [
        replace(example, split="train") if buckets.get(example.path) == furthest else example
        for example in examples
    ]


def _check_labels(source: Path, labels: Sequence[str]) -> None:
    if len(labels) == 1:
        raise DataError(f"{source}: one class only ({labels[0]}); a classifier needs at least two classes")
    for label in labels:
        if not label.isprintable():
            raise DataError(f"{source}: label {label!r}: expected printable text in one line; rename it")


def _check_known(source: Path, listing: Listing, labels: Sequence[str]) -> None:
    unknown = sorted({listed.label for listed in listing.listed} - set(labels))
    if unknown:
        raise DataError(
            f"{source}: {_classes(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the "
            f"{len(labels)} that the model knows: {', '.join(labels[:_NAMED])}"
            f"{', ...' if len(labels) > _NAMED else ''}"
        )


def _check_trainable(dataset: Dataset, labels: Iterable[int]) -> None:
    """Raise DataError unless each of the labels has an image to train on."""
    counts = list(dataset.counts().items())
    without = [counts[label] for label in sorted(labels) if not counts[label][1]["train"]]
    if not without:
        return
    empty = [label for label, splits in without if not sum(splits.values())]
    skipped = f" ({len(dataset.skipped)} files skipped)" if dataset.skipped else ""
    if empty:
        raise DataError(
            f"{dataset.root}: no readable image in {_classes(empty)}{skipped}; add images, or remove it"
        )
    raise DataError(
        f"{dataset.root}: no readable image to train on in {_classes([label for label, _ in without])}: "
        f"all are given as validation or test{skipped}; add some, or move them"
    )


def _classes(labels: Sequence[str]) -> str:
    named = ", ".join(labels[:_NAMED]) + (", ..." if len(labels) > _NAMED else "")
    return f"{'class' if len(labels) == 1 else 'classes'} {named}"
