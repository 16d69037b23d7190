"""`graftserve classify`: answers as they come, tables, and runs that are broken off and continued."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli import predictions

JPEG = b"\xff\xd8\xff"


def image(number: int) -> bytes:
    """An image of its own for each number below 1000; its label is c<number % 10>."""
    return JPEG + b"%03d" % number + b"." * (4 + number % 10)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """90 images, 000.jpg to 089.jpg; the working directory is beside."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(90):
        (tmp_path / "photos" / f"{number:03}.jpg").write_bytes(image(number))
    return tmp_path / "photos"


@pytest.fixture
def classify(graftserve: Any, server: Any) -> Callable[..., tuple[int, str, str]]:
    def classify(*args: Any) -> tuple[int, str, str]:
        return graftserve("classify", "--target", server.target, "--model", "flowers", *args)

    return classify


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def expected_row(number: int) -> dict[str, Any]:
    label = f"c{number % 10}"
    return {
        "image": f"photos/{number:03}.jpg",
        "label": label,
        "score": 0.75,
        "top": [{"label": label, "score": 0.75}],
        "version": 3,
        "error": None,
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_printed_in_order(classify: Any, folder: Path) -> None:
    status, out, err = classify("photos", "--top", "2")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"photos/{n:03}.jpg  c{n % 10} 0.7500  c{(n + 1) % 10} 0.2500" for n in range(90)
    ]


def test_json_lines_and_failures(classify: Any, folder: Path) -> None:
    (folder / "001.jpg").write_bytes(b"bad")
    status, out, err = classify("--json", "photos/000.jpg", "photos/001.jpg", "none.jpg")
    assert status == 1
    first, second, third = map(json.loads, out.splitlines())
    assert first == {key: value for key, value in expected_row(0).items() if key != "error"}
    assert second["image"] == "photos/001.jpg"
    assert "cannot be decoded" in second["error"]
    assert "none.jpg" in third["error"]
    assert "2 of 3 images could not be classified" in err


def test_paths_on_stdin(classify: Any, folder: Path, stdin: Callable[[bytes], None]) -> None:
    stdin(b"photos/003.jpg\nphotos/001.jpg\n")
    assert classify("-")[1].split() == ["photos/003.jpg", "c3", "0.7500", "photos/001.jpg", "c1", "0.7500"]
    os.rename(folder / "003.jpg", os.fsencode(folder) + b"/\xff\n.jpg")
    stdin(b"photos/\xff\n.jpg\0")
    assert classify("-0", "-", "--json")[1].startswith('{"image": "photos/\ufffd\\n.jpg", "label": "c3"')


def test_nothing_on_stdin_is_nothing_to_do(classify: Any, stdin: Callable[[bytes], None]) -> None:
    stdin(b"")
    assert classify("-") == (0, "", "")


