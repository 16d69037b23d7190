"""What every result says of how and where it was measured."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.result import ratios, spread, write_result


def test_a_result_says_how_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/some.py", "--output", "my results"])
    write_result(tmp_path, "some", {"images_per_s": 5}, rounds=3)
    result = json.loads((tmp_path / "some.json").read_text())
    assert result["command"] == "python benchmarks/some.py --output 'my results'"
    assert result["rounds"] == 3
    assert result["images_per_s"] == 5
    assert result["libraries"]["numpy"] == np.__version__
    assert result["graftserve"]["version"] == (Path(__file__).parents[2] / "VERSION").read_text().strip()
    assert result["machine"]["cpus"] == len(os.sched_getaffinity(0))
    assert result["machine"]["cpu"]
    assert result["machine"]["memory_gib"] > 0.5


def test_values_do_not_hide_the_description(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got graftserve, machine"):
        write_result(tmp_path, "some", {"machine": 1, "graftserve": 2}, rounds=1)


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([1, 4, 9], [1, 2, 3]) == {"median": 2, "min": 1, "max": 3}
    assert spread([1.26, 1.24], digits=1) == {"median": 1.2, "min": 1.2, "max": 1.3}
    with pytest.raises(ValueError, match="shorter"):
        ratios([1, 2], [1])
