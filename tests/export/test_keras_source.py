"""Keras models that somebody brings: what they become, and what is refused."""

from collections.abc import Callable
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


def layers() -> list[keras.layers.Layer]:
    return [
        keras.layers.Rescaling(1 / 255),
        keras.layers.RandomFlip(),
        keras.layers.Conv2D(8, 3),
        keras.layers.BatchNormalization(),
        keras.layers.GlobalAveragePooling2D(name="pool"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(3, "softmax"),
    ]


@pytest.mark.parametrize("name", ["model.h5", "model.keras"])
@pytest.mark.parametrize("is_deferred", [False, True])
def test_a_sequential_model(labels: Path, tmp_path: Path, name: str, is_deferred: bool) -> None:
    """Without an Input it is built by its first batch, and its file says that it takes 4 images."""
    if is_deferred:
        model = keras.Sequential(layers())
        model(np.zeros((4, SIDE_PX, SIDE_PX, 3), np.float32))
    else:
        model = keras.Sequential([keras.Input((SIDE_PX, SIDE_PX, 3)), *layers()])
    source = open_keras(saved(model, tmp_path, name), labels, "pixels=0..255")
    assert source.network.widths == {"features": 8, "probabilities": 3}
    assert source.notes == ()
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    np.testing.assert_allclose(
        source.network.run(rows)["probabilities"], expected(model, source, RANGES["0..255"]), atol=1e-5
    )


def test_a_network_within_a_sequential_model(labels: Path, tmp_path: Path) -> None:
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    inner = keras.Model(pixels, keras.layers.Conv2D(8, 3)(pixels), name="backbone")
    pool, head = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((SIDE_PX, SIDE_PX, 3)), inner, pool, head])
    path = saved(model, tmp_path)
    by_default = open_keras(path, labels, "pixels=0..1")
    by_name = open_keras(path, labels, "pixels=0..1", feature_layer="backbone")
    rows = decode_images([golden.content for golden in by_name.goldens], by_name.preprocess).numpy()
    features = np.asarray(inner(rows / np.float32(255))).mean(axis=(1, 2))
    for source in (by_default, by_name):
        np.testing.assert_allclose(source.network.run(rows)["features"], features, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "policy", "pixels"),
    [("uint8", "float32", "0..255"), ("float16", "float32", "0..1"), ("float32", "mixed_float16", "0..1")],
)
def test_other_precisions(labels: Path, tmp_path: Path, dtype: str, policy: str, pixels: str) -> None:
    keras.utils.set_random_seed(0)
    image = keras.Input((SIDE_PX, SIDE_PX, 3), dtype=dtype)
    x = keras.layers.Rescaling(1 / 255 if dtype == "uint8" else 1)(image)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, dtype=policy)(x))
    model = keras.Model(image, keras.layers.Dense(3, "softmax", dtype=policy)(x))
    source = open_keras(saved(model, tmp_path), labels, f"pixels={pixels}")
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    answers = source.network.run(rows)
    assert {array.dtype for array in answers.values()} == {np.dtype(np.float32)}
    probabilities = np.asarray(model((rows / 255).astype(dtype) if pixels == "0..1" else rows), np.float32)
    np.testing.assert_allclose(answers["probabilities"], probabilities, atol=1e-5)
    np.testing.assert_allclose([golden.probabilities for golden in source.goldens], probabilities, atol=1e-5)


def test_the_model_of_a_run(trained, tmp_path: Path) -> None:
    """Its own layers load, and its named outputs are taken as they are."""
    model = trained.load_model()
    cut = trained.preprocess
    settings = f"pixels=0..255,resize={cut.resize},crop_fraction={cut.crop_fraction}"
    source = open_keras(trained.path / "model.keras", trained.path / "labels.txt", settings)
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    answers = model(rows, training=False)
    assert source.preprocess == cut
    for name, rows_of in source.network.run(rows).items():
        np.testing.assert_allclose(rows_of, np.asarray(answers[name]), atol=1e-4, err_msg=name)


def test_kerass_own_normalization_is_not_taken_for_graftserves(labels: Path, tmp_path: Path) -> None:
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = keras.layers.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.1, 0.2, 0.3])(pixels)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(pixels, keras.layers.Dense(3, "softmax")(x))
    source = open_keras(saved(model, tmp_path, "model.h5"), labels, "pixels=0..1")
    np.testing.assert_allclose(
        [golden.probabilities for golden in source.goldens],
        expected(model, source, RANGES["0..1"]),
        atol=1e-5,
    )


