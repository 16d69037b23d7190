"""`graftserve rollout --overlay --apply`: what kubectl is asked for, and what becomes of its answers."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli.app import _run
from graftserve.k8s.manifests import copy_manifests
from graftserve.k8s.render import KubectlError, find_kubectl, render_folder
from graftserve.k8s.rollout import Cluster, ClusterError, NotReadyError, OverlayError, Tracks
from graftserve.k8s.rollout import cluster as cluster_module

APPLY = ["apply", "--server-side", "--field-manager=graftserve-rollout"]
CONFLICT = """\
error: Apply failed with 1 conflict: conflict with "kubectl-edit" using apps/v1: .spec.replicas
Please review the fields above--they currently have other managers. Here
are the ways you can resolve this warning:
* If you intend to manage all of these fields, please re-run the apply
  command with the `--force-conflicts` flag.
"""
TIMED_OUT = {
    "stdout": 'Waiting for deployment "graftserve" rollout to finish: 0 of 1 updated replicas are ready\n',
    "stderr": "error: timed out waiting for the condition\n",
    "rc": 1,
}
GONE = {
    "stderr": "The connection to the server 127.0.0.1:6443 was refused - did you specify the right host?\n",
    "rc": 1,
}


@dataclass
class Kubectl:
    """The fake, and the folder that it keeps its books in."""

    folder: Path

    def answer(self, *answers: dict[str, Any]) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))

    def calls(self) -> list[dict[str, Any]]:
        """Those since the last time."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


_rendered: dict[tuple[str, ...], str] = {}


def _render_once(folder: Path) -> str:
    """By the real kubectl, once for each state of the overlay's files."""
    names = ("kustomization.yaml", "stable.env", "canary.env")
    key = tuple((folder / name).read_text() for name in names)
    if key not in _rendered:
        _rendered[key] = render_folder(folder)
    return _rendered[key]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    try:
        find_kubectl()  # renders
    except KubectlError as error:
        pytest.skip(str(error))
    folder = tmp_path / "fake"
    folder.mkdir()
    script = Path(__file__).with_name("fake_kubectl.py")
    executable = folder / "kubectl"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "{folder}" "$@"\n')
    executable.chmod(0o755)
    monkeypatch.setattr(cluster_module, "find_kubectl", lambda: executable)
    monkeypatch.setattr(cluster_module, "render_folder", _render_once)
    fake = Kubectl(folder)
    fake.answer()
    return fake


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of staging with version 3."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = copy_manifests("staging", tmp_path / "deploy")
    path = folder / "stable.env"
    text = path.read_text().replace("MODEL_VERSION=1", "MODEL_VERSION=3")
    path.write_text(text.replace("s3://models/flowers", "/source/flowers"))  # not on this machine
    return folder


