"""Takes a rollout on an overlay's files as far as it goes by itself, one file at a time.

What is wanted and decided is in the journal before a file is touched, and where a rollout stands is read
from the files each time: killed anywhere, another `run` goes on, and one after a decision to abort goes back.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from .cluster import CANARY_DEPLOYMENT
from .drive import CheckError, decide, utc_now
from .errors import ConflictError, JournalError, NotReadyError
from .gate import Report
from .journal import JournalWriter
from .overlay import CANARY_ENV, Overlay, Tracks
from .overlay_plan import Ramp, Share, changed_by_others, is_to_check, next_edit
from .record import Decision, Outcome, Rollout

__all__ = ["JOURNAL", "Applied", "OverlayDriver", "decide_on_overlay"]

_LOOK_S = 5.0  # at a canary that has calls
JOURNAL = "rollouts.json"
"""The journal's name in an overlay's folder. It is committed with the files: a revert takes both back."""


class Applied(Protocol):
    """Where the files are applied, such as a Cluster."""

    def observe(self) -> Tracks | None:
        """What is there now, whoever did it; None if nothing is."""
        ...

    def settle(self, tracks: Tracks) -> None:
        """Make it as the files are, which say `tracks`, and wait until the pods are ready."""
        ...

    def canary_trouble(self) -> str:
        """Why no pod of the canary can answer, in words; "" if one can."""
        ...


def decide_on_overlay(overlay: Overlay, writer: JournalWriter, decision: Decision, reason: str) -> Rollout:
    """As `decide`; also raises JournalError if there is no canary to promote, OverlayError."""
    current = writer.record.current
    if decision is Decision.PROMOTE and current is not None and current.decision is None:
        tracks = overlay.read()
        if current.version not in (tracks.stable, tracks.canary):
            raise JournalError(
                f"{current.title}: version {current.version} is on no track yet: run `start` again, "
                "it goes on"
            )
    return decide(writer, decision, reason)


class OverlayDriver:
    """Changes the files, has them applied, compares, decides.

    check: sees whether the version's files are there and whole, and says what it looked at; raises
        CheckError. Asked before the version is on a track; None where nobody can tell.
    share: what the canary is to have. ramp: how its share of the calls grows instead; it needs a cluster.
    cluster: where what the files say is applied; None where somebody else does that.
    shadow: compares two versions (canary, stable) as `shadow.compare` does, and may raise CheckError, too;
        None where that is for later.
    listener: told each step in words.
    """

    def __init__(
        self,
        overlay: Overlay,
        writer: JournalWriter,
        *,
        check: Callable[[int], str] | None = None,
        share: Share | None = None,
        ramp: Ramp | None = None,
        cluster: Applied | None = None,
        shadow: Callable[[int, int], Report] | None = None,
        listener: Callable[[str], None] = lambda text: None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._overlay = overlay
        self._writer = writer
        self._check = check
        self._share = share or Share()
        self._ramp = ramp
        self._held: set[int] = set()
        self._cluster = cluster
        self._shadow = shadow
        self._is_compared = False
        self._listener = listener
        self._now = now
        self._sleep = sleep

    def run(self) -> Rollout:
        """Go on until it is over, or until somebody must decide; then the rollout's `outcome` is None.

        A version that is missing or damaged is not begun with. A canary whose pods are not ready in time, or
        that does not pass the gate, is aborted.
        Raises ConflictError (somebody else changed the files or the cluster, or owns what is to be applied),
        NotReadyError (of stable), ClusterError, OverlayError, JournalError, ClientError (nothing to compare
        with). The journal stays as it is then, and another `run` goes on.
        """
        while True:
            rollout = self._writer.record.current
            if rollout is None:
                raise JournalError("no rollout is under way")
            tracks = self._overlay.read()
            if found := changed_by_others(rollout, tracks):
                raise ConflictError(
                    f"{rollout.title}: somebody else changed {self._overlay.folder}: {found}. Nothing is "
                    "overwritten: undo their change and run this again, or keep it with `abort --leave`"
                )
            live = None if self._cluster is None else self._cluster.observe()
            if live is not None and (found := changed_by_others(rollout, live)):
                raise ConflictError(
                    f"{rollout.title}: somebody else changed the cluster: {found}. Nothing is overwritten: "
                    f"if {self._overlay.folder} is right, `graftserve rollout apply` brings it there, and "
                    "this goes on"
                )
            if self._check is not None and is_to_check(rollout, tracks):
                if (refused := self._checked(rollout, self._check)) is not None:
                    return refused
            elif edit := next_edit(rollout, tracks, self._share_now(rollout, tracks)):
                if edit.file == CANARY_ENV and rollout.decision is Decision.PROMOTE and self._cluster:
                    self._cluster.settle(tracks)  # the canary keeps its calls until stable's pods are ready
                self._listener(str(edit))
                self._overlay.write(edit)
            elif (done := self._files_are_right(rollout, tracks)) is not None:
                return done

    def _checked(self, rollout: Rollout, check: Callable[[int], str]) -> Rollout | None:
        """None if it may go on; what is refused is over, since nothing was changed for it."""
        self._listener(f"check version {rollout.version}")
        try:
            checked = check(rollout.version)
        except CheckError as error:
            reason = str(error)
            self._listener(f"{Decision.ABORT}: {reason}")
            refused = replace(
                rollout, decision=Decision.ABORT, reason=reason, outcome=Outcome.ABORTED, ended_at=utc_now()
            )
            self._writer.end(refused)
            return refused
        self._listener(f"version {rollout.version}: {checked}")
        self._writer.update(replace(rollout, checked=checked))
        return None

    def _files_are_right(self, rollout: Rollout, tracks: Tracks) -> Rollout | None:
        """None if there is more to do."""
        if self._cluster is not None and (trouble := self._settle(self._cluster, rollout, tracks)):
            self._decided(rollout, Decision.ABORT, trouble)
            return None
        if rollout.decision is not None:
            outcome = Outcome.PROMOTED if rollout.decision is Decision.PROMOTE else Outcome.ABORTED
            ended = replace(rollout, outcome=outcome, ended_at=utc_now())
            self._writer.end(ended)
            return ended
        if (compare := self._comparison(rollout)) is not None:
            self._listener(f"compare version {rollout.version} with version {rollout.previous}")
            try:
                report = compare()
            except CheckError as error:
                self._decided(rollout, Decision.ABORT, str(error))
                return None
            self._is_compared = True
            rollout = replace(rollout, report=report)
            self._writer.update(rollout)
        if rollout.gate is not None:
            if rollout.report is None:
                return rollout
            if failures := rollout.gate.failures(rollout.report):
                self._decided(rollout, Decision.ABORT, "; ".join(failures))
                return None
        if next_edit(rollout, tracks, self._share_now(rollout, tracks)) is not None:
            return None  # now it may have more calls
        if not rollout.auto:
            return rollout
        reason = "not compared" if rollout.gate is None else "the gate is passed"
        self._decided(rollout, Decision.PROMOTE, reason)
        return None

    def _settle(self, cluster: Applied, rollout: Rollout, tracks: Tracks) -> str:
        """Apply the files, let the canary have its calls for a while; returns what ends its trial, or ""."""
        is_on_trial = rollout.decision is None
        try:
            cluster.settle(tracks)
        except NotReadyError as error:
            if not is_on_trial or error.deployment != CANARY_DEPLOYMENT:
                raise
            return str(error)
        if self._ramp is None or not is_on_trial or not self._is_to_hold(tracks):
            return ""
        self._listener(f"hold {tracks.percent:g}% for {self._ramp.hold_s:g} s")
        end = self._now() + self._ramp.hold_s
        while (left_s := end - self._now()) > 0:
            if trouble := cluster.canary_trouble():
                return f"with {tracks.percent:g}% of the calls: {trouble}"
            self._sleep(min(_LOOK_S, left_s))
        self._held.add(tracks.weight)
        self._is_compared = False
        return ""

    def _share_now(self, rollout: Rollout, tracks: Tracks) -> Share:
        """More calls are for a canary that is compared, where that is to come, and had those before."""
        if self._comparison(rollout) is not None or self._is_to_hold(tracks):
            return replace(self._share, weight=None)
        if self._ramp is None:
            return self._share
        percent = tracks.percent if tracks.canary == rollout.version else 0.0
        return replace(self._share, weight=self._ramp.after(percent))

    def _comparison(self, rollout: Rollout) -> Callable[[], Report] | None:
        """What is still to compare."""
        if self._shadow is None or self._is_compared or rollout.gate is None or rollout.previous is None:
            return None
        return partial(self._shadow, rollout.version, rollout.previous)

    def _is_to_hold(self, tracks: Tracks) -> bool:
        return self._ramp is not None and tracks.weight > 0 and tracks.weight not in self._held

    def _decided(self, rollout: Rollout, decision: Decision, reason: str) -> None:
        self._listener(f"{decision}: {reason}")
        self._writer.update(replace(rollout, decision=decision, reason=reason))