def several(outputs: Callable[[Any, Any, Any], Any]) -> keras.Model:
    """`outputs` is given a map [N, h, w, 8], features [N, 8] and logits [N, 3]."""
    keras.utils.set_random_seed(0)
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    spatial = keras.layers.Conv2D(8, 3)(pixels)
    features = keras.layers.GlobalAveragePooling2D()(spatial)
    return keras.Model(pixels, outputs(spatial, features, keras.layers.Dense(3, name="logits")(features)))


@pytest.mark.parametrize(
    "outputs",
    [
        lambda spatial, features, logits: {"embedding": features, "logits": logits},
        lambda spatial, features, logits: {"map": spatial, "classes": logits},
        lambda spatial, features, logits: [spatial, logits],
        lambda spatial, features, logits: {"probabilities": keras.layers.Softmax()(logits), "logits": logits},
        lambda spatial, features, logits: {"features": spatial, "probabilities": logits},
        lambda spatial, features, logits: keras.ops.softmax(logits),
    ],
)
def test_one_of_several_outputs(labels: Path, tmp_path: Path, outputs) -> None:
    model = several(outputs)
    source = open_keras(saved(model, tmp_path), labels, "pixels=0..1")
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    graph = keras.Model(model.input, [model.get_layer("logits").input, model.get_layer("logits").output])
    features, logits = (np.asarray(array) for array in graph(rows / np.float32(255)))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    answers = source.network.run(rows)
    np.testing.assert_allclose(answers["probabilities"], softmax, atol=1e-5)
    np.testing.assert_allclose(answers["features"], features, atol=1e-5)


def test_a_dense_layer_that_is_not_the_head_gives_no_features(labels: Path, tmp_path: Path) -> None:
    """Squeeze and excitation has Dense layers, too; one for each place in the image is not of rank 2."""
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = keras.layers.Conv2D(8, 3)(pixels)
    gate = keras.layers.Dense(8, "sigmoid")(keras.layers.GlobalAveragePooling2D()(x))
    x = keras.layers.Multiply()([x, keras.layers.Reshape((1, 1, 8))(gate)])
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Dense(3)(x))
    source = open_keras(
        saved(keras.Model(pixels, keras.layers.Softmax()(x)), tmp_path), labels, "pixels=0..1"
    )
    assert source.network.widths == {"probabilities": 3}
    assert "name it with --feature-layer" in source.notes[0]


def test_what_cannot_be_the_feature_layer(labels: Path, tmp_path: Path) -> None:
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    inner = keras.Model(pixels, keras.layers.Conv2D(8, 8, strides=8)(pixels), name="backbone")
    image = keras.Input((SIDE_PX, SIDE_PX, 3))
    tokens = keras.layers.Reshape((36, 8), name="tokens")(inner(image))
    x = keras.layers.GlobalAveragePooling1D()(tokens)
    path = saved(keras.Model(image, keras.layers.Dense(3, "softmax")(x)), tmp_path)
    with pytest.raises(SourceError, match="backbone is a model by itself; name the layer after it"):
        open_keras(path, labels, "pixels=0..1", feature_layer="backbone")
    with pytest.raises(SourceError, match=r"got tokens, which gives \[N, 36, 8\]"):
        open_keras(path, labels, "pixels=0..1", feature_layer="tokens")


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


def counts() -> keras.Model:
    pixels = keras.Input((8, 8, 3), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(pixels))
    return keras.Model(pixels, keras.layers.Dense(3, "softmax")(x))


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
            r"expected one input of images \[N, side, side, 3\], got \[N, 8, 8, 1\]",
        ),
        (lambda: small_input(12), "expected one input of images"),
        (lambda: small_input(8, 16, 3), "expected square images, got an input of 8 x 16"),
        (lambda: small_input(8, 8, 3, batch=4), "takes exactly 4 images at a time"),
        (lambda: small_input(8, None, 3), "expected square images, got an input of 8 x any"),
        (counts, "expected an input in float32, float16 or uint8, got int32"),
        (two_outputs, r"expected one output \[N, classes\] of floats, .* got 0 float32 \[N, 3\], 1 float32"),
        (lambda: several(lambda spatial, features, logits: {"probabilities": spatial}), r"\[N, 46, 46, 8\]"),
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
    convolutional().save_weights(tmp_path / "only.weights.h5")
    with pytest.raises(SourceError, match="Weights alone are no model"):
        open_keras(tmp_path / "only.weights.h5", labels, "pixels=0..1")


