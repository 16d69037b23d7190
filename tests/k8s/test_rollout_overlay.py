"""`graftserve rollout --overlay` as it is typed: files, comparisons, interruptions. No cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftserve.cli.app import _run
from graftserve.client.testing import FakeServer
from graftserve.k8s.manifests import copy_manifests
from graftserve.k8s.render import KubectlError, find_kubectl, render_folder
from graftserve.k8s.rollout import journal as journal_module
from graftserve.k8s.rollout import overlay as overlay_module
from tests.certificates import certificates
from tests.k8s.tracks import good, serve

STABLE = "# the one\nMODEL_NAME=flowers\nMODEL_SOURCE=/source/flowers\nMODEL_VERSION=3\n"
CANARY = "# weights last\nMODEL_VERSION=\nREPLICAS=0\n\nSTABLE_WEIGHT=100\nWEIGHT=0\n"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Production with all it needs; not to be changed."""
    return copy_manifests("production", tmp_path_factory.mktemp("manifests")).parents[1]


@pytest.fixture
def overlay(manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The overlay's folder alone, with comments in its files."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "deploy" / "overlays" / "production"
    shutil.copytree(manifests / "overlays" / "production", folder)
    (folder / "stable.env").write_text(STABLE)
    (folder / "canary.env").write_text(CANARY)
    return folder


@pytest.fixture
def rollout(overlay: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """rollout(command, *args) -> (exit status, stdout, stderr), in this process, with --overlay."""

    def rollout(command: str, *args: str | Path) -> tuple[int, str, str]:
        status = _run(["rollout", command, "--overlay", str(overlay), *map(str, args)])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return rollout


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _tracks(overlay: Path) -> tuple[str, str]:
    return (overlay / "stable.env").read_text(), (overlay / "canary.env").read_text()


def _canary(version: int, replicas: int = 1, weight: int = 0) -> str:
    return (
        f"# weights last\nMODEL_VERSION={version}\nREPLICAS={replicas}\n\nSTABLE_WEIGHT={100 - weight}\n"
        f"WEIGHT={weight}\n"
    )


def test_from_start_to_undo_in_two_files(rollout: Command, overlay: Path) -> None:
    root = overlay.parents[1]
    before = _files(root)
    status, out, err = rollout(
        "start", "--version", "4", "--skip-comparison", "--weight", "5", "-m", "new photos"
    )
    assert status == 0, err
    assert "canary.env: MODEL_VERSION=4, REPLICAS=1, STABLE_WEIGHT=95, WEIGHT=5\n" in err
    assert out == (
        "stable     version 3\n"
        "canary     version 4, 1 pod, 5% of the route's calls\n"
        "rollout 1 (version 3 to 4) waits: `graftserve rollout promote` or `graftserve rollout abort`\n"
        f"commit it, and apply it: graftserve rollout apply --overlay {overlay}\n"
    )
    assert _tracks(overlay) == (STABLE, _canary(4, 1, 5))
    changed = {name for name, content in _files(root).items() if before.get(name) != content}
    assert changed == {"overlays/production/canary.env", "overlays/production/rollouts.json"}

    status, out, _ = rollout("status", "--json")
    values = json.loads(out)
    assert (status, values["stable"], values["canary"], values["weight"]) == (0, 3, 4, 5)

    status, out, err = rollout("start", "--version", "4", "--skip-comparison", "--weight", "20")
    assert status == 0
    assert err == "going on with rollout 1 (version 3 to 4)\ncanary.env: STABLE_WEIGHT=80, WEIGHT=20\n"

    status, out, err = rollout("promote", "--json")
    assert status == 0
    assert err.splitlines()[0] == "stable.env: MODEL_VERSION=4"
    ended = json.loads(out)
    assert (ended["outcome"], ended["applied"]) == ("promoted", False)
    assert ended["apply"] == f"graftserve rollout apply --overlay {overlay}"
    assert _tracks(overlay) == (STABLE.replace("=3", "=4"), CANARY)

    status, out, _ = rollout("start", "--version", "4", "--skip-comparison")
    assert (status, out) == (0, "version 4 is stable already: there is nothing to roll out\n")

    status, out, _ = rollout("undo", "-m", "complaints")
    assert status == 0
    assert "undo 2 (version 4 to 3) promoted: to undo rollout 1 (version 3 to 4)\n" in out
    assert _tracks(overlay) == (STABLE, CANARY)
    assert rollout("undo")[0] == 0
    assert _tracks(overlay) == (STABLE.replace("=3", "=4"), CANARY)

    status, out, _ = rollout("history")
    assert status == 0
    assert "rollout 1 (version 3 to 4)  promoted  by " in out
    assert "    new photos\n" in out
    assert "    complaints\n" in out
    status, out, _ = rollout("history", "--json")
    assert [item["kind"] for item in json.loads(out)["rollouts"]] == ["rollout", "undo", "undo"]
    left = {name for name in _files(root) if name not in before}
    assert left == {"overlays/production/rollouts.json"}


def test_an_aborted_canary_leaves_the_files_as_they_were(rollout: Command, overlay: Path) -> None:
    rollout("start", "--version", "4", "--replicas", "3", "--weight", "50")
    assert _tracks(overlay) == (STABLE, _canary(4, 3, 50))
    status, out, _ = rollout("abort", "-m", "wrong labels")
    assert status == 0
    assert "rollout 1 (version 3 to 4) aborted: wrong labels\n" in out
    assert _tracks(overlay) == (STABLE, CANARY)


def test_replicas_and_weights_are_everybodys(rollout: Command, overlay: Path) -> None:
    rollout("start", "--version", "4", "--skip-comparison", "--weight", "5")
    own = _canary(4, 1, 5).replace("REPLICAS=1", "REPLICAS=6")
    (overlay / "canary.env").write_text(own)
    assert rollout("start", "--version", "4")[0] == 0
    assert _tracks(overlay)[1] == own
    assert rollout("start", "--version", "4", "--weight", "10")[0] == 0
    assert _tracks(overlay)[1] == _canary(4, 6, 10)
    assert rollout("status")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["start", "--version", "4", "--target", "h:1"], "--target does not go with --overlay"),
        (["start", "--version", "4", "--model", "m"], "--model does not go with --overlay"),
        (["start", "--version", "4", "--drain-s", "1"], "--drain-s does not go with --overlay"),
        (["start"], "Missing option '--version'"),
        (["start", "--version", "4", "--weight", "101"], "101 is not in the range 0<=x<=100"),
        (
            ["start", "--version", "4", "--images", "x"],
            "--images needs --target-stable and --target-canary, or --apply",
        ),
        (["start", "--version", "4", "--target-canary", "h:1"], "--target-canary belong together"),
        (["start", "--version", "4", "--auto"], "--auto needs --images"),
        (
            ["start", "--version", "4", "--skip-comparison", "--images", "x"],
            "--images and --skip-comparison exclude each other",
        ),
        (["promote", "--context", "prod"], "--context belongs to --apply"),
        (["start", "--version", "4", "--tls"], "--tls and --header are for the comparison"),
        (["promote", "--header", "a=b"], "--tls and --header do not go with --overlay"),
        (["status", "--tls-server-name", "x"], "--tls and --header do not go with --overlay"),
    ],
)
def test_wrong_usage_is_status_2(rollout: Command, overlay: Path, args: list[str], message: str) -> None:
    status, out, err = rollout(*args)
    assert (status, out) == (2, "")
    assert message in err
    assert _tracks(overlay) == (STABLE, CANARY)


