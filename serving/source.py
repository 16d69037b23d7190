"""Which versions of a model a folder offers, and which of them to aspire.

    <base_path>/<N>/saved_model.pb

N is a decimal integer without a sign, at most 2**63 - 1. Everything else is ignored (`temp-5`, `5.tmp`, plain
files), so a version can be prepared beside its final name and appear by one rename. `007` is version 7, as in
TensorFlow Serving, unless there is a `7`, too.

A version that appears while the server runs may be a copy in progress. It counts from when it holds a
saved_model.pb and nothing in it has changed for a second, or from one look to the next.
Source: tensorflow_serving/sources/storage_path/file_system_storage_path_source.cc.
"""

import logging
import os
import re
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import Code, ServingError

__all__ = [
    "All",
    "CopyWatch",
    "FileSystemStoragePathSource",
    "Latest",
    "MonitoredServable",
    "Specific",
    "VersionPolicy",
    "list_versions",
]

_log = logging.getLogger(__name__)

_SETTLED_S = 1.0
_GRAPHS = ("saved_model.pb", "saved_model.pbtxt")
_NO_GRAPH = "%s: left alone until it holds a saved_model.pb"

_VERSION = re.compile(r"0*([0-9]{1,19})")  # 00000123 is version 123, as in TensorFlow Serving's own examples
_MAX_VERSION = 2**63 - 1


@dataclass(frozen=True)
class Latest:
    """Aspire the `num_versions` highest versions."""

    num_versions: int = 1

    def __post_init__(self) -> None:
        if self.num_versions < 1:
            raise ValueError(f"num_versions: expected 1 or more, got {self.num_versions}")

    def select(self, versions: Iterable[int]) -> list[int]:
        """Those to serve, ascending."""
        return sorted(versions)[-self.num_versions :]


@dataclass(frozen=True)
class All:
    """Aspire every version."""

    def select(self, versions: Iterable[int]) -> list[int]:
        """Those to serve, ascending."""
        return sorted(versions)


@dataclass(frozen=True)
class Specific:
    """Aspire these versions, as far as they are there."""

    versions: frozenset[int]

    def select(self, versions: Iterable[int]) -> list[int]:
        """Those to serve, ascending."""
        return sorted(self.versions.intersection(versions))


VersionPolicy = Latest | All | Specific


@dataclass(frozen=True)
class MonitoredServable:
    """One model to watch: its folder and which of its versions to serve."""

    name: str
    base_path: Path
    policy: VersionPolicy = field(default_factory=Latest)


def list_versions(base_path: Path) -> dict[int, Path]:
    """The version folders directly under base_path.

    Raises ServingError (NOT_FOUND) if base_path is missing or is not a readable folder: lost storage must
    not look like a folder from which every version was taken away.
    """
    try:
        children = list(base_path.iterdir())
    except OSError as exc:
        raise ServingError(
            Code.NOT_FOUND,
            f"Could not find base path {base_path}: {exc.strerror}. Expected a folder that holds one folder "
            "for each version, such as 1/",
        ) from exc
    versions: dict[int, Path] = {}
    # The plainest name first: it wins where two folders name one version.
    for child in sorted(children, key=lambda child: (len(child.name), child.name)):
        match = _VERSION.fullmatch(child.name)
        if match and int(match[1]) <= _MAX_VERSION and child.is_dir():
            versions.setdefault(int(match[1]), child)
    return versions


