"""Versions in a folder: their numbers, how they appear and go, and the sums of their files."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graftserve.export.errors import ManifestError, StoreError, VersionError
from graftserve.export.manifest import MANIFEST, check_manifest, read_manifest, write_manifest
from graftserve.export.versions import (
    candidate,
    labelled_versions,
    locked,
    newest_version,
    next_version,
    parse_version,
    prune,
    publish,
    published_versions,
)

LARGEST = 2**63 - 1


@pytest.fixture
def version(tmp_path: Path, photos, encode) -> Path:
    """A folder of three photographs and an empty file, with its manifest."""
    folder = tmp_path / "version"
    for name, pixels in photos.items():
        path = folder / "assets.extra/goldens" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))
    (folder / "saved_model.pb").write_bytes(b"")
    write_manifest(folder)
    return folder


def make_versions(base: Path, *numbers: int) -> None:
    for number in numbers:
        (base / str(number)).mkdir(parents=True)
        (base / str(number) / "saved_model.pb").write_text(str(number))


def hidden(base: Path) -> list[str]:
    return [path.name for path in base.iterdir() if path.name.startswith(".")]


# Numbers


def test_only_plain_numbers_above_zero_are_versions(tmp_path: Path) -> None:
    for name in ("1", "20", str(LARGEST), "0", "007", "+3", "4.tmp", "-5", "٣", str(LARGEST + 1), ".6"):
        (tmp_path / name).mkdir()
    (tmp_path / "8").write_text("a file")
    assert published_versions(tmp_path) == [1, 20, LARGEST]
    assert published_versions(tmp_path / "nowhere") == []


def test_version_specs() -> None:
    assert parse_version("next") is None
    assert parse_version("12") == 12
    assert parse_version(str(LARGEST)) == LARGEST
    assert abs(parse_version("timestamp") - time.time()) < 60


@pytest.mark.parametrize("text", ["0", "-1", "007", "1.5", "latest", "", " 3", "3\n", str(LARGEST + 1), "٣"])
def test_other_specs_are_refused(text: str) -> None:
    with pytest.raises(VersionError, match="expected next, timestamp or a number from 1 to"):
        parse_version(text)


def test_the_next_version_is_after_the_highest() -> None:
    assert [next_version(taken) for taken in ([], [1, 2], [9, 4])] == [1, 3, 10]
    with pytest.raises(VersionError, match="none can come after it"):
        next_version([3, LARGEST])


def test_the_newest_version_of_a_model_and_a_version_itself(tmp_path: Path) -> None:
    make_versions(tmp_path / "flowers", 2, 10)
    assert newest_version(tmp_path / "flowers") == tmp_path / "flowers/10"
    assert newest_version(tmp_path / "flowers/2") == tmp_path / "flowers/2"
    with pytest.raises(VersionError, match="expected a version"):
        newest_version(tmp_path)


# Publishing


def fail_half_way(base: Path) -> None:
    with candidate(base) as folder:
        (folder / "variables").mkdir()
        (folder / "variables/x").write_text("half")
        assert published_versions(base) == []
        assert len(hidden(base)) == 2
        raise RuntimeError("full")


def test_a_candidate_is_no_version_and_goes_whatever_happens(tmp_path: Path) -> None:
    base = tmp_path / "models/flowers"
    with pytest.raises(RuntimeError, match="full"):
        fail_half_way(base)
    assert list(base.iterdir()) == []


def test_a_published_candidate_stays(tmp_path: Path, version: Path) -> None:
    base = tmp_path / "flowers"
    for expected in (1, 2):
        with candidate(base) as folder:
            (folder / "1").mkdir()
            (folder / "1/saved_model.pb").write_text("graph")
            assert publish(folder / "1", base, None) == base / str(expected)
    assert sorted(path.name for path in base.iterdir()) == ["1", "2"]
    assert publish(version, base, 40) == base / "40"
    assert check_manifest(base / "40") == 4


def test_an_explicit_number_is_never_taken_over(tmp_path: Path, version: Path) -> None:
    base = tmp_path / "flowers"
    make_versions(base, 3)
    with pytest.raises(VersionError, match="3: exists; versions are never overwritten"):
        publish(version, base, 3)
    assert (base / "3/saved_model.pb").read_text() == "3"
    (base / "4").write_text("a file")
    with pytest.raises(VersionError, match="4: exists"):
        publish(version, base, 4)
    assert publish(version, base, None) == base / "5"


PUBLISH = """
import sys
from pathlib import Path
from graftserve.export.versions import candidate, publish
base = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
for turn in range(4):
    with candidate(base) as work:
        (work / "1").mkdir()
        (work / "1/saved_model.pb").write_text(f"{sys.argv[2]}-{turn}")
        print(publish(work / "1", base, None).name)
