"""`graftserve export` and `graftserve verify`: what they print and refuse, and a real server on trial."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest

from graftserve.cli.server_process import ServerProcess
from graftserve.cli.serving_check import serving_check
from graftserve.export import VerificationError, published_versions
from graftserve.export.manifest import write_manifest


@pytest.fixture(scope="module")
def mean_colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Keras model that is exported in a moment, with its labels beside it."""
    folder = tmp_path_factory.mktemp("mean")
    pixels = keras.Input((32, 32, 3))
    features = keras.layers.GlobalAveragePooling2D()(pixels)
    probabilities = keras.layers.Softmax()(features)
    keras.Model(pixels, probabilities).save(folder / "mean.keras")
    (folder / "labels.txt").write_text("red\ngreen\nblue\n")
    return folder


@pytest.fixture
def export(graftserve, mean_colour: Path, tmp_path: Path):
    """export(*options) -> (status, stdout, stderr) of the model above, into tmp_path / "mean"."""

    def export(*options: str) -> tuple[int, str, str]:
        return graftserve(
            "export",
            mean_colour / "mean.keras",
            "--labels",
            mean_colour / "labels.txt",
            "--preprocess",
            "pixels=0..1",
            "--model-base-path",
            tmp_path / "mean",
            *options,
        )

    return export


@pytest.mark.slow
def test_a_model_is_served_on_trial_before_it_appears(export, tmp_path: Path) -> None:
    status, out, err = export("--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["served_by"] == "graftserve serve"
    assert result["served_difference"] < 1e-5
    assert result["version"] == 1
    assert published_versions(tmp_path / "mean") == [1]


def test_what_it_prints(export, tmp_path: Path) -> None:
    options = ("--no-serving-check", "--signature-outputs", "serving_default=scores,classes,valid")
    status, out, err = export(*options, "--max-latency-ms", "60000")
    assert status == 0, err
    assert str(tmp_path / "mean" / "1") in out
    assert "ms for one image" in out
    assert f"graftserve serve --model_name mean --model_base_path {tmp_path / 'mean'}" in out
    assert "served" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--version", "0"), "version: expected next, timestamp or a number from 1"),
        (("--signature-outputs", "other"), "signature other: expected one of serving_default"),
        (("--require-accuracy", "0.5"), "there are no test images to judge by"),
        (("--quantize", "int8"), "quantize: needs the training images of a run"),
        (("--tune", "--batching", "none"), "tune: there is no batching to tune"),
    ],
)
def test_what_it_refuses(export, options, message: str, tmp_path: Path) -> None:
    status, out, err = export("--no-serving-check", *options)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.strip().splitlines()[-1]) < 300
    assert published_versions(tmp_path / "mean") == []


@pytest.mark.parametrize("share", ["-0.1", "95"])
def test_wrong_usage(export, share: str) -> None:
    status, _, err = export("--require-accuracy", share)
    assert status == 2
    assert "--require-accuracy" in err


def test_a_run_has_its_own_labels(graftserve, trained, tmp_path: Path) -> None:
    status, _, err = graftserve(
        "export", trained.path, "--model-base-path", tmp_path / "digits", "--labels", tmp_path / "labels.txt"
    )
    assert status == 1
    assert "--labels" in err
    assert "a run has its own; leave it out" in err


def test_what_is_not_ours(graftserve, tmp_path: Path) -> None:
    status, _, err = graftserve("export", tmp_path, "--model-base-path", tmp_path / "digits")
    assert status == 1
    assert "not a run directory" in err


