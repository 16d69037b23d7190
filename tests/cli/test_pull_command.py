"""`graftserve pull`: a version from a store, where nothing but the base install is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from graftserve.export.manifest import check_manifest
from graftserve.export.store import open_store


@pytest.fixture
def url(exported) -> str:
    """The model "digits" in a store, as versions 1 and 2."""
    store = open_store("memory://test_pull_command/digits")
    for number in (1, 2):
        store.publish(exported.path, number)
    yield store.url
    fsspec.filesystem("memory").rm("/test_pull_command", recursive=True)


def test_the_newest_version_comes(graftserve, url: str, tmp_path: Path, exported) -> None:
    status, out, err = graftserve("pull", url, tmp_path / "digits")
    files = len([path for path in exported.path.rglob("*") if path.is_file()])
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert status == 0, err
    assert lines["version"] == str(tmp_path / "digits/2")
    assert lines["files"] == f"{files}, every sum as in the manifest"
    assert lines["size"].endswith("of it fetched")
    assert err.startswith("pulling (MB): ")
    assert check_manifest(tmp_path / "digits/2") == files - 1

    status, out, err = graftserve("pull", url, tmp_path / "digits")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].endswith("all of it there already")


def test_for_machines(graftserve, url: str, tmp_path: Path) -> None:
    status, out, _ = graftserve("pull", url, tmp_path, "--version", "1", "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["version"], result["path"]) == (1, str(tmp_path / "1"))
    assert result["size_bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert result["reused_bytes"] == 0
    assert result["files"] > 5
    again = json.loads(graftserve("pull", f"{url}/1", tmp_path, "--json")[1])
    assert again == {**result, "reused_bytes": result["size_bytes"]}


def test_a_damaged_version_is_replaced_on_demand(graftserve, url: str, tmp_path: Path) -> None:
    assert graftserve("pull", url, tmp_path)[0] == 0
    (tmp_path / "2/saved_model.pb").write_bytes(b"damaged")
    status, out, err = graftserve("pull", url, tmp_path)
    assert (status, out) == (1, "")
    assert err == (
        f"Error: {tmp_path}/2: changed: saved_model.pb; publish or pull the version again. "
        "It is left as it is; --overwrite replaces it\n"
    )
    assert graftserve("pull", url, tmp_path, "--overwrite")[0] == 0
    assert check_manifest(tmp_path / "2") > 5


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("memory://nowhere/flowers",), 1, "Error: memory://nowhere/flowers: holds no complete version"),
        (("models/flowers", "--version", "0"), 2, "0 is not in the range x>=1"),
        (("gopher://bucket/flowers",), 1, "Error: gopher://bucket/flowers: cannot be reached: Protocol"),
    ],
)
def test_what_fails_is_one_line(graftserve, tmp_path: Path, args, status: int, message: str) -> None:
    code, out, err = graftserve("pull", args[0], tmp_path / "out", *args[1:])
    assert (code, out) == (status, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


BASE_INSTALL = """
import sys
for name in ("tensorflow", "keras", "ai_edge_litert", "sklearn", "scipy", "h5py", "jinja2", "matplotlib"):
    sys.modules[name] = None
from graftserve.cli.app import main
main(["pull", *sys.argv[1:]])
"""


def test_it_needs_no_tensorflow(exported, tmp_path: Path) -> None:
    shutil.copytree(exported.path, tmp_path / "digits/4")
    done = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL, str(tmp_path / "digits"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert check_manifest(tmp_path / "out/4") == check_manifest(exported.path)
