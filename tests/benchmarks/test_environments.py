"""Environments of peers: made once, described, and a failure is a value."""

from pathlib import Path

import pytest

from benchmarks.environments import PeerError, last_error, make_environment
from tests.benchmarks.wheels import tiny_wheel


def test_a_peer_is_installed_once_until_what_is_asked_changes(tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, "1.0")
    environment = make_environment("peer", [wheel], tmp_path / "peers")
    assert environment.error == ""
    assert environment.packages == {"tiny": "1.0"}
    assert environment.run("-c", "import tiny; print('said'); print(tiny.VALUE)") == 41
    left = environment.site_packages / "left.txt"
    left.write_text("x" * 1_000_000)
    assert environment.installed_mb() > 1
    assert make_environment("peer", [wheel], tmp_path / "peers").packages == {"tiny": "1.0"}
    assert left.exists()
    assert make_environment("peer", [tiny_wheel(tmp_path, "1.1")], tmp_path / "peers").packages == {
        "tiny": "1.1"
    }
    assert not left.exists()


def test_the_same_wheel_with_another_content_is_another(tmp_path: Path) -> None:
    make_environment("peer", [tiny_wheel(tmp_path, "1.0")], tmp_path / "peers")
    wheel = tiny_wheel(tmp_path, "1.0", "VALUE = 42  # and longer\n")
    assert (
        make_environment("peer", [wheel], tmp_path / "peers").run("-c", "import tiny; print(tiny.VALUE)")
        == 42
    )


def test_a_peer_that_does_not_install_says_why_and_is_tried_again(tmp_path: Path) -> None:
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    environment = make_environment("peer", [str(wheel)], tmp_path / "peers")
    assert environment.error.startswith("does not install: ")
    assert wheel.name in environment.error
    assert environment.packages == {}
    tiny_wheel(tmp_path, "1.0")
    assert make_environment("peer", [str(wheel)], tmp_path / "peers").error == ""


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    environment = make_environment("peer", [tiny_wheel(tmp_path, "1.0")], tmp_path / "peers")
    with pytest.raises(PeerError, match="ModuleNotFoundError: No module named 'missing'"):
        environment.run("-c", "import missing")
    with pytest.raises(PeerError, match="ended with status 3"):
        environment.run("-c", "import sys; sys.exit(3)")


@pytest.mark.parametrize(
    ("stderr", "error"),
    [
        ("WARNING: slow\nERROR: no version fits\nERROR: No matching\n", "no version fits"),
        ("Traceback\n  File\nValueError: wrong\n", "ValueError: wrong"),
        ("", ""),
    ],
)
def test_the_line_that_says_why(stderr: str, error: str) -> None:
    assert last_error(stderr) == error
