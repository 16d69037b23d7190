"""network.tflite and network.int8.tflite: the same answers through the same names, or a reason why not."""

import csv
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from graftserve.export import quantize as quantization
from graftserve.export import tflite
from graftserve.export.errors import GateError, SourceError
from graftserve.export.network import Network, freeze_network
from graftserve.export.quantize import (
    INT8_FILE,
    QuantizationCost,
    accuracy_cost,
    add_int8,
    calibration_pixels,
    quantize,
)
from graftserve.export.run_source import open_run
from graftserve.export.source import Source
from graftserve.export.tflite import (
    NETWORK_FILE,
    LiteError,
    add_lite,
    check_lite,
    convert_network,
    open_lite,
)
from graftserve.training import RunDirectory
from graftserve.training.preprocess import decode_images

SIDE_PX, CLASSES = 32, 5


def small_network(seed: int = 1, feature_scale: float = 1.0) -> Network:
    """A convolution, a depthwise one, and a softmax of five classes, on untrained weights."""
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(pixels)
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu6")(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu6")(x)
    features = keras.layers.Rescaling(feature_scale)(keras.layers.GlobalAveragePooling2D()(x))
    weights = keras.initializers.RandomNormal(stddev=8 / feature_scale, seed=seed)
    probabilities = keras.layers.Dense(CLASSES, "softmax", kernel_initializer=weights)(features)
    model = keras.Model(pixels, {"features": features, "probabilities": probabilities})
    return freeze_network(lambda batch: model(batch, training=False), SIDE_PX)


@pytest.fixture(scope="module")
def network() -> Network:
    return small_network()


@pytest.fixture(scope="module")
def converted(network: Network) -> bytes:
    return convert_network(network)


@pytest.fixture(scope="module")
def pixels(photos) -> np.ndarray:
    """Twelve pieces of three photographs, uint8 [12, 32, 32, 3]."""
    pieces = [
        tf.image.resize(photo[row : row + 150, column : column + 150], (SIDE_PX, SIDE_PX), antialias=True)
        for photo in photos.values()
        for row in (0, 140)
        for column in (0, 250)
    ]
    return tf.cast(tf.round(pieces), tf.uint8).numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "assets.extra").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def source(trained: RunDirectory) -> Source:
    return open_run(trained.path)


def files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


# The float network


def test_inputs_and_outputs_are_found_by_name(network, converted, pixels) -> None:
    interpreter = Interpreter(model_content=converted)
    assert list(interpreter.get_signature_list()) == ["serving_default"]
    runner = interpreter.get_signature_runner("serving_default")
    (name, given), *others = runner.get_input_details().items()
    assert (name, given["dtype"], others) == ("pixels", np.uint8, [])
    assert given["shape_signature"].tolist() == [-1, SIDE_PX, SIDE_PX, 3]
    outputs = runner.get_output_details()
    assert {name: output["dtype"] for name, output in outputs.items()} == dict.fromkeys(
        network.widths, np.float32
    )
    expected = network.run(pixels)

    interpreter = Interpreter(model_content=converted)  # one that no runner uses
    interpreter.allocate_tensors()  # for one image, as it comes
    interpreter.set_tensor(given["index"], pixels[:1])
    interpreter.invoke()
    for name, output in outputs.items():
        np.testing.assert_allclose(interpreter.get_tensor(output["index"]), expected[name][:1], atol=1e-5)
    interpreter.resize_tensor_input(given["index"], pixels.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], pixels)
    interpreter.invoke()
    for name, output in outputs.items():
        np.testing.assert_allclose(interpreter.get_tensor(output["index"]), expected[name], atol=1e-5)


def test_a_network_without_features_gives_probabilities_only(pixels) -> None:
    whole = small_network()
    network = freeze_network(lambda batch: {"probabilities": whole.function(batch)[1]}, SIDE_PX)
    assert set(open_lite(convert_network(network))(pixels[:2])) == {"probabilities"}


