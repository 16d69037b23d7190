"""Rows kept on disk by key, for several processes at once: features by image, content keys by stamp.

A cache is a folder of entries; an entry is a folder that holds meta.json, which says what it is, and either
segments of rows or a converted network. A segment is one file: an index of keys and checksums, then the rows.
Opening reads the indexes alone; the rows are mapped into memory and read when they are asked for.

A segment appears whole or not at all, by a rename, and nothing ever rewrites one. So an interrupted run keeps
all but its last segment, writers need no locks, and who reads while `prune` removes keeps what was opened.
"""

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import write_atomically, write_json
from .images import content_key

__all__ = [
    "CacheEntry",
    "RowStore",
    "StampIndex",
    "describe_entry",
    "list_entries",
    "mark_used",
    "prune_entries",
    "write_entry_file",
]

_log = logging.getLogger(__name__)

_KEY_BYTES = 16
_INDEX = np.dtype([("key", f"S{_KEY_BYTES}"), ("sum", "<u8")])
_SUFFIX = ".rows"
_META = "meta.json"
_KINDS = {"features", "network", "stamps", "outdated"}
_OUTDATED = re.compile("[0-9a-f]{32}")
_REMOVED = ".removed-"
_LEFTOVER_S = 24 * 3600.0  # a writer that has not renamed its file in a day was killed
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RACY_NS = 2 * 10**9  # FAT keeps times to 2 s, the coarsest of the file systems in use


@dataclass(frozen=True)
class _Segment:
    """index: _INDEX [n]. rows: [n, ...], mapped from the file; it outlives the file's removal."""

    path: Path
    index: npt.NDArray[Any]
    rows: npt.NDArray[Any]

    def intact(self, positions: npt.NDArray[np.int64]) -> bool:
        """Whether the rows at `positions` are what was written."""
        return bool((_checksums(self.rows[positions]) == self.index["sum"][positions]).all())


