"""The engines: the same answers, a conversion kept and never taken on trust, a reason for every fallback."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from graftserve.training.engine import (
    AGREEMENT,
    Engine,
    acceptable_engines,
    core_count,
    extract,
    open_engine,
)
from graftserve.training.errors import TrainingError

META = {"kind": "network", "backbone": "small"}
MANY = 10_000


def build(*layers: keras.layers.Layer) -> keras.Model:
    """Pixels uint8 [N, 32, 32, 3] to features [N, 8], with `layers` before the pooling."""
    keras.utils.set_random_seed(1)
    pixels = keras.Input((32, 32, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(pixels)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(x)
    for layer in layers:
        x = layer(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x), name="small")


class Noise(keras.layers.Layer):
    """Says something else each time, so that no engine can agree with it."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x + tf.random.uniform(tf.shape(x))


class Unconvertible(keras.layers.Layer):
    """Uses an operation that LiteRT has not."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.strings.to_number(tf.strings.as_string(x))


@pytest.fixture(scope="module")
def network() -> keras.Model:
    return build()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def converted(network, pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache entry of `network`, converted."""
    entry = tmp_path_factory.mktemp("cache") / "network"
    assert open_engine("litert", network, MANY, lambda: pixels[:4], entry, META).name == "litert"
    return entry


def never() -> np.ndarray:
    raise AssertionError("nothing should be converted")


def run(engine: Engine, pixels: np.ndarray) -> np.ndarray:
    batches = list(extract(engine, lambda row: pixels[row], range(len(pixels))))
    assert [row for rows, _ in batches for row in rows] == list(range(len(pixels)))
    return np.concatenate([features for _, features in batches])


@pytest.mark.parametrize("choice", ["tensorflow", "litert"])
@pytest.mark.parametrize("image_count", [21, MANY])
def test_both_engines_say_what_keras_says(
    network, pixels, converted: Path, choice: str, image_count: int
) -> None:
    expected = network(pixels, training=False).numpy()
    engine = open_engine(choice, network, image_count, never, converted, META)
    assert engine.name == choice
    features = run(engine, pixels)
    assert features.dtype == np.float32
    assert np.abs(features - expected).max() <= AGREEMENT * expected.max()


def test_litert_has_a_lane_for_each_core_and_no_more_than_images(network, converted: Path) -> None:
    assert core_count() == len(os.sched_getaffinity(0))
    assert len(open_engine("litert", network, MANY, never, converted, META).lanes) == core_count()
    assert len(open_engine("litert", network, 1, never, converted, META).lanes) == 1


def test_auto_converts_for_many_images_only_but_takes_what_is_there(
    network, pixels, converted: Path, tmp_path: Path
) -> None:
    assert open_engine("auto", network, 100, never, tmp_path / "e", META).name == "tensorflow"
    assert not (tmp_path / "e").exists()
    assert open_engine("auto", network, 100, never, converted, META).name == "litert"
    assert open_engine("auto", network, MANY, lambda: pixels[:2], tmp_path / "e", META).name == "litert"
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"check.npz", "meta.json", "network.tflite"}


def test_without_an_image_to_compare_on_nothing_is_converted(network, pixels, tmp_path: Path) -> None:
    engine = open_engine("litert", network, MANY, lambda: pixels[:0], tmp_path / "e", META)
    assert engine.name == "tensorflow"


