"""`graftserve tune`, on a copy of a real version."""

import json
import shutil
from pathlib import Path

from graftserve.export.rebatch import read_batching


def test_what_it_writes_and_prints(graftserve, exported, tmp_path: Path) -> None:
    base = tmp_path / "digits"
    shutil.copytree(exported.path, base / "1")
    output = tmp_path / "tuning"
    options = ("--seconds", "0.05", "--max-batch", "2", "--output", output, "--publish", "--json")
    status, out, err = graftserve("tune", base, *options)
    assert status == 0, err
    result = json.loads(out)
    assert {point["batch_images"] for point in result["points"]} == {1, 2}
    assert json.loads((output / "tuning.json").read_text())["chosen"] == result["chosen"]
    assert "num_batch_threads" in (output / "batching_parameters.txt").read_text()
    assert "Batching of digits version 1" in (output / "tuning.html").read_text()
    changed = result["chosen"] != result["current"]
    assert (base / "2").exists() == changed
    assert result["published"] == (str(base / "2") if changed else None)
    if changed:
        assert list(read_batching(base / "2").sizes) == result["chosen"]["sizes"]


def test_what_is_no_version(graftserve, tmp_path: Path) -> None:
    status, _, err = graftserve("tune", tmp_path)
    assert status == 1
    assert "expected a version, such as models/flowers/3" in err
