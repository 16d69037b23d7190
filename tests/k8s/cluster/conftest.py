"""An overlay, a cluster, and `graftserve rollout` on the two."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftserve.cli.app import _run
from graftserve.k8s.render import KubectlError, find_kubectl, render_folder
from graftserve.k8s.rollout import api as api_module
from graftserve.k8s.rollout import cluster as cluster_module
from tests.k8s.cluster.rollouts import Rollout
from tests.k8s.fake_api import FakeApi
from tests.k8s.small_overlay import copy_small_overlay

_rendered: dict[tuple[str, ...], str] = {}


def _render_once(folder: Path) -> str:
    """By the real kubectl, once for each state of the files that tests change."""
    names = ("kustomization.yaml", "namespace.yaml", "stable.env", "canary.env")
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
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The fake alone, for what only it can do; its pods are ready at once."""
    with FakeApi(ready=True) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "fake.kubeconfig")))
        yield api


@pytest.fixture
def rollout(overlay: Path, capfd: pytest.CaptureFixture[str]) -> Rollout:
    """rollout(command, *args) -> (exit status, stdout, stderr), on the overlay, which is applied."""

    def rollout(command: str, *args: str) -> tuple[int, str, str]:
        apply = () if command in ("apply", "status") else ("--apply",)
        status = _run(["rollout", command, "--overlay", str(overlay), *apply, *args])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return rollout
