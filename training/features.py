"""Bottleneck features: what a frozen backbone says of each image, computed once and kept on disk.

A row's key is a hash of the image's bytes, and its folder in the cache a hash of everything else that it
depends on: decoding, the backbone and its weights, the engine, and whether the image was flipped. Moving,
renaming or copying images costs nothing, and files that have not changed since are not even read.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .cache import RowStore, StampIndex
from .dataset import Skipped
from .engine import acceptable_engines, extract, open_engine
from .errors import ImageError
from .images import ImageStore, content_key
from .preprocess import Preprocess, explain_failure, image_decoder
from .progress import Listener, Progress, silent

__all__ = ["CachedFeatures", "Features", "Peers", "cache_features", "compute_features", "fingerprint"]

_REVISION = 2  # raise it when a backbone of the table computes something else with the same weights
_DIGEST_BYTES = 16
_SEGMENT_ROWS = 512
_STAMPS_AT_ONCE = 128
_READERS = 8
_SAMPLES = 4  # images on which a converted network is compared with Keras


class Peers(Protocol):
    """The processes, this one among them, that ask for the features of the same images at the same time."""

    @property
    def index(self) -> int:
        """Which of them this one is, from 0."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def all_gather(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows of all, in the order of their indexes; each may have another number of them."""
        ...


@dataclass(frozen=True)
class Features:
    """features: float32 [N, D], a row for each path asked for that is not in `unreadable`, in their order.

    computed, cached: how many distinct images went through the network, and how many rows the cache had.
    keys: the content key, 16 bytes, of each path in `kept`. engine: what most of the rows come from.
    """

    features: npt.NDArray[np.float32]
    kept: tuple[str, ...]
    unreadable: tuple[Skipped, ...]
    computed: int
    cached: int
    keys: Mapping[str, bytes]
    engine: str


