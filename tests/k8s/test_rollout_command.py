"""`graftserve rollout` as it is typed, on a real server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli.app import _run
from graftserve.client import Client
from graftserve.export.goldens import GoldenImage, write_goldens
from graftserve.export.manifest import write_manifest
from graftserve.serving.app import Server
from tests.certificates import certificates

# Time is not what these tests are about, and this machine may be busy.
QUICK = ("--max-latency-ratio", "1000", "--drain-s", "0")


@pytest.fixture
def rollout(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """rollout(*args) -> (exit status, stdout, stderr), in this process."""

    def rollout(*args: str | Path) -> tuple[int, str, str]:
        status = _run(["rollout", *map(str, args)])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return rollout


@pytest.fixture
def place(shop: Any) -> tuple[str, ...]:
    """The options that name the server and its file."""
    return ("--target", shop.target, "--model", "flowers", "--model-config-file", str(shop.config_path))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["start", "--model", "m", "--version", "4"], "expected --images to compare the versions on"),
        (
            ["start", "--model", "m", "--version", "4", "--images", "x", "--skip-comparison"],
            "expected --images to compare",
        ),
        (["start", "--model", "m"], "Missing option '--version'"),
        (["promote", "--model", "m"], "no rollout of m at localhost:8500 is known here: name the server's"),
        (["abort", "--model", "m", "--only-model"], "--only-model and --model-base-path belong together"),
        (["undo", "--model", "m", "--model-base-path", "/m"], "belong together"),
        (
            ["status", "--model", "m", "--model-config-file", "f", "--only-model", "--model-base-path", "/m"],
            "exclude each other",
        ),
        (
            ["start", "--model", "m", "--version", "4", "--min-agreement", "2", "--images", "x"],
            "min-agreement",
        ),
    ],
)
def test_wrong_usage_is_status_2(rollout, monkeypatch, tmp_path, args: list[str], message: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    status, out, err = rollout(*args)
    assert status == 2
    assert message in err
    assert out == ""


def test_from_start_to_undo(rollout, shop, place) -> None:
    images = shop.root / "images"
    status, out, err = rollout(
        "start", *place, "--version", "4", "--images", images, "--sample", "5", *QUICK, "-m", "new photos"
    )
    assert status == 0, err
    assert "compared   5 of 5 images\nagreement  1.0000\n" in out
    assert out.endswith(
        "rollout 1 (version 3 to 4) waits: `graftserve rollout promote` or `graftserve rollout abort`\n"
    )
    assert "load version 4\n" in err
    assert "it has no sums to check" in err

    status, out, _ = rollout("status", *place)
    assert status == 0
    assert out.startswith(
        "stable     version 3\ncanary     version 4\nversion 4  AVAILABLE\nversion 3  AVAILABLE\n"
    )
    assert out.endswith("next: `promote` or `abort`\n")

    status, out, _ = rollout("promote", *place, "--drain-s", "0", "--json")
    assert status == 0
    promoted = json.loads(out)
    assert (promoted["outcome"], promoted["report"]["agreement"]) == ("promoted", 1.0)
    with Client(shop.target, "flowers", version_label="stable") as client:
        assert client.classify(shop.images[0]).version == 4

    status, out, err = rollout("start", *place, "--version", "4", "--skip-comparison")
    assert (status, out, err) == (0, "version 4 is stable already: there is nothing to roll out\n", "")

    status, out, _ = rollout("undo", *place, "--drain-s", "0", "-m", "complaints")
    assert status == 0
    assert out.endswith("undo 2 (version 4 to 3) promoted: to undo rollout 1 (version 3 to 4)\n")

    status, out, _ = rollout("history", *place)
    assert status == 0
    lines = out.splitlines()
    assert "undo 2 (version 4 to 3)  promoted  by " in lines[0]
    assert "    complaints" in lines
    assert "    new photos" in lines
    assert "    agreement  1.0000" in lines
    status, out, _ = rollout("history", *place, "--json")
    first, second = json.loads(out)["rollouts"]
    assert (first["note"], first["gate"]["min_agreement"], second["kind"]) == ("new photos", 0.98, "undo")
    assert "@" in first["by"]
    assert (shop.root / "models.config.rollouts").is_dir()


def test_on_a_server_that_asks_for_certificates(rollout, shop, tmp_path) -> None:
    files = certificates(tmp_path / "certificates", "flowers.shop.test")
    shop.server.stop(0)
    shop.server = Server(replace(shop.server.options, ssl_config_file=str(files.ssl_config())))
    shop.server.start()
    place = ("--target", shop.target, "--model", "flowers", "--model-config-file", shop.config_path)
    access = (*files.mutual, "--tls-server-name", "flowers.shop.test", "--header", "authorization=Bearer x")
    start = ("start", *place, "--version", "4", "--images", shop.root / "images", "--sample", "5", *QUICK)

    status, out, _ = rollout("status", *place)
    assert status == 1
    assert "(is it a TLS port? try --tls, or --tls-ca)" in out
    status, out, err = rollout(*start, *access)
    assert status == 0, err
    assert "agreement  1.0000\n" in out
    status, out, _ = rollout("status", *place, *access)
    assert status == 0
    assert out.startswith("stable     version 3\ncanary     version 4\n")
    status, _, err = rollout("promote", *place, "--drain-s", "0", "--patience-s", "1")
    assert status == 1
    # gRPC's C core writes there, too.
    waited = next(line for line in err.splitlines() if line.startswith("waiting for the server: "))
    assert waited.endswith("(is it a TLS port? try --tls, or --tls-ca)")
    # No patience helps where this end refuses.
    strangers = certificates(tmp_path / "strangers", "flowers.shop.test")
    for options, hint in (
        (strangers.trusting, "(who signed the certificate is not trusted: give the authority's as --tls-ca)"),
        (files.trusting, "(the certificate is for another name: give that as --tls-server-name)"),
    ):
        status, _, err = rollout("promote", *place, "--patience-s", "3600", *options)
        assert status == 1
        assert "waiting for the server" not in err
        assert err.endswith(f"{hint}\n")
    status, out, err = rollout("promote", *place, "--drain-s", "0", *access)
    assert status == 0, err
    status, out, err = rollout("undo", *place, "--drain-s", "0", *access, "--json")
    assert status == 0, err
    assert json.loads(out)["outcome"] == "promoted"


def test_a_version_that_does_not_pass_is_aborted_with_status_1(rollout, shop, place, publish) -> None:
    publish("permuted", 4)
    status, out, err = rollout(
        "start",
        *place,
        "--version",
        "4",
        "--images",
        shop.root / "images" / "*.jpg",
        "--auto",
        *QUICK,
        "--json",
    )
    assert status == 1
    ended = json.loads(out)
    assert ended["outcome"] == "aborted"
    assert ended["reason"].startswith("agreement 0.0000 on 12 images")
    assert len(ended["report"]["disagreements"]) == 5
    assert "abort: agreement 0.0000" in err
    assert "became" not in rollout("history", *place)[1].split("at least 0.98 needed")[0]
    status, out, _ = rollout("status", *place, "--json")
    values = json.loads(out)
    assert (status, values["stable"], values["canary"], values["current"]) == (0, 3, None, None)


@pytest.mark.parametrize("harm", ["changed", "gone", "empty"])
def test_a_damaged_version_is_not_loaded(rollout, shop, place, harm: str) -> None:
    folder = shop.root / "flowers" / "4"
    (folder / "assets.extra").mkdir()
    write_manifest(folder)
    if harm == "changed":
        (folder / "saved_model.pb").write_bytes((folder / "saved_model.pb").read_bytes() + b"\0")
        message = f"{folder}: changed: saved_model.pb"
    elif harm == "gone":
        folder.rename(folder.with_name("moved"))
        message = f"{folder}: there is no such version"
    else:
        (folder / "assets.extra" / "manifest.sha256").unlink()
        (folder / "saved_model.pb").unlink()
        message = f"{folder}: expected a saved_model.pb, got none"
    status, out, _ = rollout("start", *place, "--version", "4", "--skip-comparison", "--auto")
    assert status == 1
    assert out.startswith(f"rollout 1 (version 3 to 4) aborted: {message}")
    assert 4 not in shop.observe().versions


def test_sums_are_checked(rollout, shop, place) -> None:
    folder = shop.root / "flowers" / "4"
    (folder / "assets.extra").mkdir()
    write_manifest(folder)
    status, _, err = rollout(
        "start", *place, "--version", "4", "--skip-comparison", "--auto", "--drain-s", "0"
    )
    assert status == 0
    sums = (folder / "assets.extra" / "manifest.sha256").read_text().count("\n")
    assert f"checked version 4: {sums} files with the sums of the manifest" in err


@pytest.mark.parametrize(("probabilities", "status"), [((0.1, 0.7, 0.2), 0), ((0.1, 0.8, 0.1), 1)])
def test_goldens_are_asked_of_the_canary(rollout, shop, place, probabilities, status: int) -> None:
    folder = shop.root / "flowers" / "4"
    (folder / "assets.extra").mkdir()
    write_goldens(folder, [GoldenImage("a.jpg", shop.images[0].read_bytes(), None, probabilities)])
    write_manifest(folder)
    start = ("start", *place, "--version", "4", "--images", shop.root / "images", "--auto", *QUICK)
    ended, out, _ = rollout(*start)
    assert ended == status
    said = "version 4 differs by 0.1 from what its golden image a.jpg must give, at most 0.001 allowed"
    assert (said in out) == bool(status)


def test_a_file_without_labels_is_asked_about(rollout, shop, place) -> None:
    text = "\n".join(
        line for line in shop.config_path.read_text().splitlines() if "version_labels" not in line
    )
    shop.config_path.write_text(text)
    with shop.stage() as stage:
        stage.apply(shop.placement().__class__(frozenset({3})), None)
    start = ("start", *place, "--version", "3", "--skip-comparison", "--drain-s", "0")
    status, _, err = rollout(*start)
    assert status == 1
    assert "start yours with that, then say --server-allows-labels here" in err
    assert "version_labels" not in shop.config_path.read_text()
    status, out, _ = rollout(*start, "--server-allows-labels")
    assert status == 0
    assert out == "rollout 1 (version 3) promoted: nothing was stable before it\n"
    assert 'version_labels { key: "stable" value: 3 }' in shop.config_path.read_text()
    assert shop.observe().stable == 3


def test_without_a_file_later_commands_know_the_place(rollout, shop, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shop.root / "state"))
    server = ("--target", shop.target, "--model", "flowers")
    status, _, err = rollout(
        *("start", *server, "--only-model", "--model-base-path", shop.root / "flowers", "--version", "4"),
        "--skip-comparison",
    )
    assert status == 0, err
    assert rollout("abort", *server, "--drain-s", "0")[0] == 0
    status, out, _ = rollout("status", *server)
    assert (status, out.splitlines()[0]) == (0, "stable     version 3")
    assert len(list((shop.root / "state" / "graftserve" / "rollouts").glob("*.json"))) == 1


def test_what_somebody_else_changed_is_status_1_and_can_be_left(rollout, shop, place) -> None:
    rollout("start", *place, "--version", "4", "--skip-comparison")
    text = shop.config_path.read_text().replace("versions: 3", "versions: 2")
    shop.config_path.write_text(text)
    status, out, _ = rollout("status", *place)
    assert status == 1
    assert "somebody else changed the server: the configuration says [versions 2, 4" in out
    status, out, err = rollout("promote", *place)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "Nothing is overwritten" in err
    status, out, _ = rollout("abort", *place, "--leave", "-m", "theirs")
    assert (status, out) == (0, "rollout 1 (version 3 to 4) left: theirs\n")
    assert shop.config_path.read_text() == text


def test_status_without_a_server(rollout, shop, place) -> None:
    rollout("start", *place, "--version", "4", "--skip-comparison")
    shop.stop_server()
    status, out, _ = rollout("status", *place, "--timeout-s", "0.5")
    assert status == 1
    assert shop.target in out.splitlines()[0]
    assert "rollout 1 (version 3 to 4), begun " in out


def test_images_that_are_not_there_begin_nothing(rollout, shop, place) -> None:
    (shop.root / "empty").mkdir()
    status, _, err = rollout("start", *place, "--version", "4", "--images", shop.root / "empty")
    assert status == 1
    assert "empty: expected images, found none" in err
    assert not (shop.root / "models.config.rollouts").exists()


def test_ctrl_c_says_how_to_go_on(rollout, shop, place) -> None:
    command = [sys.executable, "-m", "graftserve.cli", "rollout", "start", *place, "--version", "4"]
    command += ["--skip-comparison", "--auto", "--drain-s", "600"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("waiting for calls of version 3"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert "interrupted: the same command goes on, `graftserve rollout abort` goes back\n" in lines
    assert not [line for line in lines if "Traceback" in line]
    assert shop.observe().stable == 4
    status, out, err = rollout(
        "start", *place, "--version", "4", "--skip-comparison", "--auto", "--drain-s", "0"
    )
    assert status == 0
    assert err.startswith("going on with rollout 1 (version 3 to 4)\n")
    assert out == "rollout 1 (version 3 to 4) promoted: not compared\n"
