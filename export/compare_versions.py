"""Two published versions, asked of the same images in Sessions as servers run them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graftserve.client.wire.contract import SERVING_DEFAULT
from graftserve.training.dataset import open_dataset, source_kind
from graftserve.training.errors import DataError
from graftserve.training.folder import unlabeled_images
from graftserve.training.images import FolderImages, ImageStore
from graftserve.training.listing import Split
from graftserve.training.progress import Listener, Progress, silent

from .compare import Comparison, Predictions, compare_predictions
from .contract import read_contract
from .errors import SourceError, VerificationError
from .verify import Signatures, open_signatures

__all__ = ["Images", "VersionComparison", "compare_versions", "open_images"]

_BATCH = 8
_NEEDED = ("probabilities", "valid")


@dataclass(frozen=True)
class Images:
    """What to ask. labels: of each path, None where it is not known. store: gives the bytes of a path."""

    paths: tuple[str, ...]
    labels: tuple[str | None, ...]
    store: ImageStore


@dataclass(frozen=True)
class VersionComparison:
    """ms_before, ms_after: milliseconds for an image, in batches of 8: the median."""

    comparison: Comparison
    ms_before: float
    ms_after: float


def open_images(data: Path, *, split: Split | None = None, limit: int | None = None) -> Images:
    """The images of a dataset with their labels, or of a folder without class folders, or a single file.

    split: only this one's. limit: so many, spread evenly. Raises DataError, or SourceError if there are none.
    """
    if data.is_file() and not _is_dataset(data):
        return Images((data.name,), (None,), FolderImages(data.parent))
    labels: tuple[str | None, ...]
    try:
        dataset = open_dataset(data)
    except DataError as error:
        if split is not None or not data.is_dir():
            raise
        try:
            store, found = unlabeled_images(data)
        except DataError:
            raise error from None
        paths, labels = tuple(found), (None,) * len(found)
    else:
        store = dataset.images
        examples = dataset.examples if split is None else dataset.of(split)
        paths = tuple(example.path for example in examples)
        labels = tuple(dataset.labels[example.label] for example in examples)
    if not paths:
        raise SourceError(f"{data}: holds no image{f' in its split {split}' if split else ''}")
    if limit is not None and limit < len(paths):
        rows = [index * len(paths) // limit for index in range(limit)]
        paths, labels = tuple(paths[row] for row in rows), tuple(labels[row] for row in rows)
    return Images(paths, labels, store)


def compare_versions(
    before: Path, after: Path, images: Images, listener: Listener = silent
) -> VersionComparison:
    """Ask both versions for every image, and compare.

    Only the probabilities are kept, so memory does not grow with the images' size.
    Raises VerificationError if a folder is no version, or one without probabilities; SourceError if no image
    can be read by both.
    """
    progress = Progress("asking both versions", len(images.paths), listener)
    contracts = [read_contract(folder) for folder in (before, after)]
    for folder, contract in zip((before, after), contracts, strict=True):
        missing = [name for name in _NEEDED if name not in contract.signatures.get(SERVING_DEFAULT, ())]
        if missing:
            raise VerificationError(
                f"{folder}: comparing needs {SERVING_DEFAULT} with {' and '.join(missing)}; export it so"
            )
    count = len(images.paths)
    probabilities = [np.zeros((count, len(contract.labels)), np.float32) for contract in contracts]
    valid = [np.zeros(count, np.bool_) for _ in contracts]
    seconds: tuple[list[float], list[float]] = ([], [])
    with open_signatures(before) as first, open_signatures(after) as second:
        for signatures in (first, second):
            _ask(signatures, [b""])  # the first call prepares the graph, for a second
        for rows, contents in _batches(images):
            for which, signatures in enumerate((first, second)):
                started = time.perf_counter()
                probabilities[which][rows], valid[which][rows] = _ask(signatures, contents)
                seconds[which].append((time.perf_counter() - started) / len(contents))
            progress.advance(len(contents))
    predictions = [
        Predictions(contract.labels, rows, readable)
        for contract, rows, readable in zip(contracts, probabilities, valid, strict=True)
    ]
    try:
        comparison = compare_predictions(images.paths, images.labels, predictions[0], predictions[1])
    except ValueError as error:
        raise SourceError(str(error)) from error
    return VersionComparison(
        comparison, float(np.median(seconds[0])) * 1000, float(np.median(seconds[1])) * 1000
    )


def _is_dataset(data: Path) -> bool:
    try:
        source_kind(data)
    except DataError:
        return False
    return True


def _batches(images: Images) -> Iterator[tuple[slice, list[bytes]]]:
    for start in range(0, len(images.paths), _BATCH):
        paths = images.paths[start : start + _BATCH]
        yield slice(start, start + len(paths)), [_read(images.store, path) for path in paths]


def _read(store: ImageStore, path: str) -> bytes:
    try:
        return store.read(path)
    except OSError:
        return b""  # as unreadable as a damaged one: both versions say so


def _ask(signatures: Signatures, contents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    results = signatures.run(SERVING_DEFAULT, contents, _NEEDED)
    return results["probabilities"], results["valid"]
