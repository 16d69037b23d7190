"""What the plan says: snapshots in, one action out; and whether it converges from wherever it is started."""

import itertools
from dataclasses import replace

import pytest

from graftserve.client import VersionState, VersionStatus
from graftserve.k8s.rollout.gate import Gate, Report
from graftserve.k8s.rollout.plan import (
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
    goal,
    next_action,
)
from graftserve.k8s.rollout.record import Decision, Rollout, rollout_from_json, rollout_to_json
from graftserve.k8s.rollout.stage import Observed, Placement

LIMITS = Limits(load_timeout_s=100, drain_s=5, stale_s=10)
STATES = {
    "S": VersionState.START,
    "L": VersionState.LOADING,
    "A": VersionState.AVAILABLE,
    "U": VersionState.UNLOADING,
    "E": VersionState.END,
    "X": VersionState.END,  # with an error
}
GOOD = Report(100, 100, 1.0, 0.01, "a.jpg", 1.0, 5.0, 6.0, 5.0, 6.0, 0)
BAD = replace(GOOD, agreement=0.5, disagreements=(("a.jpg", "rose", "tulip"),))


def seen(versions: str, stable: int | None = None, canary: int | None = None, **more) -> Observed:
    """seen("3A 4L", 3): version 3 is AVAILABLE and stable, version 4 LOADING."""
    items = {}
    for word in versions.split():
        number, state = int(word[:-1]), word[-1]
        error = ("DATA_LOSS", "broken file") if state == "X" else ("OK", "")
        items[number] = VersionStatus(number, STATES[state], *error)
    return Observed(items, stable, canary, **more)


def place(*versions: int, stable: int | None = None, canary: int | None = None) -> Placement:
    return Placement(frozenset(versions), stable, canary)


FRESH = Rollout(1, 4, 3, "now", checked="whole", gate=Gate(), found=frozenset({3}))
LOADED = place(3, 4, stable=3, canary=4)


