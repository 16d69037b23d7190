"""Several models, reloads and labels, with an engine whose loads the test decides."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from graftserve.serving.config import ModelSettings
from graftserve.serving.core import ServerCore
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.manager import AspiredVersionsManager
from graftserve.serving.source import Latest, MonitoredServable, Specific, VersionPolicy

MakeCore = Callable[..., tuple[ServerCore, AspiredVersionsManager]]


@pytest.fixture
def make_core(engine: Any) -> Iterator[MakeCore]:
    managers: list[AspiredVersionsManager] = []

    def make(*, allow: bool = False) -> tuple[ServerCore, AspiredVersionsManager]:
        managers.append(AspiredVersionsManager(engine, max_num_load_retries=0))
        return ServerCore(managers[-1], allow_labels_for_unavailable=allow), managers[-1]

    yield make
    engine.gate.set()
    for manager in managers:
        assert manager.stop(10)


def add(base_path: Path, *versions: int) -> Path:
    """Versions that were copied long ago, as far as a look at the folder tells."""
    for version in versions:
        (base_path / str(version)).mkdir(parents=True)
        (base_path / str(version) / "saved_model.pb").write_bytes(b"")
    return base_path


def model(
    name: str, base_path: Path, policy: VersionPolicy | None = None, **labels: int
) -> Mapping[str, ModelSettings]:
    return {name: ModelSettings(MonitoredServable(name, base_path, policy or Latest()), labels)}


def available(manager: AspiredVersionsManager, name: str) -> list[int]:
    return sorted(entry.id.version for entry in manager.states(name) if entry.state.name == "AVAILABLE")


def test_models_come_and_go_by_reloads(make_core: MakeCore, tmp_path: Path) -> None:
    core, manager = make_core()
    a, b = add(tmp_path / "a", 1, 2), add(tmp_path / "b", 5)
    core.start(model("a", a))
    assert (available(manager, "a"), core.names()) == ([2], ["a"])
    core.reload(model("a", a) | model("b", b))
    assert available(manager, "b") == [5]
    core.reload(model("b", b))
    assert manager.wait_until(lambda: available(manager, "a") == [], 10)
    assert core.names() == ["b"]
    with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(a\)"):
        manager.handle("a")
    core.reload({})
    assert manager.wait_until(lambda: available(manager, "b") == [], 10)


def test_a_policy_that_changes_loads_and_unloads(make_core: MakeCore, tmp_path: Path) -> None:
    core, manager = make_core()
    base = add(tmp_path / "m", 1, 2, 3)
    core.start(model("m", base))
    core.reload(model("m", base, Specific(frozenset({1, 2}))))
    assert manager.wait_until(lambda: available(manager, "m") == [1, 2], 10)


def test_labels_name_available_versions_only(make_core: MakeCore, tmp_path: Path) -> None:
    core, manager = make_core()
    base = add(tmp_path / "m", 1, 2)
    core.start(model("m", base, Latest(2)))
    assert manager.wait_until(lambda: available(manager, "m") == [1, 2], 10)
    core.reload(model("m", base, Latest(2), stable=1, canary=2))
    assert (core.resolve("m", "stable"), core.resolve("m", "canary")) == (1, 2)
    with pytest.raises(ServingError) as caught:
        core.reload(model("m", base, Latest(1), stable=9))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert caught.value.message == (
        "Request to assign label to version 9 of model m, which is not currently available for inference"
    )
    # Nothing of that reload was done.
    assert core.labels("m") == {"stable": 1, "canary": 2}
    core.poll()
    assert available(manager, "m") == [1, 2]
    core.reload(model("m", base, Latest(2), stable=2))
    assert core.labels("m") == {"stable": 2}
    with pytest.raises(ServingError, match="Unrecognized servable version label: canary") as caught:
        core.resolve("m", "canary")
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_labels_at_the_start_need_the_flag(make_core: MakeCore, tmp_path: Path) -> None:
    base = add(tmp_path / "m", 1)
    core, _ = make_core()
    with pytest.raises(ServingError, match="Request to assign label to version 1 of model m"):
        core.start(model("m", base, stable=1))
    core, _ = make_core(allow=True)
    core.start(model("m", base, stable=1, later=7))
    assert core.labels("m") == {"stable": 1, "later": 7}
    # Only new labels: one that is in use cannot move to what is not there.
    with pytest.raises(ServingError, match="Request to assign label to version 8 of model m"):
        core.reload(model("m", base, stable=8))
    core.reload(model("m", base, stable=1, later=7))


def test_a_reload_that_names_nothing_to_load_is_refused_at_once(make_core: MakeCore, tmp_path: Path) -> None:
    core, manager = make_core()
    base = add(tmp_path / "m", 1)
    core.start(model("m", base))
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "gone", "Could not find base path"),
        (tmp_path / "empty", "no version"),
    ):
        with pytest.raises(ServingError, match=f"model n: {message}") as caught:
            core.reload(model("m", base) | model("n", path))
        assert caught.value.code is Code.NOT_FOUND
    assert core.names() == ["m"]
    assert available(manager, "m") == [1]


def test_a_new_model_that_cannot_be_loaded_fails_the_reload(
    make_core: MakeCore, tmp_path: Path, engine: Any
) -> None:
    core, manager = make_core()
    base = add(tmp_path / "m", 1)
    core.start(model("m", base))
    engine.failures[5] = 1
    with pytest.raises(
        ServingError, match=r"1 servable\(s\) did not become available: model n version 5: DATA"
    ):
        core.reload(model("m", base) | model("n", add(tmp_path / "n", 5)))
    assert available(manager, "m") == [1]


def test_nobody_waits_for_a_reload_longer_than_they_said(
    make_core: MakeCore, tmp_path: Path, engine: Any
) -> None:
    core, manager = make_core()
    base = add(tmp_path / "m", 1)
    core.start(model("m", base))
    engine.gate.clear()
    with pytest.raises(ServingError, match="Still loading: n") as caught:
        core.reload(model("m", base) | model("n", add(tmp_path / "n", 5)), time.monotonic() + 0.1)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    # Another one does not stand behind it, and the first one's load goes on.
    core.reload(model("m", base, stable=1) | model("n", tmp_path / "n"))
    assert core.labels("m") == {"stable": 1}
    engine.gate.set()
    assert manager.wait_until(lambda: available(manager, "n") == [5], 10)


def test_a_look_that_a_reload_overtakes_changes_nothing(
    make_core: MakeCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, manager = make_core()
    a, b = add(tmp_path / "a", 1), add(tmp_path / "b", 1)
    core.start(model("a", a))
    source = core._source
    looked, reloaded = threading.Event(), threading.Event()
    poll = source.poll

    def slow(known: Any = None) -> Any:
        answer = poll(known)
        looked.set()
        assert reloaded.wait(10)
        return answer

    monkeypatch.setattr(source, "poll", slow)
    looking = threading.Thread(target=core.poll)
    looking.start()
    assert looked.wait(10)
    core.reload(model("b", b))
    reloaded.set()
    looking.join(10)
    assert manager.wait_until(lambda: available(manager, "a") == [], 10)
    assert [entry.state.name for entry in manager.states("a")] == ["END"]
