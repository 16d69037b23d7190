"""Weights from files of every layout into a network that numbers its unnamed layers otherwise."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from graftserve.training import WeightsError
from graftserve.training.efficientnet_lite import build_efficientnet_lite, published_layer_name
from graftserve.training.weight_files import StoredLayer, StoredWeights, read_weights
from graftserve.training.weights import (
    WeightTable,
    describe_weights,
    load_weights,
    number_from_zero,
    weights_of,
)

SIDE_PX = 12


def build(seed: int) -> keras.Model:
    """A network with named and unnamed layers, every weight of it random."""
    image = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = layers.Conv2D(8, 3, name="block1_conv")(image)
    x = layers.BatchNormalization(name="block1_bn")(x)
    x = layers.MaxPooling2D(name="block1_pool")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="block2_depthwise")(x)
    x = layers.SeparableConv2D(8, 3, padding="same", use_bias=False, name="block2_separable")(x)
    for _ in range(2):
        x = layers.BatchNormalization(scale=False)(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.Conv2D(4, 1, name="block10_conv")(x)
    network = keras.Model(image, layers.GlobalAveragePooling2D()(x), name="small")
    values = np.random.default_rng(seed)
    network.set_weights([values.uniform(0.1, 1, weight.shape) for weight in network.weights])
    return network


def with_top(network: keras.Model, *, nested: bool) -> keras.Model:
    """The same weights inside a classifier, as one layer of it or unpacked."""
    image = keras.Input((SIDE_PX, SIDE_PX, 3))
    features = network(image) if nested else network.output
    scores = layers.Dense(5, name="predictions")(layers.Dense(7)(features))
    return keras.Model(image if nested else network.input, scores)


@pytest.fixture(scope="module")
def source() -> keras.Model:
    build(0)  # so that the numbers of the unnamed layers do not begin at zero
    return build(1)


@pytest.fixture
def target() -> keras.Model:
    network = build(2)
    number_from_zero(network)
    return network


def assert_same(target: keras.Model, source: keras.Model) -> None:
    for name, before, after in zip(
        [weight.path for weight in source.weights], source.get_weights(), target.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(before, after, err_msg=name)


def statuses(table: WeightTable) -> dict[str, str]:
    return {row.layer: row.status for row in table.rows}


# Writers of layouts that the installed Keras does not write


def legacy(
    path: Path,
    network: keras.Model,
    variable_name: Callable[[str, str], str] = lambda layer, variable: f"{layer}/{variable}:0",
    *,
    layer_name: Callable[[str], str] = str,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda _, array: array,
    attributes: Mapping[str, Any] | None = None,
    most: int = 1000,
) -> Path:
    """As Keras 1 and 2 lay weights out: layer_names and weight_names. most: names in one attribute."""

    def put(group: h5py.Group, attribute: str, names: list[str]) -> None:
        encoded = np.array([name.encode() for name in names], "S") if names else np.zeros(0)
        if len(names) <= most:
            group.attrs[attribute] = encoded
        else:
            for part in range(0, len(names), most):
                group.attrs[f"{attribute}{part // most}"] = encoded[part : part + most]

    with h5py.File(path, "w") as file:
        file.attrs.update(attributes or {})
        put(file, "layer_names", [layer_name(layer.name) for layer in network.layers])
        for layer in network.layers:
            name = layer_name(layer.name)
            group = file.create_group(name)
            names = [variable_name(name, weight.name) for weight in layer.weights]
            put(group, "weight_names", names)
            for weight, stored in zip(layer.weights, names, strict=True):
                group[stored] = change(weight.name, weight.numpy())
    return path


KERAS_2 = {"keras_version": b"2.2.4", "backend": b"tensorflow"}


def keras_1_variable(layer: str, variable: str) -> str:
    letter = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    return f"{layer}_{letter.get(variable, variable)}_1:0"


def slim_checkpoint(folder: Path, values: Mapping[str, np.ndarray]) -> Path:
    """Name-based, as TensorFlow 1 and Slim save."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in values.items():
            tf.compat.v1.get_variable(name, initializer=value)
        session.run(tf.compat.v1.global_variables_initializer())
        return Path(tf.compat.v1.train.Saver().save(session, str(folder / "model.ckpt")))


def named_values(network: keras.Model) -> dict[str, np.ndarray]:
    return {f"{layer.name}/{w.name}": w.numpy() for layer in network.layers for w in layer.weights}


