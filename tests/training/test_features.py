"""The feature cache: nothing computed twice, nothing lost, nothing mixed up."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from graftserve.training.cache import list_entries
from graftserve.training.features import Features, cache_features, compute_features, fingerprint
from graftserve.training.images import FolderImages, content_key
from graftserve.training.preprocess import Preprocess, decode_image
from graftserve.training.progress import Report

PREPROCESS = Preprocess(32)


@pytest.fixture(scope="module")
def network() -> keras.Model:
    """A small network in a backbone's shape: pixels uint8 [N, 32, 32, 3] to features [N, 8]."""
    keras.utils.set_random_seed(1)
    pixels = keras.Input((32, 32, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(pixels)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x), name="small")


@pytest.fixture(scope="module")
def jpegs(encode: Callable[..., bytes]) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (40 + index, 50, 3), np.uint8)) for index in range(20)]


@pytest.fixture
def folder(tmp_path: Path, jpegs: list[bytes]) -> Path:
    """20 images that have not changed for long."""
    root = tmp_path / "images"
    root.mkdir()
    for index, jpeg in enumerate(jpegs):
        (root / f"{index}.jpg").write_bytes(jpeg)
        os.utime(root / f"{index}.jpg", (1e9, 1e9))
    return root


class CountingImages(FolderImages):
    """Remembers what was read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.were_read: list[str] = []

    def read(self, path: str) -> bytes:
        self.were_read.append(path)
        return super().read(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def compute(network: keras.Model, folder: Path, cache: Path, *args: Any, **options: Any) -> Features:
    return compute_features(network, PREPROCESS, FolderImages(folder), names(folder), cache, *args, **options)


def expected(network: keras.Model, folder: Path, paths: list[str], *, flip: bool = False) -> np.ndarray:
    pixels = [decode_image(tf.io.read_file(str(folder / path)), PREPROCESS) for path in paths]
    batch = tf.stack([tf.image.flip_left_right(image) if flip else image for image in pixels])
    return network(batch, training=False).numpy()


@pytest.mark.parametrize("engine", ["tensorflow", "litert"])
@pytest.mark.parametrize("flip", [False, True])
def test_rows_are_what_the_network_says_of_each_image(
    network, folder: Path, tmp_path: Path, engine: str, flip: bool
) -> None:
    paths = names(folder)
    result = compute(network, folder, tmp_path / "cache", engine=engine, flip=flip)
    assert result.kept == tuple(paths)
    assert (result.computed, result.cached, result.engine) == (20, 0, engine)
    assert result.keys == {path: content_key((folder / path).read_bytes()) for path in paths}
    np.testing.assert_allclose(
        result.features, expected(network, folder, paths, flip=flip), rtol=1e-4, atol=1e-5
    )


def test_views_are_not_mixed_up(network, folder: Path, tmp_path: Path) -> None:
    cache, paths = tmp_path / "cache", names(folder)
    plain = compute(network, folder, cache)
    flipped = compute(network, folder, cache, flip=True)
    assert (flipped.computed, flipped.cached) == (20, 0)
    assert np.abs(flipped.features - plain.features).max() > 1e-3
    for flip in (False, True):
        again = compute(network, folder, cache, flip=flip)
        assert (again.computed, again.cached) == (0, 20)
        np.testing.assert_allclose(
            again.features, expected(network, folder, paths, flip=flip), rtol=1e-4, atol=1e-5
        )


def test_auto_takes_the_rows_of_either_engine_and_a_name_only_its_own(
    network, folder: Path, tmp_path: Path
) -> None:
    cache, images, paths = tmp_path / "cache", FolderImages(folder), names(folder)
    litert = compute_features(network, PREPROCESS, images, paths[:12], cache, engine="litert")
    both = compute_features(network, PREPROCESS, images, paths, cache)
    assert (both.computed, both.cached, both.engine) == (8, 12, "litert")  # what was converted is at hand
    np.testing.assert_array_equal(both.features[:12], litert.features)
    own = compute_features(network, PREPROCESS, images, paths, cache, engine="tensorflow")
    assert (own.computed, own.cached, own.engine) == (20, 0, "tensorflow")
    shutil.rmtree(cache / fingerprint(network, PREPROCESS, "litert"))
    rest = compute_features(network, PREPROCESS, images, paths, cache)
    assert (rest.computed, rest.cached, rest.engine) == (0, 20, "tensorflow")
    with pytest.raises(ValueError, match="engine: expected one of auto, tensorflow, litert, got 'gpu'"):
        compute_features(network, PREPROCESS, images, paths, cache, engine="gpu")


def test_the_second_time_everything_comes_from_the_cache(network, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = compute(network, folder, cache)
    for path in names(folder):
        (folder / path).rename(folder / f"renamed_{path}")
    shutil.copy(folder / "renamed_0.jpg", folder / "copy.jpg")
    second = compute(network, folder, cache)
    assert (second.computed, second.cached) == (0, 21)
    np.testing.assert_array_equal(second.features[0], first.features[0])  # copy.jpg sorts first, as 0.jpg did


def test_files_that_have_not_changed_are_not_read_again(
    network, folder: Path, tmp_path: Path, jpegs: list[bytes]
) -> None:
    cache, paths = tmp_path / "cache", names(folder)
    compute(network, folder, cache)

    def read_by(engine: str = "auto") -> tuple[list[str], Features]:
        images = CountingImages(folder)
        result = compute_features(network, PREPROCESS, images, paths, cache, engine=engine)
        return images.were_read, result

    were_read, unchanged = read_by()
    assert were_read == []
    assert (unchanged.computed, unchanged.cached) == (0, 20)

    (folder / "7.jpg").write_bytes(jpegs[5])
    were_read, changed = read_by()
    assert were_read == ["7.jpg"]
    assert (changed.computed, changed.cached) == (0, 20)
    assert changed.keys["7.jpg"] == content_key(jpegs[5])
    rows = {path: changed.features[row] for row, path in enumerate(changed.kept)}
    np.testing.assert_array_equal(rows["7.jpg"], rows["5.jpg"])

    assert read_by()[0] == ["7.jpg"]  # it changed just before it was read, so it might again
    os.utime(folder / "7.jpg", (1e9, 1e9 + 1))
    assert read_by()[0] == ["7.jpg"]
    assert read_by()[0] == []


def test_copies_are_computed_once(network, folder: Path, tmp_path: Path) -> None:
    for index in range(5):
        shutil.copy(folder / "0.jpg", folder / f"copy{index}.jpg")
    result = compute(network, folder, tmp_path / "cache")
    assert (len(result.kept), result.computed) == (25, 20)


@pytest.mark.parametrize("engine", ["tensorflow", "litert"])
def test_unreadable_files_are_listed_and_the_others_are_right(
    network, folder: Path, tmp_path: Path, engine: str
) -> None:
    good = compute(network, folder, tmp_path / "one")
    whole = (folder / "3.jpg").read_bytes()
    (folder / "0bad.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    paths = [*names(folder), "gone.jpg"]
    for cached in (0, 20):
        result = compute_features(
            network, PREPROCESS, FolderImages(folder), paths, tmp_path / "two", engine=engine
        )
        reasons = {skipped.path: skipped.reason for skipped in result.unreadable}
        assert set(reasons) == {"0bad.jpg", "bad.jpg", "empty.jpg", "folder.jpg", "gone.jpg"}
        assert "JPEG" in reasons["bad.jpg"]
        assert reasons["bad.jpg"] == reasons["0bad.jpg"]
        assert reasons["empty.jpg"] == "the file is empty"
        assert reasons["gone.jpg"] == "cannot be read: No such file or directory"
        assert reasons["folder.jpg"] == "cannot be read: Is a directory"
        assert (result.computed, result.cached) == (20 - cached, cached)
        assert set(result.keys) == set(result.kept)
        np.testing.assert_allclose(result.features, good.features, rtol=1e-4, atol=1e-5)


def test_a_file_that_changes_between_is_left_out(
    network, folder: Path, tmp_path: Path, jpegs: list[bytes]
) -> None:
    def change(report: Report) -> None:
        if report.stage == "computing features" and report.done == 0:
            (folder / "4.jpg").write_bytes(jpegs[3])

    result = compute(network, folder, tmp_path / "cache", change)
    (skipped,) = result.unreadable
    assert (skipped.path, skipped.reason.split(",")[0]) == ("4.jpg", "changed while it was being read")
    again = compute(network, folder, tmp_path / "cache")
    assert (again.computed, again.cached, again.unreadable) == (0, 20, ())
    rows = {path: again.features[row] for row, path in enumerate(again.kept)}
    np.testing.assert_array_equal(rows["4.jpg"], rows["3.jpg"])


def test_an_interrupted_run_keeps_what_it_had(network, folder: Path, tmp_path: Path) -> None:
    def interrupt(report: Report) -> None:
        if report.stage == "computing features" and report.done >= 8:
            raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        compute(network, folder, cache, interrupt)
    result = compute(network, folder, cache)
    assert result.cached >= 8
    assert result.computed == 20 - result.cached


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import keras
from graftserve.training.features import compute_features
from graftserve.training.images import FolderImages
from graftserve.training.preprocess import Preprocess

def die(report):
    if report.stage == "computing features" and report.done >= 600:
        os.kill(os.getpid(), signal.SIGKILL)

network = keras.saving.load_model(sys.argv[1])
images, cache = Path(sys.argv[2]), Path(sys.argv[3])
paths = sorted(path.name for path in images.iterdir())
compute_features(network, Preprocess(32), FolderImages(images), paths, cache, die, engine="tensorflow")
"""


