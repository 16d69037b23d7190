"""Files that are either whole or not there."""

import json
from pathlib import Path

import pytest

from graftserve.training.files import write_atomically, write_json


def test_the_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"ä": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with write_atomically(path, mode) as file:
            file.write("new" if mode == "w" else b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_until_it_is_whole_the_old_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with write_atomically(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