def keras_2_checkpoint(folder: Path, network: keras.Model) -> Path:
    """Object-based, with Keras 2's names of the edges and the variables' full names."""

    class Node(tf.Module):
        pass

    root, with_weights = Node(), 0
    for layer in network.layers:
        if layer.weights:
            node = Node()
            setattr(root, f"layer_with_weights-{with_weights}", node)
            with_weights += 1
            for weight in layer.weights:
                setattr(node, weight.name, tf.Variable(weight.numpy(), name=f"{layer.name}/{weight.name}"))
    root.save_counter = tf.Variable(1, dtype=tf.int64)
    return Path(tf.train.Checkpoint(root).write(str(folder / "ckpt")))


def without_names(path: Path, *, keras_2: bool = False) -> Path:
    """The file as early versions of Keras 3 wrote it, or Keras 2.13."""
    with h5py.File(path, "r+") as file:
        groups: list[str] = []
        file.visit(groups.append)
        for group in groups:
            if group.endswith("vars"):
                file[group].attrs.pop("name", None)
        for group in sorted(groups, key=len, reverse=True) if keras_2 else ():
            if group.rpartition("/")[2] == "layers":
                file.move(group, f"{group.removesuffix('layers')}_layer_checkpoint_dependencies")
    return path


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
class TestLayouts:
    @pytest.mark.parametrize("model", ["network", "flat", "nested"])
    @pytest.mark.parametrize("ending", [".weights.h5", ".keras", ".h5"])
    def test_of_keras_3(self, source, target, tmp_path: Path, ending: str, model: str) -> None:
        whole = source if model == "network" else with_top(source, nested=model == "nested")
        path = tmp_path / f"some{ending}"
        (whole.save_weights if ending == ".weights.h5" else whole.save)(path)
        table = load_weights(target, read_weights(path))
        assert_same(target, source)
        skipped = [row.layer for row in table.of("skipped")]
        assert skipped[-1:] == ([] if model == "network" else ["predictions"])
        assert len(table.of("loaded")) == 9

    @pytest.mark.parametrize("keras_2", [False, True])
    @pytest.mark.parametrize("nested", [False, True])
    def test_of_early_keras_3_without_names(
        self, source, target, tmp_path: Path, nested: bool, keras_2: bool
    ) -> None:
        path = tmp_path / "some.weights.h5"
        with_top(source, nested=nested).save_weights(path)
        table = load_weights(target, read_weights(without_names(path, keras_2=keras_2)))
        assert_same(target, source)
        assert [row.layer for row in table.of("skipped")] == ["dense", "dense_1"]

    def test_of_keras_2_in_an_archive(self, source, target, tmp_path: Path) -> None:
        path = tmp_path / "some.keras"
        with_top(source, nested=True).save(path)
        shutil.unpack_archive(path, tmp_path / "some", "zip")
        without_names(tmp_path / "some" / "model.weights.h5", keras_2=True)
        shutil.make_archive(str(path), "zip", tmp_path / "some")
        table = load_weights(target, read_weights(tmp_path / "some.keras.zip"))
        assert_same(target, source)
        assert statuses(table)["predictions"] == "skipped"

    @pytest.mark.parametrize("most", [1000, 3])
    def test_of_keras_2(self, source, target, tmp_path: Path, most: int) -> None:
        path = legacy(tmp_path / "some.h5", source, attributes=KERAS_2, most=most)
        load_weights(target, read_weights(path))
        assert_same(target, source)

    def test_of_keras_1(self, source, target, tmp_path: Path) -> None:
        def old(name: str) -> str:
            return re.sub(r"^conv2d", "convolution2d", name).replace(
                "batch_normalization", "batchnormalization"
            )

        path = legacy(tmp_path / "some.h5", source, keras_1_variable, layer_name=old)
        table = load_weights(target, read_weights(path))
        assert_same(target, source)
        assert {row.layer: row.reason for row in table.rows}["conv2d"].startswith("as convolution2d_")

    def test_of_keras_2_from_before_its_layers_were_renamed(self, source, target, tmp_path: Path) -> None:
        """MobileNetV3 and DenseNet were published as "conv1/bn", which is conv1_bn today."""
        whole = with_top(source, nested=False)
        path = legacy(
            tmp_path / "some.h5", whole, layer_name=lambda name: name.replace("_", "/", 1), attributes=KERAS_2
        )
        table = load_weights(target, read_weights(path))
        assert_same(target, source)
        assert {row.layer: row.reason for row in table.rows}["block1_conv"] == "as block1/conv"
        assert [row.status for row in table.rows][-2:] == ["skipped", "skipped"]

    def test_of_renamed_layers_in_another_order_are_refused(self, source, target, tmp_path: Path) -> None:
        path = tmp_path / "some.h5"
        legacy(path, source, layer_name=lambda name: name.replace("block1_", "x_"), attributes=KERAS_2)
        with h5py.File(path, "r+") as file:
            file.attrs["layer_names"] = file.attrs["layer_names"][::-1]
        with pytest.raises(
            WeightsError, match=r"2 layers do not fit \(block1_conv: not in the file; block1_bn"
        ):
            load_weights(target, read_weights(path))

    @pytest.mark.parametrize(
        ("attributes", "channels_first", "turned"),
        [
            ({}, True, True),  # Keras 1 names no backend
            ({"backend": b"theano"}, True, True),
            ({"backend": "theano"}, False, True),
            ({"backend": b"tensorflow"}, True, False),
        ],
    )
    def test_of_theano(
        self, tmp_path: Path, attributes: dict[str, Any], channels_first: bool, turned: bool
    ) -> None:
        def lay_out(variable: str, array: np.ndarray) -> np.ndarray:
            if variable != "kernel":
                return array
            array = array[::-1, ::-1] if turned else array
            return array.transpose(3, 2, 0, 1) if channels_first else array

        image = keras.Input((SIDE_PX, SIDE_PX, 3))
        x = layers.Conv2D(5, 3, name="conv1")(image)
        here = keras.Model(image, layers.Conv2D(6, (3, 1), name="conv2")(x))
        there = keras.models.clone_model(here)
        path = legacy(tmp_path / "some.h5", here, keras_1_variable, change=lay_out, attributes=attributes)
        load_weights(there, read_weights(path))
        assert_same(there, here)

    def test_of_object_based_checkpoints(self, source, target, tmp_path: Path) -> None:
        path = keras_2_checkpoint(tmp_path, source)
        load_weights(target, read_weights(path))
        assert_same(target, source)

    @pytest.mark.parametrize("apart", [False, True])
    def test_of_checkpoints_of_keras_3_with_an_optimizer(
        self, source, target, tmp_path: Path, apart: bool
    ) -> None:
        model = with_top(keras.models.clone_model(source), nested=True)
        model.layers[1].set_weights(source.get_weights())
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        parts = {"optimizer": model.optimizer} if apart else {}
        prefix = tf.train.Checkpoint(model=model, **parts).save(str(tmp_path / "ckpt"))
        table = load_weights(target, read_weights(Path(f"{prefix}.index")))
        assert_same(target, source)
        assert [row.layer for row in table.of("skipped")] == sorted([model.layers[2].name, "predictions"])

    def test_of_name_based_checkpoints(self, source, target, tmp_path: Path) -> None:
        slim = {"kernel": "weights", "bias": "biases"}
        values = {
            f"Small/{owner}/{slim.get(variable, variable)}": value
            for owner, variable, value in (
                (*name.split("/"), value) for name, value in named_values(source).items()
            )
        }
        average = values["Small/block1_conv/weights"]
        values |= {
            "global_step": np.array(7),
            "Small/block1_conv/weights/Momentum": average * 0,
            "Small/block1_conv/weights/ExponentialMovingAverage": average,
            "Small/block1_conv/weights": average + 1,
        }
        table = load_weights(target, read_weights(slim_checkpoint(tmp_path, values)))
        assert_same(target, source)
        assert statuses(table) == dict.fromkeys([row.layer for row in table.rows], "loaded")

    def test_of_other_dtypes(self, source, target, tmp_path: Path) -> None:
        path = legacy(tmp_path / "some.h5", source, change=lambda _, array: array.astype(np.float16))
        load_weights(target, read_weights(path))
        np.testing.assert_allclose(target.get_weights()[0], source.get_weights()[0], rtol=1e-3)
        assert target.get_weights()[0].dtype == np.float32


