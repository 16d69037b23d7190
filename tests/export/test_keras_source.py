"""Keras models that somebody brings: what they become, and what is refused."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from graftserve.client.wire.contract import FEATURES, SERVING_DEFAULT
from graftserve.export import ExportOptions, SourceError, export_model
from graftserve.export.brought import parse_preprocess, read_labels
from graftserve.export.keras_source import open_keras
from graftserve.export.verify import open_signatures
from graftserve.training.backbones import BACKBONES
from graftserve.training.calibration import apply_temperature
from graftserve.training.preprocess import Preprocess, decode_images

SIDE_PX = 48
CLASSES = ("red", "green", "blue")


def convolutional(activation: str | None = "softmax", units: int = 3, seed: int = 0) -> keras.Model:
    """A small network with batch normalisation whose statistics are not the trivial ones."""
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, name="first")(pixels)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(pixels, keras.layers.Dense(units, activation, name="top")(x))
    random = np.random.default_rng(seed)
    norm = model.get_layer("norm")
    norm.set_weights([np.abs(random.normal(1, 0.3, weight.shape)) for weight in norm.get_weights()])
    return model


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{label}\n" for label in CLASSES))
    return path


@pytest.fixture
def photo_dir(photos: dict[str, Any], encode, tmp_path: Path) -> Path:
    folder = tmp_path / "photos" / "red"
    folder.mkdir(parents=True)
    for name, photo in photos.items():
        (folder / f"{name}.jpg").write_bytes(encode(photo))
    return folder.parent


def saved(model: keras.Model, tmp_path: Path, name: str = "model.keras") -> Path:
    path = tmp_path / name
    model.save(path)
    return path


def expected(model: keras.Model, source, normalise) -> np.ndarray:
    """What the original says of the goldens, its pixels normalised here."""
    pixels = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    return np.asarray(model(normalise(pixels.astype(np.float32)), training=False))


RANGES = {
    "0..255": lambda pixels: pixels,
    "0..1": lambda pixels: pixels / 255,
    "-1..1": lambda pixels: pixels / 127.5 - 1,
    "caffe": lambda pixels: keras.applications.imagenet_utils.preprocess_input(pixels.copy(), mode="caffe"),
    "torch": lambda pixels: keras.applications.imagenet_utils.preprocess_input(pixels.copy(), mode="torch"),
}


@pytest.mark.parametrize("pixels", RANGES)
def test_it_answers_as_the_original_does(photo_dir: Path, labels: Path, tmp_path: Path, pixels: str) -> None:
    model = convolutional()
    source = open_keras(saved(model, tmp_path), labels, f"pixels={pixels}", goldens=photo_dir)
    probabilities = expected(model, source, RANGES[pixels])
    np.testing.assert_allclose([golden.probabilities for golden in source.goldens], probabilities, atol=1e-5)
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    np.testing.assert_allclose(source.network.run(rows)["probabilities"], probabilities, atol=1e-5)
    assert source.labels == CLASSES
    assert {golden.label for golden in source.goldens} == {"red"}
    assert source.preprocess == Preprocess(SIDE_PX)
    assert source.are_goldens_real
    assert source.notes == ()


@pytest.mark.parametrize("name", ["model.h5", "model.keras"])
def test_it_is_published_like_a_run(labels: Path, tmp_path: Path, name: str) -> None:
    model = convolutional()
    source = open_keras(saved(model, tmp_path, name), labels, "pixels=0..1")
    assert not source.are_goldens_real
    version = export_model(
        source, tmp_path / "mine", ExportOptions(signature_outputs={SERVING_DEFAULT: (), FEATURES: ()})
    )
    assert version.check.largest_difference < 1e-5
    images = [golden.content for golden in source.goldens]
    with open_signatures(version.path) as signatures:
        answers = signatures.run(SERVING_DEFAULT, [*images, b"broken"])
        assert answers["valid"].tolist() == [True] * len(images) + [False]
        np.testing.assert_allclose(
            answers["probabilities"][:-1], expected(model, source, RANGES["0..1"]), atol=1e-5
        )
        assert signatures.run(FEATURES, images)["features"].shape == (len(images), 8)
    assert "Not known here: the model was trained elsewhere." in (version.path / "README.md").read_text()


def test_logits_get_their_softmax(labels: Path, tmp_path: Path) -> None:
    model = convolutional(activation=None)
    path = saved(model, tmp_path)
    source = open_keras(path, labels, "pixels=0..1", temperature=2.0)
    assert source.notes == ("its outputs are taken for logits, and the softmax is applied",)
    logits = expected(model, source, RANGES["0..1"])
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        [golden.probabilities for golden in source.goldens], apply_temperature(softmax, 2.0), atol=1e-5
    )
    sigmoid = open_keras(path, labels, "pixels=0..1", activation="sigmoid")
    np.testing.assert_allclose(
        [golden.probabilities for golden in sigmoid.goldens], 1 / (1 + np.exp(-logits)), atol=1e-5
    )
    assert "scores do not add up to 1" in sigmoid.notes[0]


def test_classes_that_do_not_exclude_each_other_have_to_be_meant(labels: Path, tmp_path: Path) -> None:
    path = saved(convolutional("sigmoid"), tmp_path)
    with pytest.raises(SourceError, match="say --activation none if it is meant to be so"):
        open_keras(path, labels, "pixels=0..1")
    assert open_keras(path, labels, "pixels=0..1", activation="none").labels == CLASSES


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_one_output_for_two_labels(tmp_path: Path, activation: str | None) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\n")
    model = convolutional(activation, units=1)
    source = open_keras(saved(model, tmp_path), labels, "pixels=0..1")
    dog = expected(model, source, RANGES["0..1"])[:, 0]
    if activation is None:
        dog = 1 / (1 + np.exp(-dog))
    probabilities = np.array([golden.probabilities for golden in source.goldens])
    np.testing.assert_allclose(probabilities, np.stack([1 - dog, dog], axis=1), atol=1e-5)


def test_the_layer_of_the_features(labels: Path, tmp_path: Path) -> None:
    path = saved(convolutional(), tmp_path)
    assert open_keras(path, labels, "pixels=0..1").network.widths == {"features": 8, "probabilities": 3}
    spatial = open_keras(path, labels, "pixels=0..1", feature_layer="relu")
    assert spatial.network.widths["features"] == 8
    with pytest.raises(SourceError, match=r"feature layer: expected one of .*pool, top.*, got 'nope'"):
        open_keras(path, labels, "pixels=0..1", feature_layer="nope")


def test_without_a_dense_layer_there_are_no_features(labels: Path, tmp_path: Path) -> None:
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    model = keras.Model(pixels, keras.layers.Softmax()(keras.layers.GlobalAveragePooling2D()(pixels)))
    source = open_keras(saved(model, tmp_path), labels, "pixels=0..1")
    assert source.network.widths == {"probabilities": 3}
    assert "name it with --feature-layer" in source.notes[0]


def test_any_side_has_to_be_chosen(labels: Path, tmp_path: Path) -> None:
    pixels = keras.Input((None, None, 3))
    head = keras.layers.Dense(3, "softmax")
    path = saved(keras.Model(pixels, head(keras.layers.GlobalAveragePooling2D()(pixels))), tmp_path)
    with pytest.raises(SourceError, match="takes images of any size: say which"):
        open_keras(path, labels, "pixels=0..1")
    assert open_keras(path, labels, "pixels=0..1,side_px=64").preprocess.side_px == 64


def small_input(*shape: int | None, batch: int | None = None) -> keras.Model:
    pixels = keras.Input(shape, batch_size=batch)
    x = keras.layers.GlobalAveragePooling2D()(pixels) if len(shape) == 3 else keras.layers.Flatten()(pixels)
    return keras.Model(pixels, keras.layers.Dense(3, "softmax")(x))


def two_outputs() -> keras.Model:
    pixels = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(pixels)
    return keras.Model(pixels, [keras.layers.Dense(3)(x), keras.layers.Dense(3)(x)])


def not_numbers() -> keras.Model:
    model = convolutional()
    top = model.get_layer("top")
    kernel, bias = top.get_weights()
    top.set_weights([kernel, bias * np.nan])
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: small_input(8, 8, 1),
            r"expected one input of images \[N, side, side, 3\], got \['N', 8, 8, 1\]",
        ),
        (lambda: small_input(12), "expected one input of images"),
        (lambda: small_input(8, 16, 3), "expected square images, got an input of 8 x 16"),
        (lambda: small_input(8, 8, 3, batch=4), "takes exactly 4 images at a time"),
        (two_outputs, r"expected one output \[N, classes\]"),
        (lambda: convolutional(units=4), "the head has 4 classes, but .*labels.txt has 3 labels"),
        (not_numbers, "1 weights are not finite numbers, the first: top/bias"),
    ],
)
def test_what_is_refused(labels: Path, tmp_path: Path, build, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_keras(saved(build(), tmp_path), labels, "pixels=0..1")


def test_what_is_no_model(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_keras(tmp_path / "none.keras", labels, "pixels=0..1")
    (tmp_path / "text.keras").write_text("no model")
    with pytest.raises(SourceError, match="cannot load it"):
        open_keras(tmp_path / "text.keras", labels, "pixels=0..1")


def test_goldens_have_to_be_images(labels: Path, tmp_path: Path) -> None:
    path = saved(convolutional(), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="goldens: "):
        open_keras(path, labels, "pixels=0..1", goldens=tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n\nb\n", "line 2: expected a label, got an empty line"),
        ("a\nb\na\n", "line 3: 'a' stands in line 1, too"),
        ("a\n", "expected at least two labels"),
        ("", "expected at least two labels"),
    ],
)
def test_labels_are_checked(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(content)
    with pytest.raises(SourceError, match=message):
        read_labels(path, Path("model.keras"))


def test_labels_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffgänseblümchen\nrose, red\n".encode())
    assert read_labels(path, Path("m")) == ("gänseblümchen", "rose, red")
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(SourceError, match="expected UTF-8"):
        read_labels(path, Path("m"))
    with pytest.raises(SourceError, match="give --labels"):
        read_labels(None, Path("m"))


def test_preprocess_by_a_backbones_name() -> None:
    row = BACKBONES["resnet50"]
    preprocess, pixel_range = parse_preprocess("resnet50", 160, Path("m"))
    assert (preprocess.side_px, preprocess.crop_fraction, pixel_range) == (
        160,
        row.crop_fraction,
        row.pixel_range,
    )


def test_preprocess_by_settings() -> None:
    text = "pixels=-1..1, resize=squash, crop_fraction=0.9, max_pixels=1000000"
    preprocess, pixel_range = parse_preprocess(text, 96, Path("m"))
    assert preprocess == Preprocess(96, "squash", 0.9, 1_000_000)
    assert pixel_range == BACKBONES["mobilenet-v2"].pixel_range


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "what pixels it expects cannot be guessed"),
        ("resnet5", "got 'resnet5'; did you mean resnet50"),
        ("pixel=0..1", "got 'pixel'; did you mean pixels"),
        ("resize=crop", "pixels: expected one of 0..255, 0..1, -1..1, caffe, torch, got nothing"),
        ("pixels=0..2", "pixels: expected one of .*, got 0..2"),
        ("pixels=0..1,crop_fraction=x", "preprocess: could not convert"),
        ("pixels=0..1,crop_fraction=2", "crop_fraction: expected a number in"),
        ("pixels=0..1,resize=fit", "resize: expected one of crop, squash"),
        ("pixels=0..1,side_px=32", "side_px: the model takes 96, got 32"),
    ],
)
def test_preprocess_is_checked(text: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_preprocess(text, 96, Path("m"))


@pytest.mark.slow
def test_a_network_of_keras_applications(photo_dir: Path, labels: Path, tmp_path: Path) -> None:
    model = keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3), classes=3)
    source = open_keras(saved(model, tmp_path), labels, "mobilenet-v2", goldens=photo_dir)
    assert source.network.widths == {"features": 1280, "probabilities": 3}
    version = export_model(source, tmp_path / "mobile", ExportOptions())
    assert version.check.largest_difference < 1e-5
    assert version.check.lite_difference < 1e-4
