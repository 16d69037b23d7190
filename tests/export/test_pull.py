"""A version from a store to a folder: whole, resumed, refused."""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from graftserve.export import published
from graftserve.export.errors import ManifestError, StoreError, VersionError
from graftserve.export.manifest import MANIFEST, check_manifest, write_manifest
from graftserve.export.pull import Pulled, pull
from graftserve.export.store import open_store
from graftserve.training.progress import Report

WEIGHTS = "variables/variables.data-00000-of-00001"


class Flaky(MemoryFileSystem):
    """An object store that counts the bytes read of each file, and fails where a test says.

    failures: by the end of a path, one for each time that the file is opened.
    """

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    read: Counter[str] = Counter()  # noqa: RUF012
    failures: dict[str, list[Exception]] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if mode != "rb":
            return file
        for end, errors in self.failures.items():
            if path.endswith(end) and errors:
                return _Broken(file.getvalue(), errors.pop(0))
        self.read[path.partition("/flowers/")[2]] += len(file.getvalue())
        return fsspec.implementations.memory.BytesIO(file.getvalue())

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        with self.open(path, "rb") as file:
            return bytes(file.read())


class _Broken:
    """Gives half of a file, then an error; or, if that is an EOFError, just the half."""

    def __init__(self, content: bytes, error: Exception) -> None:
        self._parts: list[bytes | Exception] = [content[: len(content) // 2], error]

    def __enter__(self) -> "_Broken":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return self.read(1) + self.read(1)
        part = self._parts.pop(0)
        if isinstance(part, EOFError):
            return b""
        if isinstance(part, Exception):
            raise part
        return part


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(published, "_FIRST_WAIT_S", 0.001)
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("read", Counter()), ("failures", {})):
        monkeypatch.setattr(Flaky, name, value)
    return fsspec.filesystem("flaky")


@pytest.fixture
def version(tmp_path: Path, photos, encode) -> Path:
    """A folder of photographs and 9 MB of weights, with its manifest."""
    folder = tmp_path / "version"
    for name, pixels in photos.items():
        path = folder / "assets.extra/goldens" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))
    (folder / "variables").mkdir()
    (folder / WEIGHTS).write_bytes(np.random.default_rng(3).bytes(9_000_000))
    (folder / "saved_model.pb").write_bytes(b"graph")
    write_manifest(folder)
    return folder


