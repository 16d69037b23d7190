"""The command: help that is quick, errors in one line, exit status 0, 1 or 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from graftserve.cli.app import _COMMANDS


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom graftserve.cli.app import _run\nstatus = _run(['--help'])\n"
        "heavy = {'tensorflow', 'keras', 'grpc', 'numpy', 'graftserve.client'} & set(sys.modules)\n"
        "print(status, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    for command in _COMMANDS:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_explains_itself(graftserve, command: str) -> None:
    status, out, _ = graftserve(command, "--help")
    assert status == 0
    assert out.startswith(f"Usage: graftserve {command}")


def test_backbones_are_listed(graftserve) -> None:
    status, out, _ = graftserve("train", "--list-backbones")
    assert status == 0
    assert out.splitlines()[0].split()[:5] == ["efficientnet-lite0", "224", "px", "1280", "features"]
    assert len(out.splitlines()) == 23


def test_recipes_are_listed(graftserve) -> None:
    status, out, _ = graftserve("train", "--list-recipes")
    assert status == 0
    assert out.startswith("probe            Regularised linear head on cached features")
    assert len(out.splitlines()) == 7


def test_version(graftserve) -> None:
    root = Path(__file__).parents[2]
    assert graftserve("--version")[1] == f"graftserve {(root / 'VERSION').read_text().strip()}\n"


def test_the_changelog_begins_with_the_version() -> None:
    root = Path(__file__).parents[2]
    version = (root / "VERSION").read_text().strip()
    first = next(line for line in (root / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first.startswith(f"## {version} ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], ""),
        (["bogus"], "No such command 'bogus'"),
        (["train"], "Missing argument 'DATA'"),
        (["train", "x"], "Missing option '-o' / '--output'"),
        (["train", "x", "-o", "y", "--resume", "--overwrite"], "exclude each other"),
        (
            ["train", "x", "-o", "y", "--test-percent", "60", "--validation-percent", "50"],
            "together below 100",
        ),
        (["train", "x", "-o", "y", "--recipe", "prob"], "did you mean probe?"),
        (["train", "x", "-o", "y", "--set", "sed=1"], "sed: there is no such setting; did you mean seed?"),
        (["train", "x", "-o", "y", "--epochs", "3"], "the recipe has no stages"),
        (["train", "x", "-o", "y", "--backbone", "nope"], "no 'nope'. Known: efficientnet-lite0, "),
        (["export", "x"], "Missing option '--model-base-path'"),
        (["serve"], "--model_base_path: expected the model's folder"),
        (["serve", "--model_base_path=x", "--no_such_flag=1"], "--no_such_flag=1: there is no such flag"),
        (["serve", "--model_base_path=x", "--port=99999"], "--port: expected 0 to 65535, got 99999"),
        (["classify", "--model", "x"], "Missing argument 'IMAGES...'"),
        (["status"], "Missing option '--model'"),
    ],
)
def test_wrong_usage_is_status_2(graftserve, args: list[str], message: str) -> None:
    status, out, err = graftserve(*args)
    assert status == 2
    assert message in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "{tmp}/none", "-o", "{tmp}/run"], "none: no such folder"),
        (["train", "{tmp}/empty", "-o", "{tmp}/run"], "empty: no class folders. Expected one folder"),
        (["train", "{tmp}/one", "-o", "{tmp}/run"], "one class only (a)"),
        (["train", "{tmp}/two", "-o", "{tmp}/one"], "exists and is no run directory"),
        (
            ["train", "{tmp}/two", "-o", "{tmp}/run", "--strict"],
            "1 file cannot be used (--strict): b/x.txt",
        ),
        (["train", "{tmp}/two", "-o", "{tmp}/run", "--weights", "{tmp}/w.h5"], "w.h5: no such weights file"),
        (
            ["train", "{tmp}/two", "-o", "{tmp}/run", "--weights", "{tmp}/bad.h5"],
            "bad.h5: neither an HDF5 file",
        ),
        (["export", "{tmp}/one", "--model-base-path", "{tmp}/m"], "not a run directory"),
        (["status", "--model", "x", "--target", "localhost:1", "--timeout-s", "0.5"], "localhost:1"),
        (
            [
                "classify",
                "--model",
                "x",
                "--target",
                "localhost:1",
                "--timeout-s",
                "0.5",
                "{tmp}/one/a/1.jpg",
            ],
            "x",
        ),
        (["classify", "--model", "x", "{tmp}/none.jpg"], "none.jpg: expected a readable image file"),
    ],
)
def test_failures_are_one_clear_message_and_status_1(
    graftserve, encode, tmp_path, args, message: str
) -> None:
    jpeg = encode(Image.new("RGB", (64, 64)))
    for name, content in {
        "one/a/1.jpg": jpeg,
        "two/a/1.jpg": jpeg,
        "two/b/1.jpg": jpeg,
        "two/b/x.txt": b"text",
        "empty/.keep": b"",
        "bad.h5": b"no weights",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    status, out, err = graftserve(*(arg.format(tmp=tmp_path) for arg in args))
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_an_unexpected_failure_is_one_line_too_unless_debugging(graftserve, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr("graftserve.cli.status.Client", fail)
    status, _, err = graftserve("status", "--model", "x")
    assert status == 1
    assert err == "Error: ZeroDivisionError: by chance (an unexpected failure; --debug shows where)\n"
    with pytest.raises(ZeroDivisionError):
        graftserve("--debug", "status", "--model", "x")


def test_ctrl_c_is_status_130(graftserve, monkeypatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graftserve.cli.status.Client", interrupt)
    status, _, err = graftserve("status", "--model", "x")
    assert (status, err.strip()) == (130, "interrupted")


def test_train_and_export_print_what_came_out(
    graftserve, digits_dir, feature_cache, trained, tmp_path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "features").symlink_to(feature_cache)
    run, base = tmp_path / "run", tmp_path / "models" / "digits"
    status, out, err = graftserve("train", digits_dir, "--output", run, "--cache-dir", cache)
    assert status == 0, err
    assert "0 computed, 200 cached" in out
    assert f"graftserve export {run} --model-base-path models/run" in out

    status, out, _ = graftserve(
        "train", digits_dir, "--output", run, "--cache-dir", cache, "--resume", "--json"
    )
    assert status == 0
    assert json.loads(out)["evaluation"] == trained.metrics["evaluation"]

    status, out, _ = graftserve("export", run, "--model-base-path", base, "--json", "--no-serving-check")
    assert status == 0
    assert json.loads(out)["version"] == 1
    assert json.loads(out)["path"] == str(base / "1")