class RowStore:
    """Rows of one shape by 16-byte keys, from the segments of one or several entries.

    Reading is thread-safe, adding and refreshing are not; other processes may do either at any time. What is
    damaged on disk is as if it were not there, and is deleted.
    """

    def __init__(
        self, entries: Mapping[Path, Mapping[str, Any]], row_shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> None:
        """entries: the folders to read, each with what describes it; a folder is made by the first `add`.

        The rows' bytes are a multiple of four.
        """
        self._entries = {folder: dict(meta) for folder, meta in entries.items()}
        self._shape, self._dtype = row_shape, np.dtype(dtype)
        self._segments: dict[Path, _Segment] = {}
        self._lookup: _Lookup | None = None
        self.refresh()

    def refresh(self) -> None:
        """See what other processes have added since."""
        for folder in self._entries:
            for path in _segment_paths(folder):
                if path not in self._segments:
                    self._open(path)
            mark_used(folder)

    def __len__(self) -> int:
        return len(self._table().keys)

    def find(self, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """bool [len(keys)]: which of them have a row; each such row has been read and is undamaged."""
        while True:
            table = self._table()
            segments, positions = table.locate(keys)
            damaged = [
                table.segments[number]
                for number, at in _by_segment(segments)
                if not table.segments[number].intact(positions[at])
            ]
            if not damaged:
                found: npt.NDArray[np.bool_] = segments >= 0
                return found
            for segment in damaged:
                _discard(segment.path, "its checksums do not fit")
                del self._segments[segment.path]
            self._lookup = None

    def get(self, keys: Sequence[bytes]) -> npt.NDArray[Any]:
        """[len(keys), *row_shape]; raises KeyError for a key that has no row."""
        table = self._table()
        segments, positions = table.locate(keys)
        _check_found(keys, segments)
        out = np.empty((len(keys), *self._shape), self._dtype)
        for number, at in _by_segment(segments):
            out[at] = table.segments[number].rows[positions[at]]
        return out

    def entry_numbers(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """int64 [len(keys)]: the place among `entries` of the one that has each key's row.

        Raises KeyError for a key that has no row.
        """
        table = self._table()
        segments, _ = table.locate(keys)
        _check_found(keys, segments)
        numbers = {folder: number for number, folder in enumerate(self._entries)}
        entry_of = np.array([numbers[segment.path.parent] for segment in table.segments], np.int64)
        found: npt.NDArray[np.int64] = entry_of[segments]
        return found

    def add(self, folder: Path, keys: Sequence[bytes], rows: npt.NDArray[Any]) -> None:
        """Write one segment into the entry `folder`: durable when this returns.

        rows: [len(keys), *row_shape]. Raises OSError, on a full disk with the remedy.
        """
        rows = np.ascontiguousarray(rows, self._dtype).reshape(len(keys), *self._shape)
        index = np.empty(len(keys), _INDEX)
        index["key"] = _as_array(keys)
        index["sum"] = _checksums(rows)
        content = io.BytesIO()
        np.save(content, index)
        np.save(content, rows)
        path = folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        describe_entry(folder, self._entries[folder])
        write_entry_file(path, content.getbuffer())
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            segment = _read_segment(path)
        except OSError:  # pruned, or not ours to read
            return
        except ValueError as error:
            _discard(path, str(error))
            return
        if segment.rows.dtype == self._dtype and segment.rows.shape[1:] == self._shape:
            self._segments[path] = segment
            self._lookup = None

    def _table(self) -> "_Lookup":
        table = self._lookup
        if table is None:
            table = self._lookup = _Lookup(tuple(self._segments.values()))
        return table


class _Lookup:
    """Where the key of every row is; a key of several segments is in the first of them."""

    def __init__(self, segments: tuple[_Segment, ...]) -> None:
        self.segments = segments
        keys = np.concatenate([np.empty(0, _INDEX["key"]), *(segment.index["key"] for segment in segments)])
        sizes = [len(segment.index) for segment in segments]
        self.keys, first = np.unique(keys, return_index=True)
        self._segment = np.repeat(np.arange(len(segments)), sizes)[first]
        starts = np.cumsum([0, *sizes])[:-1].astype(np.int64)
        self._position = first - starts[self._segment] if len(first) else first

    def locate(self, keys: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64 [len(keys)] twice: the segment's number, -1 for none, and the position in it."""
        if not len(self.keys):
            return np.full(len(keys), -1), np.zeros(len(keys), np.int64)
        wanted = _as_array(keys)
        nearest = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        found = self.keys[nearest] == wanted
        return np.where(found, self._segment[nearest], -1), self._position[nearest]


class StampIndex:
    """The content keys of images that have been read before, by the stamps that their files had then.

    As in Git's index, a file that changed just before it was read is not trusted: it may change again without
    a later time (git, Documentation/technical/racy-git.txt).
    """

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / "stamps"
        self._store = RowStore({self._folder: {"kind": "stamps"}}, (_KEY_BYTES,), np.uint8)

    def keys(self, stamps: Sequence[str]) -> list[bytes | None]:
        """The content key for each stamp, None for an unknown one."""
        names = _stamp_keys(stamps)
        found = self._store.find(names)
        rows = iter(self._store.get([name for name, known in zip(names, found, strict=True) if known]))
        return [next(rows).tobytes() if known else None for known in found]

    def add(self, keys: Mapping[str, bytes]) -> None:
        """Remember content keys by stamp; if they cannot be written, the images are read again next time."""
        if not keys:
            return
        rows = np.frombuffer(b"".join(keys.values()), np.uint8).reshape(-1, _KEY_BYTES)
        try:
            self._store.add(self._folder, _stamp_keys(keys), rows)
        except OSError as error:
            _log.debug("the stamps of %d images were not kept: %s", len(keys), error)

    @staticmethod
    def is_settled(stamp: str, read_at_ns: int) -> bool:
        """Whether a file with this stamp, read at that time, had not changed shortly before.

        stamp: fields between bars, of which those that are times are whole ns since the epoch.
        """
        times = (int(field) for field in stamp.split("|") if field.isdecimal())
        return all(abs(read_at_ns - time_ns) >= _RACY_NS for time_ns in times)


@dataclass(frozen=True)
class CacheEntry:
    """One folder of the cache.

    kind: "features", "network" (a converted one), "stamps" (of images), or "outdated" (features that nothing
        describes, as graftserve 0.1 kept them).
    meta: what describes it. rows: 0 for a network. last_used_s: seconds since the epoch.
    """

    path: Path
    kind: str
    meta: Mapping[str, Any]
    rows: int
    size_bytes: int
    last_used_s: float


def list_entries(cache_dir: Path) -> list[CacheEntry]:
    """All that a cache holds, what was used last first; what is not the cache's is passed over."""
    entries = [entry for folder in _folders(cache_dir) if (entry := _read_entry(folder))]
    return sorted(entries, key=lambda entry: entry.last_used_s, reverse=True)


def prune_entries(
    cache_dir: Path,
    *,
    unused_s: float = math.inf,
    max_bytes: float = math.inf,
    now_s: float,
    dry_run: bool = False,
) -> list[CacheEntry]:
    """Remove entries, those first that have not been used for longest; gives what went, or would go.

    unused_s: those go that have not been used for so long before now_s (seconds since the epoch).
    max_bytes: as many go as it takes to leave at most that much.
    A process that has an entry open keeps reading it; one that adds to it begins it anew.
    """
    if not dry_run:
        for leftover in _folders(cache_dir):
            if leftover.name.startswith(_REMOVED):  # by a prune that was killed
                shutil.rmtree(leftover, ignore_errors=True)
    entries = list_entries(cache_dir)
    left_bytes = sum(entry.size_bytes for entry in entries)
    removed = []
    for entry in reversed(entries):
        if now_s - entry.last_used_s >= unused_s or left_bytes > max_bytes:
            if not dry_run:
                _remove(entry.path)
            removed.append(entry)
            left_bytes -= entry.size_bytes
    return removed


def describe_entry(folder: Path, meta: Mapping[str, Any]) -> None:
    """Make the folder of an entry and its meta.json, if they are not there."""
    with _explaining_full_disk(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _META).exists():
            write_json(folder / _META, {**meta, "created": datetime.now(UTC).isoformat(timespec="seconds")})


def write_entry_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file of an entry atomically; raises OSError, on a full disk with the remedy."""
    with _explaining_full_disk(path.parents[1]), write_atomically(path, "wb") as file:
        file.write(content)


def mark_used(folder: Path) -> None:
    """Note that an entry has been used just now, if it is there."""
    with contextlib.suppress(OSError):  # others may fill a cache that we can only read
        os.utime(folder / _META)


@contextlib.contextmanager
def _explaining_full_disk(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        remedy = "make room with `graftserve cache prune --max-mb N`, or give another place with --cache-dir"
        raise OSError(error.errno, f"{error.strerror}; {remedy}", str(cache_dir)) from error


def _check_found(keys: Sequence[bytes], segments: npt.NDArray[np.int64]) -> None:
    if (segments < 0).any():
        raise KeyError(keys[int((segments < 0).argmax())])


def _as_array(keys: Sequence[bytes]) -> npt.NDArray[Any]:
    # NumPy pads with NUL and leaves it out when it compares: between keys of one length that changes nothing.
    return np.frombuffer(b"".join(keys), _INDEX["key"])


def _stamp_keys(stamps: Iterable[str]) -> list[bytes]:
    return [content_key(stamp.encode("utf-8", "surrogateescape")) for stamp in stamps]


def _checksums(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """uint64 [n]: the sum of each row's four-byte words, which a zeroed page or a flipped bit changes."""
    words = np.ascontiguousarray(rows).reshape(len(rows), -1).view("<u4")
    sums: npt.NDArray[np.uint64] = words.sum(axis=1, dtype=np.uint64)
    return sums


def _by_segment(segments: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each segment's number that occurs, -1 aside, and where it does: int64 [m]."""
    order = np.argsort(segments, kind="stable")
    numbers, starts, counts = np.unique(segments[order], return_index=True, return_counts=True)
    for number, start, count in zip(numbers.tolist(), starts.tolist(), counts.tolist(), strict=True):
        at = order[start : start + count]
        if number >= 0:
            yield number, at


def _read_segment(path: Path) -> _Segment:
    """Read the index and map the rows; raises OSError, or ValueError for a damaged file."""
    with path.open("rb") as file:
        try:
            index = np.load(file)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            rows = np.asarray(np.memmap(file, dtype, "r", file.tell(), shape))
        except OSError:
            raise
        except Exception as error:  # NumPy raises whatever its parsers met
            raise ValueError(f"{type(error).__name__}: {error}") from error
    if index.dtype != _INDEX or rows.shape[:1] != index.shape:
        raise ValueError("its index does not fit its rows")
    return _Segment(path, index, rows)


def _segment_paths(folder: Path) -> list[Path]:
    paths = []
    for path in _files(folder):
        if path.name.startswith("."):
            _remove_leftover(path)
        elif path.suffix == _SUFFIX:
            paths.append(path)
    return paths


def _remove_leftover(path: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _LEFTOVER_S:
            path.unlink()


def _files(folder: Path) -> list[Path]:
    """Sorted, so that every process finds a key of several segments in the same one."""
    try:
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for entry in found if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _folders(cache_dir: Path) -> list[Path]:
    try:
        with os.scandir(cache_dir) as found:
            return [Path(entry.path) for entry in found if entry.is_dir()]
    except FileNotFoundError:
        return []


def _discard(path: Path, reason: str) -> None:
    _log.debug("%s is damaged: %s; its images are computed again", path, reason)
    with contextlib.suppress(OSError):
        path.unlink()


def _read_entry(folder: Path) -> CacheEntry | None:
    """None for a folder that is no entry, or has just been removed."""
    try:
        meta = json.loads((folder / _META).read_bytes())
        kind = meta["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        meta, kind = {}, "outdated"
    if kind not in _KINDS or (kind == "outdated" and not _OUTDATED.fullmatch(folder.name)):
        return None
    rows = 0
    for path in _segment_paths(folder):
        with contextlib.suppress(OSError, ValueError):
            rows += len(_read_segment(path).index)
    try:
        size_bytes = sum(path.stat().st_size for path in _files(folder))
        last_used_s = (folder / _META if meta else folder).stat().st_mtime
    except FileNotFoundError:
        return None
    return CacheEntry(folder, kind, meta, rows, size_bytes, last_used_s)


def _remove(folder: Path) -> None:
    """All at once for those who look, by a rename."""
    gone = folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another prune was faster
        folder.rename(gone)
        shutil.rmtree(gone)