@dataclass(frozen=True)
class CachedFeatures:
    """As `Features`, but the rows, of feature_count numbers each, are still on disk."""

    kept: tuple[str, ...]
    unreadable: tuple[Skipped, ...]
    computed: int
    cached: int
    keys: Mapping[str, bytes]
    engine: str
    feature_count: int
    _store: RowStore = field(repr=False)

    def rows(self, paths: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [len(paths), D], for paths in `kept`."""
        return self._store.get([self.keys[path] for path in paths])


def compute_features(
    backbone: keras.Model,
    preprocess: Preprocess,
    images: ImageStore,
    paths: Sequence[str],
    cache_dir: Path,
    listener: Listener = silent,
    *,
    engine: str = "auto",
    flip: bool = False,
    peers: Peers | None = None,
) -> Features:
    """Features of the images `paths`, from the cache where it has them.

    engine: "auto" takes the rows of either engine from the cache, since they agree (`engine.AGREEMENT`), and
        computes the rest with what suits the machine; "tensorflow" and "litert" mean that one only.
    flip: of the images in a mirror, left and right exchanged after decoding.
    peers: each computes its share of what is missing, and all get all.
    Images that cannot be read or decoded are listed with their reasons and left out. What is computed is kept
    even if the call is interrupted. Memory is bounded by the result and a few segments of the cache.
    Raises TrainingError if an engine that was named cannot run the backbone; OSError if the cache cannot be
    written; ValueError for an engine that there is none of.
    """
    found = cache_features(
        backbone, preprocess, images, paths, cache_dir, listener, engine=engine, flip=flip, peers=peers
    )
    return Features(
        features=found.rows(found.kept),
        kept=found.kept,
        unreadable=found.unreadable,
        computed=found.computed,
        cached=found.cached,
        keys=found.keys,
        engine=found.engine,
    )


def cache_features(
    backbone: keras.Model,
    preprocess: Preprocess,
    images: ImageStore,
    paths: Sequence[str],
    cache_dir: Path,
    listener: Listener = silent,
    *,
    engine: str = "auto",
    flip: bool = False,
    peers: Peers | None = None,
) -> CachedFeatures:
    """`compute_features` without the last step: for more rows than are wanted in memory at once."""
    keys, unreadable = _content_keys(images, paths, cache_dir, listener)
    path_of = {key: path for path, key in keys.items()}
    cache = _Cache(backbone, preprocess, engine, cache_dir, flip=flip)
    missing = cache.missing(path_of)
    extraction = _Extraction(backbone, preprocess, images, cache, engine, listener, flip=flip)
    if peers is not None and peers.count > 1:
        _share(peers, extraction, cache, path_of)
    damaged = extraction.run(cache.missing(path_of))
    unreadable += [Skipped(path, damaged[key]) for path, key in keys.items() if key in damaged]
    kept = {path: key for path, key in keys.items() if key not in damaged}
    computed = len(missing) - len(damaged)
    return CachedFeatures(
        kept=tuple(kept),
        unreadable=tuple(unreadable),
        computed=computed,
        cached=len(kept) - computed,
        keys=kept,
        engine=cache.main_engine(tuple(kept.values())),
        feature_count=backbone.output_shape[-1],
        _store=cache.store,
    )


def fingerprint(backbone: keras.Model, preprocess: Preprocess, engine: str, *, flip: bool = False) -> str:
    """Hex name of all that features depend on but the image."""
    return _hash(_describe(_identity(backbone), preprocess, engine, flip=flip))


def _content_keys(
    images: ImageStore, paths: Sequence[str], cache_dir: Path, listener: Listener
) -> tuple[dict[str, bytes], list[Skipped]]:
    """The content key of each path, and why some have none. What has the stamp it once had is not read."""
    paths = tuple(dict.fromkeys(paths))
    progress = Progress("reading images", len(paths), listener)
    index = StampIndex(cache_dir)

    def stamps_from(start: int) -> list[str | None]:
        return [images.stamp(path) for path in paths[start : start + _STAMPS_AT_ONCE]]

    def read(path: str) -> tuple[bytes | Skipped, str | None]:
        """The key or why there is none, and the stamp that may stand for it from now on."""
        started_ns = time.time_ns()
        try:
            key = content_key(images.read(path))
        except OSError as error:
            return Skipped(path, _cannot_be_read(error)), None
        stamp = stamps[path]
        trusted = stamp and index.is_settled(stamp, started_ns) and images.stamp(path) == stamp
        return key, stamp if trusted else None

    settled: dict[str, bytes] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        starts = range(0, len(paths), _STAMPS_AT_ONCE)
        stamps = dict(zip(paths, chain.from_iterable(pool.map(stamps_from, starts)), strict=True))
        known = index.keys([stamp or "" for stamp in stamps.values()])
        results: dict[str, bytes | Skipped | None] = dict(zip(paths, known, strict=True))
        unknown = [path for path, key in results.items() if key is None]
        progress.advance(len(paths) - len(unknown))
        reading: Any = pool.map(read, unknown)
        try:
            with closing(reading):  # an interrupt drops the files that still wait
                for path, (result, stamp) in zip(unknown, reading, strict=True):
                    results[path] = result
                    if stamp and isinstance(result, bytes):
                        settled[stamp] = result
                    progress.advance()
        finally:
            index.add(settled)
    keys = {path: result for path, result in results.items() if isinstance(result, bytes)}
    return keys, [result for result in results.values() if isinstance(result, Skipped)]


def _cannot_be_read(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _identity(backbone: keras.Model) -> dict[str, str]:
    """What tells a backbone from others: its name, and hashes of its architecture and of every weight.

    The kinds and shapes of its layers stand for the architecture: Keras numbers unnamed layers anew in each
    process.
    """
    layers = [
        [type(layer).__name__, layer.compute_dtype, _output_shape(layer)] for layer in _layers(backbone)
    ]
    weights = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for weight in backbone.get_weights():
        weights.update(np.ascontiguousarray(weight).data)
    return {"backbone": backbone.name, "layers": _hash(layers), "weights": weights.hexdigest()}


def _layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from _layers(layer)


def _output_shape(layer: keras.layers.Layer) -> str:
    return str(getattr(getattr(layer, "output", None), "shape", None))


def _describe(
    identity: Mapping[str, str], preprocess: Preprocess, engine: str, *, flip: bool
) -> dict[str, Any]:
    return {
        "kind": "features",
        "revision": _REVISION,
        **identity,
        "engine": engine,
        "view": "flipped" if flip else "plain",
        "preprocess": preprocess.to_dict(),
    }


def _hash(value: Any) -> str:
    content = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


class _Cache:
    """What one call may use of the cache: the rows of one engine or of both, and the converted network."""

    def __init__(
        self,
        backbone: keras.Model,
        preprocess: Preprocess,
        engine: str,
        cache_dir: Path,
        *,
        flip: bool,
    ) -> None:
        identity = _identity(backbone)
        feature_count = backbone.output_shape[-1]
        self._engines = acceptable_engines(engine)
        described = [_describe(identity, preprocess, name, flip=flip) for name in self._engines]
        self._entries = [cache_dir / _hash(meta) for meta in described]
        metas = [meta | {"feature_count": feature_count} for meta in described]
        self.store = RowStore(dict(zip(self._entries, metas, strict=True)), (feature_count,), np.float32)
        self.network_meta = {"kind": "network", **identity, "engine": "litert"}
        self.network_entry = cache_dir / f"network-{_hash(self.network_meta)}"

    def missing(self, path_of: Mapping[bytes, str]) -> dict[bytes, str]:
        """Those of the keys that have no row, with their paths."""
        keys = tuple(path_of)
        return {keys[row]: path_of[keys[row]] for row in np.flatnonzero(~self.store.find(keys)).tolist()}

    def add(self, engine: str, keys: Sequence[bytes], features: npt.NDArray[np.float32]) -> None:
        """Keep rows that an engine has computed."""
        self.store.add(self._entries[self._engines.index(engine)], keys, features)

    def receive(
        self, keys: Sequence[bytes], engines: npt.NDArray[np.int64], features: npt.NDArray[np.float32]
    ) -> None:
        """Keep those rows that are not there yet. engines: int64 [n], as the store's `entry_numbers`."""
        new = ~self.store.find(keys)
        for number, entry in enumerate(self._entries):
            at = np.flatnonzero(new & (engines == number))
            if len(at):
                self.store.add(entry, [keys[row] for row in at.tolist()], features[at])

    def main_engine(self, keys: Sequence[bytes]) -> str:
        """What most of the rows come from."""
        counts = np.bincount(self.store.entry_numbers(keys), minlength=len(self._engines))
        return self._engines[int(counts.argmax())]


class _Extraction:
    """Runs the backbone over images into the cache."""

    def __init__(
        self,
        backbone: keras.Model,
        preprocess: Preprocess,
        images: ImageStore,
        cache: _Cache,
        engine: str,
        listener: Listener,
        *,
        flip: bool,
    ) -> None:
        self._backbone, self._preprocess, self._images = backbone, preprocess, images
        self._cache, self._engine, self._listener = cache, engine, listener
        self._flip = flip

    def run(self, missing: Mapping[bytes, str]) -> dict[bytes, str]:
        """Compute the rows of these keys from the images at their paths; gives why some could not be."""
        if not missing:
            return {}
        progress = Progress("computing features", len(missing), self._listener)
        decode = image_decoder(self._preprocess)
        reasons: dict[bytes, str] = {}

        def load(item: tuple[bytes, str]) -> npt.NDArray[np.uint8] | None:
            try:
                return self._load(*item, decode)
            except ImageError as error:
                reasons[item[0]] = str(error)
                return None

        def samples() -> npt.NDArray[np.uint8]:
            decoded = (pixels for item in missing.items() if (pixels := load(item)) is not None)
            return np.array(list(islice(decoded, _SAMPLES)), np.uint8)

        cache = self._cache
        engine = open_engine(
            self._engine, self._backbone, len(missing), samples, cache.network_entry, cache.network_meta
        )
        keys: list[bytes] = []
        rows: list[npt.NDArray[np.float32]] = []

        def flush() -> None:
            if keys:
                segment = tuple(keys), np.concatenate(rows)
                keys.clear()
                rows.clear()
                cache.add(engine.name, *segment)

        with closing(extract(engine, load, missing.items())) as batches:
            try:
                for items, features in batches:
                    keys.extend(key for key, _ in items)
                    rows.append(features)
                    progress.advance(len(items))
                    if len(keys) >= _SEGMENT_ROWS:
                        flush()
            finally:
                flush()
        if reasons:
            progress.advance(len(reasons))
        return reasons

    def _load(self, key: bytes, path: str, decode: Callable[[tf.Tensor], tf.Tensor]) -> npt.NDArray[np.uint8]:
        try:
            content = self._images.read(path)
        except OSError as error:
            raise ImageError(_cannot_be_read(error)) from error
        if content_key(content) != key:
            raise ImageError("changed while it was being read, or without a new time: touch it")
        try:
            pixels: npt.NDArray[np.uint8] = decode(tf.constant(content)).numpy()
        except tf.errors.OpError as error:
            raise explain_failure(content, self._preprocess) or ImageError(error.message) from error
        return np.ascontiguousarray(pixels[:, ::-1]) if self._flip else pixels


def _share(peers: Peers, extraction: _Extraction, cache: _Cache, path_of: Mapping[bytes, str]) -> None:
    """Compute this process's share of the rows that any of the peers is missing, and get theirs.

    Who shares the cache's folder finds them there; to others they travel.
    """
    wanted = set(_gather(peers, cache.missing(path_of)))
    own = {key: path_of[key] for key in sorted(wanted & path_of.keys()) if _owner(key, peers) == peers.index}
    extraction.run(cache.missing(own))
    peers.all_gather(np.zeros(1, np.int64))  # now all have written
    cache.store.refresh()
    damaged = cache.missing(own)
    lacking = set(_gather(peers, cache.missing(path_of)))
    offered = [key for key in own if key in lacking and key not in damaged]
    most = int(peers.all_gather(np.array([len(offered)], np.int64)).max())
    for start in range(0, most, _SEGMENT_ROWS):
        part = offered[start : start + _SEGMENT_ROWS]
        engines = peers.all_gather(cache.store.entry_numbers(part))
        cache.receive(_gather(peers, part), engines, peers.all_gather(cache.store.get(part)))


def _owner(key: bytes, peers: Peers) -> int:
    return int.from_bytes(key[:8]) % peers.count


def _gather(peers: Peers, keys: Collection[bytes]) -> list[bytes]:
    """The keys of all; they travel as int64 [n, 2], since not every transport takes bytes."""
    words = np.frombuffer(b"".join(keys), np.int64).reshape(-1, 2)
    return [row.tobytes() for row in peers.all_gather(words)]
