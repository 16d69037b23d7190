"""`graftserve rollout` on a cluster: the fake API server and, where there is one, a real one."""

import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli.app import _run
from graftserve.client.testing import FakeServer
from graftserve.k8s.manifests import copy_manifests, overlays
from graftserve.k8s.render import KubectlError, find_kubectl, render_folder
from graftserve.k8s.rollout import (
    Cluster,
    ClusterError,
    NotReadyError,
    OverlayError,
    Tracks,
    forwarding,
    overlay_drive,
)
from graftserve.k8s.rollout import api as api_module
from graftserve.k8s.rollout import cluster as cluster_module
from tests.k8s.api_client import Api
from tests.k8s.controllers import Controllers
from tests.k8s.fake_api import FakeApi, Fault, Request
from tests.k8s.small_overlay import copy_small_overlay

PULL_FAILS = {
    "phase": "Pending",
    "initContainerStatuses": [
        {
            "name": "pull",
            "image": "graftserve",
            "imageID": "",
            "ready": False,
            "restartCount": 3,
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
            "lastState": {
                "terminated": {"exitCode": 1, "reason": "Error", "message": "pulling\nError: a wrong sum\n"}
            },
        }
    ],
}
START = ("start", "--version", "4", "--skip-comparison")
BAD = ("start", "--version", "9", "--skip-comparison", "--load-timeout-s", "1")

Rollout = Callable[..., tuple[int, str, str]]
_rendered: dict[tuple[str, ...], str] = {}


def _render_once(folder: Path) -> str:
    """By the real kubectl, once for each state of the overlay's files."""
    names = ("kustomization.yaml", "stable.env", "canary.env")
    key = tuple((folder / name).read_text() for name in names)
    if key not in _rendered:
        _rendered[key] = render_folder(folder)
    return _rendered[key]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        find_kubectl()  # renders
    except KubectlError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(cluster_module, "render_folder", _render_once)
    monkeypatch.setattr(api_module, "_PAUSE_S", 0.01)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def namespace() -> str:
    return f"flowers-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def overlay(tmp_path: Path, namespace: str) -> Path:
    return copy_small_overlay(tmp_path / "deploy", namespace)


@pytest.fixture
def config(api_config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kubeconfig, of the fake and of the real one in turn, where commands look for it."""
    monkeypatch.setenv("KUBECONFIG", str(api_config))
    return api_config


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The fake alone, for what only it can do; its pods are ready at once."""
    with FakeApi(ready=True) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "fake.kubeconfig")))
        yield api


@pytest.fixture
def nodes(config: Path, namespace: str) -> Iterator[None]:
    """Pods become ready, but those of version 9."""
    with Controllers(config, namespace, {9: PULL_FAILS}):
        yield


@pytest.fixture
def rollout(overlay: Path, capfd: pytest.CaptureFixture[str]) -> Rollout:
    """rollout(command, *args) -> (exit status, stdout, stderr), on the overlay, which is applied."""

    def rollout(command: str, *args: str) -> tuple[int, str, str]:
        apply = () if command in ("apply", "status") else ("--apply",)
        status = _run(["rollout", command, "--overlay", str(overlay), *apply, *args])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return rollout


def _tracks(overlay: Path) -> Tracks | None:
    with Cluster(overlay) as cluster:
        return cluster.observe()


def test_from_nothing_to_a_new_version_and_back(rollout: Rollout, overlay: Path, nodes: None) -> None:
    assert _tracks(overlay) is None
    status, out, err = rollout("apply")
    assert (status, out) == (0, f"stable     version 3\ncanary     none\napplied {overlay}\n"), err
    assert _tracks(overlay) == Tracks(3)

    status, out, err = rollout(*START, "--weight", "20")
    assert status == 0, err
    assert out.endswith(f"applied {overlay}\n")
    assert _tracks(overlay) == Tracks(3, 4, 1, 80, 20)
    assert rollout(*START, "--weight", "50")[0] == 0
    assert _tracks(overlay) == Tracks(3, 4, 1, 50, 50)

    status, out, _ = rollout("promote")
    assert status == 0
    assert "rollout 1 (version 3 to 4) promoted" in out
    assert _tracks(overlay) == Tracks(4)
    assert rollout("undo")[0] == 0
    assert _tracks(overlay) == Tracks(3)


