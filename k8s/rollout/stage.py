"""Where versions are rolled out: what the engine sees of it, and the one thing that it does to it.

A stage serves a set of versions and gives two of them a track: `stable`, which callers ask, and `canary`,
which is on trial. The engine says how it should be, never how to get there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from graftserve.client import Client, VersionState, VersionStatus

__all__ = ["Observable", "Observed", "Placement", "Stage"]

_PRESENT = frozenset({VersionState.START, VersionState.LOADING, VersionState.AVAILABLE})


@dataclass(frozen=True)
class Placement:
    """How it should be.

    versions: those to serve; None where a policy such as "the latest" chooses them (never asked for by the
        engine, but found).
    stable, canary: the version on the track, or None.
    """

    versions: frozenset[int] | None
    stable: int | None = None
    canary: int | None = None

    def __str__(self) -> str:
        served = "a policy's versions" if self.versions is None else f"versions {_numbers(self.versions)}"
        tracks = {"stable": self.stable, "canary": self.canary}
        named = [f"{track} {version}" for track, version in tracks.items() if version is not None]
        return f"{served}, {' and '.join(named) or 'no label'}"


@dataclass(frozen=True)
class Observed:
    """How it is.

    versions: every version that the stage knows, ended ones included.
    stable, canary: the version that answers for the track, or None if none does.
    configured: what the configuration says that a restart would read; None where nobody can tell.
    pinned: versions that must stay for other reasons, such as labels of other names.
    """

    versions: Mapping[int, VersionStatus] = field(default_factory=dict)
    stable: int | None = None
    canary: int | None = None
    configured: Placement | None = None
    pinned: frozenset[int] = frozenset()

    @property
    def present(self) -> frozenset[int]:
        """The versions that serve, or are on the way to it."""
        return frozenset(version for version, item in self.versions.items() if item.state in _PRESENT)

    @property
    def available(self) -> frozenset[int]:
        """The versions that serve."""
        return frozenset(
            version for version, item in self.versions.items() if item.state is VersionState.AVAILABLE
        )


class Observable(Protocol):
    """A place with tracks."""

    def observe(self) -> Observed:
        """How it is now. Raises ClientError (it cannot be asked), RolloutError (nor can its files)."""
        ...


class Stage(Observable, Protocol):
    """A place that can serve two versions side by side."""

    def apply(self, placement: Placement, expected: Placement | None) -> None:
        """Make it so; what is so already stays. May return before it is so, and may be cut off anywhere: a
        second call does the rest.

        expected: what the configuration must say so far, unless it says `placement` already; None where
            nobody can tell.
        Raises RefusedError (nothing was changed), ConflictError (the configuration says something else),
        ClientError (whether it was done is not known), ConfigFileError.
        """
        ...

    def client(self, version: int, timeout_s: float) -> Client:
        """A client of one version, for the caller to close."""
        ...


def _numbers(versions: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(versions))) or "none"
