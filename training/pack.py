"""A dataset written as TFRecord shards: the images' own bytes, with their labels, shuffled.

    packed/train-00000-of-00008.tfrecord ... validation-00000-of-00001.tfrecord ... labels.txt  skipped.csv

The same images give the same shards, byte for byte, in whatever order they are written.
"""

import hashlib
import io
import math
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock

import tensorflow as tf
from PIL import Image

from .dataset import SPLITS, Dataset, Example, Skipped, Split, is_shard, write_skipped
from .errors import DataError, RunError
from .files import naming, sync_directory, write_atomically
from .images import HEAD_BYTES, image_format
from .progress import Listener, Progress, silent
from .tfrecords import ENCODED, FILENAME, FORMAT, HEIGHT, LABEL, TEXT, WIDTH

__all__ = ["Packed", "pack"]

_MEGABYTE = 1_000_000
_SAMPLE = 512  # images whose size stands for all
_LABELS, _SKIPPED = "labels.txt", "skipped.csv"


@dataclass(frozen=True)
class Packed:
    """What was written: images and shards of each split, bytes of all shards, and the files left out."""

    images: dict[Split, int]
    shards: dict[Split, int]
    size_bytes: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Shard:
    """One file to write, and its images in their order."""

    name: str
    examples: tuple[Example, ...]


def pack(
    dataset: Dataset,
    output: Path,
    *,
    shards: int | None = None,
    shard_mb: float = 100.0,
    workers: int = 8,
    overwrite: bool = False,
    listener: Listener = silent,
) -> Packed:
    """Write the dataset to the folder `output`, which appears whole or not at all.

    shards: how many to write for training; the other splits get their share, at least one. Without it,
    shards are of about `shard_mb` megabytes. workers: shards written at once. overwrite: replace shards that
    are there; anything else that is there is left alone.
    Files that cannot be read are left out and listed in skipped.csv; images are not decoded.
    Raises RunError if `output` is in the way; DataError if a class is left without an image to train on.
    """
    _check_output(dataset, output, overwrite=overwrite)
    plan = _plan(dataset, shards, shard_mb * _MEGABYTE)
    output.parent.mkdir(parents=True, exist_ok=True)
    output = output.resolve()
    temporary = _beside(output)
    try:
        temporary.mkdir()
        unreadable = _write_shards(dataset, plan, temporary, workers, listener)
        _check_trainable(dataset, unreadable)
        skipped = (*dataset.skipped, *unreadable)
        with write_atomically(temporary / _LABELS) as file:
            file.writelines(f"{label}\n" for label in dataset.labels)
        write_skipped(replace(dataset, skipped=skipped), temporary / _SKIPPED)
        size_bytes = sum((temporary / shard.name).stat().st_size for shard in plan)
        _publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    left_out = {skipped.path for skipped in unreadable}
    return Packed(
        {split: sum(e.path not in left_out for e in dataset.of(split)) for split in SPLITS},
        {split: sum(shard.name.startswith(f"{split}-") for shard in plan) for split in SPLITS},
        size_bytes,
        skipped,
    )


def _check_output(dataset: Dataset, output: Path, *, overwrite: bool) -> None:
    if output.resolve().is_relative_to(dataset.root.resolve()):
        raise RunError(
            f"{output}: lies in {dataset.root}, which could not be read afterwards; give another folder"
        )
    if not output.exists():
        return
    names = [path.name for path in output.iterdir()] if output.is_dir() else [output.name]
    if output.is_dir() and not names:
        return
    if not all(is_shard(name) or name in (_LABELS, _SKIPPED) for name in names):
        raise RunError(f"{output}: exists and holds other files than shards; give another folder")
    if not overwrite:
        raise RunError(
            f"{output}: holds shards already; replace them with --overwrite, or give another folder"
        )


def _shuffled(examples: Sequence[Example]) -> list[Example]:
    """In the order of their paths' hashes: random, and the same every time."""

    def key(example: Example) -> bytes:
        path = example.path.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(path, digest_size=8, person=b"pack").digest()

    return sorted(examples, key=key)