def test_the_first_rollout_may_be_the_installation(rollout: Rollout, overlay: Path, nodes: None) -> None:
    assert rollout(*START, "--auto")[0] == 0
    assert _tracks(overlay) == Tracks(4)


def test_a_canary_that_does_not_become_ready_is_taken_away(
    rollout: Rollout, overlay: Path, nodes: None
) -> None:
    rollout("apply")
    status, out, err = rollout(*BAD, "--weight", "20")
    assert status == 1
    why = "1 pod: container pull waits: CrashLoopBackOff: back-off 40s (exit status 1: Error: a wrong sum)"
    assert f"graftserve-canary is not ready within 1 s: 0 of 1 pod ready; {why}; see more with" in out
    assert why in err
    assert _tracks(overlay) == Tracks(3)


def test_a_stable_track_that_does_not_become_ready_leaves_both_ways_open(
    rollout: Rollout, overlay: Path, nodes: None
) -> None:
    rollout("apply")
    path = overlay / "stable.env"
    path.write_text(path.read_text().replace("MODEL_VERSION=3", "MODEL_VERSION=9"))
    status, out, err = rollout("apply", "--load-timeout-s", "1")
    assert (status, out) == (1, "")
    assert "deployment/graftserve-stable is not ready within 1 s: 0 of 1 pod ready; 1 pod: container" in err

    status, out, _ = rollout("status", "--cluster")
    assert status == 1
    assert "graftserve-stable  version 9, 0 of 1 pod ready\n    1 pod: container pull waits: Crash" in out
    status, out, _ = rollout("status", "--cluster", "--json")
    assert status == 1
    cluster = json.loads(out)["cluster"]
    assert cluster["differ"] == []
    assert cluster["deployments"]["graftserve-canary"] | {"text": ""} == {
        "version": None,
        "ready": True,
        "text": "",
        "troubles": [],
    }


def test_a_route_that_no_gateway_takes_is_seen(rollout: Rollout, fake: FakeApi, namespace: str) -> None:
    rollout("apply")
    assert rollout("status", "--cluster")[0] == 0
    condition = {"type": "Accepted", "status": "False", "reason": "NoMatchingParent"}
    parent = {"parentRef": {"name": "gateway"}, "controllerName": "x/y", "conditions": [condition]}
    fake.set_status("GRPCRoute", "graftserve", namespace, {"parents": [parent]})
    status, out, _ = rollout("status", "--cluster")
    assert status == 1
    assert "  route: Gateway gateway: not Accepted: NoMatchingParent\n" in out


def test_what_others_own_is_left_to_them(
    rollout: Rollout, overlay: Path, namespace: str, config: Path, nodes: None, tmp_path: Path
) -> None:
    rollout("apply")
    api = Api(config, tmp_path / "discovery", namespace)
    before = api.get("Deployment", "graftserve-canary")
    template = {"spec": {"template": {"metadata": {"labels": {"graftserve.dev/version": "7"}}}}}
    api.patch("Deployment", "graftserve-canary", template)
    edited = api.get("Deployment", "graftserve-canary")
    assert edited["metadata"]["generation"] == before["metadata"]["generation"] + 1

    status, out, err = rollout("apply")
    assert (status, out) == (1, "")
    assert 'apply deployment/graftserve-canary: conflict with "kubectl-edit" using apps/v1' in err
    assert ".spec.template.metadata.labels.graftserve.dev/version" in err
    assert "nothing is forced; if that was done by hand, and is not needed any more, take it over: " in err
    assert _tracks(overlay) == Tracks(3, 7, 0)
    status, _, err = rollout("apply", "--take-over", "kubectl-client-side-apply")
    assert status == 1
    assert 'conflict with "kubectl-edit"' in err
    status, _, err = rollout("apply", "--take-over", "kubectl-edit")
    assert status == 0, err
    assert "deployment/graftserve-canary: taken over from kubectl-edit" in err
    assert _tracks(overlay) == Tracks(3)


