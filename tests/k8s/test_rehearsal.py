"""The rehearsal: Envoy's files and weights with real calls, what counts as gone well, the whole command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from graftserve.client import Client, VersionState, VersionStatus
from graftserve.client.testing import FakeModel, FakeServer, StatusError
from graftserve.client.wire import ReloadConfigRequest, ReloadConfigResponse
from graftserve.client.wire.methods import HANDLE_RELOAD_CONFIG_REQUEST
from graftserve.k8s.rehearsal import (
    GATE,
    WEIGHTS_PERCENT,
    Answer,
    Envoy,
    EnvoyError,
    Ramp,
    Rollouts,
    Step,
    Traffic,
    find_envoy,
    problems,
)
from graftserve.k8s.rehearsal.envoy_config import bootstrap, routes
from graftserve.k8s.rollout import Report, compare

MODEL = "flowers"
PLAN = Rollouts(1, 2, 3, WEIGHTS_PERCENT)


# Envoy's files


def weights_of(file: dict[str, Any]) -> list[tuple[str, int]]:
    """Of all routes, which have the same."""
    found = {
        tuple((item["name"], item["weight"]) for item in route["route"]["weighted_clusters"]["clusters"])
        for route in file["resources"][0]["virtual_hosts"][0]["routes"]
    }
    assert len(found) == 1
    return list(found.pop())


def test_the_routes_are_those_of_component_gateway() -> None:
    path = Path(str(files("graftserve.k8s"))) / "components" / "gateway" / "grpc-route.yaml"
    (rule,) = yaml.safe_load(path.read_text())["spec"]["rules"]
    wanted = {
        f"/{match['method']['service']}/{match['method'].get('method', '')}" for match in rule["matches"]
    }
    file = routes(0, "1")
    matches = [route["match"] for route in file["resources"][0]["virtual_hosts"][0]["routes"]]
    assert {match.get("path") or match["prefix"] for match in matches} == wanted
    assert all(match.get("path", "/Method")[-1] != "/" for match in matches)
    assert [name for name, _ in weights_of(file)] == [item["name"] for item in rule["backendRefs"]]


@pytest.mark.parametrize("percent", [0, 1, 50, 100])
def test_weights_sum_to_100(percent: int) -> None:
    assert weights_of(routes(percent, "7")) == [
        ("graftserve", 100 - percent),
        ("graftserve-canary", percent),
    ]
    assert routes(percent, "7")["version_info"] == "7"


@pytest.mark.parametrize("percent", [-1, 101])
def test_weights_out_of_range(percent: int) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, 100\], got {percent}"):
        routes(percent, "1")


def test_envoy_itself_finds_the_configuration_valid(tmp_path: Path) -> None:
    def validate(configuration: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "bootstrap.json"
        path.write_text(json.dumps(configuration))
        command = [find_envoy(), "--mode", "validate", "-c", path]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    route_file = tmp_path / "routes.json"
    route_file.write_text(json.dumps(routes(10, "1")))
    good = bootstrap(["127.0.0.1:1", "127.0.0.1:2"], ["127.0.0.1:3"], route_file)
    done = validate(good)
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout
    bad = json.loads(json.dumps(good))
    bad["static_resources"]["clusters"][0]["lb_policy"] = "AS_YOU_LIKE"
    assert validate(bad).returncode != 0


# Envoy with real calls, to servers whose answers are planned


@dataclass
class Place:
    """Two stable servers with version 1 and a canary with version 2 behind Envoy, and callers."""

    stable: list[FakeServer]
    canary: FakeServer
    envoy: Envoy
    traffic: Traffic
    paths: list[Path]

    def compare(self, version: int) -> Report:
        with (
            Client(self.stable[0].target, MODEL, version=1) as old,
            Client(self.canary.target, MODEL, version=version) as new,
        ):
            return compare(old, new, self.paths, seed=0, max_errors=0)

    def replace_canary(self, version: int, answer: Callable[[bytes], Any]) -> None:
        model = self.canary.models[MODEL]
        model.versions, model.answer = {version: available(version)}, answer


def available(version: int) -> VersionStatus:
    return VersionStatus(version, VersionState.AVAILABLE, "OK", "")


def label(image: bytes) -> str:
    return "roses" if len(image) % 2 else "tulips"


def other_label(image: bytes) -> str:
    return "tulips" if len(image) % 2 else "roses"


def failing(image: bytes) -> str:
    raise StatusError(grpc.StatusCode.INTERNAL, "out of memory")


@pytest.fixture
def place(tmp_path: Path, photos: Any, encode: Any) -> Iterator[Place]:
    paths = []
    for name, photo in photos.items():
        for number in range(4):
            paths.append(tmp_path / f"{name}{number}.jpg")
            paths[-1].write_bytes(encode(photo[: 60 + 3 * number, :60]))
    assert {label(path.read_bytes()) for path in paths} == {"roses", "tulips"}
    images = [(path.read_bytes(), label(path.read_bytes())) for path in paths]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                FakeServer(FakeModel(MODEL, answer=label, versions={version: available(version)}))
            )
            for version in (1, 1, 2)
        ]
        targets = [server.target for server in servers]
        envoy = stack.enter_context(Envoy(targets[:2], targets[2:], tmp_path / "envoy"))
        traffic = stack.enter_context(Traffic(envoy.target, MODEL, images, callers=4))
        yield Place(servers[:2], servers[2], envoy, traffic, paths)


def test_a_good_canary_goes_up_and_back_and_a_bad_one_is_aborted(place: Place) -> None:
    told: list[Step] = []
    ramp = Ramp(place.envoy, place.traffic, step_s=0.5, listener=told.append)
    ramp.hold("stable", None, 0)
    assert ramp.rise(2, lambda: place.compare(2))
    ramp.hold("taken back", 2, 0)
    place.replace_canary(3, other_label)
    assert not ramp.rise(3, lambda: place.compare(3))
    ramp.hold("stable", None, 0)

    assert [(step.canary, step.weight_percent) for step in told] == [
        (None, 0),
        *((2, weight) for weight in WEIGHTS_PERCENT),
        (2, 0),
        (3, 1),
        (3, 0),
        (None, 0),
    ]
    assert problems(ramp.steps, place.traffic.answers(), PLAN) == ()
    half = next(step for step in told if step.weight_percent == 50)
    assert set(half.by_version) == {1, 2}
    assert next(step for step in told if step.weight_percent == 100).by_version.keys() == {2}
    assert [step.verdict for step in told[:2]] == ["", "passed"]
    assert told[6].verdict.startswith("agreement 0.0000 on 12 images, at least 0.98 needed")
    assert all(server.calls for server in place.stable)  # both replicas had their share
    assert all(answer.right == (answer.version != 3) for answer in place.traffic.answers())


def test_failures_of_a_canary_are_counted_and_do_not_pass(place: Place) -> None:
    place.replace_canary(2, failing)
    ramp = Ramp(place.envoy, place.traffic, step_s=0.5)
    step = ramp.hold("canary", 2, 50, lambda: place.compare(2))
    assert step.failed > 0
    assert step.verdict.startswith("errors: 1 of 1 images")
    found = problems(ramp.steps, place.traffic.answers(), PLAN)
    assert any("requests failed; the first: InternalError: " in problem for problem in found)
    assert any(
        problem.startswith("version 2, which is good, was aborted at 50%: errors") for problem in found
    )


def test_reloads_do_not_pass_the_proxy(place: Place) -> None:
    with Client(place.envoy.target, MODEL) as client:
        assert client.status() == (available(1),)
    with grpc.insecure_channel(place.envoy.target) as channel:
        reload = channel.unary_unary(
            HANDLE_RELOAD_CONFIG_REQUEST.path,
            request_serializer=ReloadConfigRequest.SerializeToString,
            response_deserializer=ReloadConfigResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            reload(ReloadConfigRequest(), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_what_is_no_envoy_is_told(tmp_path: Path) -> None:
    address = ["127.0.0.1:1"]
    with (
        pytest.raises(EnvoyError, match="missing: does not run here: No such file"),
        Envoy(address, address, tmp_path, executable=tmp_path / "missing"),
    ):
        pass
    script = tmp_path / "ends"
    script.write_text("#!/bin/sh\necho no room >&2\nexit 3\n")
    script.chmod(0o755)
    with (
        pytest.raises(EnvoyError, match="Envoy ended with status 3: no room"),
        Envoy(address, address, tmp_path, executable=script),
    ):
        pass


def test_where_there_is_no_envoy_the_remedy_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "envoy", None)  # as if it were not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvoyError, match=r"pip install 'graftserve\[rehearsal\]'"):
        find_envoy()
    own = tmp_path / "envoy"
    own.touch(0o755)
    assert find_envoy() == own


# What counts as gone well

REPORT = Report(60, 60, 1.0, 0.0, "a.jpg", 1.0, 10.0, 20.0, 10.0, 20.0, 0)
DIFFERENT = replace(REPORT, agreement=0.8, largest_shift=0.9)


def step(
    name: str, canary: int | None, weight: int, report: Report | None = None, shares: Any = None
) -> Step:
    shares = shares or {1: 1000 - 10 * weight, **({canary: 10 * weight} if weight else {})}
    answers = tuple(
        Answer(0.5, 0.01, version, True) for version, count in shares.items() for _ in range(count)
    )
    return Step(name, canary, weight, 0.0, 0.1, 1.0, answers, report, GATE.failures(report) if report else ())


def as_planned() -> list[Step]:
    return [
        step("stable", None, 0),
        *(step("canary", 2, weight, REPORT) for weight in WEIGHTS_PERCENT),
        step("taken back", 2, 0),
        step("canary", 3, 1, DIFFERENT),
        step("aborted", 3, 0),
        step("stable", None, 0),
    ]


def found(steps: Sequence[Step], more: Sequence[Answer] = ()) -> tuple[str, ...]:
    return problems(steps, [answer for item in steps for answer in item.answers] + list(more), PLAN)


def test_as_planned_is_no_problem() -> None:
    assert found(as_planned()) == ()


def test_a_request_lost_between_two_steps_is_a_problem() -> None:
    lost = Answer(1.5, 0.1, None, False, "UnavailableError: gone")
    assert found(as_planned(), [lost]) == ("1 of 9001 requests failed; the first: UnavailableError: gone",)


@pytest.mark.parametrize(
    ("place", "instead", "problem"),
    [
        (0, step("stable", None, 0, shares={1: 999, 2: 1}), "version 2 answered, which should not be asked"),
        (2, step("canary", 2, 10, REPORT, {1: 500, 2: 500}), "canary answered 500 of 1000 requests"),
        (3, step("canary", 2, 50, REPORT, {1: 1000}), "canary answered 0 of 1000 requests"),
        (4, step("canary", 2, 100, REPORT, {1: 1, 2: 999}), "canary answered 999 of 1000 requests"),
        (5, step("taken back", 2, 0, shares={1: 999, 2: 1}), "canary answered 1 of 1000 requests"),
        (5, step("taken back", 2, 0, shares={1: 0}), "taken back at 0%: no request was answered"),
        (2, step("canary", 2, 10, DIFFERENT), "version 2, which is good, was aborted at 10%: agreement"),
        (2, None, "version 2: expected the weights 1%, 10%, 50%, 100%, got 1%, 50%, 100%"),
        (5, None, "version 2 was not taken back"),
        (6, step("canary", 3, 1, REPORT), "version 3, which is bad, was not aborted at once: it had 1%"),
        (6, None, "version 3, which is bad, was not aborted at once: it had none"),
        (
            6,
            step("canary", 3, 1, replace(DIFFERENT, errors=1)),
            "version 3 was aborted for other reasons than agreement: errors: 1 of 60",
        ),
        (7, None, "version 3 was not taken back"),
    ],
)
def test_what_goes_otherwise_is_a_problem(place: int, instead: Step | None, problem: str) -> None:
    steps = as_planned()
    steps[place : place + 1] = [] if instead is None else [instead]
    assert any(problem in text for text in found(steps)), found(steps)


def test_a_share_that_chance_can_give_is_no_problem() -> None:
    chance = random.Random(5)
    for weight in (1, 10, 50):
        for total in (1, 7, 60, 400):
            for _ in range(40):
                count = sum(chance.random() < weight / 100 for _ in range(total))
                steps = as_planned()
                place = 1 + WEIGHTS_PERCENT.index(weight)
                steps[place] = step("canary", 2, weight, REPORT, {1: total - count, 2: count})
                assert found(steps) == ()


# The command


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


def command(work_dir: Path, *options: str) -> list[str]:
    fixed = ["rehearsal", "--work-dir", str(work_dir), "--step-s", "1.5", "--sample", "30"]
    return [sys.executable, "-m", "graftserve.cli", *fixed, *options]


def processes_of(work_dir: Path) -> list[str]:
    # ww: lines in full, whatever the width.
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(work_dir) in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_rehearsal(work_dir: Path) -> None:
    done = subprocess.run(
        command(work_dir, "--json"), capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["problems"] == []
    assert result["failed"] == 0
    steps = result["steps"]
    assert [(item["canary"], item["weight_percent"]) for item in steps] == [
        (None, 0),
        *((2, weight) for weight in WEIGHTS_PERCENT),
        (2, 0),
        (3, 1),
        (3, 0),
        (None, 0),
    ]
    assert result["requests"] >= sum(sum(item["requests_by_version"].values()) for item in steps)
    assert all(item["comparison"]["agreement"] >= 0.98 for item in steps[1:5])
    bad = steps[6]["comparison"]
    assert bad["agreement"] < 0.98
    assert bad["errors"] == 0
    assert steps[6]["verdict"].startswith("agreement ")
    assert steps[8]["requests_by_version"].keys() == {"1"}
    assert Path(result["plot"]).read_text().startswith("<?xml")
    assert processes_of(work_dir) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_no_process(work_dir: Path, number: signal.Signals, status: int) -> None:
    # A session of its own, whose group gets the signal, as a terminal's foreground group gets Ctrl-C.
    # What runs in the background may have been told to ignore Ctrl-C, and hands that on: so it is set here.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from graftserve.cli import main; main(sys.argv[1:])"
    arguments = command(work_dir)[3:]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--step-s", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("    time")  # the servers are about to start
        deadline = time.monotonic() + 120
        try:
            while not any("bootstrap.json" in line for line in processes_of(work_dir)):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, number)
        assert process.wait(60) == status
    assert processes_of(work_dir) == []