def test_what_belongs_to_overlays_does_not_go_with_a_server(capfd: pytest.CaptureFixture[str]) -> None:
    for option in (["--weight", "5"], ["--apply"], ["--target-canary", "h:1"]):
        assert _run(["rollout", "start", "--model", "m", "--version", "4", *option]) == 2
        assert f"{option[0]} belongs to --overlay" in capfd.readouterr().err
    assert _run(["rollout", "status"]) == 2
    assert "Missing option '--model', or --overlay" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("stable.env", STABLE.replace("=3", "=v3"), "expected MODEL_VERSION= and a whole number, got 'v3'"),
        ("stable.env", STABLE.replace("=3", "=3 "), "expected MODEL_VERSION= and a whole number, got '3 '"),
        ("stable.env", STABLE.replace("MODEL_NAME", "NAME"), "expected MODEL_NAME=NAME, got none"),
        ("canary.env", CANARY.replace("WEIGHT=0", ""), "WEIGHT= and a whole number, got no such line"),
        ("canary.env", CANARY + "REPLICAS=1\n", "canary.env, line 7: REPLICAS is there twice"),
        ("canary.env", None, "cannot be read: No such file or directory; expected an overlay's folder"),
    ],
)
def test_files_that_are_not_understood_are_left_alone(
    rollout: Command, overlay: Path, file: str, text: str | None, message: str
) -> None:
    if text is None:
        (overlay / file).unlink()
    else:
        (overlay / file).write_text(text)
    before = _files(overlay)
    status, out, err = rollout("start", "--version", "4")
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert _files(overlay) == before