def test_what_plain_apply_owns_is_handed_over_once(
    rollout: Rollout, overlay: Path, namespace: str, config: Path, nodes: None, tmp_path: Path
) -> None:
    kubectl = [find_kubectl(), "--kubeconfig", config, "apply", "--validate=false"]
    subprocess.run([*kubectl, "-k", overlay], check=True, capture_output=True)
    status, _, err = rollout(*START)
    assert status == 1
    assert 'conflict with "kubectl-client-side-apply"' in err
    assert f"apply --overlay {overlay} --take-over kubectl-client-side-apply`, and run this again" in err
    assert _tracks(overlay) == Tracks(3)

    take_over = ("apply", "--take-over", "kubectl-client-side-apply")
    status, _, err = rollout(*take_over)
    assert status == 0, err
    assert "deployment/graftserve-canary: taken over from kubectl-client-side-apply" in err
    assert _tracks(overlay) == Tracks(3, 4, 1)  # as its files are
    api = Api(config, tmp_path / "discovery", namespace)
    metadata = api.get("Deployment", "graftserve-canary")["metadata"]
    assert "kubectl.kubernetes.io/last-applied-configuration" not in metadata.get("annotations", {})
    assert rollout("promote")[0] == 0
    assert _tracks(overlay) == Tracks(4)
    assert "deployment/graftserve-canary: taken over" not in rollout(*take_over)[2]


def test_somebody_elses_version_is_not_overwritten(
    rollout: Rollout, overlay: Path, namespace: str, config: Path, nodes: None, tmp_path: Path
) -> None:
    """Such as `kubectl rollout undo`, or a rollout from another checkout, whose field manager is the same."""
    rollout("apply")
    other = copy_small_overlay(tmp_path / "other", namespace)
    assert (
        _run(["rollout", "start", "--overlay", str(other), "--apply", *BAD[1:2], "5", "--skip-comparison"])
        == 0
    )
    status, _, err = rollout(*START)
    assert status == 1
    assert "rollout 1 (version 3 to 4): somebody else changed the cluster: the canary is version 5" in err
    assert _tracks(overlay) == Tracks(3, 5, 1)
    assert "MODEL_VERSION=\n" in (overlay / "canary.env").read_text()
    status, out, _ = rollout("status", "--cluster")
    assert status == 1
    assert "not as the files say: " in out
    assert "deployment/graftserve-canary" in out

    assert rollout("apply")[0] == 0  # this overlay is right
    assert rollout(*START)[0] == 0
    assert _tracks(overlay) == Tracks(3, 4, 1)
    assert rollout("status", "--cluster")[0] == 0


def _is_apply(request: Request) -> bool:
    return request.is_apply and not request.is_dry_run


def _applied(fake: FakeApi, *kinds: str) -> list[str]:
    """What was applied, in order, trials left out: "deployments/graftserve-stable" and the like."""
    paths = ["/".join(request.path.split("/")[-2:]) for request in fake.requests if _is_apply(request)]
    return [path for path in paths if path.split("/")[0] in kinds]


def test_calls_are_given_to_pods_that_are_ready_and_taken_from_those_that_go(
    rollout: Rollout, fake: FakeApi
) -> None:
    rollout("apply")
    pods = ["deployments/graftserve-canary", "deployments/graftserve-stable"]
    route = ["grpcroutes/graftserve"]
    for command, expected in (
        ((*START, "--weight", "20"), pods + route),
        ((*START, "--weight", "50"), pods + route),
        ((*START, "--weight", "10"), route + pods),
        (("promote",), route + pods + route + pods),
    ):
        fake.requests.clear()
        assert rollout(*command)[0] == 0
        assert _applied(fake, "deployments", "grpcroutes") == expected, command


def test_what_a_controller_owns_is_not_for_the_taking(
    rollout: Rollout, fake: FakeApi, namespace: str
) -> None:
    rollout("apply")
    fake.edit("Deployment", "graftserve-stable", namespace, {"spec": {"revisionHistoryLimit": 7}}, "operator")
    status, _, err = rollout("apply")
    assert status == 1
    assert 'conflict with "operator" using apps/v1: .spec.revisionHistoryLimit' in err
    assert "nothing is forced; take the field out of the overlay, or let the other manager give it up" in err
    assert "--take-over" not in err


def test_an_undo_by_hand_is_caught_up_with(
    rollout: Rollout, fake: FakeApi, overlay: Path, namespace: str
) -> None:
    """`kubectl rollout undo`, whose manager is kubectl."""
    rollout("apply")
    rollout(*START, "--auto")
    template = {"spec": {"template": {"metadata": {"labels": {"graftserve.dev/version": "3"}}}}}
    fake.edit("Deployment", "graftserve-stable", namespace, template, "kubectl")
    assert rollout("start", "--version", "5", "--skip-comparison")[0] == 1
    assert rollout("abort", "--leave")[0] == 0
    assert rollout("undo")[0] == 0
    assert _tracks(overlay) == Tracks(3)