@pytest.fixture
def url(version: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of three versions in the store."""
    monkeypatch.setattr("graftserve.export.store._SETTLE_S", 0.0)
    store = open_store("flaky://models/flowers")
    for number in (1, 2, 10):
        store.publish(version, number)
    Flaky.read.clear()
    return store.url


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_version_comes_whole(url: str, version: Path, tmp_path: Path) -> None:
    reports: list[Report] = []
    pulled = pull(url, tmp_path / "models/flowers", listener=reports.append)
    assert pulled == Pulled(10, tmp_path / "models/flowers/10", 6, total(version), 0)
    assert check_manifest(pulled.path) == 5
    assert (pulled.path / MANIFEST).read_bytes() == (version / MANIFEST).read_bytes()
    assert names(tmp_path / "models/flowers") == ["10"]
    assert (reports[0].stage, reports[0].done) == ("pulling (MB)", 0)
    assert reports[-1].done == reports[-1].total == 9


@pytest.mark.parametrize(("suffix", "number", "expected"), [("/2", None, 2), ("/2/", 2, 2), ("/", 1, 1)])
def test_one_version_by_its_number(
    url: str, tmp_path: Path, suffix: str, number: int | None, expected: int
) -> None:
    assert pull(url + suffix, tmp_path / "out", version=number).path == tmp_path / "out" / str(expected)


def test_from_a_folder_and_from_a_link_to_one(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version.rename(tmp_path / "3")
    (tmp_path / "latest").symlink_to("3")
    assert pull(str(tmp_path), tmp_path / "a").version == 3
    assert pull(str(tmp_path / "latest"), tmp_path / "b").version == 3
    assert pull(f"file://{tmp_path}/3", tmp_path / "c").version == 3
    monkeypatch.chdir(tmp_path)
    assert pull("3", Path("d")).path == Path("d/3")
    assert check_manifest(tmp_path / "d/3") == 5


def test_versions_that_are_not_there(url: str, bucket: Flaky, tmp_path: Path) -> None:
    bucket.rm_file(f"/models/flowers/2/{MANIFEST}")
    for number in (2, 5):
        message = f"version {number} is not there, or not complete; complete versions: 1, 10"
        with pytest.raises(VersionError, match=message):
            pull(url, tmp_path / "out", version=number)
    with pytest.raises(VersionError, match="is version 1, not 2; leave one of the two out"):
        pull(f"{url}/1", tmp_path / "out", version=2)
    with pytest.raises(VersionError, match="birds: holds no complete version"):
        pull("flaky://models/birds", tmp_path / "out")
    with pytest.raises(VersionError, match="nowhere: holds no complete version"):
        pull(str(tmp_path / "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_version_that_is_there_is_left_alone(url: str, tmp_path: Path) -> None:
    first = pull(url, tmp_path)
    inode = first.path.stat().st_ino
    Flaky.read.clear()
    again = pull(url, tmp_path)
    assert again == Pulled(10, first.path, 6, first.size_bytes, first.size_bytes)
    assert first.path.stat().st_ino == inode
    assert list(Flaky.read) == [f"10/{MANIFEST}"]


def test_a_damaged_version_stays_until_it_may_be_replaced(url: str, tmp_path: Path) -> None:
    pulled = pull(url, tmp_path)
    (pulled.path / "saved_model.pb").write_text("edited")
    (tmp_path / ".removing-10-0123/half").mkdir(parents=True)
    with pytest.raises(ManifestError, match=r"changed: saved_model.pb.*--overwrite replaces it"):
        pull(url, tmp_path)
    assert (pulled.path / "saved_model.pb").read_text() == "edited"
    assert pull(url, tmp_path, overwrite=True) == pulled
    assert check_manifest(pulled.path) == 5
    assert names(tmp_path) == ["10", "version"]


def test_another_version_of_the_same_number_is_not_taken_for_it(
    url: str, version: Path, tmp_path: Path
) -> None:
    pull(url, tmp_path / "out", version=1)
    (version / "saved_model.pb").write_bytes(b"other graph")
    write_manifest(version)
    other = open_store("flaky://models/other")
    other.publish(version, 1)
    with pytest.raises(ManifestError, match="another version 1 than the one to pull"):
        pull(other.url, tmp_path / "out")
    pull(other.url, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/1/saved_model.pb").read_bytes() == b"other graph"


def test_failures_that_pass_are_tried_again(url: str, tmp_path: Path) -> None:
    Flaky.failures = {
        WEIGHTS: [
            TimeoutError("timed out"),
            ConnectionResetError("reset"),
            OSError("503"),
            RuntimeError("?"),
        ],
        MANIFEST: [OSError("503")] * 4,
        "coffee.jpg": [ConnectionAbortedError("aborted")],
    }
    reports: list[Report] = []
    pulled = pull(url, tmp_path, listener=reports.append)
    assert check_manifest(pulled.path) == 5
    assert Flaky.failures == {WEIGHTS: [], MANIFEST: [], "coffee.jpg": []}
    assert reports[-1].done == reports[-1].total


def test_a_store_that_goes_away_ends_it_and_the_next_one_goes_on(
    url: str, version: Path, tmp_path: Path
) -> None:
    Flaky.failures = {WEIGHTS: [TimeoutError("timed out")] * 5}
    with pytest.raises(StoreError, match=rf"10/{WEIGHTS}: timed out \(attempt 5 of 5\)"):
        pull(url, tmp_path / "out")
    assert names(tmp_path / "out") == [".pulling-10"]
    assert (tmp_path / "out/.pulling-10" / WEIGHTS).stat().st_size == 4_500_000
    (tmp_path / "out/.pulling-10/stray").write_text("of another pull")
    here = {name for name in Flaky.read if (tmp_path / "out/.pulling-10" / name[3:]).is_file()}
    Flaky.read.clear()

    pulled = pull(url, tmp_path / "out")
    assert check_manifest(pulled.path) == 5
    assert Flaky.read[f"10/{WEIGHTS}"] == 9_000_000
    assert sum(Flaky.read.values()) == pulled.size_bytes - pulled.reused_bytes
    assert here, "some of the small files came before"
    assert not here & Flaky.read.keys()
    assert names(tmp_path / "out") == ["10"]


def test_a_file_that_ends_early_is_fetched_again(url: str, tmp_path: Path) -> None:
    Flaky.failures = {WEIGHTS: [EOFError()], MANIFEST: [EOFError()]}
    assert check_manifest(pull(url, tmp_path).path) == 5
    Flaky.failures = {WEIGHTS: [EOFError() for _ in range(5)]}
    with pytest.raises(StoreError, match="the answer ended after 4500000 of 9000000 bytes"):
        pull(url, tmp_path, version=1)


def test_a_store_that_refuses_is_not_asked_again(url: str, tmp_path: Path) -> None:
    Flaky.failures = {WEIGHTS: [PermissionError("Access denied"), OSError("unused")]}
    with pytest.raises(StoreError, match=r"Access denied$"):
        pull(url, tmp_path)
    assert len(Flaky.failures[WEIGHTS]) == 1


def test_a_damaged_file_in_the_store_is_not_taken(url: str, bucket: Flaky, tmp_path: Path) -> None:
    path = f"/models/flowers/10/{WEIGHTS}"
    bucket.pipe_file(path, bucket.cat_file(path)[:-1] + b"?")
    with pytest.raises(ManifestError, match=rf"10/{WEIGHTS}: has not the sum that its manifest gives"):
        pull(url, tmp_path / "out")
    assert names(tmp_path / "out") == [".pulling-10"]
    bucket.rm_file(path)
    with pytest.raises(ManifestError, match=f"{WEIGHTS} is missing there"):
        pull(url, tmp_path / "out")


@pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", "a/../../escaped"])
def test_nothing_is_written_outside_of_the_folder(url: str, bucket: Flaky, tmp_path: Path, path: str) -> None:
    bucket.pipe_file("/models/flowers/10/escaped", b"")
    bucket.pipe_file(f"/models/flowers/10/{MANIFEST}", f"{'0' * 64}  {path}\n".encode())
    with pytest.raises(ManifestError, match="expected a path inside the version"):
        pull(url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_error(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == Path(WEIGHTS).name:
            return open_file(Path("/dev/full"), "wb")
        return open_file(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(StoreError, match=r"out: the disk is full; make room and pull again"):
            pull(url, tmp_path / "out")
    assert Flaky.read[f"10/{WEIGHTS}"] == 9_000_000, "asking the store again would not help"
    assert check_manifest(pull(url, tmp_path / "out").path) == 5


LIMITED = """
import resource, sys
from pathlib import Path
from graftserve.export.errors import StoreError
from graftserve.export.pull import pull
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
try:
    pull(sys.argv[1], Path(sys.argv[2]))
except StoreError as error:
    print(error)
assert "tensorflow" not in sys.modules
"""


def test_a_file_that_may_not_be_so_large_is_one_clear_error(version: Path, tmp_path: Path) -> None:
    version.rename(tmp_path / "3")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'out'}: cannot be written: File too large\n", "")
    assert pull(str(tmp_path), tmp_path / "out").reused_bytes > 0


def test_a_folder_that_cannot_be_made_is_one_clear_error(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/x: cannot be written: Not a directory"):
        pull(url, tmp_path / "file/x")


def test_two_pulls_at_once_bring_it_once(url: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        pulled = list(pool.map(lambda _: pull(url, tmp_path / "out"), range(4)))
    assert Flaky.read[f"10/{WEIGHTS}"] == 9_000_000
    assert sorted(each.reused_bytes for each in pulled) == [0, *[pulled[0].size_bytes] * 3]
    assert names(tmp_path / "out") == ["10"]


KILLED = """
import sys, time
from pathlib import Path
from graftserve.export import pull
def listener(report):
    if report.done > 4:
        print("half way", flush=True)
        time.sleep(600)
pull.pull(sys.argv[1], Path(sys.argv[2]), listener=listener)
"""


def test_a_killed_pull_is_no_version_and_the_next_one_finishes(version: Path, tmp_path: Path) -> None:
    version.rename(tmp_path / "3")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "half way\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert names(tmp_path / "out") == [".pulling-3", ".pulling-3.lock"]
    pulled = pull(str(tmp_path), tmp_path / "out")
    assert check_manifest(pulled.path) == 5
    assert names(tmp_path / "out") == ["3"]
