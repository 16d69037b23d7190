"""What to do next: a pure function of what is wanted, what is seen, and how long it has been so.

    check -> load beside stable -> label canary -> compare -> hold or decide
                                                        promote: label stable -> drain -> unload the old
                                                        abort:   labels back  -> drain -> unload the new

Nothing but decisions is remembered between two steps. Where a rollout stands is read from the stage each
time, so one that was cut off goes on from what is there. The orders that matter:

- A label is moved only to a version that is AVAILABLE: the server refuses everything else, and checks labels
  before it loads.
- A version is unloaded by another request than the one that took its label away, and some seconds later: a
  call that has just resolved the label still finds its version.
"""

from dataclasses import dataclass

from graftserve.client import VersionState, VersionStatus

from .record import Decision, Rollout
from .stage import Observed, Placement

__all__ = [
    "Action",
    "Apply",
    "Check",
    "Compare",
    "Decide",
    "Finish",
    "Hold",
    "Limits",
    "Progress",
    "Stop",
    "Wait",
    "conflict",
    "next_action",
]


@dataclass(frozen=True)
class Limits:
    """load_timeout_s: for a version to become AVAILABLE, and for one to be unloaded.

    drain_s: from the moment a version has no label to its unloading.
    stale_s: how long a server may still show the end of an earlier load after it was asked to load again. The
        real server looks at its configuration once a second.
    Raises ValueError for values out of range.
    """

    load_timeout_s: float = 600.0
    drain_s: float = 5.0
    stale_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.load_timeout_s > 0:
            raise ValueError(f"expected load_timeout_s above 0, got {self.load_timeout_s}")
        for name in ("drain_s", "stale_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} of 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Progress:
    """What this process has done so far.

    applied: the placement asked for last; None for none yet.
    waited_s: since it was asked for the first time, or since the decision, or since the start.
    repeat: enough time has gone by to ask for it once more.
    """

    applied: Placement | None = None
    waited_s: float = 0.0
    repeat: bool = False


@dataclass(frozen=True)
class Check:
    """See whether the version is there and undamaged."""


@dataclass(frozen=True)
class Apply:
    """Ask the stage for a placement. why: for people."""

    placement: Placement
    why: str


@dataclass(frozen=True)
class Wait:
    """Look again in a moment."""

    why: str


@dataclass(frozen=True)
class Compare:
    """Replay images against both versions."""


@dataclass(frozen=True)
class Decide:
    """Promote or abort from here on."""

    decision: Decision
    reason: str


@dataclass(frozen=True)
class Hold:
    """Somebody is to say whether to promote or to abort."""


@dataclass(frozen=True)
class Finish:
    """All is as the decision wants it."""


@dataclass(frozen=True)
class Stop:
    """Neither on nor back; leave everything as it is, and say so."""

    reason: str


Action = Check | Apply | Wait | Compare | Decide | Hold | Finish | Stop


def next_action(rollout: Rollout, observed: Observed, progress: Progress, limits: Limits) -> Action:
    """The one thing to do now."""
    if rollout.decision is not Decision.ABORT and not rollout.checked:
        return Check()
    if rollout.decision is Decision.ABORT and rollout.intent is None:
        return Finish()  # nothing was ever asked of the stage
    step = _toward(goal(rollout), rollout, observed, progress, limits)
    if step is not None:
        return step
    if rollout.decision is not None:
        return Finish()
    if rollout.previous is None:
        return Decide(Decision.PROMOTE, "nothing was stable before it")
    if rollout.gate is not None:
        if rollout.report is None:
            return Compare()
        if failures := rollout.gate.failures(rollout.report):
            return Decide(Decision.ABORT, "; ".join(failures))
    if not rollout.auto:
        return Hold()
    return Decide(Decision.PROMOTE, "not compared" if rollout.gate is None else "the gate is passed")


def goal(rollout: Rollout) -> Placement:
    """How it should be, by what is decided so far."""
    new, old, keep = rollout.version, rollout.previous, rollout.keep
    if rollout.decision is Decision.PROMOTE:
        return Placement(keep | {new}, new)
    if rollout.decision is Decision.ABORT:
        # Without a version before, the new one stays: a server is not told to serve nothing.
        return Placement(keep | {new if old is None else old}, old)
    return Placement(keep | {new} | ({old} if old is not None else set()), old, new)


def conflict(rollout: Rollout, observed: Observed) -> str | None:
    """What somebody else has changed since this rollout's last step; None if nothing.

    Missing labels are no conflict: a server that has restarted may have lost them.
    """
    known = [placement for placement in (rollout.before, rollout.intent) if placement is not None]
    if not known:
        return None
    if observed.configured is not None and observed.configured not in known:
        expected = " or ".join(f"[{placement}]" for placement in known)
        return f"the configuration says [{observed.configured}], expected {expected}"
    for track, seen, expected_versions in (
        ("stable", observed.stable, {placement.stable for placement in known}),
        ("canary", observed.canary, {placement.canary for placement in known}),
    ):
        if seen is not None and seen not in expected_versions:
            names = " or ".join(sorted("none" if item is None else str(item) for item in expected_versions))
            return f"the label {track} is on version {seen}, expected {names}"
    ours = rollout.found | rollout.keep | {rollout.version, rollout.previous}
    for placement in known:
        ours |= placement.versions or frozenset()
    if strange := observed.present - ours:
        return f"version {min(strange)} is loaded, which was neither there at the start nor asked for"
    return None


def _toward(
    wanted: Placement, rollout: Rollout, observed: Observed, progress: Progress, limits: Limits
) -> Action | None:
    """The next step to `wanted`; None once it is reached."""
    versions = wanted.versions or frozenset()
    both = versions | observed.present
    labelled = [version for version in (wanted.stable, wanted.canary) if version is not None]
    for version in labelled:
        state = observed.versions.get(version)
        if state is not None and state.state is VersionState.AVAILABLE:
            continue
        asked = progress.applied is not None and version in (progress.applied.versions or ())
        if asked and (reason := _failure(version, state, rollout, progress, limits)):
            return _give_up(version, reason, rollout)
        if version in observed.present:
            if progress.waited_s > limits.load_timeout_s:
                return _give_up(version, _too_late(version, state, limits), rollout)
            return Wait(f"version {version} to be AVAILABLE")
        loading = Placement(
            both, _if_available(observed.stable, observed), _if_available(observed.canary, observed)
        )
        return _ask(loading, f"load version {version}", progress)
    if (observed.stable, observed.canary) != (wanted.stable, wanted.canary):
        if progress.waited_s > limits.load_timeout_s:
            return Stop(f"the labels do not follow within {limits.load_timeout_s:g} s")
        return _ask(Placement(both, wanted.stable, wanted.canary), _moves(wanted, observed), progress)
    if progress.applied != wanted:
        extra = observed.present - versions
        if extra and progress.waited_s < limits.drain_s:
            return Wait(f"calls of version {min(extra)} to end")
        unload = f"unload version {', '.join(map(str, sorted(extra)))}"
        return Apply(wanted, unload if extra else "keep it so")
    leaving = [
        version
        for version, item in observed.versions.items()
        if version not in versions and item.state is not VersionState.END
    ]
    if leaving:
        if progress.waited_s > limits.load_timeout_s:
            return Stop(
                f"version {leaving[0]} is still {observed.versions[leaving[0]].state} after "
                f"{limits.load_timeout_s:g} s; see what the server is doing, then run this again"
            )
        if progress.repeat and observed.present.intersection(leaving):
            return Apply(wanted, f"unload version {leaving[0]}")
        return Wait(f"version {leaving[0]} to be unloaded")
    return None


def _ask(placement: Placement, why: str, progress: Progress) -> Action:
    """Ask, unless that was just done: a server may take a second to show it."""
    if progress.applied == placement and not progress.repeat:
        return Wait(f"the server to {why}")
    return Apply(placement, why)


def _failure(
    version: int, state: VersionStatus | None, rollout: Rollout, progress: Progress, limits: Limits
) -> str:
    """Why a version that was asked for will not come; "" while it still may."""
    if state is None or state.state not in (VersionState.END, VersionState.UNLOADING):
        return _too_late(version, state, limits) if progress.waited_s > limits.load_timeout_s else ""
    fresh = version == rollout.version and not rollout.ended_before and state.error_code != "OK"
    if not fresh and progress.waited_s <= limits.stale_s:
        return ""
    if state.state is VersionState.UNLOADING:
        return _too_late(version, state, limits) if progress.waited_s > limits.load_timeout_s else ""
    error = f"{state.error_code}: {state.error_message}" if state.error_message else state.error_code
    return f"version {version} could not be loaded: {error}"


def _too_late(version: int, state: VersionStatus | None, limits: Limits) -> str:
    seen = (
        "the server does not list it: is its folder there?" if state is None else f"it is still {state.state}"
    )
    return f"version {version} was not AVAILABLE within {limits.load_timeout_s:g} s: {seen}"


def _give_up(version: int, reason: str, rollout: Rollout) -> Action:
    goes_back = rollout.decision is not Decision.ABORT and version == rollout.version
    return Decide(Decision.ABORT, reason) if goes_back else Stop(reason)


def _if_available(version: int | None, observed: Observed) -> int | None:
    return version if version in observed.available else None


def _moves(wanted: Placement, observed: Observed) -> str:
    changes = []
    for track, now, then in (
        ("stable", observed.stable, wanted.stable),
        ("canary", observed.canary, wanted.canary),
    ):
        if now != then:
            changes.append(
                f"take the label {track} away" if then is None else f"label version {then} {track}"
            )
    return " and ".join(changes)
