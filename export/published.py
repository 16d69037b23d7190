"""A version where it was published, an object store or a folder: found, and read without bringing all of it.

Whatever a store does not answer is asked again, after waits that grow.
"""

import errno
import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from .errors import ManifestError, NoVersionsError, StoreError, VersionError
from .manifest import MANIFEST, read_manifest
from .store import Store, is_url, local_path, open_store
from .versions import is_version

__all__ = ["Published", "find_published", "retried"]

T = TypeVar("T")

_ATTEMPTS = 5
_FIRST_CONTACT_ATTEMPTS = 2  # s3fs and gcsfs have themselves tried for 10 to 40 s before they say no
_FIRST_WAIT_S = 0.5
# Of the local disk, not of the store: to ask again mends none of them.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@dataclass(frozen=True)
class Published:
    """Version `number` of a store. manifest: as it is there. sums: what it says, by path in the version."""

    store: Store
    number: int
    manifest: bytes
    sums: Mapping[str, str]

    @property
    def url(self) -> str:
        """The version's place."""
        return f"{self.store.url}/{self.number}"

    def sizes(self) -> dict[str, int]:
        """The size in bytes of each file of the manifest; no file is read.

        Raises ManifestError if one is missing, StoreError.
        """
        sizes = retried(lambda: self.store.sizes(self.number), self.store.url)
        if missing := sorted(self.sums.keys() - sizes.keys()):
            raise ManifestError(
                f"{self.url}: {missing[0]} is missing there; the version is damaged, or being removed"
            )
        return {name: sizes[name] for name in self.sums}

    def read(self, folder: str) -> dict[str, bytes]:
        """The files below a folder of the version, by their path in the version; none if it has none there.

        Raises ManifestError if one has not its sum, StoreError.
        """
        return {name: self._read(name) for name in self.sums if name.startswith(f"{folder}/")}

    def _read(self, name: str) -> bytes:
        where = f"{self.url}/{name}"
        content = retried(lambda: _read_whole(self.store, self.store.path(self.number, name)), where)
        if hashlib.sha256(content).hexdigest() != self.sums[name]:
            raise ManifestError(
                f"{where}: has not the sum that its manifest gives; the version is damaged: publish it again"
            )
        return content


def find_published(url: str, version: int | None) -> Published:
    """A version at a model's place, or at its own: then the last part of `url` is the number.

    version: which one of a model's place; None for the newest complete one.
    Raises StoreError (the store does not answer), VersionError (no such version there; NoVersionsError if
    there is none at all), ManifestError (the manifest is damaged).
    """
    store, number = _find(url, version)
    where = f"{store.url}/{number}/{MANIFEST}"
    manifest = retried(lambda: _read_whole(store, store.path(number, MANIFEST)), where)
    return Published(store, number, manifest, read_manifest(manifest, where))


def _find(url: str, version: int | None) -> tuple[Store, int]:
    place = url.rstrip("/") if is_url(url) else str(local_path(url).resolve())
    base, _, last = place.rpartition("/")
    if not is_version(last) or base.endswith(":/"):  # gs://123 is a bucket
        store, wanted = open_store(place), version
    elif version in (None, int(last)):
        store, wanted = open_store(base or "/"), int(last)
    else:
        raise VersionError(f"{url}: is version {last}, not {version}; leave one of the two out")
    if wanted is None:
        newest = retried(store.newest, store.url, attempts=_FIRST_CONTACT_ATTEMPTS)
        if newest is None:
            raise NoVersionsError(f"{store.url}: holds no complete version; export one there first")
        return store, newest
    if not retried(lambda: store.is_complete(wanted), store.url, attempts=_FIRST_CONTACT_ATTEMPTS):
        there = retried(store.versions, store.url)
        is_known = bool(there) or retried(lambda: store.has_files(wanted), store.url)
        raise (VersionError if is_known else NoVersionsError)(
            f"{store.url}: version {wanted} is not there, or not complete; complete versions: "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    return store, wanted


def _read_whole(store: Store, path: str) -> bytes:
    content: bytes = store.filesystem.cat_file(path)
    size = store.filesystem.info(path)["size"]
    if len(content) != size:  # a manifest cut off after a line would look like one of fewer files
        raise OSError(f"the answer ended after {len(content)} of {size} bytes")
    return content


def retried(call: Callable[[], T], what: str, stopped: Event | None = None, attempts: int = _ATTEMPTS) -> T:
    """What `call` gives; tried again, after waits that grow, when the store fails.

    stopped: ends the attempts.
    """
    stopped = stopped or Event()
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except ManifestError:
            raise
        except Exception as error:  # each backend raises its own
            cause = error.__cause__ if isinstance(error, StoreError) and error.__cause__ else error
            if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
                raise
            is_final = isinstance(cause, FileNotFoundError | PermissionError)
            if not is_final and attempt < attempts and not stopped.is_set():
                # Any part of the wait above its half: pods that started together do not ask together again.
                stopped.wait(_FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1))
                continue
            if isinstance(error, StoreError):
                raise
            text = str(getattr(cause, "strerror", None) or cause).strip() or type(cause).__name__
            tried = "" if is_final else f" (attempt {attempt} of {attempts})"
            raise StoreError(f"{what}: {text}{tried}") from error
    raise AssertionError  # the last attempt returns or raises
