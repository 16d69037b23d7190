"""Bare SavedModels: what they become, and what is refused."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.util import deprecation

from graftserve.export import ExportOptions, SourceError, export_model
from graftserve.export.saved_model_source import open_saved_model
from graftserve.training.preprocess import decode_images

SIDE_PX = 24
IMAGES = tf.TensorSpec([None, SIDE_PX, SIDE_PX, 3], tf.float32, name="images")


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("red\ngreen\nblue\n")
    return path


class Colours(tf.Module):
    """The mean of each colour, as a network with a variable."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tf.Variable(4.0)

    def logits(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        features = tf.reduce_mean(images, axis=[1, 2])
        return {"embedding": features, "logits": self.scale * features}


def save(folder: Path, call, *specs: tf.TensorSpec, name: str = "serving_default") -> Path:
    """A SavedModel with one signature; `call` may be the method of a module."""
    module = getattr(call, "__self__", None) or tf.Module()
    function = tf.function(call, input_signature=specs)
    module.signature = function
    tf.saved_model.save(module, str(folder), signatures={name: function})
    return folder


def test_logits_and_an_embedding(labels: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "colours", Colours().logits, IMAGES)
    source = open_saved_model(folder, labels, "pixels=0..1")
    assert (source.kind, source.name) == ("saved_model", "colours")
    assert source.network.widths == {"features": 3, "probabilities": 3}
    pixels = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    logits = 4 * (pixels / 255).mean(axis=(1, 2))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose([golden.probabilities for golden in source.goldens], softmax, atol=1e-5)
    np.testing.assert_allclose(source.network.run(pixels)["probabilities"], softmax, atol=1e-5)
    version = export_model(source, tmp_path / "models" / "colours", ExportOptions())
    assert version.check.signatures == ("serving_default", "features", "pixels", "classify")
    assert version.check.largest_difference < 1e-5


def test_what_keras_exports(labels: Path, tmp_path: Path) -> None:
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(pixels))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(pixels, keras.layers.Dense(3, "softmax")(x))
    model.export(tmp_path / "exported", verbose=False)
    source = open_saved_model(tmp_path / "exported", labels, "pixels=-1..1")
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    expected = np.asarray(model(rows / 127.5 - 1, training=False))
    np.testing.assert_allclose(source.network.run(rows)["probabilities"], expected, atol=1e-5)
    assert source.notes == ("no features signature: the SavedModel gives none",)
    version = export_model(source, tmp_path / "models" / "exported", ExportOptions())
    assert version.check.signatures == ("serving_default", "pixels", "classify")


