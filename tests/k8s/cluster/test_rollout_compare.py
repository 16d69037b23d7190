"""`graftserve rollout start --apply --images`: a canary that is compared, and given calls step by step."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli.app import _run
from graftserve.client.testing import FakeServer
from graftserve.k8s.rollout import Cluster, Tracks, forwarding, overlay_drive
from tests.k8s.cluster.rollouts import START, Rollout, is_apply, tracks
from tests.k8s.fake_api import FakeApi

COMPARED = ("start", "--version", "4", "--max-latency-ratio", "1000")
Compared = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """ways(stable=..., canary=...) says where port-forwards lead; without arguments, what was asked for."""
    path = tmp_path / "ways.json"
    script = Path(__file__).parents[1] / "fake_kubectl.py"
    executable = tmp_path / "kubectl"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "{path}" "$@"\n')
    executable.chmod(0o755)
    monkeypatch.setattr(forwarding, "find_kubectl", lambda: executable)

    def ways(**targets: Any) -> list[Any]:
        if targets:
            names = {"stable": "service/graftserve", "canary": "service/graftserve-canary"}
            path.write_text(json.dumps({names[track]: target for track, target in targets.items()}))
            return []
        calls = path.with_name("ways.json.calls")
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [json.loads(line) for line in lines]

    return ways


@pytest.fixture
def compared(
    rollout: Rollout,
    fake: FakeApi,
    ways: Callable[..., list[Any]],
    servers: dict[str, FakeServer],
    images: Path,
) -> Compared:
    """compared(canary, *args): as rollout, a start from version 3; canary: the server behind its track."""
    rollout("apply")

    def compared(canary: str, *args: str) -> tuple[int, str, str]:
        ways(stable=servers["stable"].target, canary=servers[canary].target)
        fake.requests.clear()
        return rollout(*COMPARED, "--images", str(images), *args)

    return compared


def test_a_canary_is_compared_before_it_gets_calls(
    compared: Compared, fake: FakeApi, overlay: Path, namespace: str, ways: Callable[..., list[Any]]
) -> None:
    status, out, err = compared("good", "--weight", "20", "--context", "fake")
    assert status == 0, err
    assert "compared   8 of 8 images\nagreement  1.0000\n" in out
    steps = [line.partition(":")[0] for line in err.splitlines()]
    assert steps.index("compare version 4 with version 3") < len(steps) - 1 - steps[::-1].index("canary.env")
    assert _shares(fake) == [0, 20]
    assert tracks(overlay) == Tracks(3, 4, 1, 80, 20)
    where = ["--address=127.0.0.1", f"--namespace={namespace}", "--context=fake"]
    assert ways() == [
        ["port-forward", "service/graftserve", ":8500", *where],
        ["port-forward", "service/graftserve-canary", ":8500", *where],
        "ended",
        "ended",
    ]


def test_a_canary_that_answers_otherwise_never_gets_a_call(
    compared: Compared, fake: FakeApi, overlay: Path
) -> None:
    status, out, _ = compared("permuted", "--weight", "20", "--auto", "--max-shift", "1")
    assert status == 1
    assert "aborted: agreement 0.0000 on 8 images" in out
    assert tracks(overlay) == Tracks(3)
    assert _shares(fake) == [0]


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (
            {"stderr": "error: no pod found\n", "rc": 1},
            "no pod found",
        ),
        ({"rc": 3}, "exit status 3"),
        ({"sleep_s": 600}, "no answer after 0.3 s"),
    ],
)
def test_no_way_to_the_pods_compares_nothing_and_aborts_nothing(
    rollout: Rollout,
    fake: FakeApi,
    overlay: Path,
    ways: Callable[..., list[Any]],
    images: Path,
    way: dict[str, Any],
    said: str,
) -> None:
    rollout("apply")
    ways(stable=way)
    arguments = ("--timeout-s", "0.3") if "sleep_s" in way else ()
    status, out, err = rollout(*COMPARED, "--images", str(images), *arguments)
    assert (status, out) == (1, "")
    assert f"kubectl port-forward service/graftserve: {said}" in err
    assert tracks(overlay) == Tracks(3, 4, 1)
    status, out, _ = rollout("status")
    assert "`start` with the same version goes on, `abort` goes back" in out


def test_a_way_to_the_wrong_pods_is_no_bad_version(compared: Compared, overlay: Path) -> None:
    status, _, err = compared("stable")
    assert status == 1
    assert "a port-forward to the canary track: nothing is compared: " in err
    assert tracks(overlay) == Tracks(3, 4, 1)


def _shares(fake: FakeApi) -> list[int]:
    """What the route has given the canary, repetitions left out."""
    weights = [
        request.body["spec"]["rules"][0]["backendRefs"][1]["weight"]
        for request in fake.requests
        if is_apply(request) and request.path.endswith("/grpcroutes/graftserve")
    ]
    return [weight for weight, _ in groupby(weights)]


def test_a_ramp_is_compared_at_each_step(compared: Compared, fake: FakeApi, overlay: Path) -> None:
    ramp = ("good", "--ramp", "1,10,50", "--hold-s", "0")
    status, out, err = compared(*ramp)
    assert status == 0, err
    assert _shares(fake) == [0, 1, 10, 50]
    steps = [line for line in err.splitlines() if line.startswith(("compare ", "hold ", "canary.env"))]
    assert [line.split(",")[0] for line in steps] == [
        "canary.env: MODEL_VERSION=4",
        "compare version 4 with version 3",
        *(
            line
            for stable, percent in ((99, 1), (90, 10), (50, 50))
            for line in (
                f"canary.env: STABLE_WEIGHT={stable}",
                f"hold {percent}% for 0 s",
                "compare version 4 with version 3",
            )
        ),
    ]
    assert "version 4, 1 pod, 50% of the route's calls" in out
    assert compared(*ramp, "--auto")[0] == 0
    assert tracks(overlay) == Tracks(4)


def test_a_ramp_goes_on_where_it_was(rollout: Rollout, fake: FakeApi, overlay: Path) -> None:
    rollout("apply")
    rollout(*START, "--weight", "10")
    fake.requests.clear()
    status, _, err = rollout(*START, "--ramp", "1,10,50", "--hold-s", "0")
    assert status == 0, err
    assert [line for line in err.splitlines() if line.startswith("hold")] == [
        "hold 10% for 0 s",
        "hold 50% for 0 s",
    ]
    assert _shares(fake) == [10, 50]


def test_a_canary_whose_pods_end_under_calls_is_aborted(
    rollout: Rollout, fake: FakeApi, overlay: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout("apply")
    looks = 0
    original = Cluster.canary_trouble

    def look(self: Cluster) -> str:
        nonlocal looks
        looks += 1
        if looks == 3:
            status = {"replicas": 1, "updatedReplicas": 1, "observedGeneration": 99, "availableReplicas": 0}
            fake.set_status("Deployment", "graftserve-canary", namespace, status)
        return original(self)

    monkeypatch.setattr(Cluster, "canary_trouble", look)
    monkeypatch.setattr(overlay_drive, "_LOOK_S", 0.01)
    status, out, _ = rollout(*START, "--ramp", "20,40", "--hold-s", "600")
    assert status == 1
    assert "aborted: with 20% of the calls: no pod of the canary is ready\n" in out
    assert looks == 3
    assert tracks(overlay) == Tracks(3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--ramp", "10,5", "--apply"],
            "--ramp: expected percentages that rise, each in [1, 100], got [10, 5]",
        ),
        (["--ramp", "0,5", "--apply"], "expected percentages that rise"),
        (["--ramp", "50,101", "--apply"], "expected percentages that rise"),
        (["--ramp", "", "--apply"], "expected percentages such as 1,10,50, got ''"),
        (["--ramp", "1,x", "--apply"], "expected percentages such as 1,10,50, got '1,x'"),
        (["--ramp", "1"], "--ramp needs --apply"),
        (["--ramp", "1", "--apply", "--weight", "3"], "goes without --weight"),
    ],
)
def test_ramps_that_are_none(
    overlay: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert _run(["rollout", *START, "--overlay", str(overlay), *arguments]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_comparison_that_is_ended_ends_its_port_forwards(
    rollout: Rollout,
    fake: FakeApi,
    overlay: Path,
    ways: Callable[..., list[Any]],
    images: Path,
    number: signal.Signals,
) -> None:
    rollout("apply")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        ways(stable=target, canary=target)
        arguments = ["rollout", *COMPARED, "--overlay", str(overlay), "--apply", "--images", str(images)]
        program = f"""
from pathlib import Path
from graftserve.cli.app import main
from graftserve.k8s.rollout import forwarding
forwarding.find_kubectl = lambda: Path({str(forwarding.find_kubectl())!r})
main({arguments!r})
"""
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
        silent.settimeout(60)
        connection, _ = silent.accept()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert "interrupted: the same command goes on" in err
    assert ways()[-1] == "ended"
    assert rollout("abort")[0] == 0
