"""examples/batch_job: what it writes, that it goes on where it stopped, and that little is kept in memory."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest

from graftserve.cli.server_process import ServerProcess
from graftserve.client.testing import FakeServer
from tests.examples.conftest import EXAMPLES

_SCRIPT = "batch_job/classify_folder.py"


def _label(image: bytes) -> str | None:
    return None if image.startswith(b"bad") else image.decode()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer("flowers", answer=_label) as server:
        yield server


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images in two folders, and a file that is none; "bad" is in the third."""
    folder = tmp_path / "photos"
    for number in range(10):
        path = folder / ("a" if number < 5 else "b") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bad" if number == 2 else b"%d" % number)
    (folder / "readme.txt").write_text("no image")
    return folder


@pytest.fixture
def job(
    load_example: Callable[[str], ModuleType], server: FakeServer, tmp_path: Path
) -> Iterator[Callable[..., int]]:
    """job(source, *more arguments) -> exit status; it writes to tmp_path/answers."""
    script = load_example(_SCRIPT)
    before = signal.getsignal(signal.SIGTERM)

    def job(source: Path, *more: str) -> int:
        line = [str(source), str(tmp_path / "answers"), "--model=flowers", "--target", server.target, *more]
        status: int = script.main(line)
        return status

    yield job
    signal.signal(signal.SIGTERM, before)


def _rows(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]


def test_every_image_has_its_row_and_a_bad_one_its_error(
    job: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(photos, "--part-rows=4") == 1
    answers = tmp_path / "answers"
    assert sorted(path.name for path in answers.iterdir()) == [f"part-0000{n}.jsonl" for n in range(3)]
    rows = _rows(answers)
    assert [Path(row["image"]).stem for row in rows] == [str(n) for n in range(10)]
    for number, row in enumerate(rows):
        if number == 2:
            assert row["label"] is None
            assert row["error"]
        else:
            assert (row["label"], row["version"], row["error"]) == (str(number), 1, None)
    assert "10 images classified, 1 of them failed" in capsys.readouterr().err


def test_a_second_run_asks_for_what_is_new(
    job: Callable[..., int], server: FakeServer, photos: Path, tmp_path: Path
) -> None:
    job(photos)
    asked = len(server.images)
    assert job(photos) == 0
    assert len(server.images) == asked
    (photos / "a/new.jpg").write_bytes(b"new")
    assert job(photos) == 0
    assert server.images[asked:] == [b"new"]
    assert [row["label"] for row in _rows(tmp_path / "answers")][-1] == "new"


def test_a_list_of_paths_with_one_that_is_missing(
    job: Callable[..., int], photos: Path, tmp_path: Path
) -> None:
    paths = tmp_path / "paths.txt"
    paths.write_text(f"{photos}/b/7.jpg\n{photos}/b/none.jpg\n\n{photos}/a/0.jpg\n")
    assert job(paths) == 1
    rows = _rows(tmp_path / "answers")
    assert [row["label"] for row in rows] == ["7", None, "0"]
    assert "none.jpg" in rows[1]["error"]


def test_parquet(job: Callable[..., int], server: FakeServer, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    assert job(photos, "--format=parquet", "--part-rows=6") == 1
    table = parquet.read_table(tmp_path / "answers")
    assert table.column_names == ["image", "label", "score", "version", "error"]
    assert table["label"].to_pylist() == ["0", "1", None, *map(str, range(3, 10))]
    asked = len(server.images)
    assert job(photos, "--format=parquet") == 0
    assert len(server.images) == asked


def test_a_server_that_goes_loses_nothing_that_was_answered(
    job: Callable[..., int],
    server: FakeServer,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = tmp_path / "paths.txt"
    paths.write_text("".join(f"{photos}/b/{n}.jpg\n" for n in range(5, 8)))
    assert job(paths) == 0
    server.fail(grpc.StatusCode.INTERNAL, "ordered", times=None)
    assert job(photos) == 3
    assert "the same command continues" in capsys.readouterr().err
    server.heal()
    server.clear()
    assert job(photos) == 1
    assert not {b"5", b"6", b"7"} & set(server.images)
    rows = _rows(tmp_path / "answers")
    assert sorted(Path(row["image"]).stem for row in rows) == [str(n) for n in range(10)]


def test_sigterm_keeps_what_is_done(tmp_path: Path) -> None:
    photos, answers = tmp_path / "photos", tmp_path / "answers"
    photos.mkdir()
    for number in range(2000):
        (photos / f"{number:04}.jpg").write_bytes(b"%d" % number)
    reached, go = threading.Event(), threading.Event()

    def answer(image: bytes) -> str:
        if int(image) >= 500:
            reached.set()
            go.wait(60)
        return image.decode()

    with FakeServer("flowers", answer=answer) as server:
        line = [sys.executable, EXAMPLES / _SCRIPT, photos, answers, "--model=flowers", "--part-rows=100"]
        line += ["--target", server.target]
        with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert reached.wait(60)
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=60)
            finally:
                process.kill()
                go.set()
        assert process.returncode == 3, said
        kept = len(_rows(answers))
        assert f"ended by SIGTERM; {kept} images done" in said
        # It takes a bounded number of images ahead of the answers, not all of them.
        assert kept <= 500 <= len(server.images) < 2000
        assert subprocess.run(line, stderr=subprocess.PIPE, timeout=60).returncode == 0
    assert [row["label"] for row in _rows(answers)] == [str(n) for n in range(2000)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere", "out", "--model=m"], "nowhere"), ([".", "out", "--model=m", "--part-rows=0"], "1 or more")],
)
def test_wrong_usage(
    load_example: Callable[[str], ModuleType],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        load_example(_SCRIPT).main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not os.listdir()


@pytest.mark.slow
def test_with_a_real_model(trained: Any, exported: Any, tmp_path: Path) -> None:
    goldens = trained.goldens
    paths = tmp_path / "paths.txt"
    paths.write_text("".join(f"{golden.file}\n" for golden in goldens))
    with ServerProcess("digits", exported.path.parent) as server:
        line = [sys.executable, EXAMPLES / _SCRIPT, paths, tmp_path / "answers", "--model=digits"]
        line += ["--target", server.addresses()["gRPC"]]
        assert subprocess.run(line, timeout=120).returncode == 0
    expected = [trained.labels[np.argmax(golden.probabilities)] for golden in goldens]
    assert [row["label"] for row in _rows(tmp_path / "answers")] == expected