def test_a_killed_run_loses_one_segment_at_most(network, tmp_path: Path, encode) -> None:
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(640):
        (images / f"{index}.bmp").write_bytes(encode(rng.integers(0, 256, (8, 8, 3), np.uint8), "BMP"))
    network.save(tmp_path / "network.keras")
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "network.keras"), str(images), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    result = compute(network, images, cache)
    assert 512 <= result.cached < 640
    assert result.computed == 640 - result.cached
    fresh = compute(network, images, tmp_path / "other")
    np.testing.assert_allclose(result.features, fresh.features, rtol=1e-5, atol=1e-6)


def test_a_damaged_segment_is_computed_again(network, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = compute(network, folder, cache)
    (segment,) = (cache / fingerprint(network, PREPROCESS, "tensorflow")).glob("*.rows")
    segment.write_bytes(segment.read_bytes()[:-100])
    second = compute(network, folder, cache)
    assert second.computed == 20
    np.testing.assert_allclose(second.features, first.features, rtol=1e-5)


def test_a_lost_or_damaged_stamp_index_costs_a_reading_only(network, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    compute(network, folder, cache)
    (segment,) = (cache / "stamps").glob("*.rows")
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    images = CountingImages(folder)
    result = compute_features(network, PREPROCESS, images, names(folder), cache)
    assert (result.computed, result.cached, len(images.were_read)) == (0, 20, 20)


def test_the_fingerprint_is_of_all_that_matters(network) -> None:
    base = fingerprint(network, PREPROCESS, "tensorflow")
    assert fingerprint(network, PREPROCESS, "tensorflow") == base
    assert fingerprint(network, PREPROCESS, "litert") != base
    assert fingerprint(network, PREPROCESS, "tensorflow", flip=True) != base
    assert fingerprint(network, Preprocess(32, "squash"), "tensorflow") != base
    other = keras.models.clone_model(network)
    other.set_weights(network.get_weights())
    assert fingerprint(other, PREPROCESS, "tensorflow") == base
    lower = keras.Model(network.input, keras.ops.max(network.layers[-2].output, (1, 2)), name="small")
    assert fingerprint(lower, PREPROCESS, "tensorflow") != base
    weights = network.get_weights()
    weights[0] = weights[0] + np.float32(1e-6)
    other.set_weights(weights)
    assert fingerprint(other, PREPROCESS, "tensorflow") != base


def test_unnamed_layers_have_the_same_fingerprint_in_every_process(network) -> None:
    def build() -> keras.Model:
        pixels = keras.Input((32, 32, 3), dtype="uint8")
        inner = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(2, 3)])
        return keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(inner(pixels)), name="same")

    one, two = build(), build()
    two.set_weights(one.get_weights())
    assert [layer.name for layer in one.layers] != [layer.name for layer in two.layers]
    assert fingerprint(one, PREPROCESS, "litert") == fingerprint(two, PREPROCESS, "litert")


