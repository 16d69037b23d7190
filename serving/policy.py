"""Which version to load or unload next: a pure function of what is there.

Source: tensorflow_serving/core/availability_preserving_policy.cc.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Action", "ActionKind", "Snapshot", "State", "availability_preserving"]


class State(enum.IntEnum):
    """Where a version is in its life; the numbers of ModelVersionStatus.State on the wire."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


class ActionKind(enum.Enum):
    """What can be done with a version."""

    LOAD = "load"
    UNLOAD = "unload"


@dataclass(frozen=True)
class Snapshot:
    """One version of a servable. aspired: whether the source wants it served."""

    version: int
    state: State
    aspired: bool


@dataclass(frozen=True)
class Action:
    """The next step, and the version that it is for."""

    kind: ActionKind
    version: int


def availability_preserving(snapshots: Iterable[Snapshot]) -> Action | None:
    """The next step for one servable, or None.

    A version that is no longer aspired goes only when an aspired one is AVAILABLE, when nothing is
    aspired, or when another unaspired version still serves. So new is loaded before old is unloaded, at
    the price of holding both for a moment. Lowest versions go first, highest come first.
    """
    versions = list(snapshots)
    aspired = [version for version in versions if version.aspired]
    leaving = [version for version in versions if not version.aspired and version.state is State.AVAILABLE]
    aspired_serves = any(version.state is State.AVAILABLE for version in aspired)
    if leaving and (not aspired or aspired_serves or len(leaving) > 1):
        return Action(ActionKind.UNLOAD, min(version.version for version in leaving))
    new = [version.version for version in aspired if version.state is State.START]
    return Action(ActionKind.LOAD, max(new)) if new else None