def test_a_conflict_changes_nothing(rollout: Rollout, fake: FakeApi, namespace: str) -> None:
    rollout("apply")
    fake.edit("Deployment", "graftserve-stable", namespace, {"spec": {"progressDeadlineSeconds": 7}})
    fake.requests.clear()
    assert rollout(*START)[0] == 1
    assert [request for request in fake.requests if _is_apply(request)] == []
    fake.edit("Deployment", "graftserve-stable", namespace, {"spec": {"progressDeadlineSeconds": 1200}})
    assert rollout(*START)[0] == 0


def test_a_cluster_that_lacks_a_kind_is_not_touched(
    overlay: Path, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeApi(without={"gateway.networking.k8s.io"}, ready=True) as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "config")))
        with Cluster(overlay) as cluster, pytest.raises(ClusterError) as caught:
            cluster.settle(Tracks(3))
    assert str(caught.value).startswith(
        "grpcroute/graftserve: the cluster knows no GRPCRoute of gateway.networking.k8s.io/v1: install what"
    )
    assert [request.path for request in fake.requests if _is_apply(request)] == [
        f"/api/v1/namespaces/{namespace}"
    ]


@pytest.mark.parametrize("kind", ["throttle", "unavailable", "drop_before", "drop_after"])
@pytest.mark.parametrize("method", ["GET", "PATCH"])
def test_what_passes_is_waited_for(
    rollout: Rollout, fake: FakeApi, overlay: Path, kind: Any, method: str
) -> None:
    rollout("apply")
    fault = fake.fail(Fault(kind, method=method, path="/deployments/", times=3))
    status, _, err = rollout(*START, "--auto")
    assert status == 0, err
    assert fault.hits == 3
    assert "waiting for the API server: " in err
    assert _tracks(overlay) == Tracks(4)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("forbidden", "deployments.apps"),
        ("unauthorized", "Unauthorized"),
        ("internal", "apply deployment/graftserve-canary: "),
    ],
)
def test_what_does_not_pass_ends_the_run(
    rollout: Rollout, fake: FakeApi, overlay: Path, kind: Any, said: str
) -> None:
    rollout("apply")
    fault = fake.fail(Fault(kind, method="PATCH", path="/deployments/", times=None))
    status, out, err = rollout(*START)
    assert (status, out) == (1, "")
    assert said in err
    assert fault.hits == 1
    fake.mend()
    assert rollout(*START)[0] == 0
    assert _tracks(overlay) == Tracks(3, 4, 1)


def test_a_reading_that_fails_is_tried_again(rollout: Rollout, fake: FakeApi) -> None:
    rollout("apply")
    fault = fake.fail(Fault("internal", method="GET", path="/deployments/", times=2))
    assert rollout(*START)[0] == 0
    assert fault.hits == 2


def test_an_api_server_that_stays_away_ends_the_run_not_the_rollout(
    rollout: Rollout, fake: FakeApi, overlay: Path
) -> None:
    rollout("apply")
    rollout(*START)
    fake.stop()
    status, out, err = rollout("promote", "--patience-s", "0.2")
    assert (status, out) == (1, "")
    assert f"no answer from the API server for 0.2 s: {fake.url}: Connection refused; run this again" in err
    fake.start()
    assert rollout("promote")[0] == 0
    assert _tracks(overlay) == Tracks(4)
    fake.fail(Fault("hang", path="/deployments/graftserve-stable", times=None))
    status, _, err = rollout("undo", "--timeout-s", "0.2", "--patience-s", "0.3")
    assert status == 1
    assert "timed out" in err
    fake.mend()


