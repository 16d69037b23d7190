"""Versions in an object store, on fsspec's in-memory one and on ones that fail."""

import json
import logging
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from graftserve.export.errors import StoreError, VersionError
from graftserve.export.manifest import MANIFEST, read_manifest, write_manifest
from graftserve.export.store import Store, is_url, local_path, open_store


class Bucket(MemoryFileSystem):
    """An object store of its own, with its writes in order; each test says how it fails.

    As S3 and Google Cloud Storage do, it creates exclusively under concurrency, which fsspec's does not.
    """

    protocol = "bucket"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs: list[str] = [""]
        self.written: list[str] = []
        self.fail_at: str | None = None
        self.is_conditional = True
        self._lock = Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        with self._lock:
            super().pipe_file(path, value, mode if self.is_conditional else "overwrite", **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if self.fail_at and rpath.endswith(self.fail_at):
            with self.open(rpath, "wb") as file:
                file.write(b"half")
            raise ConnectionResetError("Connection reset by peer")
        super().put_file(lpath, rpath, **options)
        self.written.append(rpath)


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def store(bucket: Bucket) -> Store:
    return Store(bucket, "/models/flowers", "bucket://models/flowers", has_conditional_writes=True)


@pytest.fixture
def version(tmp_path: Path, photos, encode) -> Path:
    """A folder of photographs, with its manifest."""
    folder = tmp_path / "version"
    for name, pixels in photos.items():
        path = folder / "assets.extra/goldens" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))
    (folder / "variables").mkdir()
    (folder / "variables/variables.index").write_bytes(b"index")
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "zebra").write_bytes(b"last by name")
    write_manifest(folder)
    return folder


def claim(bucket: Bucket, number: int, age_s: float) -> None:
    content = {"publisher": "somebody", "time": time.time() - age_s}
    bucket.pipe_file(f"/models/flowers/.claims/{number}", json.dumps(content).encode())


def claims(bucket: Bucket) -> list[str]:
    return [path for path in bucket.store if "/.claims/" in path]


def test_urls_and_folders() -> None:
    assert is_url("gs://bucket/models/flowers")
    assert not is_url("models/flowers")
    assert not is_url("file:///models/flowers")
    assert local_path("file:///models/flowers") == local_path("/models/flowers") == Path("/models/flowers")


def test_a_published_version_has_every_byte(store: Store, bucket: Bucket, version: Path) -> None:
    assert store.versions() == []
    assert store.newest() is None
    assert store.publish(version, None) == 1
    assert store.publish(version, 7) == 7
    assert store.publish(version, None) == 8
    assert store.versions() == [1, 7, 8]
    assert store.newest() == 8
    files = {path.relative_to(version).as_posix(): path for path in version.rglob("*") if path.is_file()}
    assert store.sizes(7) == {name: path.stat().st_size for name, path in files.items()}
    for name, path in files.items():
        assert bucket.cat_file(store.path(7, name)) == path.read_bytes()
    assert claims(bucket) == []


def test_the_manifest_comes_last_and_the_graph_before_it(store: Store, bucket: Bucket, version: Path) -> None:
    store.publish(version, None)
    assert bucket.written[-2:] == ["/models/flowers/1/saved_model.pb", f"/models/flowers/1/{MANIFEST}"]
    assert len(bucket.written) == 7


def test_an_explicit_number_is_never_taken_over(store: Store, bucket: Bucket, version: Path) -> None:
    store.publish(version, 3)
    claim(bucket, 5, age_s=10)
    bucket.pipe_file("/models/flowers/6/saved_model.pb", b"by hand")
    for number in (3, 5, 6):
        with pytest.raises(VersionError, match=f"flowers/{number}: exists, or is being published"):
            store.publish(version, number)
    assert bucket.cat_file("/models/flowers/6/saved_model.pb") == b"by hand"
    assert store.publish(version, None) == 7
    assert store.versions() == [3, 7]


def test_only_plain_numbers_with_a_manifest_are_versions(store: Store, bucket: Bucket) -> None:
    for name in ("1", "007", "0", "x", "4.tmp"):
        bucket.pipe_file(f"/models/flowers/{name}/{MANIFEST}", b"")
    bucket.pipe_file("/models/flowers/2/saved_model.pb", b"")
    assert store.versions() == [1]
    assert [store.is_complete(number) for number in (1, 2, 3)] == [True, False, False]


