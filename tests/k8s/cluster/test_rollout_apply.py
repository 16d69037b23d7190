"""`graftserve rollout --apply`, on the fake API server and, where there is one, a real one."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli.app import _run
from graftserve.k8s.manifests import copy_manifests, overlays
from graftserve.k8s.render import find_kubectl
from graftserve.k8s.rollout import Cluster, ClusterError, NotReadyError, OverlayError, Tracks
from graftserve.k8s.rollout import api as api_module
from tests.k8s.api_client import Api
from tests.k8s.cluster.rollouts import BAD, START, Rollout, is_apply, tracks
from tests.k8s.controllers import Controllers
from tests.k8s.fake_api import FakeApi, Fault
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


@pytest.fixture
def config(api_config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kubeconfig, of the fake and of the real one in turn, where commands look for it."""
    monkeypatch.setenv("KUBECONFIG", str(api_config))
    return api_config


@pytest.fixture
def nodes(config: Path, namespace: str) -> Iterator[None]:
    """Pods become ready, but those of version 9."""
    with Controllers(config, namespace, {9: PULL_FAILS}):
        yield


def test_from_nothing_to_a_new_version_and_back(rollout: Rollout, overlay: Path, nodes: None) -> None:
    assert tracks(overlay) is None
    status, out, err = rollout("apply")
    assert (status, out) == (0, f"stable     version 3\ncanary     none\napplied {overlay}\n"), err
    assert tracks(overlay) == Tracks(3)

    status, out, err = rollout(*START, "--weight", "20")
    assert status == 0, err
    assert out.endswith(f"applied {overlay}\n")
    assert tracks(overlay) == Tracks(3, 4, 1, 80, 20)
    assert rollout(*START, "--weight", "50")[0] == 0
    assert tracks(overlay) == Tracks(3, 4, 1, 50, 50)

    status, out, _ = rollout("promote")
    assert status == 0
    assert "rollout 1 (version 3 to 4) promoted" in out
    assert tracks(overlay) == Tracks(4)
    assert rollout("undo")[0] == 0
    assert tracks(overlay) == Tracks(3)


def test_the_first_rollout_may_be_the_installation(rollout: Rollout, overlay: Path, nodes: None) -> None:
    assert rollout(*START, "--auto")[0] == 0
    assert tracks(overlay) == Tracks(4)


def test_a_canary_that_does_not_become_ready_is_taken_away(
    rollout: Rollout, overlay: Path, nodes: None
) -> None:
    rollout("apply")
    status, out, err = rollout(*BAD, "--weight", "20")
    assert status == 1
    why = "1 pod: container pull waits: CrashLoopBackOff: back-off 40s (exit status 1: Error: a wrong sum)"
    assert f"graftserve-canary is not ready within 1 s: 0 of 1 pod ready; {why}; see more with" in out
    assert why in err
    assert tracks(overlay) == Tracks(3)


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
    assert tracks(overlay) == Tracks(3, 7, 0)
    status, _, err = rollout("apply", "--take-over", "kubectl-client-side-apply")
    assert status == 1
    assert 'conflict with "kubectl-edit"' in err
    status, _, err = rollout("apply", "--take-over", "kubectl-edit")
    assert status == 0, err
    assert "deployment/graftserve-canary: taken over from kubectl-edit" in err
    assert tracks(overlay) == Tracks(3)


def test_what_plain_apply_owns_is_handed_over_once(
    rollout: Rollout, overlay: Path, namespace: str, config: Path, nodes: None, tmp_path: Path
) -> None:
    kubectl = [find_kubectl(), "--kubeconfig", config, "apply", "--validate=false"]
    subprocess.run([*kubectl, "-k", overlay], check=True, capture_output=True)
    status, _, err = rollout(*START)
    assert status == 1
    assert 'conflict with "kubectl-client-side-apply"' in err
    assert f"apply --overlay {overlay} --take-over kubectl-client-side-apply`, and run this again" in err
    assert tracks(overlay) == Tracks(3)

    take_over = ("apply", "--take-over", "kubectl-client-side-apply")
    status, _, err = rollout(*take_over)
    assert status == 0, err
    assert "deployment/graftserve-canary: taken over from kubectl-client-side-apply" in err
    assert tracks(overlay) == Tracks(3, 4, 1)  # as its files are
    api = Api(config, tmp_path / "discovery", namespace)
    metadata = api.get("Deployment", "graftserve-canary")["metadata"]
    assert "kubectl.kubernetes.io/last-applied-configuration" not in metadata.get("annotations", {})
    assert rollout("promote")[0] == 0
    assert tracks(overlay) == Tracks(4)
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
    assert tracks(overlay) == Tracks(3, 5, 1)
    assert "MODEL_VERSION=\n" in (overlay / "canary.env").read_text()
    status, out, _ = rollout("status", "--cluster")
    assert status == 1
    assert "not as the files say: " in out
    assert "deployment/graftserve-canary" in out

    assert rollout("apply")[0] == 0  # this overlay is right
    assert rollout(*START)[0] == 0
    assert tracks(overlay) == Tracks(3, 4, 1)
    assert rollout("status", "--cluster")[0] == 0


def _applied(fake: FakeApi, *kinds: str) -> list[str]:
    """What was applied, in order, trials left out: "deployments/graftserve-stable" and the like."""
    paths = ["/".join(request.path.split("/")[-2:]) for request in fake.requests if is_apply(request)]
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
    assert tracks(overlay) == Tracks(3)


def test_a_conflict_changes_nothing(rollout: Rollout, fake: FakeApi, namespace: str) -> None:
    rollout("apply")
    fake.edit("Deployment", "graftserve-stable", namespace, {"spec": {"progressDeadlineSeconds": 7}})
    fake.requests.clear()
    assert rollout(*START)[0] == 1
    assert [request for request in fake.requests if is_apply(request)] == []
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
    assert [request.path for request in fake.requests if is_apply(request)] == [
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
    assert tracks(overlay) == Tracks(4)


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
    assert tracks(overlay) == Tracks(3, 4, 1)


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
    assert tracks(overlay) == Tracks(4)
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
            assert tracks(overlay) == (end if way == command else Tracks(3)), point
        else:  # it has fewer requests
            kill_at(0, False)
            assert tracks(overlay) == end
            break
        for name in {Tracks(4): ("undo",), Tracks(3): ()}.get(tracks(overlay), ("abort",)):
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