def test_a_folder_without_images_is_a_mistake(classify: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    for more in ((), ("--output", tmp_path / "p.csv")):
        status, out, err = classify(tmp_path, *more)
        assert (status, out) == (1, "")
        assert "Error: no images: expected JPEG, PNG, GIF, BMP or WebP files" in err
    assert names(tmp_path) == {"notes.txt"}


def test_a_table_of_json_lines(classify: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("text")
    status, out, err = classify("photos", "-o", "p.jsonl", "--json")
    assert status == 0
    assert lines("p.jsonl") == [expected_row(n) for n in range(90)]
    summary = json.loads(out)
    assert summary.pop("images_per_s") > 0
    assert summary == {"output": "p.jsonl", "images": 90, "failed": 0, "errors": None, "versions": [3]}
    assert err == "passed over photos/notes.txt: no image\n"
    assert names(tmp_path) == {"photos", "p.jsonl"}


def test_failures_are_rows_and_listed_apart(classify: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "001.jpg").write_bytes(b"bad")
    status, out, err = classify("photos/*", "none.jpg", "--output", "p.jsonl", "--top", "2")
    assert status == 1
    rows = lines("p.jsonl")
    assert [row["image"] for row in rows] == [*(f"photos/{n:03}.jpg" for n in range(90)), "none.jpg"]
    assert rows[0]["top"] == [{"label": "c0", "score": 0.75}, {"label": "c1", "score": 0.25}]
    bad, missing = (row for row in rows if row["error"])
    assert {key for key, value in bad.items() if value is None} == {"label", "score", "top", "version"}
    assert lines("p.errors.jsonl") == [
        {"image": row["image"], "error_class": "InvalidImageError", "error": row["error"]}
        for row in (bad, missing)
    ]
    assert "2 of 91 images could not be classified (2 InvalidImageError): p.errors.jsonl" in err
    assert [line.split()[:2] for line in out.splitlines()][1:3] == [["images", "91"], ["failed", "2"]]
    assert names(tmp_path) == {"photos", "p.jsonl", "p.errors.jsonl"}
    # Done anew without failures, no list of them stays.
    (tmp_path / "none.jpg").write_bytes(image(7))
    (folder / "001.jpg").write_bytes(image(1))
    assert classify("photos/*", "none.jpg", "--output", "p.jsonl", "--overwrite")[0] == 0
    assert names(tmp_path) == {"photos", "p.jsonl", "none.jpg"}


def test_a_table_of_csv(classify: Any, folder: Path) -> None:
    (folder / "001.jpg").write_bytes(b"bad")
    (folder / "002.jpg").rename(folder / '00"2,\n.jpg')
    assert classify("photos/001.jpg", 'photos/00"2,\n.jpg', "-o", "p.csv")[0] == 1
    with open("p.csv", newline="") as file:
        bad, good = csv.DictReader(file)
    assert list(good) == ["image", "label", "score", "top", "version", "error"]
    assert good["image"] == 'photos/00"2,\n.jpg'
    assert (good["label"], good["score"], good["version"], good["error"]) == ("c2", "0.75", "3", "")
    assert json.loads(good["top"]) == [{"label": "c2", "score": 0.75}]
    assert (bad["label"], bad["score"], bad["top"], bad["version"]) == ("", "", "", "")
    assert "cannot be decoded" in bad["error"]


def test_a_table_of_parquet(classify: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    monkeypatch.setattr(predictions, "_ROW_GROUP", 40)
    (folder / "001.jpg").write_bytes(b"bad")
    assert classify("photos/*.jpg", "-o", "p.parquet")[0] == 1
    file = parquet.ParquetFile("p.parquet")
    rows = file.read().to_pylist()
    assert rows[0] == expected_row(0)
    assert rows[2:] == [expected_row(n) for n in range(2, 90)]
    assert (rows[1]["label"], rows[1]["top"], rows[1]["version"]) == (None, None, None)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [40, 40, 10]
    assert str(file.schema_arrow.field("top").type) == "list<element: struct<label: string, score: float>>"


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["-o", "p.txt"], 2, "--output: expected a name ending in .jsonl, .csv, .parquet, got p.txt"),
        (["--resume"], 2, "--resume and --overwrite are for runs with --output"),
        (["-o", "p.csv", "--resume", "--overwrite"], 2, "exclude each other"),
        (["-o", "none/p.csv"], 1, "--output: there is no folder none"),
        (["-o", "dir.csv"], 1, "--output: dir.csv is a folder"),
        (["no/such*.jpg"], 1, "no/such*.jpg: no file matches"),
    ],
)
def test_wrong_usage(
    classify: Any, server: Any, folder: Path, args: list[str], status: int, message: str
) -> None:
    Path("dir.csv").mkdir()
    got, out, err = classify("photos", *args)
    assert (got, out) == (status, "")
    assert message in err
    assert server.batches == []


