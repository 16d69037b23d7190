"""`graftserve cache`: what is there, and what goes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from graftserve.training.cache import RowStore


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of two entries of 1,234 rows, about 0.6 MB each, unused for 2 and for 40 days."""
    for engine, unused_days in (("litert", 2), ("tensorflow", 40)):
        folder = tmp_path / "features" / engine
        meta = {"kind": "features", "backbone": "small", "engine": engine, "view": "plain"}
        store = RowStore({folder: meta}, (100,), np.float32)
        store.add(folder, [bytes([n // 256, n % 256]) * 8 for n in range(1234)], np.ones((1234, 100)))
        then_s = time.time() - unused_days * 24 * 3600
        os.utime(folder / "meta.json", (then_s, then_s))
    return tmp_path


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "features").iterdir())


def test_info_is_a_table_with_a_total(graftserve, cache: Path) -> None:
    status, out, _ = graftserve("cache", "info", "--cache-dir", cache)
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["kind", "backbone", "engine", "view", "rows", "MB", "last", "used"]
    assert lines[1][:6] == ["features", "small", "litert", "plain", "1,234", "0.5"]
    assert lines[2][:6] == ["features", "small", "tensorflow", "plain", "1,234", "0.5"]
    assert lines[3] == ["total", "1.0"]
    assert out.splitlines()[1].index("0.5") == out.splitlines()[3].index("1.0")


def test_info_for_machines(graftserve, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTSERVE_CACHE_DIR", str(cache))
    status, out, _ = graftserve("cache", "info", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["cache"] == str(cache / "features")
    assert [entry["engine"] for entry in result["entries"]] == ["litert", "tensorflow"]
    assert [entry["rows"] for entry in result["entries"]] == [1234, 1234]
    assert result["size_bytes"] == sum(entry["size_bytes"] for entry in result["entries"])


def test_an_empty_cache_is_none(graftserve, tmp_path: Path) -> None:
    status, out, _ = graftserve("cache", "info", "--cache-dir", tmp_path / "none")
    assert (status, out.splitlines()[-1].split()) == (0, ["total", "0.0"])
    status, out, _ = graftserve("cache", "prune", "--all", "--cache-dir", tmp_path / "none")
    assert (status, out.splitlines()[0]) == (0, "removed  0 entries, 0.0 MB")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (["--older-than-days", "30"], ["litert"]),
        (["--older-than-days", "60"], ["litert", "tensorflow"]),
        (["--max-mb", "0.6"], ["litert"]),
        (["--max-mb", "5"], ["litert", "tensorflow"]),
        (["--older-than-days", "30", "--max-mb", "0"], []),
        (["--all"], []),
    ],
)
def test_prune_removes_what_the_limits_say(
    graftserve, cache: Path, flags: list[str], left: list[str]
) -> None:
    removed = 2 - len(left)
    status, out, _ = graftserve("cache", "prune", *flags, "--dry-run", "--cache-dir", cache)
    assert status == 0
    assert f"would remove  {removed} entries, {removed * 0.5:.1f} MB" in out
    assert entries(cache) == ["litert", "tensorflow"]
    status, out, _ = graftserve("cache", "prune", *flags, "--json", "--cache-dir", cache)
    assert status == 0
    assert len(json.loads(out)["removed"]) == removed
    assert entries(cache) == left


def test_prune_wants_a_limit(graftserve, cache: Path) -> None:
    status, _, err = graftserve("cache", "prune", "--cache-dir", cache)
    assert status == 2
    assert "--older-than-days, --max-mb or --all: expected at least one of them." in err
    assert entries(cache) == ["litert", "tensorflow"]


def test_neither_imports_tensorflow(cache: Path) -> None:
    code = (
        "import sys\nfrom graftserve.cli.app import _run\n"
        f"status = _run(['cache', 'info', '--cache-dir', {str(cache)!r}])\n"
        "print(status, sorted({'tensorflow', 'keras', 'PIL', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
