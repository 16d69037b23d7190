"""The version policy: snapshots in, action out."""

import pytest

from graftserve.client.wire import ModelVersionStatus
from graftserve.serving.policy import Action, ActionKind, Snapshot, State, availability_preserving

A, L, S, U, E = State.AVAILABLE, State.LOADING, State.START, State.UNLOADING, State.END


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([], None),
        ([(1, S, True)], ("load", 1)),
        ([(1, S, True), (2, S, True)], ("load", 2)),
        ([(1, S, True), (2, L, True)], ("load", 1)),
        ([(1, L, True)], None),
        ([(1, A, True)], None),
        # New before old.
        ([(1, A, False), (2, S, True)], ("load", 2)),
        ([(1, A, False), (2, L, True)], None),
        ([(1, A, False), (2, A, True)], ("unload", 1)),
        ([(1, U, False), (2, A, True)], None),
        ([(1, U, False), (2, L, True)], None),
        # A new version that failed leaves the old one alone.
        ([(1, A, False), (2, E, True)], None),
        # Two that nobody wants any more: one of them suffices.
        ([(1, A, False), (2, A, False), (3, S, True)], ("unload", 1)),
        ([(2, A, False), (3, L, True)], None),
        # Nothing is wanted: everything goes, lowest first.
        ([(1, A, False), (2, A, False)], ("unload", 1)),
        ([(2, A, False)], ("unload", 2)),
        ([(1, S, False)], None),
        # Back to a lower version.
        ([(1, S, True), (2, A, False)], ("load", 1)),
        ([(1, A, True), (2, A, False)], ("unload", 2)),
    ],
)
def test_next_action(versions: list[tuple[int, State, bool]], expected: tuple[str, int] | None) -> None:
    action = availability_preserving(Snapshot(*version) for version in versions)
    assert action == (expected and Action(ActionKind(expected[0]), expected[1]))


def test_states_have_the_numbers_of_the_wire() -> None:
    wire = dict(ModelVersionStatus.State.items())
    assert {state.name: state.value for state in State} == {
        name: number for name, number in wire.items() if name != "UNKNOWN"
    }