class TestUnnamedLayers:
    def test_are_named_alike_in_every_network(self) -> None:
        networks = build(0), build(0)
        assert networks[0].layers[6].name != networks[1].layers[6].name
        for network in networks:
            number_from_zero(network)
        names = [[layer.name for layer in network.layers] for network in networks]
        assert names[0] == names[1]
        assert names[0][6:10] == ["conv2d", "batch_normalization", "conv2d_1", "batch_normalization_1"]

    def test_go_by_number_and_not_by_place(self) -> None:
        image = keras.Input((4, 4, 1))
        second = [layers.Conv2D(1, 1), layers.Conv2D(1, 1)][::-1]
        network = keras.Model(image, second[1](second[0](image)))
        first_built, then_built = second[1].name, second[0].name
        number_from_zero(network)
        assert first_built < then_built
        assert [layer.name for layer in network.layers[1:]] == ["conv2d_1", "conv2d"]

    def test_of_a_larger_model_are_found_by_their_shapes(self, target, source, tmp_path: Path) -> None:
        image = keras.Input((SIDE_PX, SIDE_PX, 3))
        before = layers.Conv2D(3, 1)(image)
        inner = build(3)
        features = inner(before)
        whole = keras.Model(image, layers.Dense(2, name="top")(features))
        path = tmp_path / "some.weights.h5"
        whole.save_weights(path)
        load_weights(target, read_weights(path))
        assert_same(target, inner)

    def test_of_inception_load_in_a_process_that_built_it_before(self, tmp_path: Path) -> None:
        def inception() -> keras.Model:
            return keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(75, 75, 3))

        first, second = inception(), inception()
        number_from_zero(first)
        path = legacy(tmp_path / "inception.h5", second, attributes=KERAS_2)
        table = load_weights(first, read_weights(path))
        assert_same(first, second)
        assert len(table.of("loaded")) == 188
        assert not table.of("skipped")


