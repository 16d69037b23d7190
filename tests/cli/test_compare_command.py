"""`graftserve compare`: its table, its page, its requirements."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def other(exported, tmp_path_factory) -> Path:
    """The exported version with the labels 3 and 5 exchanged."""
    folder = tmp_path_factory.mktemp("other") / "2"
    shutil.copytree(exported.path, folder)
    labels = (folder / "assets/labels.txt").read_text().splitlines()
    labels[3], labels[5] = labels[5], labels[3]
    (folder / "assets/labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return folder


def test_the_table_and_the_page(graftserve, exported, other: Path, digits_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    status, out, err = graftserve("compare", exported.path, other, digits_dir, "--limit", "60", "-o", page)
    assert status == 0, err
    assert "of 60 images" in out
    assert "broken, it is 3" in out
    assert "3: " in out
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_requirements_fail_after_the_table(graftserve, exported, other: Path, digits_dir: Path) -> None:
    asked = ("compare", exported.path, other, digits_dir, "--limit", "30")
    status, out, err = graftserve(*asked, "--require-agreement", "0.99")
    assert status == 1
    assert "of 30 images" in out
    assert "agreement: expected at least 0.99, got 0." in err
    status, _, err = graftserve(*asked, "--max-shift", "0.5")
    assert status == 1
    assert "shift: expected at most 0.5, got 0." in err


def test_json(graftserve, exported, digits_dir: Path) -> None:
    options = ("--limit", "10", "--split", "test", "--json", "--require-agreement", "1")
    status, out, err = graftserve("compare", exported.path, exported.path, digits_dir, *options)
    assert status == 0, err
    result = json.loads(out)
    assert result["agreement"] == 1
    assert result["images"] == 10
    assert result["flips"] == []