@pytest.mark.parametrize("damage", ["network.tflite", "check.npz", "cut network.tflite", "other features"])
def test_a_kept_network_that_is_damaged_or_disagrees_is_converted_anew(
    network, pixels, converted: Path, tmp_path: Path, damage: str
) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    for file in converted.iterdir():
        (entry / file.name).write_bytes(file.read_bytes())
    if damage == "other features":  # as on a machine whose kernels round otherwise
        with np.load(entry / "check.npz") as check:
            arrays = dict(check)
        arrays["features"] = arrays["features"] + 2 * AGREEMENT * arrays["features"].max()
        np.savez(entry / "check.npz", **arrays)
    elif damage == "cut network.tflite":
        content = (entry / "network.tflite").read_bytes()
        (entry / "network.tflite").write_bytes(content[:-100])
    else:
        (entry / damage).write_bytes(b"x" * 1000)
    assert open_engine("auto", network, 10, never, entry, META).name == "tensorflow"
    asked = []

    def samples() -> np.ndarray:
        asked.append(1)
        return pixels[:4]

    assert open_engine("litert", network, 10, samples, entry, META).name == "litert"
    assert open_engine("litert", network, 10, samples, entry, META).name == "litert"
    assert asked == [1]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(Noise, "LiteRT disagrees with Keras: features up to "), (Unconvertible, "Could not translate ")],
)
def test_what_litert_cannot_do_runs_in_tensorflow_and_says_why(
    pixels, tmp_path: Path, caplog: pytest.LogCaptureFixture, layer: type, reason: str
) -> None:
    network = build(layer())
    with caplog.at_level(logging.INFO):
        engine = open_engine("auto", network, MANY, lambda: pixels[:4], tmp_path / "e", META)
    assert engine.name == "tensorflow"
    said = [record.getMessage() for record in caplog.records if record.name.startswith("graftserve")]
    assert len(said) == 1
    assert said[0].startswith(f"small runs in TensorFlow, which is slower here than LiteRT: {reason}")
    assert "\n" not in said[0]
    assert not (tmp_path / "e").exists()
    with pytest.raises(TrainingError, match=r"litert: cannot run small: .*; choose auto or tensorflow"):
        open_engine("litert", network, MANY, lambda: pixels[:4], tmp_path / "e", META)


def test_converting_is_silent(pixels, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = open_engine("litert", build(), MANY, lambda: pixels[:4], tmp_path / "e", META)
    run(engine, pixels)
    os.write(1, b"heard\n")
    assert capfd.readouterr() == ("heard\n", "")


def test_a_choice_that_there_is_none_of() -> None:
    assert acceptable_engines("auto") == ("tensorflow", "litert")
    assert acceptable_engines("litert") == ("litert",)
    with pytest.raises(ValueError, match="expected one of auto, tensorflow, litert, got 'gpu'"):
        acceptable_engines("gpu")


def doubling(batch_images: int, lanes: int, during: Callable[[], None] = lambda: None) -> Engine:
    """Features [n, 1]: twice the first pixel."""

    def lane(pixels: list) -> np.ndarray:
        during()
        return np.array([[2 * image[0, 0, 0]] for image in pixels], np.float32)

    return Engine("doubling", (lane,) * lanes, batch_images)


def as_image(number: int) -> np.ndarray:
    return np.full((1, 1, 3), number, np.uint8)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 100])
@pytest.mark.parametrize(("batch_images", "lanes"), [(1, 1), (4, 1), (4, 3)])
def test_items_keep_their_order_and_those_that_fail_are_left_out(
    count: int, batch_images: int, lanes: int
) -> None:
    batches = list(
        extract(doubling(batch_images, lanes), lambda n: None if n % 7 == 3 else as_image(n), range(count))
    )
    good = [number for number in range(count) if number % 7 != 3]
    assert [number for numbers, _ in batches for number in numbers] == good
    for numbers, features in batches:
        np.testing.assert_array_equal(features[:, 0], 2.0 * np.array(numbers))
    assert all(len(numbers) == batch_images for numbers, _ in batches[:-1])


def test_lanes_compute_side_by_side_and_each_alone(network) -> None:
    meet = threading.Barrier(3, timeout=30)  # breaks unless three compute at once
    features = run(doubling(1, 3, lambda: meet.wait() and None), np.stack([as_image(n) for n in range(30)]))
    np.testing.assert_array_equal(features[:, 0], 2.0 * np.arange(30))


def test_a_failing_lane_is_heard_of_and_nothing_goes_on() -> None:
    loaded = []

    def fail() -> None:
        raise MemoryError("no room")

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return as_image(number)

    with pytest.raises(MemoryError, match="no room"):
        list(extract(doubling(2, 1, fail), load, range(10_000)))
    assert len(loaded) < 200
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_images_are_decoded_a_little_ahead_only() -> None:
    loaded = []

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return as_image(number)

    batches = extract(doubling(4, 2), load, range(10_000))
    assert next(batches)[0] == [0, 1, 2, 3]
    batches.close()
    assert len(loaded) < 100
