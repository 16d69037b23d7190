"""A model's versions in an object store: gs://, s3://, and whatever else fsspec reaches.

    <url>/<N>/...            a version; it counts once its manifest is there, which is written last
    <url>/.claims/<N>        who is writing version N, or removing it

An object store has no rename. So nobody may read a version without a manifest, and a number is taken by
creating its claim, which only one of several publishers can do. What a publisher that died has left goes when
the next one comes an hour later.
"""

import json
import logging
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StoreError, VersionError
from .manifest import MANIFEST
from .versions import is_version, next_version

__all__ = ["Store", "is_url", "local_path", "open_store"]

_log = logging.getLogger(__name__)

_CLAIMS = ".claims"
_STALE_S = 3600.0
_REFRESH_S = 600.0
_SETTLE_S = 2.0
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# Whose pipe_file(mode="create") is one conditional request: If-None-Match of S3, ifGenerationMatch of Google
# Cloud Storage. fsspec's own default looks first and writes then, so that two may both see nothing.
_CONDITIONAL = frozenset({*_EXTRAS, "memory"})


def is_url(text: str) -> bool:
    """Whether it names a place in an object store rather than a folder; file:// is a folder."""
    return "://" in text and not text.startswith("file://")


def local_path(text: str) -> Path:
    """The folder that a path or a file:// URL names."""
    return Path(text.removeprefix("file://"))