@pytest.fixture
def rollout(
    overlay: Path, kubectl: Kubectl, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """rollout(command, *args) -> (exit status, stdout, stderr), with --overlay and --apply."""

    def rollout(command: str, *args: str) -> tuple[int, str, str]:
        status = _run(["rollout", command, "--overlay", str(overlay), "--apply", *args])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return rollout


START = ("start", "--version", "4", "--skip-comparison")


def _versions(call: dict[str, Any]) -> tuple[str, str]:
    """What a call found in the two files."""
    lines = [
        next(line for line in call[name].splitlines() if line.startswith("MODEL_VERSION="))
        for name in ("stable.env", "canary.env")
    ]
    return lines[0].partition("=")[2], lines[1].partition("=")[2]


def _applied(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was applied, trials left out."""
    return [
        _versions(call)
        for call in calls
        if call["arguments"][0] == "apply" and "--dry-run=server" not in call["arguments"]
    ]


def _canary_rollout(**answer: Any) -> dict[str, Any]:
    return {"words": ["status", "deployment/graftserve-canary"], **answer}


def _stable_rollout(**answer: Any) -> dict[str, Any]:
    return {"words": ["status", "deployment/graftserve-stable"], **answer}


def test_start_applies_and_waits_for_both_tracks(rollout, kubectl, overlay) -> None:
    status, out, err = rollout(*START, "--context", "prod", "--load-timeout-s", "90")
    assert status == 0, err
    assert out.endswith(f"applied {overlay}\n")
    where = ["--namespace=graftserve-staging", "--timeout=90s", "--context=prod"]
    calls = kubectl.calls()
    assert [call["arguments"] for call in calls] == [
        [*APPLY, "--dry-run=server", "-k", str(overlay), "--context=prod"],
        [*APPLY, "-k", str(overlay), "--context=prod"],
        ["rollout", "status", "deployment/graftserve-stable", *where],
        ["rollout", "status", "deployment/graftserve-canary", *where],
    ]
    assert _applied(calls) == [("3", "4")]
    assert not any("force" in argument for call in calls for argument in call["arguments"])


def test_promote_keeps_the_canary_until_stable_is_ready(rollout, kubectl) -> None:
    rollout(*START)
    kubectl.calls()
    status, out, _ = rollout("promote")
    assert status == 0
    assert "rollout 1 (version 3 to 4) promoted" in out
    calls = kubectl.calls()
    assert _applied(calls) == [("4", "4"), ("4", "")]
    first_wait = next(index for index, call in enumerate(calls) if call["arguments"][0] == "rollout")
    second_apply = max(index for index, call in enumerate(calls) if call["arguments"][0] == "apply")
    assert first_wait < second_apply
    assert rollout("undo")[0] == 0
    assert _applied(kubectl.calls()) == [("3", "")]


def test_without_apply_kubectl_is_not_called(kubectl, overlay, capfd) -> None:
    assert _run(["rollout", *START, "--overlay", str(overlay)]) == 0
    assert f"apply it: kubectl apply -k {overlay}\n" in capfd.readouterr().out
    assert kubectl.calls() == []


@pytest.mark.parametrize("trial", [True, False])
def test_a_conflict_is_reported_and_nothing_forced(rollout, kubectl, overlay, trial: bool) -> None:
    words = ["apply", "--dry-run=server"] if trial else ["apply"]
    answers = [{"words": words, "stderr": CONFLICT, "rc": 1}]
    kubectl.answer(*([] if trial else [{"words": ["--dry-run=server"]}]), *answers)
    status, out, err = rollout(*START)
    assert (status, out) == (1, "")
    assert 'conflict with "kubectl-edit" using apps/v1: .spec.replicas. To go on, take the field out' in err
    assert "and nothing is forced" in err
    assert "--force-conflicts" not in err
    calls = kubectl.calls()
    assert len(_applied(calls)) == (0 if trial else 1)
    assert calls[-1]["arguments"][0] == "apply"

    assert rollout("promote")[0] == 0  # the other writer gave it up, and the rollout was still open
    assert _applied(kubectl.calls()) == [("4", "4"), ("4", "")]


def test_what_plain_apply_owns_is_handed_over_by_people(rollout, kubectl, overlay) -> None:
    said = (
        'error: Apply failed with 2 conflicts: conflicts with "kubectl-client-side-apply" using apps/v1:\n'
        "- .metadata.labels.graftserve.dev/version\n- .spec.replicas\n"
    )
    kubectl.answer({"words": ["--dry-run=server"], "stderr": said, "rc": 1})
    status, _, err = rollout(*START)
    assert status == 1
    assert (
        "- .metadata.labels.graftserve.dev/version - .spec.replicas. To go on, the overlay was applied" in err
    )
    assert f"--field-manager=graftserve-rollout --force-conflicts -k {overlay}`" in err
    assert not any("--force-conflicts" in call["arguments"] for call in kubectl.calls())


def test_libraries_log_lines_are_left_out(rollout, kubectl) -> None:
    said = 'E1127 08:03:58.066837   20915 memcache.go:381] "Couldn\'t get API group list"\n' + GONE["stderr"]
    kubectl.answer({"words": ["--dry-run=server"], "stderr": said, "rc": 1})
    status, _, err = rollout(*START)
    assert status == 1
    assert "overlays/staging: The connection" in err
    assert "memcache" not in err


@pytest.mark.parametrize(
    "said",
    [
        TIMED_OUT,
        {"stderr": 'error: deployment "graftserve-canary" exceeded its progress deadline\n', "rc": 1},
    ],
)
def test_a_canary_that_is_not_ready_is_taken_away(rollout, kubectl, said: dict[str, Any]) -> None:
    kubectl.answer(_canary_rollout(**said))
    status, out, _ = rollout(*START, "--load-timeout-s", "7")
    assert status == 1
    reason = said["stderr"].strip().removeprefix("error: ")
    assert f"aborted: deployment/graftserve-canary is not ready within 7 s: {reason}; see why with" in out
    assert "kubectl -n graftserve-staging describe pods -l graftserve.dev/track=canary" in out
    assert _applied(kubectl.calls()) == [("3", "4"), ("3", "")]


def test_a_stable_track_that_is_not_ready_leaves_both_ways_open(rollout, kubectl) -> None:
    rollout(*START)
    kubectl.calls()
    for _ in range(2):
        kubectl.answer(_stable_rollout(**TIMED_OUT))
        status, out, err = rollout("promote")
        assert (status, out) == (1, "")
        assert "deployment/graftserve-stable is not ready within 600 s" in err
        assert _applied(kubectl.calls()) == [("4", "4")]  # the canary still has its calls
    status, out, _ = rollout("abort", "-m", "does not start")
    assert status == 0
    assert "aborted: does not start" in out
    assert _applied(kubectl.calls()) == [("3", "")]


def test_stable_pods_in_trouble_are_not_the_canarys_fault(rollout, kubectl) -> None:
    kubectl.answer(_stable_rollout(**TIMED_OUT))
    status, _, err = rollout(*START)
    assert status == 1
    assert "deployment/graftserve-stable is not ready" in err
    assert _applied(kubectl.calls()) == [("3", "4")]
    status, _, err = rollout(*START)
    assert status == 0
    assert "going on with rollout 1" in err


@pytest.mark.parametrize(
    "words",
    [["--dry-run=server"], ["apply"], ["deployment/graftserve-stable"], ["deployment/graftserve-canary"]],
)
@pytest.mark.parametrize("command", ["start", "promote", "abort", "undo"])
def test_an_api_server_that_goes_away_anywhere_ends_the_run_not_the_rollout(
    rollout, kubectl, overlay, command: str, words: list[str]
) -> None:
    arguments = START[1:] if command == "start" else ()
    if command in ("promote", "abort"):
        rollout(*START)
    elif command == "undo":
        rollout(*START, "--auto")
    # Once it has said yes to the trial, where that is not what it is asked.
    trial = [] if words != ["apply"] else [{"words": ["--dry-run=server"]}]
    kubectl.answer(*trial, {"words": words, **GONE})
    status, out, err = rollout(command, *arguments)
    assert (status, out) == (1, "")
    assert "The connection to the server 127.0.0.1:6443 was refused" in err
    kubectl.calls()
    assert rollout(command, *arguments)[0] == 0
    last = _applied(kubectl.calls())[-1]
    assert last == {"start": ("3", "4"), "promote": ("4", ""), "abort": ("3", ""), "undo": ("3", "")}[command]


def test_kubectl_that_hangs_is_ended(kubectl, overlay, monkeypatch) -> None:
    kubectl.answer({"words": ["--dry-run=server"], "sleep_s": 600})
    cluster = Cluster(overlay, timeout_s=0.5)
    with pytest.raises(ClusterError, match=r"kubectl apply --server-side: no end after 0\.5 s"):
        cluster.settle(Tracks(3))
    monkeypatch.setattr(cluster_module, "_GRACE_S", -0.5)
    kubectl.answer(_stable_rollout(sleep_s=600))
    with pytest.raises(ClusterError, match="kubectl rollout status: no end after") as caught:
        Cluster(overlay, ready_timeout_s=1).settle(Tracks(3))
    assert not isinstance(caught.value, NotReadyError)


def test_files_that_do_not_reach_the_manifests_are_not_applied(kubectl, overlay) -> None:
    path = overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace("  - ../../components/versions\n", ""))
    with pytest.raises(
        OverlayError, match=r"label graftserve\.dev/version '3', got '1': is component versions"
    ):
        Cluster(overlay).settle(Tracks(3))
    assert kubectl.calls() == []


def test_an_overlay_that_does_not_render_is_not_applied(rollout, kubectl, overlay) -> None:
    path = overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace("- namespace.yaml", "- missing.yaml"))
    status, _, err = rollout(*START)
    assert status == 1
    assert "missing.yaml" in err
    assert kubectl.calls() == []