@pytest.mark.parametrize(("component", "reason"), [("progressive", "Argo Rollouts"), ("kserve", "KServe")])
def test_others_that_have_the_pods_are_not_disturbed(
    rollout: Command, overlay: Path, component: str, reason: str
) -> None:
    path = overlay / "kustomization.yaml"
    path.write_text(
        path.read_text().replace("components:\n", f"components:\n  - ../../components/{component}\n")
    )
    status, _, err = rollout("start", "--version", "4")
    assert status == 1
    assert f"component {component} is in it, and {reason}" in err
    assert _tracks(overlay) == (STABLE, CANARY)


def test_a_weight_without_a_route_is_pointed_out(rollout: Command, overlay: Path) -> None:
    assert "component gateway" not in rollout("start", "--version", "4", "--weight", "5")[2]
    path = overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace("  - ../../components/gateway\n", ""))
    assert "lists no component gateway" in rollout("start", "--version", "4", "--weight", "6")[2]


def test_what_somebody_else_changed_is_not_overwritten(rollout: Command, overlay: Path) -> None:
    rollout("start", "--version", "4", "--skip-comparison")
    (overlay / "stable.env").write_text(STABLE.replace("=3", "=5"))
    status, out, _ = rollout("status")
    assert status == 1
    assert "somebody else changed the files: stable is version 5, expected 3\n" in out
    before = _tracks(overlay)
    for command in (("start", "--version", "4"), ("promote",), ("abort",)):
        status, out, err = rollout(*command)
        assert (status, out) == (1, "")
        assert "stable is version 5, expected 3" in err
        assert "Nothing is overwritten" in err
        if command == ("promote",):  # it was decided; the next command decides otherwise
            assert "expected 3 or 4" in err
    status, out, _ = rollout("abort", "--leave", "-m", "theirs")
    assert status == 0
    assert "rollout 1 (version 3 to 4) left: theirs" in out
    assert "kubectl" not in out
    assert _tracks(overlay) == before
    assert rollout("status")[0] == 0


@pytest.mark.parametrize(
    ("prepare", "command", "message"),
    [
        ((), ("promote",), "no rollout is under way: there is nothing to promote"),
        ((), ("abort",), "no rollout is under way"),
        ((), ("undo",), "there is no promoted rollout"),
        ((("start", "--version", "4"),), ("promote",), "is not compared yet: run `start` again"),
        ((("start", "--version", "4"),), ("start", "--version", "5"), "is under way: promote or abort it"),
        ((("start", "--version", "4"),), ("undo",), "is under way: abort it, that undoes it"),
    ],
)
def test_what_cannot_be_done_now(
    rollout: Command,
    overlay: Path,
    prepare: tuple[tuple[str, ...], ...],
    command: tuple[str, ...],
    message: str,
) -> None:
    for earlier in prepare:
        assert rollout(*earlier)[0] == 0
    before = _tracks(overlay)
    status, out, err = rollout(*command)
    assert (status, out) == (1, "")
    assert message in err
    assert _tracks(overlay) == before


def test_undo_does_not_guess_what_somebody_else_meant(rollout: Command, overlay: Path) -> None:
    rollout("start", "--version", "4", "--skip-comparison", "--auto")
    (overlay / "stable.env").write_text(STABLE.replace("=3", "=7"))
    status, _, err = rollout("undo")
    assert status == 1
    assert "rollout 1 (version 3 to 4) made version 4 stable, but version 7 is" in err


def test_a_revert_of_the_commit_takes_all_of_it_back(rollout: Command, overlay: Path) -> None:
    before = _files(overlay)
    rollout("start", "--version", "4", "--skip-comparison", "--auto")
    (overlay / "rollouts.json").unlink()
    for name, content in before.items():
        (overlay / name).write_bytes(content)
    assert rollout("history")[1] == "no rollouts yet\n"
    assert rollout("start", "--version", "4", "--skip-comparison")[0] == 0


def test_two_at_once(rollout: Command, overlay: Path) -> None:
    from graftserve.cli.rollout_overlay import _journal
    from graftserve.k8s.rollout import Overlay

    with _journal(Overlay(overlay)).writing("anna@desk, process 7,", {}):
        status, _, err = rollout("start", "--version", "4")
    assert status == 1
    assert "anna@desk, process 7, is at work on this rollout" in err
    assert _tracks(overlay) == (STABLE, CANARY)


