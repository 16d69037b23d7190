"""The generated code is what its .proto files give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_regenerating_changes_nothing(tmp_path):
    pytest.importorskip("grpc_tools")
    subprocess.run(
        [ROOT / "scripts" / "generate-wire", tmp_path],
        check=True,
        env={**os.environ, "PYTHON": sys.executable},
        timeout=120,
    )
    committed = {
        path.name: path.read_text() for path in (ROOT / "client" / "wire").iterdir() if "_pb2.py" in path.name
    }
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == committed
    assert len(committed) == 2 * len(list((ROOT / "client" / "wire").glob("*.proto")))
