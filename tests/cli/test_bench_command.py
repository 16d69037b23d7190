"""`graftserve bench` against a real server."""

import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from graftserve.cli.bench import synthetic_images

QUICK = ("--duration-s", "0.2", "--warm-up-s", "0.05")


@pytest.fixture
def bench(graftserve: Any, server: Any) -> Callable[..., tuple[int, str, str]]:
    def bench(*args: Any) -> tuple[int, str, str]:
        return graftserve("bench", "--target", server.target, "--model", "flowers", *QUICK, *args)

    return bench


def test_synthetic_images_are_photographs_of_some_variety() -> None:
    images = synthetic_images(4)
    assert images == synthetic_images(4)
    assert images != synthetic_images(4, seed=1)
    for content in images:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
    sizes = list(map(len, images))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 4 * sizes[0]


def test_the_table_and_everything_as_json(bench: Any, server: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    status, out, err = bench("--concurrency", "1,3", "--rate", "100", "--output", path, "--seed", "7")
    assert status == 0, err
    header, *rows = (re.split(r"  +", line.strip()) for line in out.splitlines())
    assert header[:7] == ["load", "images/s", "p50", "p90", "p99", "p99.9", "max"]
    assert header[7:] == ["batch", "errors", "late", "not sent"]
    assert [row[0] for row in rows] == ["1 caller", "3 callers", "100/s"]
    assert all(row[8] == "0" for row in rows)
    assert [row[9:] for row in rows[:2]] == [["-", "-"], ["-", "-"]]

    result = json.loads(path.read_text())
    assert (result["target"], result["model"], result["version"]) == (server.target, "flowers", 3)
    assert {"graftserve", "python", "grpcio", "protobuf", "platform", "began"} <= set(result)
    assert result["images"]["count"] == 16
    assert not result["images"]["given"]
    assert result["settings"]["concurrency"] == [1, 3]
    assert (result["settings"]["rate"], result["settings"]["seed"]) == ([100.0], 7)
    assert not result["interrupted"]
    for level, row in zip(result["levels"], rows, strict=True):
        assert level["answers"] > 0
        assert sum(count for _, count in level["histogram"]["bins"]) == level["answers"]
        assert level["latency_ms"]["p50"] <= level["latency_ms"]["p99.9"] <= level["latency_ms"]["max"]
        assert row[1] == f"{level['images_per_s']:.1f}"
        assert float(row[2]) == pytest.approx(level["latency_ms"]["p50"], abs=0.06)
    for level, row in zip(result["levels"], rows, strict=True):
        batch = (level["client_stats"] or {}).get("batch_images")
        assert row[7] == ("-" if batch is None else f"{batch:.1f}")
    # Every request was for one of the images, and all of them were asked for.
    asked = {content for batch in server.batches for content in batch}
    assert asked == set(synthetic_images(16))


def test_as_json(bench: Any) -> None:
    status, out, _ = bench("--concurrency", "2", "--json")
    assert status == 0
    (level,) = json.loads(out)["levels"]
    assert (level["loop"], level["callers"], level["rate_per_s"]) == ("closed", 2, None)


def test_rates_from_the_best_closed_loop(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert bench("--rate", "auto", "--concurrency", "1,2", "--output", path)[0] == 0
    *closed, quarter, half, most, near = json.loads(path.read_text())["levels"]
    best = max(level["images_per_s"] for level in closed)
    rates = [level["rate_per_s"] for level in (quarter, half, most, near)]
    assert rates == pytest.approx([0.25 * best, 0.5 * best, 0.75 * best, 0.9 * best], rel=0.01)


def test_images_of_ones_own(bench: Any, server: Any, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"\xff\xd8\xff%d" % number)
    status, out, _ = bench(tmp_path, "--concurrency", "2", "--json")
    assert status == 0
    assert json.loads(out)["images"] == {"given": True, "count": 3, "mean_bytes": 4.0}
    assert {content for batch in server.batches for content in batch} == {
        b"\xff\xd8\xff%d" % number for number in range(3)
    }


def test_raw_sends_a_request_for_each_image(bench: Any, server: Any) -> None:
    status, out, _ = bench("--raw", "--concurrency", "4", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["settings"]["raw"]
    assert result["levels"][0]["answers"] > 0
    assert not result["levels"][0]["errors"]
    assert {len(batch) for batch in server.batches} == {1}
    # A closed loop of four callers with a request each.
    assert server.most_active <= 4


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_errors_are_counted_by_class(bench: Any, tmp_path: Path, raw: tuple[str, ...]) -> None:
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xffgood")
    (tmp_path / "2.jpg").write_bytes(b"bad")
    status, out, err = bench(tmp_path / "1.jpg", tmp_path / "2.jpg", "--concurrency", "1", "--json", *raw)
    assert status == 0
    (level,) = json.loads(out)["levels"]
    count = level["errors"]["InvalidImageError"]
    assert abs(count - level["answers"]) <= 1
    assert sum(count for _, count in level["histogram"]["bins"]) == level["answers"]
    assert f"1 caller: {count} InvalidImageError" in err


def test_a_server_that_is_too_slow_is_told_by_an_open_loop(bench: Any, server: Any, tmp_path: Path) -> None:
    """It answers the first request and then no more; two callers may ask at a time."""
    server.hold = threading.Event()
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xff")
    release = threading.Thread(target=_answer_one, args=(server,))
    release.start()
    status, out, _ = bench(
        tmp_path / "1.jpg", "--rate", "400", "--max-callers", "2", "--raw", "--timeout-s", "1"
    )
    release.join()
    assert status == 1  # no request was answered
    row = re.split(r"  +", out.splitlines()[1].strip())
    errors, _, not_sent = map(int, row[-3:])
    assert row[2].startswith("≥")
    assert errors + not_sent > 40  # about 80 were due
    assert not_sent > 30


def _answer_one(server: Any) -> None:
    assert server.entered.acquire(timeout=30)
    held, server.hold = server.hold, threading.Event()
    held.set()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_the_plot(bench: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latency{suffix}"
    assert bench("--concurrency", "1,2", "--plot", path)[0] == 0
    content = path.read_bytes()
    if suffix == ".png":
        with Image.open(path) as image:
            assert image.size == (1200, 750)
        return
    assert b"<svg" in content
    assert content.startswith(b"<!doctype html>" if suffix == ".html" else b"<?xml")
    assert content.count(b'id="line2d') > 2


def test_a_wrong_model_or_target_is_told_at_once(graftserve: Any, server: Any) -> None:
    status, out, err = graftserve("bench", "--target", server.target, "--model", "roses")
    assert (status, out) == (1, "")
    assert err.startswith(f"Error: NOT_FOUND from {server.target}, model 'roses'")
    assert len(err.splitlines()) == 1
    status, out, err = graftserve("bench", "--target", "localhost:1", "--model", "x", "--timeout-s", "0.5")
    assert (status, out) == (1, "")
    assert "localhost:1" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--concurrency", "1,0"], 2, "expected whole numbers above 0, separated by commas, got '1,0'"),
        (["--concurrency", "1.5"], 2, "expected whole numbers above 0"),
        (["--rate", "fast"], 2, "expected numbers above 0, separated by commas or auto, got 'fast'"),
        (["--rate", "inf"], 2, "expected numbers above 0"),
        (["--plot", "x.pdf"], 2, "--plot: expected a name ending in .png, .svg, .html, got x.pdf"),
        (["--output", "no/such/x.json"], 1, "--output: there is no folder no/such"),
        (["no/such*.jpg"], 1, "no/such*.jpg: no file matches"),
        (["no/such.jpg"], 1, "no/such.jpg: No such file or directory"),
    ],
)
def test_wrong_usage(bench: Any, server: Any, args: list[str], status: int, message: str) -> None:
    got, out, err = bench(*args)
    assert (got, out) == (status, "")
    assert message in err
    assert server.batches == []


def test_a_plot_without_its_extra(bench: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftserve.cli.output.find_spec", lambda name: None)
    status, _, err = bench("--plot", "x.png")
    assert (status, err) == (1, "Error: matplotlib is not installed: pip install 'graftserve[plot]'\n")


@pytest.mark.parametrize("load", [("--concurrency", "4,8"), ("--rate", "300,400")])
def test_ctrl_c_ends_it_with_what_was_measured(server: Any, tmp_path: Path, load: tuple[str, ...]) -> None:
    path = tmp_path / "results.json"
    args = ["--target", server.target, "--model", "flowers", "--output", str(path), *load]
    code = "import sys; from graftserve.cli import main; main(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", code, "bench", *args, "--warm-up-s", "0", "--duration-s", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(200):
            assert server.entered.acquire(timeout=60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; this is what was measured so far\n"
    result = json.loads(path.read_text())
    assert result["interrupted"]
    (level,) = result["levels"]
    assert level["interrupted"]
    assert level["answers"] >= 100
    assert level["errors"] == {}  # what was cancelled is none
    assert level["duration_s"] < 100
    assert len(out.splitlines()) == 2