@pytest.mark.parametrize(
    ("case", "rollout", "observed", "progress", "action"),
    [
        ("first of all", replace(FRESH, checked=""), seen("3A", 3), Progress(), Check()),
        ("load", FRESH, seen("3A", 3), Progress(), Apply(place(3, 4, stable=3), "load version 4")),
        (
            "the server has not looked yet",
            FRESH,
            seen("3A", 3),
            Progress(place(3, 4, stable=3), 1),
            Wait("the server to load version 4"),
        ),
        (
            "it may have missed it",
            FRESH,
            seen("3A", 3),
            Progress(place(3, 4, stable=3), 11, repeat=True),
            Apply(place(3, 4, stable=3), "load version 4"),
        ),
        ("loading", FRESH, seen("3A 4L", 3), Progress(), Wait("version 4 to be AVAILABLE")),
        (
            "it never comes",
            FRESH,
            seen("3A 4L", 3),
            Progress(place(3, 4, stable=3), 101),
            Decide(Decision.ABORT, "version 4 was not AVAILABLE within 100 s: it is still LOADING"),
        ),
        (
            "its folder is missing",
            FRESH,
            seen("3A", 3),
            Progress(place(3, 4, stable=3), 101),
            Decide(
                Decision.ABORT,
                "version 4 was not AVAILABLE within 100 s: the server does not list it: is its folder there?",
            ),
        ),
        (
            "it fails to load",
            FRESH,
            seen("3A 4X", 3),
            Progress(place(3, 4, stable=3), 1),
            Decide(Decision.ABORT, "version 4 could not be loaded: DATA_LOSS: broken file"),
        ),
        (
            "an error of the past is no error",
            FRESH,
            seen("3A 4X", 3),
            Progress(),
            Apply(place(3, 4, stable=3), "load version 4"),
        ),
        (
            "nor while the server has not looked yet",
            replace(FRESH, ended_before=True),
            seen("3A 4X", 3),
            Progress(place(3, 4, stable=3), 9),
            Wait("the server to load version 4"),
        ),
        (
            "but after that",
            replace(FRESH, ended_before=True),
            seen("3A 4X", 3),
            Progress(place(3, 4, stable=3), 11),
            Decide(Decision.ABORT, "version 4 could not be loaded: DATA_LOSS: broken file"),
        ),
        (
            "the version before is lost: going back would not help",
            FRESH,
            seen("3X 4A"),
            Progress(place(3, 4), 11),
            Stop("version 3 could not be loaded: DATA_LOSS: broken file"),
        ),
        (
            "nor if it is the higher one",
            replace(FRESH, version=3, previous=4),
            seen("3A 4X"),
            Progress(place(3, 4), 11),
            Stop("version 4 could not be loaded: DATA_LOSS: broken file"),
        ),
        (
            "there is time until the limit",
            FRESH,
            seen("3A 4L", 3),
            Progress(place(3, 4, stable=3), 100),
            Wait("version 4 to be AVAILABLE"),
        ),
        (
            "also for what the server does not list",
            FRESH,
            seen("3A", 3),
            Progress(place(3, 4, stable=3), 100),
            Wait("the server to load version 4"),
        ),
        (
            "loading, as it was asked to",
            FRESH,
            seen("3A 4L", 3),
            Progress(place(3, 4, stable=3), 1),
            Wait("version 4 to be AVAILABLE"),
        ),
        (
            "a version that is not the new one may have ended before",
            FRESH,
            seen("3X 4A"),
            Progress(place(3, 4), 9),
            Wait("the server to load version 3"),
        ),
        (
            "so may a higher one",
            replace(FRESH, version=3, previous=4),
            seen("3A 4X"),
            Progress(place(3, 4), 9),
            Wait("the server to load version 4"),
        ),
        (
            "nor at the end of the time that it has for that",
            replace(FRESH, ended_before=True),
            seen("3A 4X", 3),
            Progress(place(3, 4, stable=3), 10),
            Wait("the server to load version 4"),
        ),
        (
            "it still unloads from before, 50 s long",
            FRESH,
            seen("3A 4U", 3),
            Progress(place(3, 4, stable=3), 50),
            Wait("the server to load version 4"),
        ),
        (
            "it still unloads from before, 100 s long",
            FRESH,
            seen("3A 4U", 3),
            Progress(place(3, 4, stable=3), 100),
            Wait("the server to load version 4"),
        ),
        (
            "it unloads for too long",
            FRESH,
            seen("3A 4U", 3),
            Progress(place(3, 4, stable=3), 101),
            Decide(Decision.ABORT, "version 4 was not AVAILABLE within 100 s: it is still UNLOADING"),
        ),
        ("label", FRESH, seen("3A 4A", 3), Progress(), Apply(LOADED, "label version 4 canary")),
        (
            "the label takes its time",
            FRESH,
            seen("3A 4A", 3),
            Progress(LOADED, 100),
            Wait("the server to label version 4 canary"),
        ),
        (
            "the label never comes",
            FRESH,
            seen("3A 4A", 3),
            Progress(LOADED, 101),
            Stop("the labels do not follow within 100 s"),
        ),
        (
            "label both",
            FRESH,
            seen("3A 4A"),
            Progress(),
            Apply(LOADED, "label version 3 stable and label version 4 canary"),
        ),
        ("compare", FRESH, seen("3A 4A", 3, 4), Progress(LOADED), Compare()),
        ("pass", replace(FRESH, report=GOOD), seen("3A 4A", 3, 4), Progress(LOADED), Hold()),
        (
            "pass and go on",
            replace(FRESH, report=GOOD, auto=True),
            seen("3A 4A", 3, 4),
            Progress(LOADED),
            Decide(Decision.PROMOTE, "the gate is passed"),
        ),
        (
            "fail, whoever decides",
            replace(FRESH, report=BAD),
            seen("3A 4A", 3, 4),
            Progress(LOADED),
            Decide(
                Decision.ABORT,
                "agreement 0.5000 on 100 images, at least 0.98 needed; such as a.jpg: rose became tulip",
            ),
        ),
        ("no gate", replace(FRESH, gate=None), seen("3A 4A", 3, 4), Progress(LOADED), Hold()),
        (
            "promote: the label first",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3A 4A", 3, 4),
            Progress(),
            Apply(place(3, 4, stable=4), "label version 4 stable and take the label canary away"),
        ),
        (
            "promote: drain",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3A 4A", 4),
            Progress(place(3, 4, stable=4), 4),
            Wait("calls of version 3 to end"),
        ),
        (
            "promote: unload",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3A 4A", 4),
            Progress(place(3, 4, stable=4), 5),
            Apply(place(4, stable=4), "unload version 3"),
        ),
        (
            "promote: gone?",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3U 4A", 4),
            Progress(place(4, stable=4), 1),
            Wait("version 3 to be unloaded"),
        ),
        (
            "promote: one by one",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("2U 3U 4A", 4),
            Progress(place(4, stable=4), 100),
            Wait("version 2 to be unloaded"),
        ),
        (
            "promote: the server has not looked yet",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3A 4A", 4),
            Progress(place(4, stable=4), 1),
            Wait("version 3 to be unloaded"),
        ),
        (
            "promote: it may have missed it",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3A 4A", 4),
            Progress(place(4, stable=4), 11, repeat=True),
            Apply(place(4, stable=4), "unload version 3"),
        ),
        (
            "promote: what unloads is not asked to again",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3U 4A", 4),
            Progress(place(4, stable=4), 11, repeat=True),
            Wait("version 3 to be unloaded"),
        ),
        (
            "promote: two never go",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("2U 3L 4A", 4),
            Progress(place(4, stable=4), 101),
            Stop(
                "version 2 is still UNLOADING after 100 s; see what the server is doing, then run this again"
            ),
        ),
        (
            "promote: it may have missed two",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("2A 3A 4A", 4),
            Progress(place(4, stable=4), 11, repeat=True),
            Apply(place(4, stable=4), "unload version 2"),
        ),
        (
            "promote: it never goes",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3U 4A", 4),
            Progress(place(4, stable=4), 101),
            Stop(
                "version 3 is still UNLOADING after 100 s; see what the server is doing, then run this again"
            ),
        ),
        (
            "promote: done",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3E 4A", 4),
            Progress(place(4, stable=4), 1),
            Finish(),
        ),
        (
            "promote: a server that restarted lost the new version, and cannot load it",
            replace(FRESH, decision=Decision.PROMOTE),
            seen("3A 4X"),
            Progress(place(3, 4), 1),
            Decide(Decision.ABORT, "version 4 could not be loaded: DATA_LOSS: broken file"),
        ),
        (
            "abort after the label moved: back first",
            replace(FRESH, decision=Decision.ABORT, intent=LOADED),
            seen("3A 4A", 4),
            Progress(),
            Apply(place(3, 4, stable=3), "label version 3 stable"),
        ),
        (
            "abort after the old one was unloaded: load it again",
            replace(FRESH, decision=Decision.ABORT, intent=LOADED),
            seen("3E 4A", 4),
            Progress(),
            Apply(place(3, 4, stable=4), "load version 3"),
        ),
        (
            "abort of what never loaded",
            replace(FRESH, decision=Decision.ABORT, intent=LOADED),
            seen("3A 4X", 3),
            Progress(),
            Apply(place(3, stable=3), "keep it so"),
        ),
        (
            "abort before anything was done",
            replace(FRESH, decision=Decision.ABORT, checked=""),
            seen("3A", 3),
            Progress(),
            Finish(),
        ),
        (
            "abort, and the old one is broken, too",
            replace(FRESH, decision=Decision.ABORT, intent=LOADED),
            seen("3X 4A", 4),
            Progress(place(3, 4, stable=4), 11),
            Stop("version 3 could not be loaded: DATA_LOSS: broken file"),
        ),
        (
            "others stay",
            replace(FRESH, decision=Decision.PROMOTE, keep=frozenset({1})),
            seen("1A 3A 4A", 4),
            Progress(place(1, 3, 4, stable=4), 9),
            Apply(place(1, 4, stable=4), "unload version 3"),
        ),
        (
            "the first version",
            replace(FRESH, previous=None),
            seen("4A", None, 4),
            Progress(place(4, canary=4)),
            Decide(Decision.PROMOTE, "nothing was stable before it"),
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_the_next_step(case, rollout, observed, progress, action) -> None:
    assert next_action(rollout, observed, progress, LIMITS) == action


@pytest.mark.parametrize("decision", [None, Decision.PROMOTE, Decision.ABORT])
@pytest.mark.parametrize("stable", [None, 3, 4])
@pytest.mark.parametrize("canary", [None, 3, 4])
def test_it_converges_from_anywhere_and_never_breaks_a_label(decision, stable, canary) -> None:
    """A server that takes a step to load and one to unload, begun in every pair of states."""
    for old, new in itertools.product("SLAUE", repeat=2):
        states = {3: old, 4: new}
        if any(label is not None and states[label] != "A" for label in (stable, canary)):
            continue  # no server gives such a label
        labels = {"stable": stable, "canary": canary}
        rollout = replace(FRESH, decision=decision, report=GOOD, intent=LOADED)
        applied, waited_s = None, 0.0
        for _ in range(40):
            words = " ".join(f"{version}{state}" for version, state in states.items())
            action = next_action(
                rollout, seen(words, labels["stable"], labels["canary"]), Progress(applied, waited_s), LIMITS
            )
            if isinstance(action, Hold | Finish):
                break
            assert isinstance(action, Apply | Wait), (old, new, action)
            waited_s += 1
            if isinstance(action, Apply):
                wanted = action.placement
                for label in (wanted.stable, wanted.canary):
                    assert label is None or (label in wanted.versions and states[label] == "A")
                lost = {labels["stable"], labels["canary"]} - {None} - wanted.versions
                assert not lost, f"{lost} are unloaded with their label"
                labels = {"stable": wanted.stable, "canary": wanted.canary}
                if wanted != applied:
                    applied, waited_s = wanted, 0.0
            for version, state in states.items():
                aspired = applied is not None and version in applied.versions
                kept = aspired or (applied is None and state in "SLA")
                states[version] = {"S": "L", "L": "A", "A": "A", "U": "E", "E": "S" if aspired else "E"}[
                    state
                ]
                if not kept and state in "SLA":
                    states[version] = "U" if state == "A" else "E"
        assert isinstance(action, Hold | Finish), (old, new, action)
        wanted = goal(rollout)
        assert (labels["stable"], labels["canary"]) == (wanted.stable, wanted.canary)
        assert {version for version, state in states.items() if state == "A"} == wanted.versions


@pytest.mark.parametrize(
    ("observed", "words"),
    [
        (seen("3A 4A", 3, 4, configured=LOADED), None),
        (seen("3A", 3, configured=place(3, stable=3)), None),
        (seen("3A 4A", 3, configured=place(3, 4, stable=3)), "the configuration says"),
        (seen("3A", 3, configured=place(3)), "the configuration says"),
        (seen("3A 5A", 5), "the label stable is on version 5, expected 3"),
        (seen("3A 4A", 4), "the label stable is on version 4, expected 3"),
        (seen("3A 4A", 3, 3), "the label canary is on version 3, expected 4 or none"),
        (seen("3A 5L", 3), "version 5 is loaded, which was neither there"),
        (seen("3A 5E", 3), None),
        (seen("3A 4A"), None),  # it restarted and has no labels
    ],
)
def test_what_somebody_else_did_is_noticed(observed, words) -> None:
    rollout = replace(FRESH, before=place(3, stable=3), intent=LOADED)
    found = conflict(rollout, observed)
    assert (found is None) == (words is None)
    assert words is None or words in found


@pytest.mark.parametrize("code", ["ABORTED", "DATA_LOSS", "UNAVAILABLE"])
def test_any_error_of_a_load_ends_it(code: str) -> None:
    failed = VersionStatus(4, VersionState.END, code, "")
    observed = replace(seen("3A", 3), versions={**seen("3A").versions, 4: failed})
    action = next_action(FRESH, observed, Progress(place(3, 4, stable=3), 1), LIMITS)
    assert action == Decide(Decision.ABORT, f"version 4 could not be loaded: {code}")


def test_what_this_rollout_asked_for_is_nobody_elses() -> None:
    rollout = replace(FRESH, intent=place(2, 3, 4, stable=3))
    assert conflict(rollout, seen("2A 3A 4A", 3)) is None
    assert conflict(rollout, seen("1A 3A 4A", 3)) is not None


def test_a_rollout_survives_json() -> None:
    rollout = replace(
        FRESH,
        keep=frozenset({1, 2}),
        report=replace(BAD, latency_ratio=1.75),
        decision=Decision.ABORT,
        reason="agreement",
        before=Placement(None),
        intent=LOADED,
    )
    assert rollout_from_json(rollout_to_json(rollout)) == rollout


def test_a_first_rollout_survives_json() -> None:
    first = Rollout(1, 4, None, "now")
    assert rollout_from_json(rollout_to_json(first)) == first


def test_json_has_no_nan() -> None:
    empty = replace(GOOD, compared=0, agreement=float("nan"))
    values = rollout_to_json(replace(FRESH, report=empty))
    assert values["report"]["agreement"] is None
    assert str(rollout_from_json(values).report.agreement) == "nan"


def test_limits_at_the_ends_of_their_ranges() -> None:
    limits = Limits(load_timeout_s=0.5, drain_s=0, stale_s=0.5)
    assert (limits.load_timeout_s, limits.drain_s, limits.stale_s) == (0.5, 0, 0.5)
    assert Limits() == Limits(load_timeout_s=600, drain_s=5, stale_s=10)


def test_at_first_nothing_was_asked_for() -> None:
    assert Progress() == Progress(applied=None, waited_s=0, repeat=False)


@pytest.mark.parametrize(
    "values", [{"load_timeout_s": 0}, {"load_timeout_s": -1}, {"drain_s": -1}, {"stale_s": float("nan")}]
)
def test_limits_out_of_range(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Limits(**values)
