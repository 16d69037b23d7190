"""What to change next in an overlay's files: a pure function of what is decided and what they say.

Two files cannot be renamed at once, so every state between them must be one that may be applied, and one from
which both ways lead. Stable is written first: between the two files of a promotion both tracks name the new
version, calls are answered as before, and either command goes on from there. The other order would take the
canary away first, which looks as an abort does.
"""

from dataclasses import dataclass
from itertools import pairwise

from .overlay import CANARY_ENV, STABLE_ENV, Edit, Tracks
from .record import Decision, Rollout

__all__ = ["Ramp", "Share", "changed_by_others", "goal", "is_to_check", "next_edit"]


@dataclass(frozen=True)
class Share:
    """What the canary is to have; None for what it has, or, at first, one pod and no calls.

    replicas: pods. weight: the percentage of calls, in [0, 100].
    Raises ValueError for values out of range.
    """

    replicas: int | None = None
    weight: int | None = None

    def __post_init__(self) -> None:
        if self.replicas is not None and self.replicas < 0:
            raise ValueError(f"expected replicas of 0 or more, got {self.replicas}")
        if self.weight is not None and not 0 <= self.weight <= 100:
            raise ValueError(f"expected weight in [0, 100], got {self.weight}")


@dataclass(frozen=True)
class Ramp:
    """How the canary's share grows by itself. percents: of the calls, rising, each in [1, 100].

    hold_s: how long each of them lasts at least. Raises ValueError for other values.
    """

    percents: tuple[int, ...]
    hold_s: float = 300.0

    def __post_init__(self) -> None:
        rises = all(before < after for before, after in pairwise((0, *self.percents)))
        if not self.percents or not rises or self.percents[-1] > 100:
            raise ValueError(f"expected percentages that rise, each in [1, 100], got {list(self.percents)}")
        if not self.hold_s >= 0:
            raise ValueError(f"expected hold_s of 0 or more, got {self.hold_s}")

    def after(self, percent: float) -> int | None:
        """The first step above what it has; None at the end."""
        return next((step for step in self.percents if step > percent), None)


def is_to_check(rollout: Rollout, tracks: Tracks) -> bool:
    """Whether to look at the version's files now: none was looked at, and no track names it yet."""
    is_wanted = rollout.decision is not Decision.ABORT and not rollout.checked
    return is_wanted and rollout.version not in (tracks.stable, tracks.canary)


def goal(rollout: Rollout, tracks: Tracks, share: Share) -> Tracks:
    """What the files should say, by what is decided so far."""
    if rollout.decision is Decision.PROMOTE:
        return Tracks(rollout.version)
    stable = tracks.stable if rollout.previous is None else rollout.previous
    if rollout.decision is Decision.ABORT:
        return Tracks(stable)
    now = tracks if tracks.canary == rollout.version else Tracks(stable, rollout.version, 1)
    weights = (now.stable_weight, now.weight) if share.weight is None else (100 - share.weight, share.weight)
    return Tracks(
        stable, rollout.version, now.replicas if share.replicas is None else share.replicas, *weights
    )


def next_edit(rollout: Rollout, tracks: Tracks, share: Share) -> Edit | None:
    """The one file to change now; None if both say what they should."""
    wanted = goal(rollout, tracks, share)
    if tracks.stable != wanted.stable:
        return Edit(STABLE_ENV, {"MODEL_VERSION": str(wanted.stable)})
    before, after = _canary_values(tracks), _canary_values(wanted)
    changes = {key: value for key, value in after.items() if before[key] != value}
    return Edit(CANARY_ENV, changes) if changes else None


def changed_by_others(rollout: Rollout, tracks: Tracks) -> str | None:
    """What the files, or the cluster, say that no step of this rollout has written; None if nothing.

    Replicas and weights are everybody's to change.
    """
    stables = {rollout.previous} if rollout.decision is None else {rollout.previous, rollout.version}
    if tracks.stable not in stables:
        expected = " or ".join(map(str, sorted(version for version in stables if version is not None)))
        return f"stable is version {tracks.stable}, expected {expected}"
    if tracks.canary not in (None, rollout.version):
        return f"the canary is version {tracks.canary}, expected {rollout.version} or none"
    return None


def _canary_values(tracks: Tracks) -> dict[str, str]:
    return {
        "MODEL_VERSION": "" if tracks.canary is None else str(tracks.canary),
        "REPLICAS": str(tracks.replicas),
        "STABLE_WEIGHT": str(tracks.stable_weight),
        "WEIGHT": str(tracks.weight),
    }
