"""What the peers run: the same model in both engines, and codecs that are right."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import client_codec
from benchmarks.peers.model import open_model
from graftserve.client.wire import PredictRequest
from tests.benchmarks.wheels import tiny_wheel

_CODEC = Path(client_codec.__file__)


def test_both_engines_see_the_same_in_whole_images(exported: Any) -> None:
    goldens = sorted((exported.path / "assets.extra" / "goldens").glob("*.jpg"))
    images = [path.read_bytes() for path in goldens]
    in_litert = open_model(exported.path, "litert")(images)
    in_tensorflow = open_model(exported.path, "tensorflow")(images)
    assert len(in_litert) == len(images) > 1
    assert [label for label, _ in in_litert] == [label for label, _ in in_tensorflow]
    # Pillow and the version's own decoding resize differently.
    assert [score for _, score in in_litert] == pytest.approx([score for _, score in in_tensorflow], abs=0.1)


def test_the_client_encodes_what_it_was_given() -> None:
    encode, _ = client_codec.CLIENTS["graftserve.client"]()
    images = client_codec.jpegs()[0]
    assert len(images) == 32
    assert {len(image) for image in images} == {100_000}
    assert list(PredictRequest.FromString(encode(images)).inputs["image_bytes"].string_val) == images


@pytest.mark.parametrize(
    ("program", "message"),
    [("", "is not on the PATH"), ("#!/bin/sh\nexit 3\n", "did not start: status 3")],
)
def test_a_model_server_that_cannot_be_had_is_told(
    program: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(_CODEC.parents[1]))
    servers = importlib.import_module("servers")
    monkeypatch.setenv("PATH", str(tmp_path))
    if program:
        file = tmp_path / "tensorflow_model_server"
        file.write_text(program)
        file.chmod(0o755)
    expected = pytest.raises(servers.PeerError, match=f"tensorflow_model_server {message}")
    with expected, servers.serve_model_server(tmp_path):
        pass


@pytest.fixture
def client_peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module; it finds its neighbours as a program does."""
    monkeypatch.syspath_prepend(str(_CODEC.parents[1]))
    return importlib.import_module("client_peers")


def test_an_answer_is_compared_with_what_it_says(client_peers: Any, tmp_path: Path) -> None:
    client_peers.write_answer(tmp_path)
    command = [sys.executable, str(_CODEC), "graftserve.client", "decode", str(tmp_path), "--seconds=0"]
    done = subprocess.run(command, check=True, capture_output=True)
    assert json.loads(done.stdout)["right"] is True
    answer = json.loads((tmp_path / "answer.json").read_text())
    answer[0][0] = "something else"
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    done = subprocess.run(command, check=True, capture_output=True)
    assert json.loads(done.stdout)["right"] is False


def test_a_client_that_does_not_install_is_a_row_of_the_result(
    client_peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = client_peers.Environment("ours", Path(sys.prefix), {"graftserve": "0"})
    monkeypatch.setattr(client_peers, "our_environment", lambda: ours)
    make = client_peers.make_environment
    monkeypatch.setattr(client_peers, "make_environment", lambda name, asked: make(name, asked, tmp_path))
    missing = client_peers.Peer((str(tmp_path / "gone-1.0-py3-none-any.whl"),), "import gone")
    broken = client_peers.Peer((tiny_wheel(tmp_path, "1.0"),), "import gone")
    monkeypatch.setattr(client_peers, "PEERS", {"ovmsclient": missing, "tritonclient": broken})
    monkeypatch.setattr(sys, "argv", ["client_peers.py", f"--output={tmp_path}", "--rounds=1", "--seconds=0"])
    client_peers.main()
    result = json.loads((tmp_path / "client_peers.json").read_text())
    assert "gone-1.0-py3-none-any.whl" in result["clients"]["ovmsclient"]["error"]["install"]
    assert "No module named 'gone'" in result["clients"]["tritonclient"]["error"]["import"]
    assert result["ratios_to_graftserve"]["ovmsclient"] == {}
    good = result["clients"]["graftserve.client"]
    assert good["encode_right"] is good["decode_right"] is True
    assert good["import_s"] > 0
    assert "error" not in good
