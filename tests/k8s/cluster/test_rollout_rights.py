"""What whoever rolls out must be allowed to do: the Role of k8s/deployer, no more and no less."""

import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftserve.cli.app import _run
from graftserve.k8s.render import find_kubectl, render_folder
from graftserve.k8s.rollout import Cluster, ClusterError, Tracks, port_forward
from graftserve.k8s.rollout.match import says_all
from tests.k8s.api_client import Api, new_thing
from tests.k8s.cluster.rollouts import Rollout
from tests.k8s.controllers import Controllers
from tests.k8s.envtest import EnvTest
from tests.k8s.fake_api import FakeApi, Fault, Request
from tests.k8s.fake_kinds import KINDS
from tests.k8s.mixes import MIXES

_ROLE = Path(__file__).parents[3] / "k8s/deployer/role.yaml"
START = ("start", "--version", "4", "--skip-comparison", "--weight", "20")
TAKE_OVER = ("--take-over", "kubectl-client-side-apply")
# What `kubectl port-forward service/...` asks for by itself.
KUBECTL = {
    ("", "services"): {"get"},
    ("", "pods"): {"get", "list", "watch"},
    ("", "pods/portforward"): {"get", "create"},
}

Rights = dict[tuple[str, str], set[str]]
"""Verbs by (group, resource)."""


