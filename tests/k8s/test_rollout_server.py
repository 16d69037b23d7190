"""Rollouts on a real server, with callers who must not notice."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from graftserve.client import Client, ClientError, UnavailableError, UnimplementedError, VersionState
from graftserve.k8s.rollout import (
    BusyError,
    CheckError,
    ConflictError,
    Decision,
    Gate,
    JournalError,
    ModelServer,
    Placement,
    RefusedError,
    RolloutError,
    StuckError,
    begin,
    begin_undo,
    decide,
    leave,
)

LENIENT = Gate(max_latency_ratio=1000)
OLD, NEW = Placement(frozenset({3}), 3), Placement(frozenset({4}), 4)
BOTH = Placement(frozenset({3, 4}), 3, 4)


@contextmanager
def callers(shop: Any) -> Iterator[list[Any]]:
    """Four callers who ask for the label `stable` all the time; gives what they got, errors too."""
    got: list[Any] = []
    stop = threading.Event()

    def call() -> None:
        with Client(shop.target, "flowers", version_label="stable", timeout_s=20) as client:
            while not stop.is_set():
                try:
                    got.append(client.classify(shop.images[0]))
                except ClientError as error:
                    got.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield got
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def failures(got: list[Any]) -> list[Any]:
    return [item for item in got if isinstance(item, ClientError)]


def test_a_good_version_comes_under_traffic_without_a_failed_call(shop, publish) -> None:
    publish("close", 4)
    shop.drain_s = 0.3
    told: list[str] = []
    with callers(shop) as got:
        rollout = shop.start(4, listener=told.append)
        many = len(got) + 20
        while len(got) < many:
            time.sleep(0.01)
    assert rollout.outcome == "promoted"
    assert rollout.report.agreement == 1.0
    assert rollout.report.largest_shift == pytest.approx(0.05, abs=1e-6)
    assert not failures(got)
    versions = [item.version for item in got]
    assert {*versions} == {3, 4}
    assert versions[-1] == 4
    assert shop.placement() == NEW
    assert shop.observe().configured == NEW
    assert shop.config_path.read_text().startswith("# the flower shop\n")
    steps = ["load version 4", "label version 4 canary", "compare version 4 with version 3"]
    steps += ["label version 4 stable and take the label canary away", "unload version 3"]
    assert [step for step in told if step in steps] == steps


def test_wrong_labels_are_aborted_by_agreement_alone(shop, publish) -> None:
    publish("permuted", 4)
    with callers(shop) as got:
        rollout = shop.start(4)
    assert rollout.outcome == "aborted"
    assert rollout.reason.startswith("agreement 0.0000 on 12 images, at least 0.98 needed; such as ")
    assert not [
        line for line in LENIENT.failures(rollout.report) if "agreement" not in line and "shift" not in line
    ]
    assert not failures(got)
    assert {item.version for item in got} == {3}
    assert shop.placement() == OLD
    assert shop.observe().configured == OLD


def test_a_version_that_does_not_load_is_aborted_with_the_servers_reason(shop, publish) -> None:
    publish("broken", 4)
    rollout = shop.start(4)
    assert rollout.outcome == "aborted"
    assert rollout.reason.startswith("version 4 could not be loaded: ")
    state = shop.observe().versions[4]
    assert state.error_message in rollout.reason
    assert shop.placement() == OLD
    assert shop.observe().configured == OLD


def test_a_mended_version_is_tried_anew_whatever_it_was_before(shop, publish) -> None:
    publish("broken", 4)
    assert shop.start(4).outcome == "aborted"
    publish("good", 4)
    assert shop.start(4).outcome == "promoted"
    assert [item.outcome for item in shop.journal.read().history] == ["aborted", "promoted"]


def test_a_version_that_is_not_there_is_aborted_in_time(shop) -> None:
    from graftserve.k8s.rollout import Limits

    rollout = shop.start(9, limits=Limits(load_timeout_s=0.5, drain_s=0))
    assert rollout.outcome == "aborted"
    assert "the server does not list it: is its folder there?" in rollout.reason
    assert shop.placement() == OLD


def test_a_damaged_version_is_not_even_loaded(shop) -> None:
    def check(version: int) -> str:
        raise CheckError("saved_model.pb: changed")

    rollout = shop.start(4, check=check)
    assert (rollout.outcome, rollout.reason) == ("aborted", "saved_model.pb: changed")
    assert 4 not in shop.observe().versions


def test_without_auto_it_waits_and_promote_goes_on(shop) -> None:
    rollout = shop.start(4, auto=False)
    assert rollout.outcome is None
    assert shop.placement() == BOTH
    with pytest.raises(JournalError, match="is under way: promote or abort it first"):
        shop.start(5)
    promoted = shop.run(lambda stage, writer: decide(writer, Decision.PROMOTE, "it looks good"))
    assert (promoted.outcome, promoted.reason) == ("promoted", "it looks good")
    assert shop.placement() == NEW


def test_abort_takes_the_canary_away(shop) -> None:
    shop.start(4, auto=False)
    rollout = shop.run(lambda stage, writer: decide(writer, Decision.ABORT, "no"))
    assert (rollout.outcome, rollout.reason) == ("aborted", "no")
    assert shop.placement() == OLD


def test_promote_needs_a_comparison_that_was_passed(shop, publish) -> None:
    with pytest.raises(JournalError, match="nothing to promote"):
        shop.run(lambda stage, writer: decide(writer, Decision.PROMOTE, ""))

    def stops(canary: int, stable: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shop.start(4, auto=False, shadow=stops)
    with pytest.raises(JournalError, match="is not compared yet"):
        shop.run(lambda stage, writer: decide(writer, Decision.PROMOTE, ""))
    assert shop.placement() == BOTH


def test_undo_and_undo_again(shop, publish) -> None:
    with pytest.raises(JournalError, match="no promoted rollout"):
        shop.run(begin_undo)
    shop.start(4)
    with callers(shop) as got:
        undone = shop.run(begin_undo)
    assert (undone.outcome, undone.kind, undone.version) == ("promoted", "undo", 3)
    assert not failures(got)
    assert shop.placement() == OLD
    assert shop.run(begin_undo).version == 4
    assert shop.placement() == NEW


def test_undo_does_not_undo_what_somebody_else_did(shop) -> None:
    shop.start(4)
    with shop.stage() as stage:
        stage.apply(Placement(frozenset({3, 4}), 4), None)
        shop.wait_for(lambda seen: 3 in seen.available)
        stage.apply(Placement(frozenset({3, 4}), 3), None)
    with pytest.raises(ConflictError, match="made version 4 stable, but version 3 is"):
        shop.run(begin_undo)


def test_the_first_version_is_labelled(shop) -> None:
    with shop.stage() as stage:
        stage.apply(Placement(frozenset({3})), None)
    rollout = shop.start(3)
    assert (rollout.outcome, rollout.previous, rollout.reason) == (
        "promoted",
        None,
        "nothing was stable before it",
    )
    assert shop.placement() == OLD


def test_several_versions_without_a_label_are_no_guess(shop) -> None:
    with shop.stage() as stage:
        stage.apply(Placement(frozenset({3, 4})), None)
        shop.wait_for(lambda seen: seen.available == {3, 4})
        with pytest.raises(RolloutError, match="got versions 3, 4 and no label: say which is stable"):
            shop.start(5)


def test_a_stable_version_is_not_rolled_out(shop) -> None:
    with pytest.raises(RolloutError, match="version 3 is stable already"):
        shop.start(3)


def test_other_models_and_labels_stay(shop) -> None:
    text = shop.config_path.read_text().replace(
        "    version_labels", '    version_labels { key: "champion" value: 3 }\n    version_labels'
    )
    shop.config_path.write_text(text)
    assert shop.start(4).outcome == "promoted"
    with Client(shop.target, "flowers", version_label="champion") as client:
        assert client.classify(shop.images[0]).version == 3
    with Client(shop.target, "birds") as client:
        assert client.classify(shop.images[0]).version == 1
    assert shop.placement() == Placement(frozenset({3, 4}), 4)


def test_a_server_with_one_model_needs_no_file(shop) -> None:
    with ModelServer(shop.target, "flowers", str(shop.root / "flowers")) as stage:
        assert shop.start(4, stage=stage).outcome == "promoted"
        seen = stage.observe()
    assert (seen.present, seen.stable, seen.canary, seen.configured) == ({4}, 4, None, None)
    with Client(shop.target, "birds") as client:
        assert [item.state for item in client.status()] == [VersionState.END]


def test_a_restart_keeps_what_was_promoted(shop) -> None:
    shop.start(4)
    shop.stop_server()
    shop.start_server()
    assert shop.wait_for(lambda seen: seen.stable is not None).stable == 4
    assert shop.placement() == NEW


def test_a_restart_in_the_middle_is_waited_for(shop) -> None:
    restarted = threading.Event()

    def restart() -> None:
        shop.stop_server()
        shop.start_server()
        restarted.set()

    def listen(text: str) -> None:
        if text.startswith("compare"):
            threading.Thread(target=restart).start()

    assert shop.start(4, listener=listen).outcome == "promoted"
    assert restarted.wait(20)
    assert shop.wait_for(lambda seen: seen.stable == 4 and seen.present == {4})


def test_a_server_that_stays_away_ends_the_run_but_not_the_rollout(shop) -> None:
    shop.start(4, auto=False)
    shop.stop_server()
    with pytest.raises(ClientError, match=shop.target):
        shop.run(lambda stage, writer: decide(writer, Decision.ABORT, "no"), patience_s=0.5)
    assert shop.journal.read().current.decision == "abort"
    shop.start_server()
    assert shop.run().outcome == "aborted"
    assert shop.placement() == OLD


def test_what_somebody_else_changed_is_reported_and_not_overwritten(shop) -> None:
    shop.start(4, auto=False)
    changed = shop.config_path.read_text().replace("versions: 4", "versions: 5")
    shop.config_path.write_text(changed)
    with pytest.raises(ConflictError, match="the configuration says \\[versions 3, 5"):
        shop.run(lambda stage, writer: decide(writer, Decision.PROMOTE, ""))
    assert shop.config_path.read_text() == changed
    assert shop.placement() == BOTH
    with shop.journal.writing("me", {}) as writer:
        left = leave(writer, "theirs is better")
    assert left.outcome == "left"
    assert shop.config_path.read_text() == changed


def test_a_label_that_somebody_else_moved_is_reported(shop) -> None:
    shop.start(4, auto=False)
    text = shop.config_path.read_text()
    with shop.stage() as stage:
        stage.apply(Placement(frozenset({3, 4}), 4), None)
    shop.config_path.write_text(text)
    with pytest.raises(ConflictError, match="the label stable is on version 4, expected 3"):
        shop.run(lambda stage, writer: decide(writer, Decision.ABORT, ""))
    assert shop.observe().stable == 4


def test_somebody_elses_canary_is_left_alone(shop) -> None:
    with shop.stage() as stage:
        stage.apply(Placement(frozenset({3, 4}), 3), None)
        shop.wait_for(lambda seen: 4 in seen.available)
        stage.apply(BOTH, None)
        with pytest.raises(ConflictError, match="version 4 is labelled canary"):
            shop.start(5)


def test_two_at_once(shop) -> None:
    compared, go_on = threading.Event(), threading.Event()

    def listen(text: str) -> None:
        if text.startswith("compare"):
            compared.set()
            assert go_on.wait(20)

    ended: list[Any] = []
    first = threading.Thread(target=lambda: ended.append(shop.start(4, listener=listen)))
    first.start()
    assert compared.wait(20)
    with pytest.raises(BusyError, match="the test is at work"):
        shop.run(lambda stage, writer: decide(writer, Decision.ABORT, ""))
    go_on.set()
    first.join(30)
    assert ended[0].outcome == "promoted"


class Refusing:
    """A stage that refuses so many configurations."""

    def __init__(self, stage: Any, times: int) -> None:
        self.stage, self.times = stage, times
        self.observe, self.client = stage.observe, stage.client

    def apply(self, placement: Placement, expected: Placement | None) -> None:
        if self.times:
            self.times -= 1
            raise RefusedError("not that one")
        self.stage.apply(placement, expected)


@pytest.mark.parametrize(("times", "outcome"), [(2, "promoted"), (3, "aborted")])
def test_refusals(shop, times: int, outcome: str) -> None:
    with shop.stage() as stage:
        rollout = shop.start(4, stage=Refusing(stage, times))
    assert rollout.outcome == outcome
    assert shop.placement() == (NEW if outcome == "promoted" else OLD)


class DeadLine:
    """A stage of whose requests each first one is lost: on its way, or the answer on its way back."""

    def __init__(self, stage: Any, *, done: bool) -> None:
        self.stage, self.done = stage, done
        self.observe, self.client = stage.observe, stage.client
        self.lost: list[Placement] = []

    def apply(self, placement: Placement, expected: Placement | None) -> None:
        lost = placement not in self.lost
        if not lost or self.done:
            self.stage.apply(placement, expected)
        if lost:
            self.lost.append(placement)
            raise UnavailableError("the line went dead")


@pytest.mark.parametrize("done", [True, False])
def test_requests_and_answers_that_are_lost(shop, done: bool) -> None:
    with shop.stage() as stage:
        dead = DeadLine(stage, done=done)
        assert shop.start(4, stage=dead).outcome == "promoted"
    assert dead.lost == [Placement(frozenset({3, 4}), 3), BOTH, Placement(frozenset({3, 4}), 4), NEW]
    assert shop.placement() == NEW
    assert shop.observe().configured == NEW


def test_a_refused_abort_is_said(shop) -> None:
    shop.start(4, auto=False)
    with shop.stage() as stage, pytest.raises(StuckError, match="cannot be aborted: not that one"):
        shop.run(lambda _, writer: decide(writer, Decision.ABORT, ""), stage=Refusing(stage, 99))
    assert shop.run().outcome == "aborted"
    assert shop.placement() == OLD


def kill_at(shop: Any, point: int) -> bool:
    """Whether the rollout died; else it had fewer points and is done."""
    program = Path(__file__).with_name("killed_rollout.py")
    paths = (shop.config_path, shop.journal.path, shop.root / "images")
    done = subprocess.run(
        [sys.executable, program, shop.target, *map(str, paths), str(point)], capture_output=True, text=True
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert (done.returncode == 0) == (done.stdout == "done\n")
    return done.returncode != 0


def finish(shop: Any, way: str) -> None:
    """Go on, or back, after a kill, and see that nothing of it is left."""
    record = shop.journal.read()
    if record.current is None and not record.history:  # it died before it was written down
        shop.start(4)
        expected = NEW
    elif record.current is None:  # or after
        expected = NEW
    else:
        begin_it: Callable[[Any, Any], Any] | None = None
        if way == "back":
            begin_it = lambda _, writer: decide(writer, Decision.ABORT, "killed")  # noqa: E731
        shop.run(begin_it)
        expected = OLD if way == "back" else NEW
    assert shop.placement() == expected
    assert shop.observe().configured == expected
    assert shop.journal.read().current is None
    shop.observe()


@pytest.mark.parametrize(("point", "way"), [(13, "on"), (29, "back"), (41, "on"), (64, "back"), (71, "on")])
def test_killed_and_run_again(shop, point: int, way: str) -> None:
    assert kill_at(shop, point)
    with callers(shop) as got:
        finish(shop, way)
    assert not failures(got)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["on", "back"])
def test_killed_at_every_point_and_run_again(shop, way: str) -> None:
    point = 1
    while kill_at(shop, point):
        finish(shop, way)
        shop.reset()
        point += 1
    assert point > 70
    files = sorted(path.name for path in shop.root.iterdir())
    there = ["birds", "flowers", "images", "journal.json", "journal.json.lock", "models.config"]
    assert files == [".models.config.lock", *there]


def test_begin_writes_nothing_where_it_fails(shop) -> None:
    with shop.stage() as stage, shop.journal.writing("me", {}) as writer, pytest.raises(RolloutError):
        begin(stage, writer, version=3, gate=None)
    assert shop.journal.read().current is None


class _Seen(grpc.ServerInterceptor):
    """The metadata of every call, by method."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, str | bytes]] = {}

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method.rpartition("/")[2]
        self.calls[method] = dict(handler_call_details.invocation_metadata)
        return continuation(handler_call_details)


def test_every_request_has_the_metadata() -> None:
    seen = _Seen()
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[seen])
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with ModelServer(target, "flowers", "/models/flowers", metadata={"authorization": "x"}) as stage:
            with pytest.raises(UnimplementedError):
                stage.observe()
            with pytest.raises(UnimplementedError):
                stage.apply(OLD, None)
            with stage.client(3, 20) as client, pytest.raises(UnimplementedError):
                client.classify(b"abc")
    finally:
        server.stop(None).wait()
    assert {"GetModelStatus", "HandleReloadConfigRequest", "Predict"} <= set(seen.calls)
    assert all(metadata["authorization"] == "x" for metadata in seen.calls.values())