class TestChoice:
    @pytest.fixture
    def stored(self, source) -> StoredWeights:
        return weights_of(source, "a file")

    @pytest.mark.parametrize("limit", ["block1_bn", "block1_pool"])
    def test_until_leaves_what_follows_random(self, source, target, stored, limit: str) -> None:
        before = target.get_weights()
        table = load_weights(target, stored, until=limit)
        for index, (old, new, wanted) in enumerate(
            zip(before, target.get_weights(), source.get_weights(), strict=True)
        ):
            np.testing.assert_array_equal(new, wanted if index < 6 else old)
        found = statuses(table)
        assert found["block1_bn"] == "loaded"
        assert found["block2_depthwise"] == found["conv2d"] == "random"
        assert {row.reason for row in table.of("random")} == {f"after {limit}"}

    @pytest.mark.parametrize(
        ("exclude", "random"),
        [
            (["block1_conv"], {"block1_conv"}),
            (["block1"], {"block1_conv", "block1_bn"}),  # and not block10_conv
            (["conv2d"], {"conv2d", "conv2d_1"}),
            (["block2_", "conv2d_1"], {"block2_depthwise", "block2_separable", "conv2d_1"}),
            (["*_conv"], {"block1_conv", "block10_conv"}),
            (["block?_bn"], {"block1_bn"}),
        ],
    )
    def test_excluded_layers_stay_random(self, target, stored, exclude, random) -> None:
        table = load_weights(target, stored, exclude=exclude)
        assert {row.layer for row in table.of("random")} == random
        assert len(table.of("loaded")) == 9 - len(random)

    def test_an_excluded_layer_may_be_of_another_shape_or_missing(self, source, target) -> None:
        whole = weights_of(source, "a file").layers
        other = StoredLayer("block1_conv", (("kernel", np.zeros((1, 2))),))
        stored = StoredWeights("a file", (other, *whole[1:-1]))
        table = load_weights(target, stored, exclude=["block1_conv", "block10_conv"])
        assert len(table.of("loaded")) == 7
        np.testing.assert_array_equal(
            target.get_layer("block1_bn").get_weights(), source.get_layer("block1_bn").get_weights()
        )

    def test_a_layer_of_the_file_alone_may_be_excluded(self, source, target) -> None:
        whole = weights_of(source, "a file").layers
        stored = StoredWeights("a file", (*whole, StoredLayer("predictions", (("kernel", np.zeros(2)),))))
        table = load_weights(target, stored, exclude=["predictions"])
        assert len(table.of("loaded")) == 9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"until": "block1_con"},
                r"until: small has no layer 'block1_con'; the nearest are block1_conv, ",
            ),
            ({"exclude": ["blok2"]}, r"exclude: small has no layer 'blok2'; the nearest are "),
            ({"exclude": ["x*"]}, r"exclude: small has no layer 'x\*'"),
            ({"exclude": [""]}, r"exclude: small has no layer ''"),
            ({"exclude": ["*"]}, r"a file: until, exclude and truncate_at leave no layer of small to"),
        ],
    )
    def test_unknown_names_are_refused(self, target, stored, options, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            load_weights(target, stored, **options)


class TestRefusals:
    def test_of_another_network(self, target, tmp_path: Path) -> None:
        other = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="a"), layers.Dense(2, name="b")])
        path = tmp_path / "other.weights.h5"
        other.save_weights(path)
        with pytest.raises(
            WeightsError, match=r"other\.weights\.h5: does not hold the weights of small: none of"
        ):
            load_weights(target, read_weights(path))

    def test_name_the_first_layers_that_do_not_fit_and_count_them(self, source, target) -> None:
        before = target.get_weights()
        stored = weights_of(source, "a file")
        missing = [layer for layer in stored.layers if layer.name not in ("block1_conv", "block10_conv")]
        wrong = StoredLayer("block10_conv", (("kernel", np.zeros((1, 1, 9, 4))), ("bias", np.zeros(4))))
        with pytest.raises(WeightsError) as caught:
            load_weights(target, StoredWeights("a file", (*missing, wrong)))
        assert "a file: does not hold the weights of small: 2 layers do not fit" in str(caught.value)
        assert "block1_conv: not in the file; block10_conv: kernel should be 1x1x8x4, is 1x1x9x4" in str(
            caught.value
        )
        for old, new in zip(before, target.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_numbers_that_are_none(self, source, target, tmp_path: Path, value: float) -> None:
        def spoil(name: str, array: np.ndarray) -> np.ndarray:
            return np.where(np.arange(array.size).reshape(array.shape) == 3, value, array)

        path = legacy(tmp_path / "some.h5", source, change=spoil)
        with pytest.raises(WeightsError, match=r"block1_conv: kernel holds numbers that are not finite"):
            load_weights(target, read_weights(path))

    def test_text_for_numbers(self, source, target) -> None:
        first, *others = weights_of(source, "a file").layers
        text = StoredLayer(first.name, (("kernel", np.array(["a"])), first.variables[1]))
        with pytest.raises(WeightsError, match=r"block1_conv: kernel holds <U1, no numbers"):
            load_weights(target, StoredWeights("a file", (text, *others)))

    def test_a_variable_too_few(self, source, target) -> None:
        stored = weights_of(source, "a file")
        bn = stored.layers[1]
        short = StoredLayer(bn.name, bn.variables[1:])
        with pytest.raises(WeightsError, match=r"block1_bn: expected 4 variables, found 3"):
            load_weights(target, StoredWeights("a file", (stored.layers[0], short, *stored.layers[2:])))

    @pytest.mark.parametrize("ending", [".weights.h5", ".keras", ".h5"])
    @pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
    @pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
    def test_truncated_files(self, source, tmp_path: Path, ending: str, kept: float) -> None:
        path = tmp_path / f"some{ending}"
        (source.save_weights if ending == ".weights.h5" else source.save)(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(WeightsError, match=rf"some{re.escape(ending)}: (cannot be read|damaged|neither)"):
            read_weights(path)

    @pytest.mark.parametrize("part", [".index", ".data-00000-of-00001"])
    def test_damaged_checkpoints(self, source, tmp_path: Path, part: str) -> None:
        path = keras_2_checkpoint(tmp_path, source)
        damaged = path.with_name(path.name + part)
        damaged.write_bytes(damaged.read_bytes()[:100])
        with pytest.raises(WeightsError, match=r"ckpt: (damaged|cannot be read)"):
            read_weights(path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.h5", b""),
            ("x.keras", b"these are no weights"),
            ("x.weights.h5", b"\x89HDF\r\n\x1a\n and nothing more"),
            ("x.keras", b"PK\x03\x04 and nothing more"),
            ("x.pth", b"PK\x03\x04 and nothing more"),
        ],
    )
    def test_files_of_something_else(self, tmp_path: Path, name: str, content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            read_weights(path)

    def test_a_file_without_weights(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.h5"
        h5py.File(path, "w").close()
        with pytest.raises(WeightsError, match=r"empty\.h5: holds no weights"):
            read_weights(path)

    def test_an_empty_name(self) -> None:
        with pytest.raises(WeightsError, match="no such weights file"):
            read_weights(Path(""))

    @pytest.mark.parametrize("name", ["none.h5", "folder", "folder/ckpt"])
    def test_what_is_not_there(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(
            WeightsError, match=rf"{name}: no such weights file\. Expected imagenet, none, or a"
        ):
            read_weights(tmp_path / name)


class TestTable:
    def test_says_what_became_of_each_layer(self, source, target) -> None:
        whole = weights_of(source, "a file").layers
        stored = StoredWeights("a file", (*whole, StoredLayer("top", (("kernel", np.zeros((4, 5))),))))
        kept = {layer.name for layer in target.layers if layer.name != "block10_conv"}
        table = load_weights(target, stored, exclude=["block1_bn"], kept=kept)
        assert table.summary() == "small from a file: 7 layers loaded (1,656 parameters), 1 random, 2 skipped"
        lines = table.render().splitlines()
        assert lines[0] == table.summary()
        columns = [re.split(r"  +", line) for line in lines[2:]]
        assert columns[0] == ["layer", "status", "parameters", "shapes"]
        assert columns[1] == ["block1_conv", "loaded", "224", "3x3x3x8, 8"]
        assert columns[2] == ["block1_bn", "random", "32", "8, 8, 8, 8", "excluded"]
        assert columns[5][-1] == f"as {whole[4].name}"
        assert columns[-2] == ["block10_conv", "skipped", "36", "1x1x8x4, 4", "above truncate_at"]
        assert columns[-1] == ["top", "skipped", "20", "4x5", "not in this network"]
        assert len({len(line[: line.index("loaded")]) for line in lines[3:] if " loaded" in line}) == 1

    def test_of_one_status(self, source) -> None:
        table = describe_weights(source, "none", "random", kept={"block1_conv"})
        assert statuses(table)["block1_conv"] == "random"
        assert set(list(statuses(table).values())[1:]) == {"skipped"}


class TestEfficientNetLite:
    def test_the_published_checkpoint_of_every_size_loads(self, tmp_path: Path) -> None:
        """With the names that tensorflow/tpu gives the variables; the test knows them from its readers."""
        network = build_efficientnet_lite(1.0, 1.1, 32)
        values = np.random.default_rng(0)
        network.set_weights([values.uniform(size=weight.shape) for weight in network.weights])
        stored = {}
        for layer in network.layers:
            for weight in layer.weights:
                depthwise = "depthwise_kernel" if "depthwise_conv" in layer.name else weight.name
                variable = depthwise if weight.name == "kernel" else weight.name
                stored[f"efficientnet-lite1/{tpu_scope(layer.name)}/{variable}"] = weight.numpy()
        stored["efficientnet-lite1/head/dense/kernel"] = np.zeros((1280, 10))
        again = build_efficientnet_lite(1.0, 1.1, 32)
        read = read_weights(slim_checkpoint(tmp_path, stored))
        table = load_weights(again, read, layer_name=published_layer_name)
        assert_same(again, network)
        assert [row.layer for row in table.of("skipped")] == ["efficientnet-lite1/head/dense"]

    @pytest.mark.parametrize(
        ("published", "ours"),
        [
            ("_conv_stem", "stem_conv"),
            ("_blocks.0._bn1", "block0_depthwise_bn"),
            ("_blocks.12._expand_conv", "block12_expand_conv"),
            ("efficientnet-lite2/blocks_0/conv2d", "block0_project_conv"),
            ("efficientnet-lite2/blocks_12/conv2d", "block12_expand_conv"),
            ("efficientnet-lite2/head/tpu_batch_normalization", "head_bn"),
            ("block3_add", "block3_add"),
        ],
    )
    def test_published_names(self, published: str, ours: str) -> None:
        assert published_layer_name(published) == ours


def tpu_scope(name: str) -> str:
    part, _, kind = name.partition("_")
    if part in ("stem", "head"):
        return f"{part}/{'conv2d' if kind == 'conv' else 'tpu_batch_normalization'}"
    block = part.removeprefix("block")
    kinds = ["expand", "depthwise", "project"] if block != "0" else ["depthwise", "project"]
    place, _, what = kind.partition("_")
    if what == "bn":
        number = kinds.index(place)
        scope = "tpu_batch_normalization"
    else:
        number = [kind for kind in kinds if kind != "depthwise"].index(place) if place != "depthwise" else 0
        scope = "depthwise_conv2d" if place == "depthwise" else "conv2d"
    return f"blocks_{block}/{scope}" + (f"_{number}" if number else "")