def test_the_rows_on_disk_are_those_in_memory(network, folder: Path, tmp_path: Path) -> None:
    whole = compute(network, folder, tmp_path / "cache")
    found = cache_features(network, PREPROCESS, FolderImages(folder), names(folder), tmp_path / "cache")
    assert (found.kept, found.feature_count, found.cached) == (whole.kept, 8, 20)
    np.testing.assert_array_equal(found.rows(found.kept[5:9]), whole.features[5:9])
    assert found.rows([]).shape == (0, 8)


def test_no_images_are_no_rows(network, tmp_path: Path) -> None:
    result = compute_features(network, PREPROCESS, FolderImages(tmp_path), [], tmp_path / "cache")
    assert result.features.shape == (0, 8)
    assert (result.kept, result.computed, result.cached) == ((), 0, 0)


class Threads:
    """Peers that are threads of one process."""

    def __init__(self, index: int, meeting: threading.Barrier, table: list[np.ndarray]) -> None:
        self.index, self.count = index, meeting.parties
        self._meeting, self._table = meeting, table
        self.travelled = 0

    def all_gather(self, rows: np.ndarray) -> np.ndarray:
        self._table[self.index] = rows
        self._meeting.wait()
        gathered = np.concatenate(self._table)
        self._meeting.wait()
        if gathered.dtype == np.float32:
            self.travelled += len(gathered)
        return gathered


