"""What is changed in an overlay's files: the lines of one, and which of two comes next."""

from dataclasses import replace
from itertools import product

import pytest

from graftserve.k8s.rollout import Decision, Kind, OverlayError, Rollout, Share, Tracks
from graftserve.k8s.rollout.env_file import edited, parse_env
from graftserve.k8s.rollout.overlay import Edit
from graftserve.k8s.rollout.overlay_plan import Ramp, changed_by_others, goal, is_to_check, next_edit

NONE = Tracks(3)
ROLLOUT = Rollout(1, 4, 3)
PROMOTE = replace(ROLLOUT, decision=Decision.PROMOTE)
ABORT = replace(ROLLOUT, decision=Decision.ABORT)
UNDO = Rollout(2, 3, 4, kind=Kind.UNDO, decision=Decision.PROMOTE)


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("A=1\nB=2\n", {"A": "3"}, "A=3\nB=2\n"),
        ("A=1\nB=2\n", {"B": "", "A": "x=y"}, "A=x=y\nB=\n"),
        ("# A=9\n\nB=2\n  A=1\n#end", {"A": "3"}, "# A=9\n\nB=2\n  A=3\n#end"),
        ("A=1\r\nB=2\r\n", {"A": "3"}, "A=3\r\nB=2\r\n"),
        ("\ufeffA=1\nAB=1", {"A": "3"}, "\ufeffA=3\nAB=1"),
        ("\ufeff# about\nA=", {"A": "3"}, "\ufeff# about\nA=3"),
        ("A=1 # not a comment\n", {"A": "3"}, "A=3\n"),
        ("A=1\nB=two words \n", {}, "A=1\nB=two words \n"),
    ],
)
def test_only_values_change(text: str, changes: dict[str, str], expected: str) -> None:
    assert edited(text, changes, "f") == expected


def test_values_are_what_kustomize_makes_of_them() -> None:
    assert parse_env('# c\n A=1=2 \nB="q"\nC=\n', "f") == {"A": "1=2 ", "B": '"q"', "C": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\nA=2\n", "f, line 2: A is there twice"),
        ("B=1\nA\n", "f, line 2: expected KEY=VALUE, got 'A'"),
        ("=1\n", "f, line 1: expected KEY=VALUE"),
        ("B=1\n", "f: expected a line A=, got none"),
    ],
)
def test_what_is_not_understood_is_said(text: str, message: str) -> None:
    with pytest.raises(OverlayError, match=message):
        edited(text, {"A": "1"}, "f")


@pytest.mark.parametrize(
    ("rollout", "tracks", "share", "edit"),
    [
        # start
        (ROLLOUT, NONE, Share(), ("canary.env", {"MODEL_VERSION": "4", "REPLICAS": "1"})),
        (
            ROLLOUT,
            NONE,
            Share(2, 5),
            (
                "canary.env",
                {"MODEL_VERSION": "4", "REPLICAS": "2", "STABLE_WEIGHT": "95", "WEIGHT": "5"},
            ),
        ),
        (ROLLOUT, Tracks(3, 4, 1), Share(), None),
        (ROLLOUT, Tracks(3, 4, 0, 7, 3), Share(), None),  # somebody's own choice
        (
            ROLLOUT,
            Tracks(3, 4, 6, 95, 5),
            Share(weight=20),
            ("canary.env", {"STABLE_WEIGHT": "80", "WEIGHT": "20"}),
        ),
        (ROLLOUT, Tracks(3, 4, 1, 95, 5), Share(replicas=2), ("canary.env", {"REPLICAS": "2"})),
        # promote: stable first
        (PROMOTE, Tracks(3, 4, 1, 95, 5), Share(), ("stable.env", {"MODEL_VERSION": "4"})),
        (
            PROMOTE,
            Tracks(4, 4, 1, 95, 5),
            Share(),
            (
                "canary.env",
                {"MODEL_VERSION": "", "REPLICAS": "0", "STABLE_WEIGHT": "100", "WEIGHT": "0"},
            ),
        ),
        (PROMOTE, Tracks(4, 4, 1), Share(), ("canary.env", {"MODEL_VERSION": "", "REPLICAS": "0"})),
        (PROMOTE, Tracks(4), Share(), None),
        # abort, from before, between and after the files of a promotion
        (ABORT, Tracks(3, 4, 1), Share(), ("canary.env", {"MODEL_VERSION": "", "REPLICAS": "0"})),
        (ABORT, Tracks(4, 4, 1), Share(), ("stable.env", {"MODEL_VERSION": "3"})),
        (ABORT, Tracks(4), Share(), ("stable.env", {"MODEL_VERSION": "3"})),
        (ABORT, NONE, Share(9, 9), None),
        # undo
        (UNDO, Tracks(4), Share(), ("stable.env", {"MODEL_VERSION": "3"})),
        (UNDO, Tracks(3), Share(), None),
    ],
)
def test_the_next_edit(
    rollout: Rollout, tracks: Tracks, share: Share, edit: tuple[str, dict[str, str]] | None
) -> None:
    assert next_edit(rollout, tracks, share) == (None if edit is None else Edit(*edit))