assert "tensorflow" not in sys.modules
"""


def test_publishers_at_the_same_time_each_get_their_own_number(tmp_path: Path) -> None:
    base = tmp_path / "flowers"
    publishers = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(base), str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(8)
    ]
    for publisher in publishers:
        assert publisher.stdout.readline() == "ready\n"
    for publisher in publishers:
        publisher.stdin.close()
    published = {}
    for index, publisher in enumerate(publishers):
        for turn, line in enumerate(publisher.stdout.read().splitlines()):
            published[line] = f"{index}-{turn}"
        publisher.stdout.close()
        assert publisher.wait() == 0
    assert published_versions(base) == list(range(1, 33))
    assert {path.name: (path / "saved_model.pb").read_text() for path in base.iterdir()} == published


def test_threads_get_their_own_numbers_too(tmp_path: Path) -> None:
    def export(index: int) -> str:
        with candidate(tmp_path) as work:
            (work / "1").mkdir()
            (work / "1/saved_model.pb").write_text(str(index))
            return publish(work / "1", tmp_path, None).name

    with ThreadPoolExecutor(8) as pool:
        assert sorted(map(int, pool.map(export, range(24)))) == list(range(1, 25))
    assert hidden(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from graftserve.export.versions import candidate
with candidate(Path(sys.argv[1])) as work:
    (work / "half").write_bytes(bytes(1000))
    print(work.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def exporter_at_work(tmp_path: Path):
    """A process in the middle of writing a candidate below tmp_path / "flowers"; and its folder's name."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "flowers")], stdout=subprocess.PIPE, text=True
    )
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_a_killed_exporter_left_goes_with_the_next(tmp_path: Path, exporter_at_work) -> None:
    process, name = exporter_at_work
    base = tmp_path / "flowers"
    with candidate(base):
        assert (base / name / "half").exists(), "its owner is alive"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(hidden(base)) == [name, f"{name}.lock"]
    (base / ".removing-3-0123").mkdir()
    with candidate(base) as own:
        assert sorted(hidden(base)) == [own.name, f"{own.name}.lock"]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match="cannot be written: Not a directory"),
        candidate(tmp_path / "file/x"),
    ):
        pass


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(index: int) -> None:
        with locked(tmp_path / "lock"):
            inside.append(index)
            most.append(len(inside))
            inside.remove(index)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    assert (len(most), max(most)) == (200, 1)
    assert not (tmp_path / "lock").exists()


# Pruning


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    make_versions(tmp_path, 1, 2, 3, 4, 10)
    assert prune(tmp_path, 2, {2, 99}) == [1, 3]
    assert published_versions(tmp_path) == [2, 4, 10]
    assert hidden(tmp_path) == []
    assert prune(tmp_path, 3, ()) == []
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        prune(tmp_path, 0, ())


def test_a_version_goes_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_versions(tmp_path, 1, 2)
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((path.name, os.listdir(path))))
    assert prune(tmp_path, 1, ()) == [1]
    assert published_versions(tmp_path) == [2]
    ((name, files),) = seen
    assert name.startswith(".removing-1-")
    assert files == ["saved_model.pb"]


def test_pruners_at_the_same_time_remove_each_version_once(tmp_path: Path) -> None:
    make_versions(tmp_path, *range(1, 41))
    with ThreadPoolExecutor(8) as pool:
        removed = [number for part in pool.map(lambda _: prune(tmp_path, 5, ()), range(8)) for number in part]
    assert sorted(removed) == list(range(1, 36))
    assert published_versions(tmp_path) == list(range(36, 41))