def test_add_lite_writes_what_agrees(network, converted, pixels, folder: Path) -> None:
    result = add_lite(folder, network, pixels, network.run(pixels))
    assert (result.path, result.reason) == (folder / NETWORK_FILE, None)
    assert result.largest_difference is not None
    assert 0 <= result.largest_difference < 1e-5
    assert files(folder) == [NETWORK_FILE]
    assert result.size_bytes == result.path.stat().st_size
    run, same = open_lite(result.path.read_bytes()), open_lite(converted)
    np.testing.assert_array_equal(run(pixels)["probabilities"], same(pixels)["probabilities"])


def test_a_real_network_agrees_with_what_its_training_recorded(source: Source, folder: Path) -> None:
    contents = [golden.content for golden in source.goldens]
    images = decode_images(contents, source.preprocess).numpy()
    recorded = np.array([golden.probabilities for golden in source.goldens], np.float32)
    expected = source.network.run(images) | {"probabilities": recorded}
    result = add_lite(folder, source.network, images, expected)
    assert result.reason is None
    assert result.largest_difference < 2e-5
    assert 13e6 < result.size_bytes < 14e6  # the weights once, in 32 bits


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: tf.strings.to_number(tf.strings.as_string(x)), "AsString"),
        (lambda x: tf.linalg.svd(x[:, None], compute_uv=False), "Svd"),
    ],
)
def test_an_operation_that_litert_has_not_leaves_it_out(operation, name: str, pixels, folder: Path) -> None:
    network = freeze_network(
        lambda batch: {"probabilities": operation(tf.cast(batch[:, 0, 0], tf.float32))}, SIDE_PX
    )
    result = add_lite(folder, network, pixels, network.run(pixels))
    assert result.path is None
    assert result.reason is not None
    assert result.reason.startswith("cannot be converted for LiteRT: it has no operator for ")
    assert name in result.reason
    assert "\n" not in result.reason
    assert files(folder) == []


