"""Which versions of a model a folder offers, and which of them to aspire.

    <base_path>/<N>/saved_model.pb

N is a plain decimal integer: no sign, no leading zero, at most 2**63 - 1. Everything else is ignored
(`temp-5`, `5.tmp`, `007`, plain files), so a version can be prepared beside its final name and appear by
one rename. TensorFlow Serving reads `007` as 7; here it is ignored, because `7` and `007` would claim the
same version.
Source: tensorflow_serving/sources/storage_path/file_system_storage_path_source.cc.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import Code, ServingError

__all__ = [
    "All",
    "FileSystemStoragePathSource",
    "Latest",
    "MonitoredServable",
    "Specific",
    "VersionPolicy",
    "list_versions",
]

_VERSION = re.compile(r"0|[1-9][0-9]{0,18}")
_MAX_VERSION = 2**63 - 1


@dataclass(frozen=True)
class Latest:
    """Aspire the `num_versions` highest versions."""

    num_versions: int = 1

    def __post_init__(self) -> None:
        if self.num_versions < 1:
            raise ValueError(f"num_versions: expected 1 or more, got {self.num_versions}")

    def select(self, versions: Iterable[int]) -> list[int]:
        return sorted(versions)[-self.num_versions :]


@dataclass(frozen=True)
class All:
    """Aspire every version."""

    def select(self, versions: Iterable[int]) -> list[int]:
        return sorted(versions)


@dataclass(frozen=True)
class Specific:
    """Aspire these versions, as far as they are there."""

    versions: frozenset[int]

    def select(self, versions: Iterable[int]) -> list[int]:
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
    for child in children:
        if _VERSION.fullmatch(child.name) and int(child.name) <= _MAX_VERSION and child.is_dir():
            versions[int(child.name)] = child
    return versions


class FileSystemStoragePathSource:
    """Reads what a set of folders offers. Holds no state: safe to call from any thread."""

    def __init__(self, servables: Iterable[MonitoredServable]) -> None:
        self._servables = tuple(servables)

    def poll(self) -> tuple[Mapping[str, Mapping[int, Path]], Mapping[str, ServingError]]:
        """The aspired versions of each servable, and an error for each whose folder could not be read.

        A servable is in exactly one of the two. One with an empty folder is in the first with no versions.
        """
        found: dict[str, Mapping[int, Path]] = {}
        failed: dict[str, ServingError] = {}
        for servable in self._servables:
            try:
                versions = list_versions(servable.base_path)
            except ServingError as exc:
                failed[servable.name] = exc
            else:
                found[servable.name] = {
                    version: versions[version] for version in servable.policy.select(versions)
                }
        return found, failed

    def poll_at_start(self) -> Mapping[str, Mapping[int, Path]]:
        """As `poll`, but every servable must offer a version.

        Raises ServingError that names every servable that does not, and why.
        """
        found, failed = self.poll()
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