def test_parquet_without_its_extra(classify: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftserve.cli.output.find_spec", lambda name: None if name == "pyarrow" else name)
    status, _, err = classify("photos", "-o", "p.parquet")
    assert (status, err) == (1, "Error: pyarrow is not installed: pip install 'graftserve[parquet]'\n")


def test_large_images_are_shrunk_before_they_are_sent(
    classify: Any, server: Any, encode: Any, photos: dict[str, Any], tmp_path: Path
) -> None:
    import io

    from PIL import Image

    (tmp_path / "coffee.jpg").write_bytes(encode(photos["coffee"]))
    (tmp_path / "rocket.tiff").write_bytes(encode(photos["rocket"], "TIFF"))
    assert classify(tmp_path, "--max-side-px", "128")[0] == 0
    sent = [content for batch in server.batches for content in batch]
    sizes = []
    for content in sent:
        with Image.open(io.BytesIO(content)) as opened:
            sizes.append((opened.format, max(opened.size)))
    assert sizes == [("JPEG", 128), ("JPEG", 128)]


def test_options_of_the_client_arrive(classify: Any, server: Any, folder: Path) -> None:
    assert classify("photos", "--max-batch-images", "3", "--max-in-flight", "1")[0] == 0
    assert max(map(len, server.batches)) <= 3
    assert server.most_active == 1


def test_an_output_that_is_there_is_refused_or_replaced(classify: Any, server: Any, folder: Path) -> None:
    Path("p.csv").write_text("mine")
    status, _, err = classify("photos", "-o", "p.csv")
    assert (status, err) == (1, "Error: p.csv: exists; --overwrite replaces it\n")
    assert Path("p.csv").read_text() == "mine"
    assert server.batches == []
    assert classify("photos", "-o", "p.csv", "--overwrite")[0] == 0
    assert Path("p.csv").read_text().startswith("image,label,")


def test_resuming_what_is_complete_does_nothing(classify: Any, server: Any, folder: Path) -> None:
    (folder / "001.jpg").write_bytes(b"bad")
    assert classify("photos/*.jpg", "-o", "p.csv", "--resume")[0] == 1  # nothing to resume: it begins
    asked = len(server.batches)
    status, _, err = classify("photos/*.jpg", "-o", "p.csv", "--resume")
    assert (status, err) == (1, "p.csv is complete: nothing to resume\n")  # and failed as it did
    assert len(server.batches) == asked


def test_a_server_that_is_not_there_leaves_nothing(graftserve: Any, folder: Path, tmp_path: Path) -> None:
    args = ("classify", "--model", "flowers", "--target", "localhost:1", "--timeout-s", "0.5", "photos")
    status, _, err = graftserve(*args, "-o", "p.csv")
    assert status == 1
    assert err.startswith("Error: ")
    assert "localhost:1" in err
    assert err.endswith("; nothing was done\n")
    assert names(tmp_path) == {"photos"}


class BrokenOff:
    """A run over 90 images in a process of its own that stands still: the server answers no more after 50.

    One image a request and one request at a time, so that what is done is a prefix.
    """

    def __init__(self, server: Any, *args: str, output: str = "p.jsonl", answers: int = 50) -> None:
        self.server, self.part = server, Path(f"{output}.part")
        self.answers = 0
        self.stuck = threading.Event()

        def count(_: Any) -> None:
            self.answers += 1
            if self.answers == answers:
                server.hold = threading.Event()

        server.rewrite = count
        self.args = ["--target", server.target, "--model", "flowers", "--output", output]
        self.args += ["--max-batch-images", "1", "--max-in-flight", "1", *args]
        code = "import sys; from graftserve.cli import main; main(sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "classify", *self.args, "photos"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for_rows(self, rows: int) -> None:
        deadline = time.monotonic() + 60
        while not self.part.exists() or self.part.read_bytes().count(b"\n") < rows + 1:
            assert time.monotonic() < deadline, "too few answers"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def ended(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err

    def release(self) -> None:
        self.server.rewrite = lambda response: None
        held, self.server.hold = self.server.hold, None
        if held is not None:
            held.set()

    def done(self) -> int:
        """How many answers are kept whole."""
        return self.part.read_bytes().count(b"\n") - 1


def check_resumed(graftserve: Any, run: BrokenOff, server: Any, done: int) -> None:
    """Resuming, on a server that was not asked yet, asks for no image a second time, and gives what a run in
    one go gives.
    """
    run.args[1] = server.target
    status, out, err = graftserve("classify", *run.args, "photos", "--resume", "--json")
    assert status == 0, err
    assert f"resuming after {done} images" in err
    sent = [content for batch in server.batches for content in batch]
    assert sent == [image(n) for n in range(done, 90)]
    assert lines("p.jsonl") == [expected_row(n) for n in range(90)]
    assert json.loads(out)["images"] == 90
    assert not run.part.exists()


@pytest.fixture
def broken_off(server: Any, folder: Path) -> Any:
    runs = []

    def start(*args: str, **options: Any) -> BrokenOff:
        runs.append(BrokenOff(server, *args, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.release()
        run.process.kill()
        run.process.communicate()


def test_ctrl_c_keeps_what_is_done(graftserve: Any, start_server: Any, broken_off: Any) -> None:
    run = broken_off()
    run.wait_for_rows(32)
    run.process.send_signal(signal.SIGINT)
    status, err = run.ended()
    done = run.done()
    assert status == 130
    assert 32 <= done <= 50
    assert err == (
        f"interrupted; {done} images done and kept in p.jsonl.part: "
        "the same command with --resume continues\n"
    )
    assert not Path("p.jsonl").exists()
    check_resumed(graftserve, run, start_server(), done)


def test_kill_9_keeps_what_is_done(graftserve: Any, start_server: Any, broken_off: Any) -> None:
    run = broken_off()
    run.wait_for_rows(32)
    run.process.kill()
    assert run.ended() == (-signal.SIGKILL, "")
    with open(run.part, "ab") as file:
        file.write(b'{"image": "photos/0')  # as a power cut may leave it
    check_resumed(graftserve, run, start_server(), run.done())


def test_a_server_that_goes_away_keeps_what_is_done(
    graftserve: Any, server: Any, start_server: Any, broken_off: Any
) -> None:
    run = broken_off("--timeout-s", "2")
    run.wait_for_rows(32)
    server.stop()
    status, err = run.ended()
    done = run.done()
    assert status == 1
    assert err.startswith("Error: ")
    assert f"; {done} images done and kept in p.jsonl.part: the same command with --resume" in err
    assert len(err.splitlines()) == 1
    check_resumed(graftserve, run, start_server(), done)


def test_a_run_that_replaces_is_resumed_without_overwriting(
    graftserve: Any, start_server: Any, folder: Path, broken_off: Any
) -> None:
    Path("p.jsonl").write_text("mine")
    run = broken_off("--overwrite")
    run.wait_for_rows(32)
    run.process.send_signal(signal.SIGINT)
    assert "the same command with --resume in place of --overwrite continues" in run.ended()[1]
    assert Path("p.jsonl").read_text() == "mine"
    done = run.done()
    run.args.remove("--overwrite")
    check_resumed(graftserve, run, start_server(), done)


def test_no_two_runs_write_the_same(classify: Any, broken_off: Any) -> None:
    run = broken_off()
    run.wait_for_rows(32)
    for flag in ("--resume", "--overwrite"):
        status, _, err = classify("photos", "-o", "p.jsonl", flag)
        assert (status, err) == (1, "Error: p.jsonl.part: another graftserve classify is writing it\n")
    assert run.done() >= 32


def test_a_full_disk_keeps_what_is_done(graftserve: Any, server: Any, folder: Path) -> None:
    args = ["--target", server.target, "--model", "flowers", "-o", "p.jsonl"]
    # No file of that process grows beyond 4 kB: a write fails half-way, as on a full disk.
    code = (
        "import resource, sys; from graftserve.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); main(sys.argv[1:])"
    )
    full = subprocess.run(
        [sys.executable, "-c", code, "classify", *args, "photos"], capture_output=True, text=True
    )
    content = Path("p.jsonl.part").read_bytes()
    done = content.count(b"\n") - 1
    assert full.returncode == 1
    assert full.stderr == (
        f"Error: p.jsonl.part: File too large; {done} images done and kept in p.jsonl.part: "
        "the same command with --resume continues\n"
    )
    assert len(content) == 4000
    assert not content.endswith(b"\n")  # torn
    asked = len(server.batches)
    status, _, err = graftserve("classify", *args, "photos", "--resume")
    assert (status, err) == (0, f"resuming after {done} images\n")
    assert sum(map(len, server.batches[asked:])) == 90 - done
    assert lines("p.jsonl") == [expected_row(n) for n in range(90)]


@pytest.fixture
def part(classify: Any, server: Any, folder: Path) -> Path:
    """What a run over the first 40 images has left, one of them failed."""
    (folder / "001.jpg").write_bytes(b"bad")
    settings = {"model": "flowers", "version": None, "top": 1, "max-side-px": None}
    kept = [json.dumps({"graftserve_classify": 1, **settings})]
    for number in range(40):
        row = expected_row(number) | {"version": 2}
        if number == 1:
            row |= dict.fromkeys(("label", "score", "top", "version"))
            row |= {"error": "it cannot be decoded", "error_class": "InvalidImageError"}
        kept.append(json.dumps(row))
    Path("p.jsonl.part").write_text("\n".join(kept) + "\n")
    return Path("p.jsonl.part")


def test_failures_and_versions_of_both_runs_are_told(classify: Any, server: Any, part: Path) -> None:
    status, out, err = classify("photos/*", "-o", "p.jsonl", "--resume", "--json")
    assert status == 1
    assert sum(map(len, server.batches)) == 50
    assert json.loads(out)["versions"] == [2, 3]
    assert "answered by versions 2, 3" in err
    assert "1 of 90 images could not be classified (1 InvalidImageError)" in err
    assert [row["image"] for row in lines("p.errors.jsonl")] == ["photos/001.jpg"]
    assert [row["image"] for row in lines("p.jsonl")] == [f"photos/{n:03}.jpg" for n in range(90)]


def test_without_resume_a_part_is_refused(classify: Any, server: Any, part: Path) -> None:
    content = part.read_bytes()
    status, _, err = classify("photos", "-o", "p.jsonl")
    assert status == 1
    assert "p.jsonl.part: a run was broken off: --resume continues it, --overwrite begins anew" in err
    assert part.read_bytes() == content
    assert classify("photos/*", "-o", "p.jsonl", "--overwrite")[0] == 1
    assert sum(map(len, server.batches)) == 90
    assert {row["version"] for row in lines("p.jsonl")} == {3, None}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--top", "2"], "begun with --top 1, now --top 2"),
        (["--version", "3"], "begun with no --version, now --version 3"),
        (["--max-side-px", "64"], "begun with no --max-side-px, now --max-side-px 64"),
    ],
)
def test_other_settings_do_not_mix(
    classify: Any, server: Any, part: Path, args: list[str], message: str
) -> None:
    content = part.read_bytes()
    status, _, err = classify("photos/*", "-o", "p.jsonl", "--resume", *args)
    assert status == 1
    assert message in err
    assert part.read_bytes() == content
    assert server.batches == []


def test_other_images_do_not_mix(classify: Any, server: Any, folder: Path, part: Path) -> None:
    content = part.read_bytes()
    (folder / "005.jpg").unlink()
    status, _, err = classify("photos/*", "-o", "p.jsonl", "--resume")
    assert status == 1
    assert "expected photos/005.jpg as image 6, which is done, got photos/006.jpg in its place" in err
    assert part.read_bytes() == content
    assert server.batches == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"something else\n", "expected what graftserve classify keeps there"),
        (b'{"graftserve_classify": 99}\n', "expected what graftserve classify keeps there"),
        (None, "line 3 is damaged"),
    ],
)
def test_a_damaged_part_is_noticed(
    classify: Any, server: Any, part: Path, content: bytes | None, message: str
) -> None:
    if content is None:
        kept = part.read_bytes().split(b"\n")
        content = b"\n".join([*kept[:2], b"\0\0\0", *kept[3:]])
    part.write_bytes(content)
    status, _, err = classify("photos/*", "-o", "p.jsonl", "--resume")
    assert status == 1
    assert message in err
    assert part.read_bytes() == content
    assert server.batches == []


