"""A version from an object store, or any folder, to a local one: whole and checked, or not at all.

    graftserve pull gs://bucket/models/flowers models/flowers

What an init container runs. Files come aside, each one's sum is checked while it is written, and the folder
is renamed last. A pull that was cut off goes on where it was; one that is done does nothing.

    <directory>/<N>/             the version, complete
    <directory>/.pulling-<N>/    what has come so far
"""

import errno
import hashlib
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from graftserve.training.files import sync_directory
from graftserve.training.progress import Listener, Progress, silent

from .errors import ManifestError, StoreError
from .manifest import MANIFEST, check_manifest, file_digest
from .published import Published, find_published, retried
from .versions import locked, sync_tree

__all__ = ["Pulled", "pull"]

_CHUNK_BYTES = 4 * 2**20
_PARALLEL = 4
_MEGABYTE = 10**6
_REMOVING = ".removing-"


@dataclass(frozen=True)
class Pulled:
    """path: the version's folder. files, size_bytes: of all in it. reused_bytes: what was there already."""

    version: int
    path: Path
    files: int
    size_bytes: int
    reused_bytes: int


def pull(
    url: str,
    directory: Path,
    *,
    version: int | None = None,
    overwrite: bool = False,
    listener: Listener = silent,
) -> Pulled:
    """Bring a version to `directory`/<N>.

    url: a model's place, or a version's: then its last part is the number.
    version: which one to bring from a model's place; None for the newest complete one.
    overwrite: replace a local version that differs or is damaged, instead of raising.
    Raises StoreError (the store does not answer, or not after five attempts at a file; or the disk is full),
    VersionError (no such version there), ManifestError (files do not have their sums, or the version is here
    and differs).
    """
    published = find_published(url, version)
    number, count = published.number, len(published.sums) + 1
    target = directory / str(number)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / f".pulling-{number}.lock"):
            for leftover in directory.glob(f"{_REMOVING}{number}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if target.exists() and _is_same(target, published.manifest, overwrite):
                size = _size(target)
                return Pulled(number, target, count, size, size)
            work = directory / f".pulling-{number}"
            reused = _fetch(published, work, listener)
            (work / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
            (work / MANIFEST).write_bytes(published.manifest)
            sync_tree(work)
            _replace(target, work)
            return Pulled(number, target, count, _size(target), reused)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{directory}: the disk is full; make room and pull again, it goes on where it was"
            ) from error
        raise StoreError(f"{directory}: cannot be written: {error.strerror or error}") from error


def _is_same(target: Path, manifest: bytes, overwrite: bool) -> bool:
    """Whether `target` is the version to pull; False only if it is to be overwritten."""
    try:
        check_manifest(target)
        if (target / MANIFEST).read_bytes() == manifest:
            return True
        reason = f"{target}: another version {target.name} than the one to pull"
    except ManifestError as error:
        reason = str(error)
    if overwrite:
        return False
    raise ManifestError(f"{reason}. It is left as it is; --overwrite replaces it")


def _fetch(published: Published, work: Path, listener: Listener) -> int:
    """Bring the files that are not in `work` already; returns how many bytes were."""
    sizes = published.sizes()
    for path in [path for path in work.rglob("*") if not path.is_dir()]:
        if path.relative_to(work).as_posix() not in sizes:
            path.unlink()
    work.mkdir(exist_ok=True)
    transfer = _Transfer(published, work, sizes, listener)
    with ThreadPoolExecutor(_PARALLEL, "pull") as pool:
        futures = [pool.submit(transfer.bring, name, digest) for name, digest in published.sums.items()]
        try:
            return sum(future.result() for future in as_completed(futures))
        except BaseException:
            transfer.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Transfer:
    """What the threads that bring a version's files have in common."""

    def __init__(
        self, published: Published, work: Path, sizes: Mapping[str, int], listener: Listener
    ) -> None:
        self.stopped = Event()
        self._published, self._work, self._sizes = published, work, sizes
        self._progress = Progress("pulling (MB)", sum(sizes.values()) // _MEGABYTE, listener)
        self._lock, self._bytes = Lock(), 0

    def bring(self, name: str, digest: str) -> int:
        """Have the file `name` in place; returns its size if it was there, or else 0."""
        path = self._work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and file_digest(path) == digest:
            size = path.stat().st_size
            self._count(size)
            return size
        what = f"{self._published.url}/{name}"
        retried(lambda: self._download(name, path, digest, what), what, self.stopped)
        return 0

    def _download(self, name: str, path: Path, expected: str, what: str) -> None:
        digest, size = hashlib.sha256(), 0
        store = self._published.store
        source_path = store.path(self._published.number, name)
        try:
            with store.filesystem.open(source_path, "rb") as source, path.open("wb") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    if self.stopped.is_set():
                        raise StoreError(f"{what}: stopped")  # another file's failure is the one told
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    self._count(len(chunk))
            if size < self._sizes[name]:
                raise OSError(f"the answer ended after {size} of {self._sizes[name]} bytes")
        except BaseException:
            self._count(-size)
            raise
        if digest.hexdigest() != expected:
            raise ManifestError(
                f"{what}: has not the sum that its manifest gives; the version is damaged: publish it again"
            )

    def _count(self, size: int) -> None:
        with self._lock:
            before = self._bytes // _MEGABYTE
            self._bytes += size
            self._progress.advance(self._bytes // _MEGABYTE - before)


def _replace(target: Path, work: Path) -> None:
    """By renames: whoever looks finds the old version, the new one, or for an instant neither."""
    old = target.with_name(f"{_REMOVING}{target.name}-{uuid.uuid4().hex}")
    if target.exists():
        target.rename(old)
    work.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
