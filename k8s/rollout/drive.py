"""Carries out what `plan` says, one step at a time, each of them in the journal before it is taken.

    with ModelServer(...) as stage, journal.writing(holder, settings) as writer:
        begin(stage, writer, version=4, ...)
        rollout = Driver(stage, writer, check=..., shadow=...).run()

Killed anywhere, another `run` goes on from what the stage and the journal say.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from graftserve.client import VersionState
from graftserve.client.errors import ClientError, InternalError, RetryError

from .errors import ConflictError, JournalError, RefusedError, RolloutError, StuckError
from .gate import Gate, Report
from .journal import JournalWriter
from .plan import (
    Action,
    Apply,
    Check,
    Compare,
    Decide,
    Finish,
    Hold,
    Limits,
    Progress,
    Stop,
    Wait,
    conflict,
    next_action,
)
from .record import Decision, Kind, Outcome, Rollout
from .stage import Observable, Observed, Placement, Stage

__all__ = ["AlreadyStableError", "CheckError", "Driver", "begin", "begin_undo", "decide", "leave", "utc_now"]

_REFUSALS = 3


class AlreadyStableError(RolloutError):
    """The version to roll out is stable already."""


class CheckError(RolloutError):
    """The version is missing or damaged, or does not answer as its files say."""


def begin(
    stage: Observable,
    writer: JournalWriter,
    *,
    version: int,
    previous: int | None = None,
    gate: Gate | None,
    auto: bool = False,
    by: str = "",
    note: str = "",
) -> Rollout:
    """Write down a new rollout of `version`; nothing is done to the stage yet.

    previous: the version to compare with and to go back to; None for the one labelled stable, or else the
        only one that is AVAILABLE.
    gate: None for no comparison.
    Raises JournalError if one is under way, ConflictError if somebody else's is, AlreadyStableError,
    RolloutError if it is not clear what is stable now.
    """
    if writer.record.current is not None:
        raise JournalError(f"{writer.record.current.title} is under way: promote or abort it first")
    observed = stage.observe()
    rollout = _new(writer, observed, version, _previous(observed, version, previous), by, note)
    rollout = replace(rollout, gate=gate, auto=auto)
    writer.begin(rollout)
    return rollout


def begin_undo(stage: Observable, writer: JournalWriter, *, by: str = "", note: str = "") -> Rollout:
    """Write down that the version before the last promoted one is wanted back.

    Undoing an undo goes forward again. Raises JournalError if there is nothing to undo or a rollout is under
    way, ConflictError if something else is stable by now.
    """
    if writer.record.current is not None:
        raise JournalError(f"{writer.record.current.title} is under way: abort it, that undoes it")
    promoted = [item for item in writer.record.history if item.outcome is Outcome.PROMOTED]
    last = promoted[-1] if promoted else None
    if last is None or last.previous is None:
        raise JournalError("there is no promoted rollout with a version before it to go back to")
    observed = stage.observe()
    if observed.stable != last.version:
        raise ConflictError(
            f"{last.title} made version {last.version} stable, but version {observed.stable} is: somebody "
            "else changed it, and undo does not know what they meant; start a rollout of the version wanted"
        )
    rollout = _new(writer, observed, last.previous, last.version, by, note)
    rollout = replace(
        rollout, kind=Kind.UNDO, decision=Decision.PROMOTE, reason=f"to undo {last.title}", auto=True
    )
    writer.begin(rollout)
    return rollout


def decide(writer: JournalWriter, decision: Decision, reason: str) -> Rollout:
    """Write down what somebody decided; the next `run` does it.

    Raises JournalError if no rollout is under way, it is not ready to be promoted, or it was decided
    otherwise.
    """
    rollout = writer.record.current
    if rollout is None:
        raise JournalError(f"no rollout is under way: there is nothing to {decision}")
    if decision is Decision.PROMOTE:
        if rollout.decision is Decision.ABORT:
            raise JournalError(
                f"{rollout.title} is being aborted ({rollout.reason}): let `abort` finish, then start anew"
            )
        if rollout.decision is None and rollout.gate is not None:
            if rollout.report is None:
                raise JournalError(f"{rollout.title} is not compared yet: run `start` again, it goes on")
            if failures := rollout.gate.failures(rollout.report):
                raise JournalError(f"{rollout.title} did not pass the gate: {'; '.join(failures)}")
    if rollout.decision is not decision:
        rollout = replace(rollout, decision=decision, reason=reason)
        writer.update(rollout)
    return rollout


def leave(writer: JournalWriter, reason: str) -> Rollout:
    """End the rollout under way in the journal only; server and configuration stay as they are.

    Raises JournalError if none is.
    """
    rollout = writer.record.current
    if rollout is None:
        raise JournalError("no rollout is under way: there is nothing to leave")
    ended = replace(rollout, outcome=Outcome.LEFT, reason=reason, ended_at=utc_now())
    writer.end(ended)
    return ended


def _new(
    writer: JournalWriter, observed: Observed, version: int, previous: int | None, by: str, note: str
) -> Rollout:
    configured = observed.configured
    stables = {observed.stable, configured.stable if configured else None} - {None}
    if len(stables) > 1 and configured is not None:
        raise ConflictError(
            f"the configuration says that stable is version {configured.stable}, the server says "
            f"{observed.stable}: make them agree first"
        )
    canaries = {observed.canary, configured.canary if configured else None} - {None, version}
    if canaries:
        raise ConflictError(
            f"version {canaries.pop()} is labelled canary, which no rollout here did: take the "
            "label away first"
        )
    served = configured.versions if configured is not None and configured.versions else observed.present
    state = observed.versions.get(version)
    return Rollout(
        number=writer.record.next_number,
        version=version,
        previous=previous,
        started_at=utc_now(),
        by=by,
        note=note,
        found=observed.present,
        keep=(served - {version, *(() if previous is None else (previous,))}) | observed.pinned,
        ended_before=state is not None and state.state is VersionState.END,
        before=configured or Placement(observed.present or None, observed.stable, observed.canary),
    )


def _previous(observed: Observed, version: int, given: int | None) -> int | None:
    labelled = observed.stable
    if labelled is None and observed.configured is not None:
        labelled = observed.configured.stable
    found = given if given is not None else labelled
    if found is None:
        others = observed.available - {version}
        if len(others) > 1:
            raise RolloutError(
                "expected the label stable, or one version, got versions "
                f"{', '.join(map(str, sorted(others)))} and no label: say which is stable with --from"
            )
        found = next(iter(others), None)
    elif given is not None and labelled not in (None, given):
        raise RolloutError(f"expected version {given} to be stable, but version {labelled} is")
    if found == version:
        raise AlreadyStableError(f"version {version} is stable already: there is nothing to roll out")
    return found


class Driver:
    """Takes a rollout as far as it goes by itself.

    check: sees whether the version's files are there and whole, and says what it looked at; raises
        CheckError.
    shadow: compares two versions (canary, stable) as `shadow.compare` does, and may raise CheckError, too;
        not called without a gate.
    listener: told each step in words, when it is new.
    patience_s: how long a stage that does not answer is asked again.
    is_lasting: whether such an error is one that no patience helps against.
    poll_s: between two looks. repeat_s: until a placement that shows no effect is asked for once more.
    now, sleep: the clock.
    """

    def __init__(
        self,
        stage: Stage,
        writer: JournalWriter,
        *,
        check: Callable[[int], str],
        shadow: Callable[[int, int], Report] | None = None,
        listener: Callable[[str], None] = lambda text: None,
        limits: Limits | None = None,
        patience_s: float = 60.0,
        is_lasting: Callable[[RetryError], bool] = lambda error: False,
        poll_s: float = 0.5,
        repeat_s: float = 10.0,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._stage = stage
        self._writer = writer
        self._check = check
        self._shadow = shadow
        self._listener = listener
        self._limits = limits or Limits()
        self._patience_s = patience_s
        self._is_lasting = is_lasting
        self._poll_s = poll_s
        self._repeat_s = repeat_s
        self._now = now
        self._sleep = sleep
        self._applied: Placement | None = None
        self._since = self._repeated = now()
        self._lost_since: float | None = None
        self._refusals = 0
        self._told = ""

    def run(self) -> Rollout:
        """Go on until it is over, or until somebody must decide; then the rollout's `outcome` is None.

        Raises ConflictError (somebody else changed something), StuckError (neither on nor back),
        JournalError, ConfigFileError, ClientError (the server cannot be reached). The journal stays as it is
        then, and another `run` goes on.
        """
        while True:
            rollout = self._writer.record.current
            if rollout is None:
                raise JournalError("no rollout is under way")
            try:
                action, observed = self._next(rollout)
                done = self._act(rollout, action, observed)
            except RetryError as error:
                self._bear(error)
                continue
            self._lost_since = None
            if done is not None:
                return done

    def _next(self, rollout: Rollout) -> tuple[Action, Observed]:
        observed = self._stage.observe()
        if found := conflict(rollout, observed):
            raise ConflictError(
                f"{rollout.title}: somebody else changed the server: {found}. Nothing is overwritten: undo "
                "their change and run this again, or keep it with `abort --leave`"
            )
        now = self._now()
        progress = Progress(self._applied, now - self._since, now - self._repeated >= self._repeat_s)
        return next_action(rollout, observed, progress, self._limits), observed

    def _act(self, rollout: Rollout, action: Action, observed: Observed) -> Rollout | None:
        match action:
            case Wait(why):
                self._tell(f"waiting for {why}")
                self._sleep(self._poll_s)
            case Apply(placement, why):
                self._apply(rollout, placement, why, observed)
            case Check():
                self._run_check(rollout)
            case Compare():
                self._compare(rollout)
            case Decide(decision, reason):
                self._decided(rollout, decision, reason)
            case Hold():
                return rollout
            case Stop(reason):
                raise StuckError(f"{rollout.title}: {reason}")
            case Finish():
                outcome = Outcome.PROMOTED if rollout.decision is Decision.PROMOTE else Outcome.ABORTED
                ended = replace(rollout, outcome=outcome, ended_at=utc_now())
                self._writer.end(ended)
                return ended
        return None

    def _apply(self, rollout: Rollout, placement: Placement, why: str, observed: Observed) -> None:
        self._tell(why)
        if rollout.intent != placement:
            before = observed.configured or rollout.intent or rollout.before
            rollout = replace(rollout, before=before, intent=placement)
            self._writer.update(rollout)
        now = self._now()
        if self._applied != placement:
            self._applied, self._since = placement, now
        self._repeated = now
        try:
            self._stage.apply(placement, observed.configured)
        except (RefusedError, InternalError) as error:
            self._refused(rollout, error)
        except RetryError:
            self._repeated -= self._repeat_s  # nobody knows whether it was done: ask again, it does no harm
            raise
        else:
            self._refusals = 0

    def _refused(self, rollout: Rollout, error: Exception) -> None:
        """A version may have gone between the look and the request; then the next look tells."""
        self._applied = None
        self._refusals += 1
        if self._refusals < _REFUSALS:
            self._sleep(self._poll_s)
        elif rollout.decision is Decision.ABORT:
            raise StuckError(f"{rollout.title} cannot be aborted: {error}") from error
        else:
            self._decided(rollout, Decision.ABORT, str(error))

    def _run_check(self, rollout: Rollout) -> None:
        self._tell(f"check version {rollout.version}")
        try:
            checked = self._check(rollout.version)
        except CheckError as error:
            self._decided(rollout, Decision.ABORT, str(error))
            return
        self._tell(f"checked version {rollout.version}: {checked}")
        self._writer.update(replace(rollout, checked=checked))

    def _compare(self, rollout: Rollout) -> None:
        if self._shadow is None or rollout.previous is None:
            raise JournalError(f"{rollout.title} is to be compared, but no images are given")
        self._tell(f"compare version {rollout.version} with version {rollout.previous}")
        try:
            report = self._shadow(rollout.version, rollout.previous)
        except RetryError:
            raise
        except CheckError as error:
            self._decided(rollout, Decision.ABORT, str(error))
            return
        except ClientError as error:
            self._decided(rollout, Decision.ABORT, f"it cannot be compared: {error}")
            return
        self._writer.update(replace(rollout, report=report))

    def _decided(self, rollout: Rollout, decision: Decision, reason: str) -> None:
        self._tell(f"{decision}: {reason}")
        self._writer.update(replace(rollout, decision=decision, reason=reason))
        self._applied, self._since, self._refusals = None, self._now(), 0

    def _bear(self, error: RetryError) -> None:
        """A server that restarts comes back; one that does not ends the run, not the rollout."""
        now = self._now()
        if self._lost_since is None:
            self._lost_since = now
        if now - self._lost_since >= self._patience_s or self._is_lasting(error):
            raise error
        self._tell(f"waiting for the server: {error}")
        self._sleep(self._poll_s)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._listener(text)


def utc_now() -> str:
    """The time, as the journal has it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