class KilledError(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """kill_at(n, is_done): the n-th request from now on, done or not, is the last; none for 0."""
    original = api_module.KubernetesApi._ask
    left, done = 0, False

    def ask(self: Any, *args: Any) -> Any:
        nonlocal left
        left -= 1
        result = None if left == 0 and not done else original(self, *args)
        if left == 0:
            raise KilledError
        return result

    def kill_at(point: int, is_done: bool) -> None:
        nonlocal left, done
        left, done = point, is_done

    monkeypatch.setattr(api_module.KubernetesApi, "_ask", ask)
    return kill_at


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(
    ("command", "before", "end"),
    [
        ("start", (), Tracks(3, 4, 1, 80, 20)),
        ("promote", ("start",), Tracks(4)),
        ("abort", ("start",), Tracks(3)),
        ("undo", ("start", "promote"), Tracks(3)),
    ],
)
def test_killed_at_any_request_it_goes_on_or_back(
    rollout: Rollout,
    fake: FakeApi,
    overlay: Path,
    kill_at: Callable[[int, bool], None],
    command: str,
    before: tuple[str, ...],
    end: Tracks,
    is_done: bool,
    stride: int,
) -> None:
    def run(name: str) -> int:
        return rollout(name, *((*START[1:], "--weight", "20") if name == "start" else ()))[0]

    rollout("apply")
    points = 0
    for point in count(1, stride):
        for earlier in before:
            assert run(earlier) == 0
        kill_at(point, is_done)
        try:
            run(command)
        except KilledError:
            points += 1
            kill_at(0, False)
            way = "abort" if command == "start" and points % 2 else command
            assert run(way) == 0, point
            assert _tracks(overlay) == (end if way == command else Tracks(3)), point
        else:  # it has fewer requests
            kill_at(0, False)
            assert _tracks(overlay) == end
            break
        for name in {Tracks(4): ("undo",), Tracks(3): ()}.get(_tracks(overlay), ("abort",)):
            assert run(name) == 0
    assert points * stride > 20


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop_watch", times=3),
        Fault("drop_watch", after_events=1, mid_line=True, times=3),
        Fault("gone", times=3),
        Fault("unavailable", when=lambda request: request.is_watch, times=3),
    ],
    ids=["dropped", "in a line", "gone", "refused"],
)
def test_a_watch_that_ends_is_begun_anew(
    overlay: Path,
    fake_api: FakeApi,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    config = fake_api.kubeconfig(tmp_path / "fake.kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(config))
    fault = fake_api.fail(replace(fault))
    with Cluster(overlay) as cluster, ThreadPoolExecutor() as pool:
        settled = pool.submit(cluster.settle, Tracks(3))
        assert fault.hit.wait(30)
        deadline = time.monotonic() + 30
        while fault.hits < 3:
            assert time.monotonic() < deadline
            label = {"metadata": {"labels": {"edited": str(time.monotonic_ns())}}}  # an event
            fake_api.edit("Deployment", "graftserve-stable", namespace, label)
        with Controllers(config, namespace):
            settled.result(30)
        assert cluster.observe() == Tracks(3)


def test_history_that_is_forgotten_is_read_anew(
    overlay: Path, fake_api: FakeApi, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction between the look at a Deployment and the watch of it."""
    config = fake_api.kubeconfig(tmp_path / "fake.kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(config))
    original = api_module.KubernetesApi.changes
    forgotten = 0

    def changes(self: Any, document: dict[str, Any], timeout_s: float) -> Any:
        nonlocal forgotten
        if forgotten < 2:
            label = {"metadata": {"labels": {"edited": str(forgotten)}}}
            fake_api.edit("Deployment", document["metadata"]["name"], namespace, label)
            fake_api.compact()
            forgotten += 1
        return original(self, document, timeout_s)

    monkeypatch.setattr(api_module.KubernetesApi, "changes", changes)
    with Cluster(overlay) as cluster, ThreadPoolExecutor() as pool:
        settled = pool.submit(cluster.settle, Tracks(3))
        deadline = time.monotonic() + 30
        while forgotten < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        with Controllers(config, namespace):
            settled.result(30)
    assert forgotten == 2


@pytest.mark.parametrize("name", sorted(overlays()))
def test_whole_overlays_are_taken(
    name: str, config: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if config.name != "fake.kubeconfig" and request.getfixturevalue("real_api").minor < 30:
        pytest.skip("this API server is older than the manifests' fields")
    folder = copy_manifests(name, tmp_path / "deploy")
    with Cluster(folder, ready_timeout_s=0.1) as cluster:
        with pytest.raises(NotReadyError, match="deployment/graftserve-stable is not ready within"):
            cluster.settle(Tracks(1))
        assert set(cluster.differences()) <= {"grpcroute/graftserve"}  # it is for pods that are ready


def test_the_way_to_the_cluster_is_missing(
    rollout: Rollout, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    status, _, err = rollout("apply")
    assert status == 1
    assert f"{tmp_path / 'none'}: expected a kubeconfig, found none" in err
    for text in ("no kubeconfig", "- a", "{", "clusters: 3"):
        (tmp_path / "none").write_text(text)
        status, _, err = rollout("apply")
        assert status == 1, text
        assert "not a kubeconfig that can be used" in err
    with FakeApi() as fake:
        fake.kubeconfig(tmp_path / "none")
        status, _, err = rollout("apply", "--context", "prod")
    assert status == 1
    assert "prod" in err
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    status, _, err = rollout("apply")
    assert status == 1
    assert "pip install 'graftserve[k8s]'" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["start", "--version", "4", "--context", "prod"], "--context belongs to --apply"),
        (["status", "--context", "prod"], "--context belongs to --cluster"),
        (
            ["start", "--version", "4", "--images", "."],
            "--images needs --target-stable and --target-canary, or",
        ),
    ],
)
def test_options_that_need_each_other(
    overlay: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert _run(["rollout", arguments[0], "--overlay", str(overlay), *arguments[1:]]) == 2
    assert said in capfd.readouterr().err


def test_apply_and_cluster_are_for_overlays(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["rollout", "status", "--model", "flowers", "--cluster"]) == 2
    assert "--cluster belongs to --overlay" in capfd.readouterr().err
    assert _run(["rollout", "apply"]) == 2
    assert "Missing option '--overlay'" in capfd.readouterr().err


def test_files_that_do_not_reach_the_manifests_are_not_applied(fake: FakeApi, overlay: Path) -> None:
    path = overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace("  - ../../components/versions\n", ""))
    with (
        Cluster(overlay) as cluster,
        pytest.raises(
            OverlayError,
            match=r"expected version 3 in the label graftserve\.dev/version of graftserve-stable's",
        ),
    ):
        cluster.settle(Tracks(3))
    assert [request for request in fake.requests if request.method != "GET"] == []


def test_an_overlay_that_does_not_render_is_not_applied(
    rollout: Rollout, fake: FakeApi, overlay: Path
) -> None:
    path = overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace("- namespace.yaml", "- missing.yaml"))
    status, _, err = rollout(*START)
    assert status == 1
    assert "missing.yaml" in err
    assert fake.requests == []


@pytest.mark.parametrize("command", ["apply", "start", "status"])
def test_an_overlay_without_a_namespace_is_not_applied(
    rollout: Rollout, fake: FakeApi, overlay: Path, namespace: str, command: str
) -> None:
    path = overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace(f"namespace: {namespace}\n", ""))
    arguments = {"apply": ("apply",), "start": START, "status": ("status", "--cluster")}[command]
    status, out, err = rollout(*arguments)
    assert (status, out) == (1, "")
    assert f"{path}: expected `namespace: NAME`, got none: " in err
    assert "would be in no namespace" in err
    assert [request for request in fake.requests if request.method != "GET"] == []


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """ways(stable=..., canary=...) says where port-forwards lead; without arguments, what was asked for."""
    path = tmp_path / "ways.json"
    script = Path(__file__).with_name("fake_kubectl.py")
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


COMPARED = ("start", "--version", "4", "--max-latency-ratio", "1000")
Compared = Callable[..., tuple[int, str, str]]


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
    assert _tracks(overlay) == Tracks(3, 4, 1, 80, 20)
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
    assert _tracks(overlay) == Tracks(3)
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
    assert _tracks(overlay) == Tracks(3, 4, 1)
    status, out, _ = rollout("status")
    assert "`start` with the same version goes on, `abort` goes back" in out


def test_a_way_to_the_wrong_pods_is_no_bad_version(compared: Compared, overlay: Path) -> None:
    status, _, err = compared("stable")
    assert status == 1
    assert "a port-forward to the canary track: nothing is compared: " in err
    assert _tracks(overlay) == Tracks(3, 4, 1)


def _shares(fake: FakeApi) -> list[int]:
    """What the route has given the canary, repetitions left out."""
    weights = [
        request.body["spec"]["rules"][0]["backendRefs"][1]["weight"]
        for request in fake.requests
        if _is_apply(request) and request.path.endswith("/grpcroutes/graftserve")
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
    assert _tracks(overlay) == Tracks(4)


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
    assert _tracks(overlay) == Tracks(3)


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