@pytest.mark.parametrize("tear", [0, 1, 5, 70_000])
def test_only_whole_lines_are_kept(classify: Any, server: Any, part: Path, tear: int) -> None:
    with open(part, "ab") as file:
        file.write(b"x" * tear)
    assert classify("photos/*", "-o", "p.jsonl", "--resume")[0] == 1
    assert sum(map(len, server.batches)) == 50
    assert len(lines("p.jsonl")) == 90


def test_a_part_without_a_whole_line_begins_anew(classify: Any, server: Any, part: Path) -> None:
    part.write_bytes(b'{"graftserve_cl')
    assert classify("photos/*", "-o", "p.jsonl", "--resume")[0] == 1
    assert sum(map(len, server.batches)) == 90


def test_progress_in_a_terminal(server: Any, folder: Path) -> None:
    master, slave = os.openpty()
    code = "import sys; from graftserve.cli import output, main; output._REDRAW_S = 0; main(sys.argv[1:])"
    args = ["classify", "--target", server.target, "--model", "flowers", "-o", "p.csv"]
    files = [f"photos/{n:03}.jpg" for n in range(5)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *args, *files], stderr=slave, stdout=subprocess.PIPE
    ) as process:
        os.close(slave)
        said = b""
        while True:
            try:
                said += os.read(master, 4096)
            except OSError:  # the terminal's other end is closed
                break
    os.close(master)
    assert process.returncode == 0
    assert b"\r\x1b[Kclassifying: 1/5, " in said
    assert b" to go" in said
    assert said.endswith(b"/s\r\n")


def test_classifying_imports_no_tensorflow_and_no_more_than_it_needs() -> None:
    code = (
        "import sys, graftserve.cli.classify\n"
        "sys.exit(str(sorted({'tensorflow', 'pyarrow', 'PIL', 'matplotlib'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"