def test_a_conversion_that_answers_otherwise_is_left_out(
    network, pixels, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = convert_network(small_network(seed=2))
    monkeypatch.setattr(tflite, "convert_network", lambda network: other)
    result = add_lite(folder, network, pixels, network.run(pixels))
    assert result.path is None
    assert result.reason is not None
    assert result.reason.startswith("gives other answers in LiteRT: ")
    assert files(folder) == []


def test_without_litert_it_is_left_out_and_says_what_to_install(
    network, pixels, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    result = add_lite(folder, network, pixels, network.run(pixels))
    assert result.path is None
    assert result.reason is not None
    assert result.reason.startswith("ai-edge-litert, ")
    assert "pip install 'graftserve[training]'" in result.reason
    assert files(folder) == []


def test_converting_is_silent(network, pixels, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert add_lite(folder, network, pixels, network.run(pixels)).reason is None
    quantize(network, pixels)
    os.write(2, b"heard\n")
    assert capfd.readouterr() == ("", "heard\n")


def test_differences_are_found_wherever_they_are(network, converted, pixels) -> None:
    expected = network.run(pixels)
    assert check_lite(converted, pixels, expected) < 1e-5
    for name, values in expected.items():
        for wrong in (0.01, np.nan):
            changed = values.copy()
            changed[-1, -1] += wrong
            with pytest.raises(LiteError, match=f"gives other answers in LiteRT: {name} differ by "):
                check_lite(converted, pixels, expected | {name: changed})
    with pytest.raises(LiteError, match=r"probabilities: expected the shape \[12, 4\], got \[12, 5\]"):
        check_lite(converted, pixels, {"probabilities": expected["probabilities"][:, :4]})
    with pytest.raises(LiteError, match="expected the output logits, got only features, probabilities"):
        check_lite(converted, pixels, {"logits": expected["features"]})


def test_large_features_are_compared_by_their_size(pixels) -> None:
    network = small_network(feature_scale=1000.0)
    features = network.run(pixels)["features"]
    model, largest = convert_network(network), float(features.max())
    assert largest > 10
    difference = check_lite(model, pixels, {"features": features + 5e-5 * largest})
    assert 4e-5 < difference < 6e-5
    with pytest.raises(LiteError, match="features differ"):
        check_lite(model, pixels, {"features": features + 2e-4 * largest})


def test_what_is_no_model_or_has_no_images_is_refused(network, converted, pixels) -> None:
    for damaged in (b"", b"x" * 100, converted[: len(converted) // 2]):
        with pytest.raises(LiteError, match="cannot be loaded by LiteRT: "):
            check_lite(damaged, pixels, network.run(pixels))
    with pytest.raises(LiteError, match="does not run in LiteRT: "):
        open_lite(converted)(pixels.astype(np.float32))
    with pytest.raises(ValueError, match="expected at least one image to compare on, got none"):
        check_lite(converted, pixels[:0], {})


# The same in 8 bits


@pytest.fixture(scope="module")
def int8(network: Network, pixels) -> bytes:
    return quantize(network, pixels)


def test_int8_stands_in_for_the_float_network(network, int8: bytes, pixels) -> None:
    runner = Interpreter(model_content=int8).get_signature_runner("serving_default")
    assert {name: details["dtype"] for name, details in runner.get_input_details().items()} == {
        "pixels": np.uint8
    }
    outputs = runner.get_output_details()
    assert {name: details["dtype"] for name, details in outputs.items()} == {
        "features": np.float32,
        "probabilities": np.float32,
    }
    expected, got = network.run(pixels), open_lite(int8)(pixels)
    for name in expected:
        assert got[name].shape == expected[name].shape
        assert np.abs(got[name] - expected[name]).max() < 0.1
    assert len(np.unique(expected["probabilities"].argmax(axis=1))) > 1
    np.testing.assert_allclose(got["probabilities"].sum(axis=1), 1, atol=1e-5)  # in steps of 1/256 they vary


def test_the_network_itself_is_computed_in_8_bits(int8: bytes, converted) -> None:
    def kernels(model: bytes) -> list[type]:
        details = Interpreter(model_content=model).get_tensor_details()
        return [row["dtype"] for row in details if row["shape"].tolist() in ([16, 3, 3, 3], [1, 3, 3, 16])]

    assert kernels(converted) == [np.float32] * 2
    assert kernels(int8) == [np.int8] * 2


def test_images_brighter_than_those_of_the_calibration_are_not_cut_off() -> None:
    """A network that tells how bright an image is, calibrated in the dark."""

    def brightness(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        light = tf.nn.relu6(tf.reduce_mean(tf.cast(batch, tf.float32), axis=(1, 2)) / 255)
        return {"probabilities": tf.nn.softmax(light)}

    network = freeze_network(brightness, SIDE_PX)
    dark = np.random.default_rng(0).integers(0, 60, (8, SIDE_PX, SIDE_PX, 3), np.uint8)
    before = dark.copy()
    interpreter = Interpreter(model_content=quantize(network, dark))
    np.testing.assert_array_equal(dark, before)
    scales = [
        row["quantization_parameters"]["scales"][0] * 255
        for row in interpreter.get_tensor_details()
        if row["dtype"] == np.int8 and row["shape"].tolist() == [1, SIDE_PX, SIDE_PX, 3]
    ]
    assert scales
    assert max(scales) == pytest.approx(255, rel=0.01)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, SIDE_PX, SIDE_PX, 3), np.uint8), "expected at least one image, got none"),
        (np.zeros((1, 16, 16, 3), np.uint8), r"expected images uint8 \[32, 32, 3\], got uint8 \[16, 16, 3\]"),
        (np.zeros((1, SIDE_PX, SIDE_PX, 3), np.float32), r"got float32 \[32, 32, 3\]"),
    ],
)
def test_calibration_images_are_checked(network, images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(network, images)


def test_what_cannot_be_quantised_is_named(pixels) -> None:
    network = freeze_network(
        lambda batch: {
            "probabilities": tf.strings.to_number(tf.strings.as_string(tf.cast(batch[:, 0, 0], tf.float32)))
        },
        SIDE_PX,
    )
    with pytest.raises(LiteError, match=r"int8: the network cannot be quantised: it has no operator for .*A"):
        quantize(network, pixels)


def test_a_drop_is_exact_to_what_people_write() -> None:
    assert QuantizationCost(100, 0.97, 0.96, 1.0).drop == 0.01
    assert QuantizationCost(100, 0.96, 0.97, 1.0).drop == -0.01


# What it is calibrated on and judged by


def changed_run(trained: RunDirectory, folder: Path, moved: dict[str, str]) -> RunDirectory:
    """A copy of a run in which `moved` says for some splits where their images went instead."""
    shutil.copytree(trained.path, folder)
    path = folder / "split.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("path", "label", "split"))
        writer.writeheader()
        writer.writerows(row | {"split": moved.get(row["split"], row["split"])} for row in rows)
    return RunDirectory.open_finished(folder)


def run_on_other_data(trained: RunDirectory, folder: Path, data: Path) -> RunDirectory:
    """A copy of a run that was trained on `data`."""
    shutil.copytree(trained.path, folder)
    recipe = (folder / "recipe.json").read_text().replace(trained.recipe.data_dir, str(data))
    (folder / "recipe.json").write_text(recipe)
    return RunDirectory.open_finished(folder)


def images_of(run: RunDirectory, split: str) -> dict[bytes, str]:
    """Label of each of the split's images, by its pixels."""
    with (run.path / "split.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    contents = [Path(run.recipe.data_dir, row["path"]).read_bytes() for row in rows]
    decoded = decode_images(contents, run.preprocess).numpy()
    return {image.tobytes(): row["label"] for image, row in zip(decoded, rows, strict=True)}


def test_calibration_takes_training_images_the_classes_in_turn(trained: RunDirectory) -> None:
    labels = images_of(trained, "train")
    chosen = calibration_pixels(trained, 24)
    assert chosen.shape == (24, 224, 224, 3)
    assert chosen.dtype == np.uint8
    counts = Counter(labels[image.tobytes()] for image in chosen)
    assert sorted(counts.values()) == [2] * 6 + [3] * 4
    np.testing.assert_array_equal(calibration_pixels(trained, 24), chosen)
    np.testing.assert_array_equal(calibration_pixels(trained, 13), chosen[:13])
    assert len(calibration_pixels(trained)) == len(labels)  # fewer than 200
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        calibration_pixels(trained, 0)


@pytest.fixture(scope="module")
def lite(source: Source) -> bytes:
    return convert_network(source.network)


@pytest.fixture(scope="module")
def mistaken(source: Source) -> bytes:
    """The run's network, which takes each class for the one before it."""

    def call(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = dict(zip(source.network.widths, source.network.function(batch), strict=True))
        first, others = tf.split(outputs["probabilities"], [1, -1], axis=1)
        return outputs | {"probabilities": tf.concat([others, first], axis=1)}

    return convert_network(freeze_network(call, source.network.side_px))


def test_the_cost_is_that_of_the_test_images(trained, source: Source, lite: bytes, mistaken: bytes) -> None:
    evaluation = trained.evaluation("test")
    cost = accuracy_cost(trained, source.network, lite)
    assert cost == QuantizationCost(evaluation.images, evaluation.accuracy, evaluation.accuracy, 1.0)
    assert cost.drop == 0
    assert accuracy_cost(trained, source.network, lite, 3).images == 3
    cost = accuracy_cost(trained, source.network, mistaken)
    assert cost.float_accuracy == evaluation.accuracy
    assert cost.int8_accuracy < 0.3
    assert cost.agreement == 0
    assert cost.drop == pytest.approx(cost.float_accuracy - cost.int8_accuracy)
    with pytest.raises(ValueError, match="limit: expected at least 1, got -1"):
        accuracy_cost(trained, source.network, lite, -1)


def test_without_test_images_validation_judges_and_without_both_nothing_does(
    trained, source: Source, lite: bytes, folder: Path, tmp_path: Path
) -> None:
    run = changed_run(trained, tmp_path / "no-test", {"test": "train"})
    assert accuracy_cost(run, source.network, lite).images == trained.evaluation("validation").images
    run = changed_run(trained, tmp_path / "none", {"test": "train", "validation": "train"})
    with pytest.raises(SourceError, match="needs held-out images to be judged by, and the run has none"):
        add_int8(folder, run, source.network)


def test_a_drop_above_the_limit_is_refused_with_the_numbers(
    trained, source: Source, mistaken: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "quantize", lambda network, calibration: mistaken)
    message = (
        r"int8: expected the accuracy to drop by at most 0\.1, got 0\.\d{4}: from 0\.\d{4} to 0\.\d{4} on "
    )
    with pytest.raises(GateError, match=message):
        add_int8(folder, trained, source.network, max_accuracy_drop=0.1)
    assert files(folder) == []
    add_int8(folder, trained, source.network, max_accuracy_drop=1.0)
    assert (folder / INT8_FILE).read_bytes() == mistaken


def test_images_that_are_gone_or_damaged_are_named(trained: RunDirectory, tmp_path: Path) -> None:
    data = tmp_path / "data"
    run = run_on_other_data(trained, tmp_path / "run", data)
    with pytest.raises(SourceError, match=r"needs the images that the run was trained on: .*data: no such"):
        calibration_pixels(run)
    shutil.copytree(trained.recipe.data_dir, data)
    assert len(calibration_pixels(run, 10)) == 10
    with (run.path / "split.csv").open(newline="") as file:
        first = next(row["path"] for row in csv.DictReader(file) if row["split"] == "train")
    (data / first).write_bytes((data / first).read_bytes()[:100])
    with pytest.raises(SourceError, match=rf"trained on: {first}: .*; put them back"):
        calibration_pixels(run)
    (data / first).unlink()
    with pytest.raises(SourceError, match=rf"trained on: {first}: No such file or directory; put them back"):
        calibration_pixels(run)


@pytest.mark.parametrize("text", ["path,label\na.jpg,1\n", "path,label,split\na.jpg,cat,train\n", ""])
def test_a_damaged_split_is_named(trained: RunDirectory, tmp_path: Path, text: str) -> None:
    run = changed_run(trained, tmp_path / "run", {})
    (run.path / "split.csv").write_text(text)
    with pytest.raises(SourceError, match=r"split\.csv: (missing or )?damaged"):
        calibration_pixels(run)


@pytest.mark.slow
def test_a_real_network_in_8_bits(trained, source: Source, lite: bytes, folder: Path) -> None:
    cost = add_int8(folder, trained, source.network, max_accuracy_drop=0.5)
    assert cost.images == trained.evaluation("test").images
    assert cost.float_accuracy == trained.evaluation("test").accuracy
    assert cost.agreement >= 0.6  # of 18 images, some of which hardly differ between two digits
    model = (folder / INT8_FILE).read_bytes()
    assert len(model) < 0.31 * len(lite)
    assert accuracy_cost(trained, source.network, model) == cost
    contents = [golden.content for golden in source.goldens]
    images = decode_images(contents, source.preprocess).numpy()
    got, expected = open_lite(model)(images), source.network.run(images)
    similarity = keras.losses.cosine_similarity(got["features"], expected["features"]).numpy()
    assert (similarity < -0.9).all()
