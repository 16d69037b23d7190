"""The feature cache: nothing computed twice, nothing lost, nothing mixed up."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from graftserve.training.features import FeatureCache, compute_features, fingerprint
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


@pytest.fixture
def folder(tmp_path: Path, encode) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(20):
        pixels = rng.integers(0, 256, (40 + index, 50, 3), np.uint8)
        (root / f"{index}.jpg").write_bytes(encode(pixels))
    return root


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rows_are_what_the_network_says_of_each_image(network, folder: Path, tmp_path: Path) -> None:
    paths = names(folder)
    result = compute_features(network, PREPROCESS, folder, paths, tmp_path / "cache")
    assert result.kept == tuple(paths)
    assert (result.computed, result.cached) == (20, 0)
    for path, row in zip(paths, result.features, strict=True):
        pixels = decode_image(tf.io.read_file(str(folder / path)), PREPROCESS)
        np.testing.assert_allclose(row, network(pixels[None], training=False)[0], rtol=1e-4, atol=1e-5)


def test_the_second_time_everything_comes_from_the_cache(network, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = compute_features(network, PREPROCESS, folder, names(folder), cache)
    for path in names(folder):
        (folder / path).rename(folder / f"renamed_{path}")
    shutil.copy(folder / "renamed_0.jpg", folder / "copy.jpg")
    second = compute_features(network, PREPROCESS, folder, names(folder), cache)
    assert (second.computed, second.cached) == (0, 21)
    np.testing.assert_array_equal(second.features[0], first.features[0])  # copy.jpg sorts first, as 0.jpg did


def test_copies_are_computed_once(network, folder: Path, tmp_path: Path) -> None:
    for index in range(5):
        shutil.copy(folder / "0.jpg", folder / f"copy{index}.jpg")
    result = compute_features(network, PREPROCESS, folder, names(folder), tmp_path / "cache")
    assert (len(result.kept), result.computed) == (25, 20)


def test_unreadable_files_are_listed_and_the_others_are_right(network, folder: Path, tmp_path: Path) -> None:
    good = compute_features(network, PREPROCESS, folder, names(folder), tmp_path / "one")
    whole = (folder / "3.jpg").read_bytes()
    (folder / "bad1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bad2.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.jpg").mkdir()
    result = compute_features(network, PREPROCESS, folder, [*names(folder), "gone.jpg"], tmp_path / "two")
    reasons = {skipped.path: skipped.reason for skipped in result.unreadable}
    assert set(reasons) == {"bad1.jpg", "bad2.jpg", "folder.jpg", "gone.jpg"}
    assert "JPEG" in reasons["bad1.jpg"]
    assert reasons["gone.jpg"] == "cannot be read: No such file or directory"
    assert reasons["folder.jpg"] == "cannot be read: Is a directory"
    np.testing.assert_allclose(result.features, good.features, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_keeps_what_it_had(network, folder: Path, tmp_path: Path) -> None:
    def interrupt(report: Report) -> None:
        if report.stage == "computing features" and report.done >= 8:
            raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        compute_features(network, PREPROCESS, folder, names(folder), cache, interrupt)
    result = compute_features(network, PREPROCESS, folder, names(folder), cache)
    assert result.cached >= 8
    assert result.computed == 20 - result.cached


def test_a_damaged_segment_is_computed_again(network, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = compute_features(network, PREPROCESS, folder, names(folder), cache)
    (segment,) = cache.rglob("*.npy")
    segment.write_bytes(segment.read_bytes()[:-100])
    second = compute_features(network, PREPROCESS, folder, names(folder), cache)
    assert second.computed == 20
    np.testing.assert_allclose(second.features, first.features, rtol=1e-5)


def test_the_fingerprint_is_of_all_that_matters(network) -> None:
    base = fingerprint(network, PREPROCESS)
    assert fingerprint(network, PREPROCESS) == base
    assert fingerprint(network, Preprocess(32, "squash")) != base
    other = keras.models.clone_model(network)
    other.set_weights(network.get_weights())
    assert fingerprint(other, PREPROCESS) == base
    weights = network.get_weights()
    weights[0] = weights[0] + np.float32(1e-6)
    other.set_weights(weights)
    assert fingerprint(other, PREPROCESS) != base


def test_two_writers_share_a_cache(tmp_path: Path) -> None:
    one, two = FeatureCache(tmp_path, 3), FeatureCache(tmp_path, 3)
    one.add([b"a" * 16], np.full((1, 3), 1, np.float32))
    two.add([b"b" * 16, b"a" * 16], np.full((2, 3), 2, np.float32))
    both = FeatureCache(tmp_path, 3)
    assert len(both) == 2
    np.testing.assert_array_equal(both.get([b"b" * 16]), [[2, 2, 2]])
    with pytest.raises(KeyError):
        both.get([b"c" * 16])


def test_progress_counts_to_the_end(network, folder: Path, tmp_path: Path) -> None:
    reports: list[Report] = []
    compute_features(network, PREPROCESS, folder, names(folder), tmp_path / "cache", reports.append)
    for stage in ("reading images", "computing features"):
        steps = [report for report in reports if report.stage == stage]
        assert [steps[0].done, steps[-1].done, steps[-1].total] == [0, 20, 20]
        assert steps[0].eta_s is None
        assert steps[-1].eta_s == 0