def _after(tracks: Tracks, edit: Edit) -> Tracks:
    if edit.file == "stable.env":
        return replace(tracks, stable=int(edit.values["MODEL_VERSION"]))
    names = {"REPLICAS": "replicas", "STABLE_WEIGHT": "stable_weight", "WEIGHT": "weight"}
    numbers = {names[key]: int(value) for key, value in edit.values.items() if key in names}
    version = edit.values.get("MODEL_VERSION", tracks.canary)
    return replace(tracks, canary=int(version) if version else None, **numbers)


@pytest.mark.parametrize("decision", [None, Decision.PROMOTE, Decision.ABORT])
@pytest.mark.parametrize(("stable", "canary"), list(product((3, 4), (None, 4))))
def test_every_state_between_leads_to_the_goal(
    decision: Decision | None, stable: int, canary: int | None
) -> None:
    rollout = replace(ROLLOUT, decision=decision)
    tracks = Tracks(stable, canary, 0 if canary is None else 2, 90, 10)
    if changed_by_others(rollout, tracks):
        assert (decision, stable) == (None, 4)
        return
    for _ in range(2):
        if edit := next_edit(rollout, tracks, Share()):
            tracks = _after(tracks, edit)
            assert changed_by_others(rollout, tracks) is None
    assert next_edit(rollout, tracks, Share()) is None
    assert tracks == goal(rollout, tracks, Share())


@pytest.mark.parametrize(
    ("rollout", "tracks", "message"),
    [
        (ROLLOUT, Tracks(5, 4), "stable is version 5, expected 3"),
        (ROLLOUT, Tracks(4, 4), "stable is version 4, expected 3"),
        (ROLLOUT, Tracks(3, 5), "the canary is version 5, expected 4 or none"),
        (PROMOTE, Tracks(5), "stable is version 5, expected 3 or 4"),
        (PROMOTE, Tracks(3, 3), "the canary is version 3, expected 4 or none"),
    ],
)
def test_what_somebody_else_wrote_is_seen(rollout: Rollout, tracks: Tracks, message: str) -> None:
    assert changed_by_others(rollout, tracks) == message


@pytest.mark.parametrize("share", [{"replicas": -1}, {"weight": 101}, {"weight": -1}])
def test_a_share_is_in_its_range(share: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected (replicas|weight)"):
        Share(**share)


@pytest.mark.parametrize("share", [{}, {"replicas": 0, "weight": 0}, {"replicas": 1}, {"weight": 100}])
def test_a_share_may_be_at_the_ends_of_its_range(share: dict[str, int]) -> None:
    assert Share(**share) == Share(share.get("replicas"), share.get("weight"))


@pytest.mark.parametrize(
    ("percents", "hold_s"),
    [
        ((), 1),
        ((0, 5), 1),
        ((-1,), 1),
        ((5, 5), 1),
        ((10, 5), 1),
        ((50, 101), 1),
        ((5, 50), -1),
        ((5, 50), float("nan")),
    ],
)
def test_a_ramp_that_is_none(percents: tuple[int, ...], hold_s: float) -> None:
    with pytest.raises(ValueError, match=r"expected (percentages that rise|hold_s of 0 or more)"):
        Ramp(percents, hold_s)


def test_a_ramp_goes_on_from_what_the_canary_has() -> None:
    ramp = Ramp((1, 5, 100), hold_s=0)
    steps = {percent: ramp.after(percent) for percent in (0, 1, 2, 5, 5.5, 99, 100)}
    assert steps == {0: 1, 1: 5, 2: 5, 5: 100, 5.5: 100, 99: 100, 100: None}
    assert Ramp((5,)).hold_s == 300


@pytest.mark.parametrize(
    ("rollout", "tracks", "looks"),
    [
        (ROLLOUT, NONE, True),
        (PROMOTE, NONE, True),
        (ABORT, NONE, False),
        (replace(ROLLOUT, checked="the sums"), NONE, False),
        (ROLLOUT, Tracks(3, 4, 1), False),  # what runs was looked at
        (PROMOTE, Tracks(4), False),
    ],
)
def test_files_are_looked_at_before_a_track_names_them(rollout: Rollout, tracks: Tracks, looks: bool) -> None:
    assert is_to_check(rollout, tracks) == looks