def _targets(servers: dict[str, FakeServer], canary: str, images: Path) -> tuple[Any, ...]:
    return (
        *("--images", images, "--target-stable", servers["stable"].target),
        *("--target-canary", servers[canary].target, "--max-latency-ratio", "1000"),
    )


def test_a_good_canary_waits_and_is_promoted(
    rollout: Command, overlay: Path, servers: dict[str, FakeServer], images: Path
) -> None:
    status, out, _ = rollout("start", "--version", "4")
    assert status == 0
    assert "waits for its comparison" in out
    status, out, err = rollout("start", "--version", "4", *_targets(servers, "good", images))
    assert status == 0, err
    assert "compared   8 of 8 images\nagreement  1.0000\n" in out
    assert len(servers["stable"].images) == len(servers["good"].images) == 11  # three of them to warm up
    assert rollout("promote")[0] == 0
    assert _tracks(overlay) == (STABLE.replace("=3", "=4"), CANARY)
    assert "    agreement  1.0000\n" in rollout("history")[1]


def test_a_bad_canary_is_aborted_by_agreement_alone(
    rollout: Command, overlay: Path, servers: dict[str, FakeServer], images: Path
) -> None:
    rollout("start", "--version", "4", "--weight", "5")
    start = ("start", "--version", "4", "--auto", *_targets(servers, "permuted", images), "--max-shift", "1")
    status, out, err = rollout(*start, "--json")
    assert status == 1
    ended = json.loads(out)
    assert ended["outcome"] == "aborted"
    assert ended["reason"].startswith("agreement 0.0000 on 8 images")
    assert "abort: agreement 0.0000" in err
    assert _tracks(overlay) == (STABLE, CANARY)


def test_a_wrong_address_is_no_bad_version(
    rollout: Command, overlay: Path, servers: dict[str, FakeServer], images: Path
) -> None:
    rollout("start", "--version", "4")
    status, out, err = rollout("start", "--version", "4", *_targets(servers, "stable", images))
    assert (status, out) == (1, "")
    assert f"--target-canary {servers['stable'].target}: " in err
    assert "nothing is compared" in err
    servers["good"].stop()
    status, _, err = rollout(
        "start", "--version", "4", "--timeout-s", "1", *_targets(servers, "good", images)
    )
    assert status == 1
    assert f"--target-canary {servers['good'].target}: nothing is compared" in err
    assert _tracks(overlay) == (STABLE, _canary(4))
    assert json.loads(rollout("status", "--json")[1])["current"]["version"] == 4


def test_tracks_that_ask_for_certificates(
    rollout: Command, overlay: Path, images: Path, tmp_path: Path
) -> None:
    files = certificates(tmp_path / "certificates")
    settings = {"host": "localhost", "credentials": files.credentials(mutual=True)}
    rollout("start", "--version", "4")
    with serve(3, good, **settings) as stable, serve(4, good, **settings) as canary:
        start = ("start", "--version", "4", *_targets({"stable": stable, "good": canary}, "good", images))
        status, _, err = rollout(*start)
        assert status == 1
        assert "(is it a TLS port? try --tls, or --tls-ca)" in err
        status, out, err = rollout(*start, *files.mutual, "--header", "authorization=Bearer x")
        assert status == 0, err
        assert "agreement  1.0000\n" in out
        for server in (stable, canary):
            assert all(("authorization", "Bearer x") in call.metadata for call in server.calls)


class _Killed(BaseException):
    """The process ends here."""


