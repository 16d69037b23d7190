"""The manager's life cycle, with an engine whose loads the test decides."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftserve.serving.errors import Code, ServingError
from graftserve.serving.manager import AspiredVersionsManager, ServableState
from graftserve.serving.policy import State


@pytest.fixture
def make_manager(engine: Any) -> Iterator[Callable[..., AspiredVersionsManager]]:
    managers: list[AspiredVersionsManager] = []

    def make(retries: int = 0, interval_s: float = 60.0, **threads: int) -> AspiredVersionsManager:
        managers.append(
            AspiredVersionsManager(
                engine, max_num_load_retries=retries, load_retry_interval_s=interval_s, **threads
            )
        )
        return managers[-1]

    yield make
    engine.gate.set()
    for manager in managers:
        assert manager.stop(10)


def versions(*numbers: int) -> dict[int, Path]:
    return {number: Path(str(number)) for number in numbers}


def await_states(manager: AspiredVersionsManager, **expected: str) -> None:
    def seen() -> dict[str, str]:
        return {f"v{state.id.version}": state.state.name for state in manager.states("m")}

    assert manager.wait_until(lambda: seen() == expected, 10), f"expected {expected}, have {seen()}"


def test_new_is_available_before_old_goes_and_every_step_is_announced(
    make_manager: Callable[..., AspiredVersionsManager], engine: Any
) -> None:
    manager = make_manager()
    steps: list[tuple[int, str]] = []
    served: list[int | None] = []

    def observe(state: ServableState) -> None:
        steps.append((state.id.version, state.state.name))
        if state.state is State.AVAILABLE:
            with manager.handle("m") as handle:
                served.append(handle.id.version)
        if state.state is State.UNLOADING:
            with manager.handle("m", state.id.version) as handle:
                served.append(handle.id.version)

    manager.subscribe(observe)
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")
    manager.set_aspired_versions("m", versions(2))
    await_states(manager, v1="END", v2="AVAILABLE")
    assert steps == [
        *[(1, name) for name in ("START", "LOADING", "AVAILABLE")],
        *[(2, name) for name in ("START", "LOADING", "AVAILABLE")],
        *[(1, name) for name in ("UNLOADING", "END")],
    ]
    assert served == [1, 2, 1]  # AVAILABLE is announced once it can be had, UNLOADING while it still can
    assert threading.current_thread() not in engine.threads


def test_unload_waits_for_handles(make_manager: Callable[..., AspiredVersionsManager]) -> None:
    manager = make_manager()
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")
    with manager.handle("m") as first, manager.handle("m", 1):
        servable = first.servable
        manager.set_aspired_versions("m", {})
        await_states(manager, v1="UNLOADING")
        with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(m\)"):
            manager.handle("m")
        assert hasattr(servable, "closed")
        assert not servable.closed.is_set()
    await_states(manager, v1="END")
    assert servable.closed.is_set()


def test_a_broken_new_version_leaves_the_old_one_and_is_not_tried_for_ever(
    make_manager: Callable[..., AspiredVersionsManager], engine: Any
) -> None:
    manager = make_manager(retries=2, interval_s=0.01)
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")
    engine.failures[2] = 99
    manager.set_aspired_versions("m", versions(2))
    await_states(manager, v1="AVAILABLE", v2="END")
    for _ in range(3):
        manager.set_aspired_versions("m", versions(2))
    assert engine.attempts == [1, 2, 2, 2]
    error = manager.states("m")[0].error
    assert error is not None
    assert (error.code, error.message) == (Code.DATA_LOSS, "broken file")
    # Its folder is removed, and the state stays listed. Put back, and mended, it is tried again.
    manager.set_aspired_versions("m", versions(1))
    assert [state.state for state in manager.states("m")] == [State.END, State.AVAILABLE]
    engine.failures[2] = 0
    manager.set_aspired_versions("m", versions(2))
    await_states(manager, v1="END", v2="AVAILABLE")
    assert manager.states("m")[0].error is None


def test_a_load_that_fails_first_succeeds_by_a_retry(
    make_manager: Callable[..., AspiredVersionsManager], engine: Any
) -> None:
    manager = make_manager(retries=3, interval_s=0.01)
    engine.failures[1] = 2
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")
    assert engine.attempts == [1, 1, 1]


def test_waiting_for_a_retry_blocks_nothing(
    make_manager: Callable[..., AspiredVersionsManager], engine: Any
) -> None:
    manager = make_manager(retries=5, interval_s=3600)
    engine.failures[1] = 99
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="LOADING")
    assert engine.failed.wait(10)
    manager.set_aspired_versions("m", versions(2))
    await_states(manager, v1="END", v2="AVAILABLE")
    assert manager.states("m")[1].error is not None


def test_stop_interrupts_a_retry_and_unloads(
    make_manager: Callable[..., AspiredVersionsManager], engine: Any
) -> None:
    manager = make_manager(retries=5, interval_s=3600)
    engine.failures[2] = 99
    manager.set_aspired_versions("m", versions(1, 2))
    await_states(manager, v1="AVAILABLE", v2="LOADING")
    assert manager.stop(10)
    await_states(manager, v1="END", v2="END")


def test_stop_gives_up_on_a_handle_that_is_kept(
    make_manager: Callable[..., AspiredVersionsManager],
) -> None:
    manager = make_manager()
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")
    with manager.handle("m"):
        assert not manager.stop(0.05)
    assert manager.stop(10)


def test_a_version_no_longer_wanted_when_its_turn_comes_is_not_loaded(
    make_manager: Callable[..., AspiredVersionsManager], engine: Any
) -> None:
    manager = make_manager()
    engine.gate.clear()
    manager.set_aspired_versions("m", versions(2))
    await_states(manager, v2="LOADING")
    manager.set_aspired_versions("m", versions(1, 2))
    await_states(manager, v1="LOADING", v2="LOADING")
    manager.set_aspired_versions("m", versions(2))
    engine.gate.set()
    await_states(manager, v1="END", v2="AVAILABLE")
    assert engine.attempts == [2]


def test_a_failing_observer_disturbs_nobody(
    make_manager: Callable[..., AspiredVersionsManager],
) -> None:
    manager = make_manager()
    manager.subscribe(lambda state: {}[state])
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")


def test_unknown_versions_are_named(make_manager: Callable[..., AspiredVersionsManager]) -> None:
    manager = make_manager()
    with pytest.raises(ServingError, match=r"Servable not found for request: Specific\(m, 7\)"):
        manager.handle("m", 7)


def test_as_many_versions_load_at_once_as_there_are_threads(
    make_manager: Callable[..., AspiredVersionsManager], engine: Any
) -> None:
    manager = make_manager(num_load_threads=2)
    engine.gate.clear()
    manager.set_aspired_versions("m", versions(1, 2, 3))
    assert engine.loading.acquire(timeout=10)
    assert engine.loading.acquire(timeout=10)
    assert not engine.loading.acquire(timeout=0.1)
    engine.gate.set()
    await_states(manager, v1="AVAILABLE", v2="AVAILABLE", v3="AVAILABLE")


def test_an_observer_is_told_what_was_before_it(
    make_manager: Callable[..., AspiredVersionsManager],
) -> None:
    manager = make_manager()
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")
    seen: list[tuple[int, str]] = []
    manager.subscribe(lambda state: seen.append((state.id.version, state.state.name)))
    assert seen == [(1, "AVAILABLE")]


def test_what_is_available_is_told_by_version(make_manager: Callable[..., AspiredVersionsManager]) -> None:
    manager = make_manager()
    assert not manager.is_known("m")
    manager.set_aspired_versions("m", versions(1))
    await_states(manager, v1="AVAILABLE")
    assert (manager.is_known("m"), manager.is_available("m", 1), manager.is_available("m", 2)) == (
        True,
        True,
        False,
    )
    assert (manager.engine_of("m", 1), manager.engine_of("m", 2)) == ("fake", "")
