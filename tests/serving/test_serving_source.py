"""Which folders count as versions, and what is said when there are none."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

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


def test_only_folders_named_by_a_number_count(tmp_path: Path) -> None:
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
    assert sorted(list_versions(tmp_path)) == [0, 1, 7, 10, 2**63 - 1]
    assert list_versions(tmp_path)[10] == tmp_path / "10"
    assert list_versions(tmp_path)[7] == tmp_path / "007"
    (tmp_path / "7").mkdir()
    assert list_versions(tmp_path)[7] == tmp_path / "7"


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


def age(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let so much time pass, as far as the source can tell."""
    now_s = time.time() + seconds
    monkeypatch.setattr("graftserve.serving.source.time.time", lambda: now_s)


def test_a_version_that_appears_counts_once_nothing_in_it_has_changed_for_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FileSystemStoragePathSource([MonitoredServable("m", tmp_path, All())])
    (tmp_path / "1" / "variables").mkdir(parents=True)
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"half of it")
    assert source.poll({"m": {2}})[0] == {"m": {}}
    (tmp_path / "1" / "variables" / "variables.index").write_bytes(b"")  # the copy goes on
    assert source.poll({"m": set()})[0] == {"m": {}}
    age(monkeypatch, 1.5)
    assert source.poll({"m": set()})[0] == {"m": {1: tmp_path / "1"}}
    # At the start, and where it was passed on before, it is taken as it is.
    monkeypatch.undo()
    (tmp_path / "1" / "more").write_bytes(b"")
    assert source.poll()[0] == {"m": {1: tmp_path / "1"}}
    assert source.poll({"m": {1}})[0] == {"m": {1: tmp_path / "1"}}


def test_a_file_system_whose_clock_is_ahead_does_not_keep_a_version_out_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FileSystemStoragePathSource([MonitoredServable("m", tmp_path)])
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"")
    age(monkeypatch, -3600)
    assert source.poll({})[0] == {"m": {}}
    assert source.poll({})[0] == {"m": {1: tmp_path / "1"}}


def test_a_whole_version_is_walked_once_and_one_in_its_place_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[Path] = []

    def walk(folder: Path, real: Any = os.walk) -> Any:
        walked.append(folder)
        return real(folder)

    monkeypatch.setattr("graftserve.serving.source.os.walk", walk)
    source = FileSystemStoragePathSource([MonitoredServable("m", tmp_path)])
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"")
    age(monkeypatch, 1.5)
    for _ in range(3):
        assert source.poll({})[0] == {"m": {1: tmp_path / "1"}}
    assert walked == [tmp_path / "1"]
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"half of it")
    age(monkeypatch, -1.5)
    assert source.poll({})[0] == {"m": {}}


def test_a_folder_without_a_graph_is_told_once_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = FileSystemStoragePathSource([MonitoredServable("m", tmp_path)])
    (tmp_path / "1" / "assets").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert source.poll({})[0] == {"m": {}}
    assert caplog.messages == [f"{tmp_path / '1'}: left alone until it holds a saved_model.pb"]
    os.rename(tmp_path / "1", tmp_path / "temp")
    (tmp_path / "temp" / "saved_model.pbtxt").write_bytes(b"")
    os.rename(tmp_path / "temp", tmp_path / "1")
    source.poll({})
    assert source.poll({})[0] == {"m": {1: tmp_path / "1"}}


def test_a_copy_that_was_cut_off_does_not_keep_a_whole_version_from_being_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
    (tmp_path / "1" / "saved_model.pb").touch()
    source = FileSystemStoragePathSource([MonitoredServable("m", tmp_path)])
    assert source.poll_at_start() == {"m": {1: tmp_path / "1"}}
    assert caplog.messages == [f"{tmp_path / '2'}: left alone until it holds a saved_model.pb"]
    # One that is being served stays, whatever became of its folder.
    assert source.poll_at_start({"m": {2}}) == {"m": {2: tmp_path / "2"}}
    only = FileSystemStoragePathSource([MonitoredServable("m", tmp_path, Specific(frozenset({2})))])
    assert only.poll_at_start() == {"m": {2: tmp_path / "2"}}