def _plan(dataset: Dataset, train_shards: int | None, shard_bytes: float) -> list[_Shard]:
    by_split = {split: _shuffled(dataset.of(split)) for split in SPLITS}
    if train_shards is None:
        mean_bytes = _mean_bytes(dataset, _shuffled(dataset.examples)[:_SAMPLE])
        images_a_shard = shard_bytes / max(mean_bytes, 1.0)
    else:
        images_a_shard = max(len(by_split["train"]) / train_shards, 1.0)
    plan = []
    for split, examples in by_split.items():
        count = min(max(math.ceil(len(examples) / images_a_shard), 1), len(examples))
        for number in range(count):
            name = f"{split}-{number:05}-of-{count:05}.tfrecord"
            plan.append(_Shard(name, tuple(examples[number::count])))
    return plan


def _mean_bytes(dataset: Dataset, sample: Sequence[Example]) -> float:
    sizes = []
    for example in sample:
        try:
            sizes.append(len(dataset.images.read(example.path)))
        except OSError:
            continue
    return sum(sizes) / max(len(sizes), 1)


def _write_shards(
    dataset: Dataset, plan: Sequence[_Shard], folder: Path, workers: int, listener: Listener
) -> list[Skipped]:
    progress = Progress("packing images", len(dataset.examples), listener)
    lock, stop = Lock(), Event()

    def advance() -> bool:
        with lock:
            progress.advance()
        return not stop.is_set()

    with ThreadPoolExecutor(workers) as pool:
        writing = [pool.submit(_write_shard, dataset, shard, folder, advance) for shard in plan]
        try:
            unreadable = [skipped for future in writing for skipped in future.result()]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(unreadable, key=lambda skipped: skipped.path)


def _write_shard(dataset: Dataset, shard: _Shard, folder: Path, advance: Callable[[], bool]) -> list[Skipped]:
    """Write one shard, durably; `advance` counts an image and says whether to go on."""
    path = folder / shard.name
    unreadable = []
    try:
        with tf.io.TFRecordWriter(str(path)) as writer:
            for example in shard.examples:
                record = _record(dataset, example)
                if isinstance(record, Skipped):
                    unreadable.append(record)
                else:
                    writer.write(record)
                if not advance():
                    return unreadable
    except tf.errors.OpError as error:
        raise OSError(f"{path}: {error.message}") from error
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
    return unreadable


def _record(dataset: Dataset, example: Example) -> bytes | Skipped:
    try:
        encoded = dataset.images.read(example.path)
    except OSError as error:
        return Skipped(example.path, f"cannot be read: {error.strerror or error}")
    name = image_format(encoded[:HEAD_BYTES])
    try:
        with Image.open(io.BytesIO(encoded)) as image:  # reads the header, no more
            width_px, height_px = image.size
    except Image.DecompressionBombError:
        return Skipped(example.path, "too large to be decoded")
    except (OSError, ValueError, SyntaxError):
        name = None
    if name is None:
        return Skipped(example.path, "damaged: its header cannot be read")
    feature = {
        ENCODED: _bytes(encoded),
        FORMAT: _bytes(name.encode()),
        FILENAME: _bytes(os.fsencode(example.split_key or example.path)),
        HEIGHT: _integer(height_px),
        WIDTH: _integer(width_px),
        LABEL: _integer(example.label),
        TEXT: _bytes(dataset.labels[example.label].encode()),
    }
    record = tf.train.Example(features=tf.train.Features(feature=feature))
    serialized: bytes = record.SerializeToString(deterministic=True)
    return serialized


def _bytes(value: bytes) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _integer(value: int) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def _check_trainable(dataset: Dataset, unreadable: Sequence[Skipped]) -> None:
    left_out = {skipped.path for skipped in unreadable}
    trained_on = {example.label for example in dataset.of("train") if example.path not in left_out}
    for index, label in enumerate(dataset.labels):
        if index not in trained_on:
            raise DataError(
                f"{dataset.root}: none of the images to train on in class {label} can be read "
                f"({unreadable[0].path}: {unreadable[0].reason}); replace them"
            )


def _beside(output: Path) -> Path:
    return output.with_name(f".{output.name}.{uuid.uuid4().hex}")


def _publish(temporary: Path, output: Path) -> None:
    sync_directory(temporary)
    if output.exists() and any(output.iterdir()):
        old = _beside(output)
        output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old)
    else:
        temporary.rename(output)
    sync_directory(output.parent)
