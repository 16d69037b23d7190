"""One rollout as the journal holds it: what is wanted, what was decided, what was found. To JSON and back."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from .gate import Gate, Report
from .stage import Placement

__all__ = ["Decision", "Kind", "Outcome", "Rollout", "rollout_from_json", "rollout_to_json"]


class Kind(StrEnum):
    """Why a version is brought: it is the next, or the one before is wanted back."""

    ROLLOUT = "rollout"
    UNDO = "undo"


class Decision(StrEnum):
    """Where it goes once that is decided."""

    PROMOTE = "promote"
    ABORT = "abort"


class Outcome(StrEnum):
    """How it ended. LEFT: given up with everything as it was found."""

    PROMOTED = "promoted"
    ABORTED = "aborted"
    LEFT = "left"


@dataclass(frozen=True)
class Rollout:
    """number: counted from 1. version: the one to bring. previous: stable before, None if there was none.

    found: the versions that were there at the start. keep: those of them that stay whatever happens.
    ended_before: the server listed `version` as ended at the start, with an error of the past perhaps.
    auto: promote without being asked once the gate is passed.
    gate: None for no comparison. report: what it found.
    checked: what was checked before the load; "" for not yet.
    before, intent: the placement last asked for, and the one before it. The journal has them before the
        stage is told, so one of the two is what its configuration says, whenever this was cut off.
    by, note, reason: who, why it was begun, and why it was decided as it was.
    started_at, ended_at: ISO 8601, UTC.
    """

    number: int
    version: int
    previous: int | None = None
    started_at: str = ""
    by: str = ""
    note: str = ""
    kind: Kind = Kind.ROLLOUT
    found: frozenset[int] = frozenset()
    keep: frozenset[int] = frozenset()
    ended_before: bool = False
    auto: bool = False
    gate: Gate | None = None
    checked: str = ""
    report: Report | None = None
    decision: Decision | None = None
    reason: str = ""
    before: Placement | None = None
    intent: Placement | None = None
    ended_at: str = ""
    outcome: Outcome | None = None

    @property
    def title(self) -> str:
        """For messages: "rollout 5 (version 3 to 4)"."""
        source = "" if self.previous is None else f"version {self.previous} to "
        return f"{self.kind} {self.number} ({source or 'version '}{self.version})"


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    """Plain values; NaN, which JSON has not, as null."""
    values = {name: _plain(value) for name, value in asdict(rollout).items()}
    return {name: value for name, value in values.items() if value not in (None, "")}


def rollout_from_json(values: Mapping[str, Any]) -> Rollout:
    """The inverse. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    fields = dict(values)
    for name in ("found", "keep"):
        fields[name] = frozenset(fields.get(name, ()))
    for name in ("before", "intent"):
        if name in fields:
            fields[name] = _placement(fields[name])
    if "gate" in fields:
        fields["gate"] = Gate(**fields["gate"])
    if "report" in fields:
        report: dict[str, Any] = {
            key: math.nan if value is None else value for key, value in fields["report"].items()
        }
        rows = tuple((str(a), str(b), str(c)) for a, b, c in report.pop("disagreements", ()))
        fields["report"] = Report(**report, disagreements=rows)
    fields["kind"] = Kind(fields.get("kind", Kind.ROLLOUT))
    if "decision" in fields:
        fields["decision"] = Decision(fields["decision"])
    if "outcome" in fields:
        fields["outcome"] = Outcome(fields["outcome"])
    return Rollout(**fields)


def _placement(values: Mapping[str, Any]) -> Placement:
    versions = values["versions"]
    return Placement(
        None if versions is None else frozenset(versions), values.get("stable"), values.get("canary")
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
