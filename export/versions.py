"""The versions in a model's folder: their numbers, how one appears, how old ones go.

    <model_base_path>/<N>/                  a version
    <model_base_path>/.exporting-<id>/      one that is being written, of a process that holds its lock
    <model_base_path>/.exporting-<id>.lock

A version appears by one rename, so a server that polls the folder never sees half of one.
"""

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from google.protobuf import text_format

from graftserve.client.wire import ModelServerConfig
from graftserve.training.files import sync_directory

from .errors import StoreError, VersionError

__all__ = [
    "candidate",
    "is_version",
    "labelled_versions",
    "locked",
    "newest_version",
    "next_version",
    "parse_version",
    "prune",
    "publish",
    "published_versions",
    "sync_tree",
]

_PATTERN = re.compile(r"[1-9][0-9]{0,18}")  # as TensorFlow Serving reads a folder's name, without 0 and 007
_LARGEST = 2**63 - 1
_TEMPORARY = ".exporting-"
_REMOVING = ".removing-"


def is_version(name: str) -> bool:
    """Whether a folder of this name is a version."""
    return _PATTERN.fullmatch(name) is not None and int(name) <= _LARGEST


def parse_version(text: str) -> int | None:
    """The number that --version asks for; None for the next free one.

    text: "next", "timestamp" (now, in seconds since 1970 UTC; like any number, it is refused where it is
    taken), or a number from 1 to 2**63 - 1. Raises VersionError for anything else.
    """
    if text == "next":
        return None
    if text == "timestamp":
        return int(time.time())
    if not is_version(text):
        raise VersionError(
            f"version: expected next, timestamp or a number from 1 to {_LARGEST}, got {text!r}"
        )
    return int(text)


def published_versions(model_base_path: Path) -> list[int]:
    """The version numbers in a model's folder, ascending; none if the folder is not there."""
    if not model_base_path.is_dir():
        return []
    return sorted(
        int(path.name) for path in model_base_path.iterdir() if is_version(path.name) and path.is_dir()
    )


def next_version(taken: Iterable[int]) -> int:
    """The number after the highest of those taken; 1 if there is none.

    Raises VersionError after 2**63 - 1.
    """
    number = max(taken, default=0) + 1
    if number > _LARGEST:
        raise VersionError(
            f"version {_LARGEST} is taken, and none can come after it; name a free number with --version"
        )
    return number


def newest_version(folder: Path) -> Path:
    """`folder` itself if it is a version, or the newest one in it if it is a model's folder.

    Raises VersionError if it is neither.
    """
    if (folder / "saved_model.pb").is_file():
        return folder
    versions = published_versions(folder)
    if not versions:
        raise VersionError(
            f"{folder}: expected a version, such as models/flowers/3, or a model's folder with versions in it"
        )
    return folder / str(versions[-1])


@contextmanager
def candidate(model_base_path: Path) -> Iterator[Path]:
    """A new folder below `model_base_path` to write into, which no server takes for a version.

    It is gone afterwards, whatever happens; what is to stay is moved out by `publish`. On entering, what
    exporters that died have left there is removed.
    Raises StoreError if the folder cannot be made.
    """
    temporary = model_base_path / f"{_TEMPORARY}{uuid.uuid4().hex}"
    with ExitStack() as stack:
        try:
            model_base_path.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(model_base_path)
            stack.enter_context(locked(temporary.with_suffix(".lock")))
            temporary.mkdir()
        except OSError as error:
            raise StoreError(f"{model_base_path}: cannot be written: {error.strerror or error}") from error
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is there for so long; others wait. A process that dies lets go of it.

    Raises OSError if the file cannot be made, or its file system has no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            is_current = False  # who held it before has removed it, and a lock on no name keeps nobody out
        except BaseException:
            os.close(descriptor)
            raise
        if is_current:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def publish(folder: Path, model_base_path: Path, number: int | None) -> Path:
    """Make all of `folder` durable and rename it to `number`; None takes the next after the highest, and the
    one after if somebody else just took that.

    Raises VersionError if `number` is taken.
    """
    sync_tree(folder)
    while True:
        # Files of such a name are in the way, too.
        taken = (int(path.name) for path in model_base_path.iterdir() if is_version(path.name))
        wanted = next_version(taken) if number is None else number
        target = model_base_path / str(wanted)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if number is not None:
                raise VersionError(f"{target}: exists; versions are never overwritten") from error
        else:
            sync_directory(model_base_path)
            return target


def prune(model_base_path: Path, keep: int, protected: Collection[int]) -> list[int]:
    """Remove all but the newest `keep` versions, and never one of `protected`; returns those removed.

    A version goes by a rename, too, before its files do.
    Raises ValueError if `keep` is below 1, StoreError if a version cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    removed = []
    for number in published_versions(model_base_path)[:-keep]:
        if number in protected:
            continue
        version = model_base_path / str(number)
        hidden = model_base_path / f"{_REMOVING}{number}-{uuid.uuid4().hex}"
        try:
            version.rename(hidden)
            sync_directory(model_base_path)
        except FileNotFoundError:  # somebody else has just removed it
            continue
        except OSError as error:
            raise StoreError(f"{version}: cannot be removed: {error.strerror or error}") from error
        removed.append(number)
        shutil.rmtree(hidden, ignore_errors=True)  # what stays goes with the next exporter's leftovers
    return removed


def labelled_versions(model_config_file: Path, model_name: str) -> set[int]:
    """The versions of a model that a server's --model_config_file labels, or pins by a specific policy.

    Raises VersionError if the file cannot be read or does not name the model: nothing is removed on a guess.
    """
    try:
        text = model_config_file.read_text(encoding="utf-8")
        config = text_format.Parse(text, ModelServerConfig(), allow_unknown_field=True)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise VersionError(f"{model_config_file}: no ModelServerConfig in text format: {reason}") from error
    models = [model for model in config.model_config_list.config if model.name == model_name]
    if not models:
        names = ", ".join(model.name for model in config.model_config_list.config) or "none"
        raise VersionError(
            f"{model_config_file}: expected the model {model_name}, got {names}; without its labels no "
            "version can safely be removed"
        )
    versions: set[int] = set()
    for model in models:
        versions.update(model.version_labels.values(), model.model_version_policy.specific.versions)
    return versions


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for directory, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(directory))


def _remove_leftovers(model_base_path: Path) -> None:
    for lock in model_base_path.glob(f"{_TEMPORARY}*.lock"):
        try:
            descriptor = os.open(lock, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):  # its owner has just finished, or is another user
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its owner is at work
            continue
        else:
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    for hidden in model_base_path.glob(f"{_REMOVING}*"):
        shutil.rmtree(hidden, ignore_errors=True)