@pytest.mark.parametrize("shared", [True, False])
def test_peers_compute_their_shares_and_get_all(
    network, folder: Path, tmp_path: Path, jpegs: list[bytes], shared: bool
) -> None:
    (folder / "bad.jpg").write_bytes(jpegs[0][:500])
    alone = compute(network, folder, tmp_path / "alone")
    caches = [tmp_path / ("cache" if shared else f"cache{index}") for index in range(3)]
    if not shared:  # one has some of the rows already
        compute_features(network, PREPROCESS, FolderImages(folder), ["0.jpg", "1.jpg"], caches[1])
    meeting, table = threading.Barrier(3, timeout=60), [np.empty(0)] * 3
    peers = [Threads(index, meeting, table) for index in range(3)]
    images = [CountingImages(folder) for _ in peers]
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(
                compute_features, network, PREPROCESS, images[i], names(folder), caches[i], peers=peers[i]
            )
            for i in range(3)
        ]
        results = [call.result() for call in calls]
    for result in results:
        assert [skipped.path for skipped in result.unreadable] == ["bad.jpg"]
        assert result.kept == alone.kept
        np.testing.assert_allclose(result.features, alone.features, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(result.features, results[0].features)
    again = compute(network, folder, caches[2])
    assert (again.computed, again.cached) == (0, 20)
    # Who shares a folder computes each row once and sends none; of others the rows travel to all.
    rows = sum(entry.rows for entry in list_entries(caches[2]) if entry.kind == "features")
    assert (rows, peers[0].travelled) == ((20, 0) if shared else (20, 20))


def test_progress_counts_to_the_end(network, folder: Path, tmp_path: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    reports: list[Report] = []
    compute(network, folder, tmp_path / "cache", reports.append)
    for stage in ("reading images", "computing features"):
        steps = [report for report in reports if report.stage == stage]
        assert [steps[0].done, steps[-1].done, steps[-1].total] == [0, 21, 21]
        assert steps[0].eta_s is None
        assert steps[-1].eta_s == 0
        assert [step.done for step in steps].count(21) == 1