class _Writes:
    """Counts the writes of both files and the journal, and ends the process before or after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self._after = False
        self._original = journal_module.replace_file
        for module in (journal_module, overlay_module):
            monkeypatch.setattr(module, "replace_file", self._write)

    def kill_at(self, number: int, *, after: bool) -> None:
        self.left, self._after = number, after

    def _write(self, path: Path, content: bytes) -> None:
        self.left -= 1
        if self.left == 0 and not self._after:
            raise _Killed
        self._original(path, content)
        if self.left == 0:
            raise _Killed


_PREPARED = {
    "start": (),
    "promote": (("start", "--version", "4", "--weight", "5", "--skip-comparison"),),
    "abort": (("start", "--version", "4", "--weight", "5", "--skip-comparison"),),
    "undo": (("start", "--version", "4", "--skip-comparison", "--auto"),),
}
_ARGUMENTS = {"start": ("--version", "4", "--weight", "5", "--skip-comparison", "--auto")}
_DONE = {
    "start": (STABLE.replace("=3", "=4"), CANARY),
    "promote": (STABLE.replace("=3", "=4"), CANARY),
    "abort": (STABLE, CANARY),
    "undo": (STABLE, CANARY),
}
# Writes: the journal's and the files'.
_COUNT = {"start": 7, "promote": 4, "abort": 3, "undo": 4}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("command", "number"),
    [(name, number) for name, count in _COUNT.items() for number in range(1, count + 1)],
)
def test_killed_at_any_write_it_goes_on_or_back(
    rollout: Command,
    overlay: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    number: int,
    after: bool,
) -> None:
    for earlier in _PREPARED[command]:
        assert rollout(*earlier)[0] == 0
    begun = _tracks(overlay)
    writes = _Writes(monkeypatch)
    writes.kill_at(number, after=after)
    with pytest.raises(_Killed):
        rollout(command, *_ARGUMENTS.get(command, ()))
    between = _tracks(overlay)
    assert between[0] in (begun[0], _DONE[command][0])  # each file whole, and one of its two states
    journal = (overlay / "rollouts.json").read_bytes() if (overlay / "rollouts.json").is_file() else None
    assert rollout("status")[0] == 0

    # The same command again is done, whether or not the journal had its end already.
    status, _, err = rollout(command, *_ARGUMENTS.get(command, ()))
    finished = number == _COUNT[command] and after
    if finished and command == "undo":
        assert _tracks(overlay)[0] == STABLE.replace("=3", "=4")  # undone again: it goes forward
    else:
        assert status == (1 if finished and command in ("promote", "abort") else 0), err
        assert _tracks(overlay) == _DONE[command]
    assert json.loads((overlay / "rollouts.json").read_text())["current"] is None

    if finished or journal is None:
        return
    # And from the same place back, if that is what is wanted.
    for file, text in zip(("stable.env", "canary.env"), between, strict=True):
        (overlay / file).write_text(text)
    (overlay / "rollouts.json").write_bytes(journal)
    status, _, err = rollout("abort")
    if json.loads(journal)["current"] is None:  # it was killed before its first word in the journal
        assert (status, _tracks(overlay)) == (1, begun)
    else:
        previous = STABLE if command != "undo" else STABLE.replace("=3", "=4")
        assert (status, _tracks(overlay)) == (0, (previous, CANARY)), err


def test_the_writes_are_as_many_as_the_test_above_ends(
    rollout: Command, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = _Writes(monkeypatch)
    for command in ("start", "undo"):
        writes.kill_at(_COUNT[command] + 1, after=False)
        assert rollout(command, *_ARGUMENTS.get(command, ()))[0] == 0
        assert writes.left == 1


def test_killed_for_good_between_the_two_files(rollout: Command, overlay: Path, tmp_path: Path) -> None:
    """The lock goes with the process, and status says where it stands."""
    rollout("start", "--version", "4", "--weight", "5", "--skip-comparison")
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from graftserve.cli.app import main\n"
        "from graftserve.k8s.rollout import overlay\n"
        "write = overlay.replace_file\n"
        "def once(path, content):\n"
        "    write(path, content)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "overlay.replace_file = once\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, script, "rollout", "promote", "--overlay", overlay]
    done = subprocess.run(command, env=os.environ, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert _tracks(overlay) == (STABLE.replace("=3", "=4"), _canary(4, 1, 5))
    status, out, _ = rollout("status")
    assert status == 0
    assert "next: `graftserve rollout promote` goes on with it" in out
    assert rollout("promote")[0] == 0
    assert _tracks(overlay) == (STABLE.replace("=3", "=4"), CANARY)


def _versions(manifests: str) -> dict[str, str]:
    found = [document for document in yaml.safe_load_all(manifests) if document["kind"] == "Deployment"]
    return {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]["graftserve.dev/version"]
        for each in found
    }


def test_the_files_reach_the_manifests(rollout: Command, overlay: Path, manifests: Path) -> None:
    try:
        find_kubectl()
    except KubectlError as error:
        pytest.skip(str(error))
    for name in ("base", "components"):
        shutil.copytree(manifests / name, overlay.parents[1] / name)
    rollout("start", "--version", "4", "--replicas", "2", "--weight", "5", "--skip-comparison")
    text = render_folder(overlay)
    assert _versions(text) == {"graftserve-stable": "3", "graftserve-canary": "4"}
    assert "weight: 95\n" in text
    assert "weight: 5\n" in text
    assert "\n  replicas: 2\n" in text
    rollout("promote")
    text = render_folder(overlay)
    assert _versions(text) == {"graftserve-stable": "4", "graftserve-canary": ""}
    assert "weight: 100\n" in text