CONFIG = """
# Two models.
model_config_list {
  config {
    name: 'flowers'
    base_path: "/models/flowers"
    model_platform: "tensorflow"
    model_type: TENSORFLOW
    logging_config { sampling_config { sampling_rate: 0.5 } }
    model_version_policy { specific { versions: 4 versions: 7 } }
    version_labels { key: "stable" value: 4 }
    version_labels { key: "canary" value: 9 }
  }
  config: < name: "birds", base_path: "/models/birds", model_version_policy { latest { num_versions: 2 } } >
}
"""


def test_labelled_and_pinned_versions_of_a_server_configuration(tmp_path: Path) -> None:
    file = tmp_path / "models.config"
    file.write_text(CONFIG)
    assert labelled_versions(file, "flowers") == {4, 7, 9}
    assert labelled_versions(file, "birds") == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONFIG, "expected the model bees, got flowers, birds; without its labels"),
        ("", "expected the model bees, got none"),
        ("model_config_list { config {", "no ModelServerConfig in text format: .*Expected"),
        ("\xff", "no ModelServerConfig in text format"),
        (None, "no ModelServerConfig in text format: No such file"),
    ],
)
def test_no_version_is_called_free_on_a_guess(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "models.config"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(VersionError, match=message):
        labelled_versions(file, "bees")


# Manifests


def test_a_manifest_has_the_sum_of_every_file(version: Path) -> None:
    sums = read_manifest((version / MANIFEST).read_bytes(), "here")
    assert sums == {
        path.relative_to(version).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in version.rglob("*")
        if path.is_file() and path.name != "manifest.sha256"
    }
    assert list(sums) == sorted(sums)
    assert check_manifest(version) == len(sums) == 4
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", MANIFEST], cwd=version, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout.count(": OK")) == (0, 4)


def truncate(folder: Path) -> None:
    file = folder / "assets.extra/goldens/coffee.jpg"
    file.write_bytes(file.read_bytes()[:-1])


def move(folder: Path) -> None:
    (folder / "saved_model.pb").rename(folder / "saved_model.pbtxt")


def link(folder: Path) -> None:
    (folder / "more").symlink_to("assets.extra", target_is_directory=True)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "changed: assets.extra/goldens/coffee.jpg; publish or pull"),
        (move, "missing: saved_model.pb; not listed: saved_model.pbtxt"),
        (link, "not listed: more"),
        (lambda folder: (folder / MANIFEST).unlink(), "No such file.*not a version that graftserve export"),
        (lambda folder: (folder / MANIFEST).write_text(""), "line 1: expected a SHA-256 sum and a path"),
        (lambda folder: [(folder / f"x{n}").touch() for n in range(7)], "x0, x1, x2, x3, x4 and 2 more"),
    ],
)
def test_every_difference_is_named(version: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(version)
    with pytest.raises(ManifestError, match=message):
        check_manifest(version)


SUM = "0" * 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{SUM}  ../escaped", "expected a path inside the version, got '../escaped'"),
        (f"{SUM}  a/../../escaped", "expected a path inside"),
        (f"{SUM}  /etc/passwd", "expected a path inside"),
        (f"{SUM}  .", "expected a path inside"),
        (f"{SUM}  a//b", "expected a path inside"),
        (f"{SUM}  ./a", "expected a path inside"),
        (f"{SUM}  {MANIFEST}", "expected a path inside"),
        (f"{SUM}  a\0b", "expected a SHA-256 sum and a path"),
        (f"{SUM} *a", "expected a SHA-256 sum and a path"),
        (f"{SUM[1:]}  a", "expected a SHA-256 sum and a path"),
        ("", "expected a SHA-256 sum and a path"),
        (f"{SUM}  fine", "fine comes twice"),
    ],
)
def test_a_hostile_manifest_is_refused(line: str, message: str) -> None:
    with pytest.raises(ManifestError, match=f"here, line 2: {message}"):
        read_manifest(f"{SUM}  fine\n{line}\n".encode(), "here")


def test_a_file_name_of_two_lines_is_refused(version: Path) -> None:
    (version / "a\nb").touch()
    with pytest.raises(ManifestError, match=r"expected file names of one line, got 'a\\nb'"):
        write_manifest(version)
