"""Bottleneck features: what the frozen backbone says of each image, computed once and kept on disk.

The cache is a folder of segments, one NumPy file for at most a few hundred rows of (key, features). A
segment appears whole or not at all, and nothing ever rewrites one, so an interrupted run keeps what it had
and several runs may share a cache. The key is a hash of the image's bytes; the folder's name is a hash of
everything else that the features depend on. Moving, renaming or copying images costs nothing.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .dataset import Skipped
from .files import write_atomically
from .network import freeze
from .preprocess import Preprocess, decode_image, explain_failure
from .progress import Listener, Progress, silent

__all__ = ["FeatureCache", "Features", "compute_features", "fingerprint"]

_REVISION = 1  # raise it when a backbone of the table computes something else with the same weights
_KEY_BYTES = 16  # 128 bits of BLAKE2b: no two of 2**40 images collide by chance
_SEGMENT_ROWS = 512
_BATCH_IMAGES = 8  # on CPUs batches of 4 to 8 are the fastest in TensorFlow
_READERS = 8


@dataclass(frozen=True)
class Features:
    """features: float32 [N, D], a row for each path asked for that is not in `unreadable`, in their order.

    computed, cached: how many distinct images went through the network, and how many rows the cache had.
    """

    features: npt.NDArray[np.float32]
    kept: tuple[str, ...]
    unreadable: tuple[Skipped, ...]
    computed: int
    cached: int


def fingerprint(backbone: keras.Model, preprocess: Preprocess) -> str:
    """Hex name of all that features depend on but the image: decoding, the backbone's name, every weight.

    The architecture stands in by its name: Keras numbers unnamed layers anew in each process.
    """
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    digest.update(json.dumps([_REVISION, backbone.name, preprocess.to_dict()], sort_keys=True).encode())
    for weight in backbone.get_weights():
        digest.update(np.ascontiguousarray(weight).data)
    return digest.hexdigest()


class FeatureCache:
    """The features of one fingerprint, by key. Reading is thread-safe; `add` is not."""

    def __init__(self, folder: Path, feature_count: int) -> None:
        self._folder = folder
        self._row = np.dtype([("key", f"V{_KEY_BYTES}"), ("features", "<f4", (feature_count,))])
        self._segments: list[npt.NDArray[Any]] = []
        self._where: dict[bytes, tuple[int, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.npy")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            segment = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return  # damaged: its images are computed again
        if segment.dtype == self._row:
            index = len(self._segments)
            self._segments.append(segment)
            self._where.update((key.tobytes(), (index, row)) for row, key in enumerate(segment["key"]))

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def get(self, keys: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """float32 [len(keys), D]; raises KeyError for a key that was never added."""
        out = np.empty((len(keys), *self._row["features"].shape), np.float32)
        for row, key in enumerate(keys):
            segment, position = self._where[key]
            out[row] = self._segments[segment]["features"][position]
        return out

    def add(self, keys: Sequence[bytes], features: npt.NDArray[np.float32]) -> None:
        """Write one segment: durable when this returns."""
        rows = np.empty(len(keys), self._row)
        rows["key"] = np.frombuffer(b"".join(keys), f"V{_KEY_BYTES}")
        rows["features"] = features
        path = self._folder / f"{uuid.uuid4().hex}.npy"
        with write_atomically(path, "wb") as file:
            np.save(file, rows)
        self._open(path)


def compute_features(
    backbone: keras.Model,
    preprocess: Preprocess,
    root: Path,
    paths: Sequence[str],
    cache_dir: Path,
    listener: Listener = silent,
) -> Features:
    """Features of the images `paths` (relative to `root`), from the cache where it has them.

    Files that cannot be read or decoded are listed with their reasons and left out. What is computed is kept
    even if the call is interrupted. Memory is bounded by the result and one segment.
    """
    cache = FeatureCache(cache_dir / fingerprint(backbone, preprocess), backbone.output_shape[-1])
    keys, unreadable = _hash_files(root, paths, listener)
    missing = {key: path for path, key in keys.items() if key not in cache}
    damaged = dict(_extract(backbone, preprocess, root, missing, cache, listener))
    unreadable += [Skipped(path, damaged[key]) for path, key in keys.items() if key in damaged]
    kept = tuple(path for path in keys if keys[path] not in damaged)
    computed = len(missing) - len(damaged)
    return Features(
        cache.get([keys[path] for path in kept]), kept, tuple(unreadable), computed, len(kept) - computed
    )


def _hash_files(
    root: Path, paths: Sequence[str], listener: Listener
) -> tuple[dict[str, bytes], list[Skipped]]:
    progress = Progress("reading images", len(paths), listener)
    keys: dict[str, bytes] = {}
    unreadable: list[Skipped] = []

    def hash_file(path: str) -> bytes | Skipped:
        try:
            return hashlib.blake2b((root / path).read_bytes(), digest_size=_KEY_BYTES).digest()
        except OSError as error:
            return Skipped(path, f"cannot be read: {error.strerror or error}")

    with ThreadPoolExecutor(_READERS) as pool:
        hashes: Any = pool.map(hash_file, paths)
        with closing(hashes):  # an interrupt drops the files that still wait, where the pool would read them
            for path, result in zip(paths, hashes, strict=True):
                if isinstance(result, Skipped):
                    unreadable.append(result)
                else:
                    keys[path] = result
                progress.advance()
    return keys, unreadable


def _extract(
    backbone: keras.Model,
    preprocess: Preprocess,
    root: Path,
    missing: dict[bytes, str],
    cache: FeatureCache,
    listener: Listener,
) -> Iterator[tuple[bytes, str]]:
    """Run the network over the missing images into the cache; yields the key and reason of each bad one."""
    if not missing:
        return
    progress = Progress("computing features", len(missing), listener)
    keys = tuple(missing)
    full_paths = [os.fsencode(root / path) for path in missing.values()]
    indexes = tf.data.Dataset.range(len(keys))
    names = tf.data.Dataset.from_tensor_slices(full_paths)

    def load(index: tf.Tensor, name: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index, decode_image(tf.io.read_file(name), preprocess)

    batches = (
        tf.data.Dataset.zip(indexes, names)
        .map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
        .ignore_errors()
        .batch(_BATCH_IMAGES)
        .prefetch(tf.data.AUTOTUNE)
    )
    network = freeze(backbone)
    done: set[int] = set()
    pending: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []

    def flush() -> None:
        if pending:
            rows = np.concatenate([rows for rows, _ in pending])
            cache.add([keys[row] for row in rows], np.concatenate([features for _, features in pending]))
            pending.clear()

    try:
        for rows, pixels in batches:
            pending.append((rows.numpy(), network(pixels)[0].numpy()))
            done.update(pending[-1][0].tolist())
            progress.advance(len(pending[-1][0]))
            if len(pending) * _BATCH_IMAGES >= _SEGMENT_ROWS:
                flush()
    finally:
        flush()

    for row in sorted(set(range(len(keys))) - done):
        reason = _reason(Path(os.fsdecode(full_paths[row])), preprocess)
        progress.advance()
        yield keys[row], reason


def _reason(path: Path, preprocess: Preprocess) -> str:
    try:
        failure = explain_failure(path.read_bytes(), preprocess)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return str(failure) if failure else "changed while it was being read"