def test_publishers_at_the_same_time_each_get_their_own_number(
    store: Store, bucket: Bucket, version: Path
) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: store.publish(version, None), range(24)))
    assert len(set(numbers)) == 24
    assert store.versions() == sorted(numbers)
    assert claims(bucket) == []


def test_one_number_asked_for_twice_is_published_once(store: Store, version: Path) -> None:
    def publish(_: int) -> int:
        try:
            return store.publish(version, 5)
        except VersionError:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(publish, range(8))) == [0] * 7 + [5]


def test_a_number_whose_publisher_has_just_finished_is_left_alone(
    store: Store, bucket: Bucket, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = bucket.pipe_file

    def somebody_finishes_first(path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and "1" not in {name.split("/")[3] for name in bucket.store}:
            create(f"/models/flowers/1/{MANIFEST}", b"somebody's")
        create(path, value, mode, **options)

    monkeypatch.setattr(bucket, "pipe_file", somebody_finishes_first)
    assert store.publish(version, None) == 2
    assert bucket.cat_file(f"/models/flowers/1/{MANIFEST}") == b"somebody's"
    assert claims(bucket) == []


@pytest.mark.parametrize("fail_at", ["coffee.jpg", "saved_model.pb", MANIFEST])
def test_an_upload_that_fails_leaves_nothing(
    store: Store, bucket: Bucket, version: Path, fail_at: str
) -> None:
    bucket.fail_at = fail_at
    with pytest.raises(StoreError, match="flowers: Connection reset by peer"):
        store.publish(version, None)
    assert bucket.store == {}
    bucket.fail_at = None
    assert store.publish(version, None) == 1


def test_a_file_that_arrives_short_is_an_error(
    store: Store, bucket: Bucket, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = bucket.put_file

    def cut(lpath: str, rpath: str, **options: Any) -> None:
        put(lpath, rpath, **options)
        if rpath.endswith("coffee.jpg"):
            bucket.pipe_file(rpath, bucket.cat_file(rpath)[:100])

    monkeypatch.setattr(bucket, "put_file", cut)
    size = (version / "assets.extra/goldens/coffee.jpg").stat().st_size
    with pytest.raises(StoreError, match=f"coffee.jpg: expected {size} bytes .*, found 100 bytes; publish"):
        store.publish(version, None)
    assert bucket.store == {}


def test_what_a_dead_publisher_left_goes_after_an_hour(
    store: Store, bucket: Bucket, version: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.pipe_file("/models/flowers/1/saved_model.pb", b"half")
    claim(bucket, 1, age_s=3500)
    assert store.publish(version, None) == 2
    assert bucket.exists("/models/flowers/1/saved_model.pb"), "it may be at work"
    assert caplog.records == []

    claim(bucket, 1, age_s=3700)
    claim(bucket, 2, age_s=3700)  # of one that died between its manifest and the end
    assert store.publish(version, None) == 3
    assert not bucket.exists("/models/flowers/1")
    assert store.versions() == [2, 3]
    assert claims(bucket) == []
    assert [record.getMessage() for record in caplog.records] == [
        "bucket://models/flowers/1: removing what a publisher that died has left"
    ]


def test_a_store_that_does_not_answer_costs_no_version(
    store: Store, bucket: Bucket, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(version, 1)
    claim(bucket, 1, age_s=3700)
    info = bucket.info

    def unavailable(path: str, **options: Any) -> Any:
        if path.endswith(MANIFEST):
            raise OSError("503 Service Unavailable")
        return info(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "info", unavailable)
        with pytest.raises(StoreError, match="flowers: 503 Service Unavailable"):
            store.publish(version, None)
    assert store.versions() == [1]


def test_a_publisher_that_was_given_up_does_not_go_on(
    store: Store, bucket: Bucket, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = bucket.put_file

    def sleep_long(lpath: str, rpath: str, **options: Any) -> None:
        if rpath.endswith("saved_model.pb"):
            claim(bucket, 1, age_s=0)
        put(lpath, rpath, **options)

    monkeypatch.setattr(bucket, "put_file", sleep_long)
    with pytest.raises(StoreError, match=r"flowers/1: took over an hour .*; publish again"):
        store.publish(version, None)
    assert bucket.exists("/models/flowers/1/saved_model.pb"), "by now it is the other's"
    assert claims(bucket) == ["/models/flowers/.claims/1"]


def test_an_answer_that_is_lost_does_not_lose_the_number(
    store: Store, bucket: Bucket, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = bucket.pipe_file

    def lose_the_answer(path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        create(path, value, mode, **options)
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(bucket, "pipe_file", lose_the_answer)
    monkeypatch.setattr("graftserve.export.store.Store._refresh", lambda *_: None)
    assert store.publish(version, None) == 1


def test_a_store_without_conditions_is_warned_of_and_looked_at_again(
    store: Store,
    bucket: Bucket,
    version: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bucket.is_conditional = False
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert store.publish(version, None) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot tell two publishers apart for sure; publish from one place" in record.getMessage()

    monkeypatch.setattr(time, "sleep", lambda _: claim(bucket, 2, age_s=0))
    with pytest.raises(VersionError, match="2: exists, or is being published"):
        store.publish(version, 2)
    assert claims(bucket) == ["/models/flowers/.claims/2"]


def test_prune_keeps_the_newest_and_the_protected(store: Store, bucket: Bucket, version: Path) -> None:
    for number in (1, 2, 3, 9, 10):
        store.publish(version, number)
    bucket.pipe_file("/models/flowers/4/saved_model.pb", b"by hand")
    assert store.prune(2, {2}) == [1, 3]
    assert store.versions() == [2, 9, 10]
    assert bucket.exists("/models/flowers/4/saved_model.pb")
    assert not bucket.exists("/models/flowers/1")
    assert claims(bucket) == []
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        store.prune(0, ())


def test_a_prune_that_was_cut_off_is_finished_by_a_publisher(
    store: Store, bucket: Bucket, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(version, 1)
    store.publish(version, 2)

    def reset(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "rm", reset)
        with pytest.raises(StoreError, match="flowers: Connection reset by peer"):
            store.prune(1, ())
    assert store.versions() == [2], "nobody may read what is half gone"
    assert bucket.exists("/models/flowers/1/saved_model.pb")
    monkeypatch.setattr("graftserve.export.store._STALE_S", -1.0)
    assert store.publish(version, None) == 3
    assert not bucket.exists("/models/flowers/1")


def test_through_urls(version: Path, tmp_path: Path) -> None:
    place = open_store("memory://test_store/flowers/")
    try:
        assert place.url == "memory://test_store/flowers"
        assert place.publish(version, None) == 1
        manifest = place.filesystem.cat_file(place.path(1, MANIFEST))
        assert len(read_manifest(manifest, "there")) == 6
    finally:
        fsspec.filesystem("memory").rm("/test_store", recursive=True)


def test_a_file_system_serves_as_a_store(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftserve.export.store._SETTLE_S", 0.0)
    place = open_store(f"local://{tmp_path}/models/flowers")
    assert [place.publish(version, None) for _ in range(2)] == [1, 2]
    assert (tmp_path / "models/flowers/2/variables/variables.index").read_bytes() == b"index"
    assert place.prune(1, ()) == [1]
    assert sorted(path.name for path in (tmp_path / "models/flowers").iterdir()) == [".claims", "2"]


@pytest.mark.parametrize(
    ("url", "missing", "message"),
    [
        ("gs://bucket/models", "fsspec", r"fsspec is not installed: pip install 'graftserve\[gcs\]'"),
        ("s3://bucket/models", "fsspec", r"fsspec is not installed: pip install 'graftserve\[s3\]'"),
        ("models/flowers", "fsspec", "fsspec is not installed: pip install fsspec"),
        ("gs://bucket/models", "gcsfs", r"what reads gs:// is not .*: pip install 'graftserve\[gcs\]'"),
        ("s3://bucket/models", "s3fs", r"what reads s3:// is not .*: pip install 'graftserve\[s3\]'"),
        ("abfs://bucket/models", "adlfs", "what reads abfs:// is not installed"),
        ("gopher://bucket/models", "x", "cannot be reached: Protocol not known: gopher"),
    ],
)
def test_what_is_not_installed_is_said(url: str, missing: str, message: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from graftserve.export.store import open_store
from graftserve.export.errors import StoreError
try:
    open_store({url!r})
except StoreError as error:
    print(error)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(message, done.stdout), done.stdout
