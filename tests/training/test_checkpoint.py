"""Where a run stands: whole or not there, and never somebody else's."""

from pathlib import Path

import keras
import numpy as np
import pytest

from graftserve.training.checkpoint import Checkpoint, restore, snapshot
from graftserve.training.errors import RunError


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.npz")
    assert checkpoint.load() is None
    groups = {"a": (np.arange(3, dtype=np.float32), np.array(5)), "none": ()}
    checkpoint.save({"step": 3, "history": [{"loss": 0.5}]}, groups)
    document, found = checkpoint.load()  # type: ignore[misc]
    assert document == {"step": 3, "history": [{"loss": 0.5}]}
    assert found.keys() == groups.keys()
    np.testing.assert_array_equal(found["a"][0], groups["a"][0])
    assert found["a"][1] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]
    checkpoint.remove()
    assert checkpoint.load() is None


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: b"", lambda data: b"PK" + data[9:]])
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "checkpoint.npz"
    Checkpoint(path).save({}, {"a": (np.arange(1000),)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"checkpoint\.npz: damaged .*--overwrite"):
        Checkpoint(path).load()


def test_variables_go_back_to_what_they_were() -> None:
    variables = [keras.Variable(np.ones(3)), keras.Variable(2, dtype="int32")]
    saved = snapshot(variables)
    variables[0].assign([5, 6, 7])
    variables[1].assign(9)
    np.testing.assert_array_equal(saved[0], [1, 1, 1])
    restore(variables, saved)
    assert [np.asarray(variable).tolist() for variable in variables] == [[1, 1, 1], 2]
    with pytest.raises(RunError, match="of another network"):
        restore(variables[:1], saved)