def test_layers_of_ones_own(labels: Path, tmp_path: Path) -> None:
    class Double(keras.layers.Layer):
        def call(self, pixels: Any) -> Any:
            return 2 * pixels

    model = keras.Sequential(
        [keras.Input((8, 8, 3)), Double(), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    with pytest.raises(
        SourceError, match=r"Could not locate class 'Double'\. A model with layers of your own"
    ):
        open_keras(saved(model, tmp_path), labels, "pixels=0..1")


def test_a_model_that_fails_on_its_images(labels: Path, tmp_path: Path) -> None:
    pixels = keras.Input((None, None, 3))
    half, third = (keras.layers.Conv2D(3, 1, strides=step)(pixels) for step in (2, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Concatenate()([half, third]))
    path = saved(keras.Model(pixels, keras.layers.Dense(3, "softmax")(x)), tmp_path)
    with pytest.raises(SourceError, match="does not run, or cannot be frozen"):
        open_keras(path, labels, "pixels=0..1,side_px=32")


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


def test_pixels_that_a_model_of_integers_cannot_take(labels: Path, tmp_path: Path) -> None:
    image = keras.Input((SIDE_PX, SIDE_PX, 3), dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))
    path = saved(keras.Model(image, keras.layers.Dense(3, "softmax")(x)), tmp_path)
    for text in ("resnet50", "pixels=0..1"):
        with pytest.raises(SourceError, match="takes pixels in uint8, so it normalises by itself"):
            open_keras(path, labels, text)


@pytest.mark.parametrize("asked", ["softmax", "none"])
def test_one_output_has_no_softmax(tmp_path: Path, asked: str) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\n")
    model = convolutional(None, units=1)
    model.get_layer("top").set_weights([np.zeros((8, 1)), np.array([5.0])])
    with pytest.raises(SourceError, match="expected auto or sigmoid for one output and two labels"):
        open_keras(saved(model, tmp_path), labels, "pixels=0..1", activation=asked)


def test_temperatures(labels: Path, tmp_path: Path) -> None:
    path = saved(convolutional("sigmoid"), tmp_path)
    with pytest.raises(SourceError, match="classes that do not exclude each other have none"):
        open_keras(path, labels, "pixels=0..1", activation="none", temperature=2.0)
    with pytest.raises(SourceError, match="temperature: expected a number above 0, got 0"):
        open_keras(path, labels, "pixels=0..1", temperature=0)


def test_other_activations_give_no_probabilities(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="its outputs are no probabilities"):
        open_keras(saved(convolutional("tanh"), tmp_path), labels, "pixels=0..1")


def test_probabilities_in_bfloat16(labels: Path, tmp_path: Path) -> None:
    image = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = keras.layers.GlobalAveragePooling2D()(image)
    top = keras.layers.Dense(3, "softmax", dtype="mixed_bfloat16")
    source = open_keras(saved(keras.Model(image, top(x)), tmp_path), labels, "pixels=0..255")
    assert source.notes == ()


def test_flat_goldens_have_no_label_and_nothing_is_passed_over(
    photo_dir: Path, labels: Path, tmp_path: Path
) -> None:
    path = saved(convolutional(), tmp_path)
    source = open_keras(path, labels, "pixels=0..1", goldens=photo_dir / "red")
    assert {golden.label for golden in source.goldens} == {None}
    (photo_dir / "red" / "notes.txt").write_text("no image")
    with pytest.raises(SourceError, match=r"goldens: .*notes.txt: expected images only"):
        open_keras(path, labels, "pixels=0..1", goldens=photo_dir)


def test_a_setting_stands_once() -> None:
    with pytest.raises(SourceError, match="preprocess: pixels stands there twice"):
        parse_preprocess("pixels=0..1,pixels=0..255", 96, Path("m"))
