"""What `make mutation` is told, as far as it can be read without its running."""

import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORES = tomllib.loads((ROOT / "tests/mutation.toml").read_text())["cores"]


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_modules_and_tests_are_there(core) -> None:
    tests = [part for line in core["tests"] for part in shlex.split(line) if part.startswith("tests/")]
    assert tests
    for path in (*core["modules"], *tests):
        assert (ROOT / path).is_file(), f"{path} is named in tests/mutation.toml"