@pytest.mark.parametrize("use_resource", [False, True])
def test_what_tensorflow_1_wrote(labels: Path, tmp_path: Path, use_resource: bool) -> None:
    """Its variables were no resources, and are read in a Session."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        images = v1.placeholder(tf.float32, IMAGES.shape)
        with v1.variable_scope("network", use_resource=use_resource):
            scale = v1.get_variable("scale", initializer=4.0)
        features = tf.reduce_mean(images, axis=[1, 2])
        logits = scale * features
        session.run(v1.global_variables_initializer())
        outputs = {"logits": logits, "feature_vector": features}
        with deprecation.silence():
            v1.saved_model.simple_save(session, str(tmp_path / "old"), {"images": images}, outputs)
    source = open_saved_model(tmp_path / "old", labels, "pixels=0..1")
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    features = (rows / 255).mean(axis=(1, 2))
    softmax = np.exp(4 * features) / np.exp(4 * features).sum(axis=1, keepdims=True)
    np.testing.assert_allclose([golden.probabilities for golden in source.goldens], softmax, atol=1e-5)
    np.testing.assert_allclose(source.network.run(rows)["probabilities"], softmax, atol=1e-5)
    np.testing.assert_allclose(source.network.run(rows)["features"], features, atol=1e-5)
    version = export_model(source, tmp_path / "models" / "old", ExportOptions())
    assert version.check.largest_difference < 1e-5


def test_loops_keep_their_shape(labels: Path, tmp_path: Path) -> None:
    colours = Colours()

    def thrice(images: tf.Tensor) -> dict[str, tf.Tensor]:
        start = [0, tf.reduce_mean(images, axis=[1, 2])]
        _, rows = tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, x * colours.scale), start)
        return {"logits": rows}

    colours.thrice = thrice
    function = tf.function(thrice, input_signature=[IMAGES])
    colours.signature = function
    tf.saved_model.save(colours, str(tmp_path / "loop"), signatures={"serving_default": function})
    source = open_saved_model(tmp_path / "loop", labels, "pixels=0..1")
    rows = decode_images([golden.content for golden in source.goldens], source.preprocess).numpy()
    logits = 64 * (rows / 255).mean(axis=(1, 2))
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(source.network.run(rows)["probabilities"], softmax, atol=1e-5)


def test_only_floats_are_probabilities(labels: Path, tmp_path: Path) -> None:
    def call(images: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.nn.softmax(tf.reduce_mean(images, axis=[1, 2]))
        top = tf.math.top_k(rows, 3)
        return {"scores": rows, "classes": top.indices, "features": top.indices, "count": tf.shape(rows)[0]}

    source = open_saved_model(save(tmp_path / "model", call, IMAGES), labels, "pixels=0..1")
    assert source.network.widths == {"probabilities": 3}


class Stateful(tf.Module):
    """What a frozen graph does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.count = tf.Variable(1.0)
        values = tf.lookup.KeyValueTensorInitializer(
            tf.range(3, dtype=tf.int64), tf.constant([1.0, 2.0, 3.0])
        )
        self.table = tf.lookup.StaticHashTable(values, 0.0)

    def counts(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        self.count.assign_add(1.0)
        return {"y": tf.nn.softmax(tf.reduce_mean(images, axis=[1, 2]) * self.count)}

    def looks_up(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        scale = tf.ensure_shape(self.table.lookup(tf.range(3, dtype=tf.int64)), [3])
        return {"y": tf.nn.softmax(tf.reduce_mean(images, axis=[1, 2]) * scale)}

    def calls_python(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.numpy_function(lambda rows: rows, [tf.reduce_mean(images, axis=[1, 2])], tf.float32)
        return {"y": tf.nn.softmax(tf.ensure_shape(rows, [None, 3]))}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("counts", r"changes its variables as it answers.* \(AssignAddVariableOp\)"),
        ("looks_up", r"looks something up in a hash table.* \(LookupTableFindV2\)"),
        ("calls_python", r"calls Python code.* \(PyFunc\)"),
    ],
)
def test_state_that_cannot_be_frozen(labels: Path, tmp_path: Path, method: str, message: str) -> None:
    folder = save(tmp_path / "model", getattr(Stateful(), method), IMAGES)
    with pytest.raises(SourceError, match=message):
        open_saved_model(folder, labels, "pixels=0..1")


def test_another_signature(labels: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "colours", Colours().logits, IMAGES, name="classify")
    with pytest.raises(SourceError, match="signature: expected one of classify, got 'serving_default'"):
        open_saved_model(folder, labels, "pixels=0..1")
    assert open_saved_model(folder, labels, "pixels=0..1", signature="classify").labels[0] == "red"


def probabilities(images: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"y": tf.nn.softmax(tf.reduce_mean(tf.cast(images, tf.float32), axis=[1, 2]))}


def spec(*shape: int | None, dtype: tf.DType = tf.float32) -> tf.TensorSpec:
    return tf.TensorSpec(shape, dtype, name="images")


@pytest.mark.parametrize(
    ("call", "specs", "message"),
    [
        (lambda x: {"y": x}, [spec()], r"expected an input \[N, side, side, 3\]"),
        (lambda x: {"y": x}, [spec(None, 24, 24, 4)], r"expected three channels, RGB, .* \[N, 24, 24, 4\]"),
        (lambda x: {"y": x}, [spec(None, 24, 24, 3, dtype=tf.float64)], "got images float64"),
        (lambda x: {"embedding": x[:, 0, 0]}, [IMAGES], r"got embedding float32 \[N, 3\]"),
        (lambda x: {"y": x}, [spec(None, dtype=tf.string)], "takes strings, so it decodes images by itself"),
        (lambda x: {"y": x[:, :, 0, 0]}, [spec(None, 3, 24, 24)], "takes channels first"),
        (probabilities, [spec(8, 24, 24, 3)], "takes exactly 8 images at a time"),
        (probabilities, [spec(None, 24, 32, 3)], "expected square images, got an input of 24 x 32"),
        (
            lambda a, b: {"y": a + b},
            [spec(None, 24, 24, 3), tf.TensorSpec([], tf.float32, name="b")],
            "one input",
        ),
        (lambda x: {"a": x[:, 0, 0], "b": x[:, 0, 1]}, [IMAGES], r"expected one output \[N, classes\]"),
        (lambda x: {"y": x[:, 0, 0, :2]}, [IMAGES], "the head has 2 classes, but .*labels.txt has 3 labels"),
        (lambda x: {"y": probabilities(x)["y"] * np.nan}, [IMAGES], "probabilities are no finite numbers"),
        (
            lambda x: {"y": tf.nn.softmax(tf.random.normal([tf.shape(x)[0], 3]))},
            [IMAGES],
            "answers differently once its weights are frozen",
        ),
    ],
)
def test_what_is_refused(labels: Path, tmp_path: Path, call, specs, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_saved_model(save(tmp_path / "model", call, *specs), labels, "pixels=0..1")


def test_weights_that_are_no_numbers(labels: Path, tmp_path: Path) -> None:
    colours = Colours()
    colours.scale.assign(np.nan)
    with pytest.raises(SourceError, match="1 weights are not finite numbers"):
        open_saved_model(save(tmp_path / "model", colours.logits, IMAGES), labels, "pixels=0..1")


def test_what_is_no_model(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot load it"):
        open_saved_model(tmp_path, labels, "pixels=0..1")
