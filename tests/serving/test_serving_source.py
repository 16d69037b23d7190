"""Which folders count as versions, and what is said when there are none."""

from pathlib import Path

import pytest

from graftserve.serving.errors import Code, ServingError
from graftserve.serving.source import (
    All,
    FileSystemStoragePathSource,
    Latest,
    MonitoredServable,
    Specific,
    VersionPolicy,
    list_versions,
)


def test_only_folders_named_by_a_plain_number_count(tmp_path: Path) -> None:
    for name in (
        "1",
        "10",
        "0",
        "007",
        "-3",
        "+4",
        "2.tmp",
        "temp-5",
        "abc",
        "１",
        str(2**63),
        str(2**63 - 1),
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "6").write_text("a file")
    assert sorted(list_versions(tmp_path)) == [0, 1, 10, 2**63 - 1]
    assert list_versions(tmp_path)[10] == tmp_path / "10"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Latest(), [9]),
        (Latest(2), [3, 9]),
        (Latest(7), [1, 3, 9]),
        (All(), [1, 3, 9]),
        (Specific(frozenset({3, 4})), [3]),
    ],
)
def test_version_policies(tmp_path: Path, policy: VersionPolicy, expected: list[int]) -> None:
    for version in (3, 1, 9):
        (tmp_path / str(version)).mkdir()
    found, failed = FileSystemStoragePathSource([MonitoredServable("m", tmp_path, policy)]).poll()
    assert (sorted(found["m"]), failed) == (expected, {})


def test_latest_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_versions: expected 1 or more, got 0"):
        Latest(0)


def test_a_missing_base_path_is_an_error_and_not_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    source = FileSystemStoragePathSource(
        [MonitoredServable("a", tmp_path / "there"), MonitoredServable("b", tmp_path / "gone")]
    )
    found, failed = source.poll()
    assert found == {"a": {}}
    assert failed["b"].code is Code.NOT_FOUND
    assert f"Could not find base path {tmp_path / 'gone'}" in failed["b"].message


def test_the_start_names_every_servable_without_a_version(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    source = FileSystemStoragePathSource(
        [MonitoredServable("a", tmp_path / "empty"), MonitoredServable("b", tmp_path / "gone")]
    )
    with pytest.raises(ServingError) as caught:
        source.poll_at_start()
    assert "model b: Could not find base path" in caught.value.message
    assert f"model a: no version to serve under {tmp_path / 'empty'}." in caught.value.message
    assert "Did you forget to name your leaf directory as a number" in caught.value.message