def test_verify_offline(graftserve, exported, tmp_path: Path) -> None:
    status, out, err = graftserve("verify", exported.path, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["signatures"] == ["serving_default", "features", "pixels", "classify"]
    assert result["largest_difference"] < 1e-5
    damaged = shutil.copytree(exported.path, tmp_path / "digits" / "1")
    (damaged / "assets/labels.txt").write_text("x")
    status, out, err = graftserve("verify", damaged)
    assert (status, out) == (1, "")
    assert "changed: assets/labels.txt" in err


def test_verify_against_a_running_server(graftserve, exported, tmp_path: Path) -> None:
    with ServerProcess("digits", exported.path.parent) as server:
        target = server.addresses()["gRPC"]
        asked = ("verify", exported.path, "--target", target, "--model", "digits")
        status, out, err = graftserve(*asked, "--json")
        assert status == 0, err
        assert json.loads(out)["version"] == 1
        assert json.loads(out)["largest_difference"] < 1e-5

        other = shutil.copytree(exported.path, tmp_path / "digits" / "1")
        goldens = other / "assets.extra/goldens/goldens.json"
        document = json.loads(goldens.read_text())
        document["goldens"][2]["probabilities"].reverse()
        goldens.write_text(json.dumps(document))
        status, out, err = graftserve("verify", other, "--target", target, "--model", "digits")
        assert status == 1
        assert document["goldens"][2]["file"] in out
        assert "expected at most 0.001: another model or version" in err

        status, _, err = graftserve(*asked[:-1], "nope", "--timeout-s", "5")
        assert status == 1
        assert "nope" in err


def test_verify_allows_a_server_in_int8_what_the_version_tells(graftserve, quantized) -> None:
    with ServerProcess("digits", quantized.path.parent, "--engine=litert_int8") as server:
        asked = ("verify", quantized.path, "--target", server.addresses()["gRPC"], "--model", "digits")
        status, _, err = graftserve(*asked)
        assert (status, err) == (0, "")
        status, _, err = graftserve(*asked, "--tolerance", "1e-6")
    assert status == 1
    assert "expected at most 1e-06: another model or version" in err


def test_verify_asks_for_a_target(graftserve, exported) -> None:
    status, _, err = graftserve("verify", exported.path, "--model", "digits")
    assert status == 2
    assert "give its --target" in err


def test_a_version_that_does_not_load_fails_its_trial(exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.path, tmp_path / "digits" / "1")
    (copy / "variables/variables.index").write_bytes(b"")
    write_manifest(copy)
    with pytest.raises(
        VerificationError, match=r"graftserve serve does not serve the new version: .*did not"
    ):
        serving_check(tmp_path / "digits", "digits")


@pytest.mark.slow
def test_a_version_that_answers_differently_fails_its_trial(exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.path, tmp_path / "digits" / "1")
    goldens = copy / "assets.extra/goldens/goldens.json"
    document = json.loads(goldens.read_text())
    document["goldens"][0]["probabilities"].reverse()
    goldens.write_text(json.dumps(document))
    with pytest.raises(VerificationError, match="answers differently from the trained model"):
        serving_check(tmp_path / "digits", "digits")


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_version_and_the_next_export_cleans_up(
    export, mean_colour: Path, tmp_path: Path
) -> None:
    base = tmp_path / "mean"
    command = [sys.executable, "-m", "graftserve.cli", "export", str(mean_colour / "mean.keras")]
    command += ["--labels", str(mean_colour / "labels.txt"), "--preprocess", "pixels=0..1"]
    process = subprocess.Popen([*command, "--model-base-path", str(base)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(base.glob(".exporting-*/1/saved_model.pb")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert published_versions(base) == []
    assert list(base.glob(".exporting-*/1/saved_model.pb"))
    status, _, err = export("--no-serving-check")
    assert status == 0, err
    assert [path.name for path in base.iterdir()] == ["1"]


def test_a_full_disk_leaves_nothing(mean_colour: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 kB: what a full disk does, at the graph or at the weights."""
    base = tmp_path / "mean"
    code = (
        "import resource, signal, sys\n"
        "from graftserve.cli.app import _run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import tensorflow\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(_run(sys.argv[1:]))\n"
    )
    arguments = ["export", str(mean_colour / "mean.keras"), "--labels", str(mean_colour / "labels.txt")]
    arguments += ["--preprocess", "pixels=0..1", "--model-base-path", str(base), "--no-serving-check"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: {base}: cannot be written: ")
    assert list(base.iterdir()) == []


def stand_in(folder: Path, body: str) -> str:
    """A tensorflow_model_server, first on the PATH that is returned."""
    binary = folder / "bin" / "tensorflow_model_server"
    binary.parent.mkdir()
    binary.write_text(f"#!/bin/sh\n{body}\n")
    binary.chmod(0o755)
    return f"{binary.parent}:{os.environ['PATH']}"


@pytest.mark.slow
def test_the_real_server_is_preferred_where_there_is_one(exported, tmp_path: Path, monkeypatch) -> None:
    """The binary cannot be had here: the embedded server, which has its flags, stands in for it."""
    body = f'exec {sys.executable} -m graftserve.cli serve "$@"'
    monkeypatch.setenv("PATH", stand_in(tmp_path, body))
    check = serving_check(exported.path.parent, "digits")
    assert check.server == "tensorflow_model_server"
    assert check.largest_difference < 1e-5


def test_what_the_real_server_said_is_told(exported, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", stand_in(tmp_path, "echo it cannot; exit 3"))
    with pytest.raises(VerificationError, match="it ended with status 3: it cannot"):
        serving_check(exported.path.parent, "digits")