class CopyWatch:
    """Tells complete versions from those still being copied. For one thread at a time."""

    def __init__(self) -> None:
        self._last_changes: dict[Path, tuple[int, float]] = {}
        self._complete: dict[Path, tuple[int, int]] = {}  # which need no second walk
        self._told: set[Path] = set()

    def is_complete(self, path: Path) -> bool:
        """Whether the version in `path` may be loaded; to be asked at every look until it may."""
        try:
            folder = path.stat()
            identity = (folder.st_ino, folder.st_mtime_ns)
            if self._complete.get(path) == identity:
                return True
            files, changed_s = _newest_change(path)
            has_graph = _has_graph(path)
        except OSError:  # it changes while we look
            identity, files, changed_s, has_graph = (0, 0), 0, 0.0, False
        age_s = time.time() - changed_s
        # The clock of a network file system may be ahead of ours: what has not changed since the last look
        # has settled, too.
        unchanged = self._last_changes.get(path) == (files, changed_s)
        if has_graph and (age_s >= _SETTLED_S or unchanged):
            self._last_changes.pop(path, None)
            self._told.discard(path)
            self._complete[path] = identity
            return True
        if not has_graph and unchanged and path not in self._told:
            self._told.add(path)
            _log.warning(_NO_GRAPH, path)
        self._last_changes[path] = (files, changed_s)
        return False

    def forget_all_but(self, paths: Container[Path]) -> None:
        """Drop what is known of folders that are gone."""
        self._last_changes = {path: last for path, last in self._last_changes.items() if path in paths}
        self._complete = {path: which for path, which in self._complete.items() if path in paths}
        self._told = {path for path in self._told if path in paths}


class FileSystemStoragePathSource:
    """Reads what a set of folders offers."""

    def __init__(self, servables: Iterable[MonitoredServable]) -> None:
        self._servables = tuple(servables)
        self._copies = CopyWatch()

    def poll(
        self, known: Mapping[str, Container[int]] | None = None, *, at_once: bool = False
    ) -> tuple[Mapping[str, Mapping[int, Path]], Mapping[str, ServingError]]:
        """The aspired versions of each servable, and an error for each whose folder could not be read.

        known: versions that need not be complete, by servable, since they were passed on before.
        at_once: take every version with a saved_model.pb, since nobody may ever look again; others only
            where no such one can be served, so that their errors are told. Without `known` it is always so.
        A servable is in exactly one of the two. One with an empty folder is in the first with no versions.
        Not for two threads at once.
        """
        found: dict[str, Mapping[int, Path]] = {}
        failed: dict[str, ServingError] = {}
        seen: set[Path] = set()
        for servable in self._servables:
            try:
                versions = list_versions(servable.base_path)
            except ServingError as exc:
                failed[servable.name] = exc
                continue
            seen.update(versions.values())
            old = (known or {}).get(servable.name, ())
            if known is None or at_once:
                chosen = _choose_at_once(servable, versions, old)
            else:
                chosen = servable.policy.select(
                    version
                    for version, path in versions.items()
                    if version in old or self._copies.is_complete(path)
                )
            found[servable.name] = {version: versions[version] for version in chosen}
        self._copies.forget_all_but(seen)
        return found, failed

    def poll_at_start(
        self, known: Mapping[str, Container[int]] | None = None
    ) -> Mapping[str, Mapping[int, Path]]:
        """As `poll` with `at_once`, but every servable must offer a version.

        Raises ServingError (NOT_FOUND) that names every servable that does not, and why.
        """
        found, failed = self.poll(known, at_once=True)
        problems = [f"model {name}: {error.message}" for name, error in failed.items()]
        for servable in self._servables:
            if servable.name in found and not found[servable.name]:
                problems.append(
                    f"model {servable.name}: no version to serve under {servable.base_path}. "
                    "Did you forget to name your leaf directory as a number (eg. '/1/')?"
                )
        if problems:
            raise ServingError(Code.NOT_FOUND, "; ".join(problems))
        return found


def _choose_at_once(
    servable: MonitoredServable, versions: Mapping[int, Path], known: Container[int]
) -> list[int]:
    """The versions to aspire without a second look: a copy that was cut off must not replace a whole one."""
    with_graph = [version for version, path in versions.items() if version in known or _has_graph(path)]
    chosen, wanted = servable.policy.select(with_graph), servable.policy.select(versions)
    if not chosen:
        return wanted
    for version in set(wanted).difference(chosen):
        _log.warning(_NO_GRAPH, versions[version])
    return chosen


def _has_graph(path: Path) -> bool:
    return any((path / name).is_file() for name in _GRAPHS)


def _newest_change(folder: Path) -> tuple[int, float]:
    """How many entries there are below a folder, and when one of them last changed, in seconds.

    The folder itself does not count: the rename by which it appears changes it.
    """
    count, newest_s = 0, 0.0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            count += 1
            newest_s = max(newest_s, os.lstat(os.path.join(parent, name)).st_ctime)
    return count, newest_s