def open_store(url: str) -> "Store":
    """The place of a model's versions: a URL of an object store, or a folder.

    Raises StoreError if what reads it is not installed, or does not understand the URL.
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    remedy = f"pip install 'graftserve[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else "pip install fsspec"
    try:
        import fsspec
    except ImportError as error:
        raise StoreError(f"{url}: fsspec is not installed: {remedy}") from error
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        fix = remedy if scheme in _EXTRAS else "install it"
        raise StoreError(f"{url}: what reads {scheme}:// is not installed ({error}): {fix}") from error
    except Exception as error:  # fsspec and each of its backends raise their own
        raise StoreError(f"{url}: cannot be reached: {_reason(error)}") from error
    return Store(filesystem, root.rstrip("/"), url.rstrip("/"), has_conditional_writes=scheme in _CONDITIONAL)


class Store:
    """The versions below one place. Every method raises StoreError if the store does not answer."""

    def __init__(self, filesystem: Any, root: str, url: str, *, has_conditional_writes: bool) -> None:
        self.filesystem, self.root, self.url = filesystem, root, url
        self._has_conditional_writes = has_conditional_writes

    def versions(self) -> list[int]:
        """The complete versions, ascending."""
        with self._translated():
            return [number for number in self._numbers() if self._exists(self.path(number, MANIFEST))]

    def newest(self) -> int | None:
        """The highest complete version; None if there is none."""
        with self._translated():
            numbers = reversed(self._numbers())
            return next((number for number in numbers if self._exists(self.path(number, MANIFEST))), None)

    def is_complete(self, number: int) -> bool:
        """Whether a version is there, with its manifest."""
        with self._translated():
            self.filesystem.invalidate_cache()
            return self._exists(self.path(number, MANIFEST))

    def has_files(self, number: int) -> bool:
        """Whether anything is there under a version's number, complete or not."""
        with self._translated():
            return number in self._numbers()

    def path(self, number: int, name: str = "") -> str:
        """Where the backend has a version, or a file of it."""
        return f"{self.root}/{number}/{name}".rstrip("/")

    def sizes(self, number: int) -> dict[str, int]:
        """The size in bytes of each file that a version has now, by its path in the version."""
        with self._translated():
            self.filesystem.invalidate_cache()
            prefix = f"{self.path(number)}/"
            found = self.filesystem.find(self.path(number), detail=True)
            return {
                path.removeprefix(prefix): int(info["size"])
                for path, info in found.items()
                if info["type"] == "file"
            }

    def publish(self, folder: Path, number: int | None) -> int:
        """Upload the version in `folder`, its manifest last; None takes the next number.

        Nothing stays behind if it fails. Raises VersionError if `number` is taken.
        """
        with self._translated():
            self._remove_leftovers()
            claim = self._claim(number)
            try:
                self._upload(folder, claim)
            except BaseException:
                with suppress(Exception):  # the first error is the one to tell
                    if self._holds(claim):
                        self._remove(claim.number)
                raise
            self._remove_file(self._claim_path(claim.number))
        return claim.number

    def prune(self, keep: int, protected: Collection[int]) -> list[int]:
        """Remove all but the newest `keep` versions, and never one of `protected`; returns those removed.

        The manifest goes first, under a claim: what a process that died has left of it goes as a
        publisher's would.
        Raises ValueError if `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        removed = [number for number in self.versions()[:-keep] if number not in protected]
        with self._translated():
            for number in removed:
                claim = _Claim(number, uuid.uuid4().hex)
                self._make_parent(self._claim_path(number))
                self.filesystem.pipe_file(self._claim_path(number), claim.content())
                self._remove_file(self.path(number, MANIFEST))
                self._remove(number)
        return removed

    def _claim_path(self, number: int) -> str:
        return f"{self.root}/{_CLAIMS}/{number}"

    def _numbers(self) -> list[int]:
        """Complete or not, ascending."""
        return self._listed(self.root)

    def _listed(self, folder: str) -> list[int]:
        self.filesystem.invalidate_cache()
        try:
            paths = self.filesystem.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(int(name) for name in names if is_version(name))

    def _exists(self, path: str) -> bool:
        # fsspec's own `exists` says no to any failure; here that would cost a good version.
        try:
            self.filesystem.info(path)
        except FileNotFoundError:
            return False
        return True

    def _claim(self, number: int | None) -> "_Claim":
        """Create a claim that nobody else has, on a number that has no files."""
        while True:
            claimed = self._listed(f"{self.root}/{_CLAIMS}")
            taken = {*claimed, *self._numbers()}
            claim = _Claim(next_version(taken) if number is None else number, uuid.uuid4().hex)
            if claim.number not in taken and self._create(claim):
                # Its last publisher may have finished between the look and the claim.
                if claim.number not in self._numbers():
                    return claim
                self._remove_file(self._claim_path(claim.number))
            if number is not None:
                raise VersionError(
                    f"{self.url}/{number}: exists, or is being published; versions are never overwritten"
                )

    def _create(self, claim: "_Claim") -> bool:
        """Write a claim unless somebody else has; whether it is ours now."""
        path = self._claim_path(claim.number)
        self._make_parent(path)
        try:
            self.filesystem.pipe_file(path, claim.content(), mode="create")
        except FileExistsError:
            return False
        except Exception:
            # Refused in words that the backend does not know, or the answer to our own was lost.
            if not self._exists(path):
                raise
            return self._holds(claim)
        if self._is_exclusive(claim):
            return True
        _log.warning(
            "%s: this store cannot tell two publishers apart for sure; publish from one place at a time",
            self.url,
        )
        time.sleep(_SETTLE_S)  # whoever else saw nothing has written by now, and the last one stays
        return self._holds(claim)

    def _is_exclusive(self, claim: "_Claim") -> bool:
        """Ask again for what can only fail: some that speak the S3 protocol ignore its conditions."""
        if not self._has_conditional_writes:
            return False
        try:
            self.filesystem.pipe_file(self._claim_path(claim.number), claim.content(), mode="create")
        except Exception:
            return True
        return False

    def _holds(self, claim: "_Claim") -> bool:
        return self._publisher_and_time(claim.number)[0] == claim.publisher

    def _publisher_and_time(self, number: int) -> tuple[str | None, float]:
        """Of a claim; None and the present if it is gone, or nobody's."""
        try:
            content = json.loads(self.filesystem.cat_file(self._claim_path(number)))
            return str(content["publisher"]), float(content["time"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None, time.time()

    def _remove_leftovers(self) -> None:
        for number in self._listed(f"{self.root}/{_CLAIMS}"):
            publisher, written = self._publisher_and_time(number)
            if publisher is None or time.time() - written < _STALE_S:
                continue
            if self._exists(self.path(number, MANIFEST)):
                self._remove_file(self._claim_path(number))
            else:
                _log.warning("%s/%d: removing what a publisher that died has left", self.url, number)
                self._remove(number)

    def _remove(self, number: int) -> None:
        """A version's files, and then its claim."""
        with suppress(FileNotFoundError):
            self.filesystem.invalidate_cache()
            self.filesystem.rm(self.path(number), recursive=True)
        self._remove_file(self._claim_path(number))

    def _remove_file(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(path)

    def _make_parent(self, path: str) -> None:
        # Object stores have no folders, and s3fs would try to make the bucket.
        if not self._has_conditional_writes:
            self.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _upload(self, folder: Path, claim: "_Claim") -> None:
        expected = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
        # A server that watches the store itself begins to load when it finds the graph.
        names = sorted(expected, key=lambda name: (name == MANIFEST, name == "saved_model.pb", name))
        refreshed = time.monotonic()
        for name in names:
            if name == MANIFEST:
                self._check_sizes(claim.number, {key: expected[key] for key in names[:-1]})
            if name == MANIFEST or time.monotonic() - refreshed > _REFRESH_S:
                self._refresh(claim)
                refreshed = time.monotonic()
            target = self.path(claim.number, name)
            self._make_parent(target)
            self.filesystem.put_file(str(folder / name), target)
        self._check_sizes(claim.number, expected)

    def _refresh(self, claim: "_Claim") -> None:
        if not self._holds(claim):
            raise StoreError(
                f"{self.url}/{claim.number}: took over an hour between two files, so another publisher has "
                "cleared it away; publish again"
            )
        self.filesystem.pipe_file(self._claim_path(claim.number), claim.content())

    def _check_sizes(self, number: int, expected: dict[str, int]) -> None:
        found = self.sizes(number)
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise StoreError(
                    f"{self.url}/{number}/{name}: expected {_bytes(expected.get(name))} after the upload, "
                    f"found {_bytes(found.get(name))}; publish again"
                )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (StoreError, VersionError):
            raise
        except Exception as error:  # each backend raises its own
            raise StoreError(f"{self.url}: {_reason(error)}") from error


@dataclass(frozen=True)
class _Claim:
    number: int
    publisher: str

    def content(self) -> bytes:
        return json.dumps({"publisher": self.publisher, "time": time.time()}).encode()


def _bytes(size: int | None) -> str:
    return "no file" if size is None else f"{size} bytes"


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