@pytest.fixture
def rollout(overlay: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Rollout:
    """rollout(kubeconfig, command, *args) -> (exit status, stdout, stderr), on the applied overlay."""

    def rollout(kubeconfig: Path, command: str, *args: str) -> tuple[int, str, str]:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        apply = () if command in ("apply", "status") else ("--apply",)
        status = _run(["rollout", command, "--overlay", str(overlay), *apply, *args])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return rollout


@pytest.fixture
def kubectl(real_api: EnvTest, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """kubectl(kubeconfig, *args)"""

    def kubectl(kubeconfig: Path, *args: Any) -> "subprocess.CompletedProcess[str]":
        options = ("--kubeconfig", kubeconfig, "--cache-dir", tmp_path / "kubectl")
        return subprocess.run([find_kubectl(), *options, *args], capture_output=True, text=True, timeout=60)

    return kubectl


@pytest.fixture
def prepared(
    real_api: EnvTest,
    overlay: Path,
    namespace: str,
    kubectl: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    """An administrator made the namespace, and gave the Role to the deployer."""
    for arguments in (
        ("--server-side", "-f", overlay / "namespace.yaml"),
        ("--namespace", namespace, "-k", overlay / "../../deployer"),
    ):
        done = kubectl(real_api.config_path, "apply", "--validate=false", *arguments)
        assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 30  # the server reads Roles by a watch of its own
    while kubectl(real_api.deployer_path, "auth", "can-i", "get", "services", "-n", namespace).returncode:
        assert time.monotonic() < deadline


def _granted() -> Rights:
    rights: Rights = defaultdict(set)
    for rule in yaml.safe_load(_ROLE.read_text())["rules"]:
        assert rule.keys() == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                rights[group, resource] |= set(rule["verbs"])
    return rights


def _asked(requests: Iterable[Request]) -> Rights:
    """What RBAC would have been asked for. Server-side apply asks for create where there is nothing."""
    rights: Rights = defaultdict(set)
    for request in requests:
        match = re.fullmatch(
            r"/(?:api|apis/([^/]+))/[^/]+/(?:namespaces/[^/]+/)?([a-z]+)(/[^/]+)?", request.path
        )
        if match is None:  # discovery, which everybody may
            assert request.path.count("/") <= 3, request.path
            continue
        group, resource, name = match.groups()
        if request.method == "PATCH":
            verbs = {"patch", "create"} if request.is_apply else {"patch"}
        else:
            assert request.method == "GET"
            verbs = {"watch" if request.is_watch else "get" if name else "list"}
        rights[group or "", resource] |= verbs
    return rights


def test_the_role_is_what_rollouts_ask_for(
    rollout: Rollout, overlay: Path, namespace: str, tmp_path: Path
) -> None:
    requests = []
    for is_ready in (False, True):
        with FakeApi(ready=is_ready) as fake:
            fake.apply(yaml.safe_load((overlay / "namespace.yaml").read_text()))
            config = fake.kubeconfig(tmp_path / "config")
            status, _, err = rollout(config, "apply", *TAKE_OVER, "--load-timeout-s", "0.1")
            assert status == (not is_ready), err
            assert rollout(config, "status", "--cluster")[0] == (not is_ready)
            if is_ready:
                for command in (START, ("abort",), START, ("promote",), ("undo",)):
                    status, _, err = rollout(config, *command)
                    assert status == 0, err
            requests += fake.requests
    asked = _asked(requests)
    assert asked["", "namespaces"] == {"get"}
    assert asked["", "pods"] == {"list"}

    plurals = {(kind.api_version, kind.kind): (kind.group, kind.plural) for kind in KINDS}
    applied = {
        plurals[item["apiVersion"], item["kind"]]
        for mix in MIXES
        for item in mix.objects
        if "namespace" in item["metadata"]
    }
    expected = {
        name: asked.get(name, set())
        | KUBECTL.get(name, set())
        | (asked["", "configmaps"] if name in applied else set())
        for name in {*asked, *applied, *KUBECTL}
    }
    assert _granted() == expected


def test_only_a_laptop_has_more_outside_of_its_namespace_than_that() -> None:
    for mix in MIXES:
        kinds = {item["kind"] for item in mix.objects if "namespace" not in item["metadata"]}
        assert kinds == ({"Namespace", "PersistentVolume"} if mix.overlay == "laptop" else {"Namespace"})


def test_a_namespace_that_is_as_it_should_be_needs_no_rights(
    rollout: Rollout, overlay: Path, namespace: str, tmp_path: Path
) -> None:
    with FakeApi(ready=True) as fake:
        config = fake.kubeconfig(tmp_path / "config")
        fault = fake.fail(Fault("forbidden", method="PATCH", path=f"/namespaces/{namespace}$", times=None))
        status, out, err = rollout(config, "apply")
        assert (status, out) == (1, "")
        assert f'apply namespace/{namespace}: namespaces "{namespace}" is forbidden: User "fake" ' in err
        assert f"applies it once, by `graftserve rollout apply --overlay {overlay}`" in err
        assert fault.hits == 1

        fake.apply(yaml.safe_load((overlay / "namespace.yaml").read_text()), "an-administrator")
        assert rollout(config, "apply")[0] == 0
        assert rollout(config, *START)[0] == 0
        assert rollout(config, "status", "--cluster")[0] == 0
        assert fault.hits == 1

        label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}}
        fake.edit("Namespace", namespace, "", label, "an-administrator")
        for command in ("apply", "promote"):
            status, out, err = rollout(config, command)
            assert (status, out) == (1, "")
            assert f"applies it once, by `graftserve rollout apply --overlay {overlay}`" in err
        with Cluster(overlay) as cluster:
            assert cluster.observe() == Tracks(3, 4, 1, 80, 20)


def test_a_namespace_that_differs_is_applied_by_those_who_may(
    rollout: Rollout, overlay: Path, namespace: str, tmp_path: Path
) -> None:
    with FakeApi(ready=True) as fake:
        config = fake.kubeconfig(tmp_path / "config")
        assert rollout(config, "apply")[0] == 0
        path = overlay / "namespace.yaml"
        path.write_text(path.read_text().replace("  labels:\n", "  labels:\n    team: garden\n"))
        status, out, _ = rollout(config, "status", "--cluster")
        assert status == 1
        assert f"not as the files say: namespace/{namespace};" in out
        assert rollout(config, "apply")[0] == 0
        assert fake.get("Namespace", namespace)["metadata"]["labels"]["team"] == "garden"
        assert rollout(config, "status", "--cluster")[0] == 0


def test_who_lacks_rights_is_told_who_gives_them(
    rollout: Rollout, overlay: Path, namespace: str, tmp_path: Path
) -> None:
    with FakeApi(ready=True) as fake:
        fake.fail(Fault("forbidden", path=f"/namespaces/{namespace}", times=None))
        status, out, err = rollout(fake.kubeconfig(tmp_path / "config"), *START)
    assert (status, out) == (1, "")
    assert 'User "fake" cannot get resource "deployments" in API group "apps"' in err
    folder = overlay.parents[1] / "deployer"
    assert f"`kubectl apply --namespace {namespace} -k {folder}`, after `graftserve rollout apply" in err
    assert "kind: Role" in render_folder(folder)


def test_where_the_role_comes_from_is_said_if_it_is_not_there(
    rollout: Rollout, overlay: Path, tmp_path: Path
) -> None:
    shutil.rmtree(overlay.parents[1] / "deployer")
    with FakeApi() as fake:
        fake.fail(Fault("forbidden", path="/deployments/", times=None))
        _, _, err = rollout(fake.kubeconfig(tmp_path / "config"), *START)
    assert "/deployer`, a folder that `graftserve k8s render --output` makes, after" in err


def test_a_deployer_rolls_out_on_a_real_server(
    rollout: Rollout, real_api: EnvTest, namespace: str, overlay: Path, prepared: None
) -> None:
    mine = real_api.deployer_path
    with Controllers(real_api.config_path, namespace):
        for command, expected in (
            (("apply", *TAKE_OVER), Tracks(3)),
            (START, Tracks(3, 4, 1, 80, 20)),
            (("promote",), Tracks(4)),
            (("undo",), Tracks(3)),
            ((*START, "--load-timeout-s", "60"), Tracks(3, 4, 1, 80, 20)),
            (("abort",), Tracks(3)),
        ):
            status, _, err = rollout(mine, *command)
            assert status == 0, err
            with Cluster(overlay) as cluster:
                assert cluster.observe() == expected
        status, out, err = rollout(mine, "status", "--cluster")
        assert status == 0, out + err


def test_a_deployer_sees_why_pods_are_not_ready(
    rollout: Rollout, real_api: EnvTest, namespace: str, prepared: None
) -> None:
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    container = {"name": "server", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    trouble = {"phase": "Pending", "containerStatuses": [container | {"state": waits}]}
    with Controllers(real_api.config_path, namespace, {3: trouble}):
        status, _, err = rollout(real_api.deployer_path, "apply", "--load-timeout-s", "1")
    assert status == 1
    assert "container server waits: ImagePullBackOff: no such image" in err


def test_a_deployer_gets_through_to_pods(
    rollout: Rollout,
    real_api: EnvTest,
    namespace: str,
    prepared: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Controllers(real_api.config_path, namespace):
        assert rollout(real_api.deployer_path, "apply")[0] == 0
    api = Api(real_api.config_path, tmp_path / "discovery", namespace)
    server = {"name": "server", "image": "i", "ports": [{"name": "grpc", "containerPort": 8500}]}
    pod = new_thing("Pod", "stable", spec={"containers": [server]})
    pod["metadata"]["labels"] = api.get("Service", "graftserve")["spec"]["selector"]
    api.create(pod)
    api.write_status("Pod", "stable", {"phase": "Running"})
    api.close()
    monkeypatch.setenv("KUBECONFIG", str(real_api.deployer_path))
    # There is no node, and the server looks for it only after it has asked who may.
    with (
        pytest.raises(ClusterError, match="pod stable does not have a host assigned"),
        port_forward("graftserve", namespace=namespace),
    ):
        pass


def test_a_deployer_may_do_nothing_else(
    real_api: EnvTest,
    namespace: str,
    prepared: None,
    kubectl: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    for arguments in (
        ("get", "secrets"),
        ("get", "services"),
        ("create", "role", "more", "--verb=get", "--resource=pods"),
        ("create", "rolebinding", "more", "--clusterrole=admin", "--user=deployer"),
        ("create", "secret", "generic", "more"),
        ("delete", "deployment", "graftserve-stable"),
        ("run", "shell", "--image=shell"),
        ("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=privileged", "--overwrite"),
        ("get", "namespaces"),
        ("get", "deployment", "graftserve-stable", "--namespace", "default"),
    ):
        done = kubectl(real_api.deployer_path, "--namespace", namespace, *arguments)
        assert done.returncode == 1, arguments
        assert 'forbidden: User "deployer" cannot ' in done.stderr, arguments


def test_without_a_namespace_an_administrator_comes_first(
    rollout: Rollout, real_api: EnvTest, namespace: str, overlay: Path
) -> None:
    status, out, err = rollout(real_api.deployer_path, *START)
    assert (status, out) == (1, "")
    assert f"`kubectl apply --namespace {namespace} -k {overlay.parents[1] / 'deployer'}`" in err


def test_a_role_without_create_is_none(
    rollout: Rollout, real_api: EnvTest, namespace: str, overlay: Path, request: pytest.FixtureRequest
) -> None:
    path = overlay.parents[1] / "deployer/role.yaml"
    path.write_text(path.read_text().replace("create, ", ""))
    request.getfixturevalue("prepared")
    status, out, err = rollout(real_api.deployer_path, "apply")
    assert (status, out) == (1, "")
    assert "An administrator gives the rights to roll out once, by `kubectl apply --namespace" in err


def test_a_namespace_that_goes_is_no_lack_of_rights(
    rollout: Rollout,
    real_api: EnvTest,
    namespace: str,
    prepared: None,
    kubectl: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    done = kubectl(real_api.config_path, "delete", "namespace", namespace, "--wait=false")
    assert done.returncode == 0, done.stderr
    status, out, err = rollout(real_api.deployer_path, "apply", "--load-timeout-s", "1")
    assert (status, out) == (1, "")
    assert "is forbidden: unable to create new content in namespace" in err
    assert "An administrator" not in err


def test_a_real_namespace_that_differs_is_an_administrators(
    rollout: Rollout, real_api: EnvTest, namespace: str, overlay: Path, prepared: None
) -> None:
    path = overlay / "namespace.yaml"
    path.write_text(path.read_text().replace("  labels:\n", "  labels:\n    team: garden\n"))
    with Controllers(real_api.config_path, namespace):
        for command in (("apply",), ("status", "--cluster")):
            status, out, err = rollout(real_api.deployer_path, *command)
            assert (status, out) == (1, "")
            assert f'apply namespace/{namespace}: namespaces "{namespace}" is forbidden: User "dep' in err
            assert f"once, by `graftserve rollout apply --overlay {overlay}`" in err
        assert rollout(real_api.config_path, "apply")[0] == 0
        assert rollout(real_api.deployer_path, "apply")[0] == 0
        status, out, err = rollout(real_api.deployer_path, "status", "--cluster")
        assert status == 0, out + err


@pytest.mark.parametrize(
    ("live", "wanted", "expected"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, True),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, False),
        ({"a": "1"}, {"a": {"b": 1}}, False),
        ({"a": [1, 2]}, {"a": [1, 2]}, True),
        ({"a": [1, 2]}, {"a": [1]}, False),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]}, True),
        ({"a": 1}, {"a": 1, "b": None}, True),
        ({"a": 1}, {"a": None}, False),
        ({"a": "1Gi"}, {"a": "1024Mi"}, False),
        (None, {"a": 1}, False),
    ],
)
def test_what_is_said_already(live: Any, wanted: Any, expected: bool) -> None:
    assert says_all(live, wanted) is expected
