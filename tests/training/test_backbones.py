"""The backbone table, and the port of EfficientNet-Lite0 against what its weights are known to see."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from graftserve.training import WeightsError
from graftserve.training.backbones import BACKBONES, Normalization, _packaged_lite0, load_backbone
from graftserve.training.efficientnet_lite import build_efficientnet_lite, convert_state_dict
from graftserve.training.preprocess import decode_image
from graftserve.training.torch_checkpoint import read_state_dict

# ImageNet classes: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso; 657 missile.
TOP = {"chelsea": {281, 282, 285}, "coffee": {967}, "rocket": {657}}


def test_the_original_head_recognises_photographs(photos, encode) -> None:
    network = build_efficientnet_lite(1.0, 1.0, 224, classes=1000)
    convert_state_dict(read_state_dict(_packaged_lite0()), network)
    preprocess = BACKBONES["efficientnet-lite0"].preprocess
    for name, expected in TOP.items():
        pixels = decode_image(tf.constant(encode(photos[name], quality=95)), preprocess)
        logits = network((tf.cast(pixels[None], tf.float32) - 127) / 128, training=False).numpy()[0]
        assert set(np.argsort(-logits)[: len(expected)]) == expected, name


def test_lite0_weights_from_a_file_equal_the_packaged_ones() -> None:
    packaged = load_backbone("efficientnet-lite0")
    from_file = load_backbone("efficientnet-lite0", str(_packaged_lite0()))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    np.testing.assert_array_equal(packaged(pixels, training=False), from_file(pixels, training=False))


@pytest.mark.parametrize("name", ["efficientnet-lite0", "mobilenet-v2", "vgg16"])
def test_weights_survive_a_file(name: str, tmp_path: Path) -> None:
    backbone = load_backbone(name, "none")
    network = next(layer for layer in backbone.layers if isinstance(layer, keras.Model))
    path = tmp_path / "some.weights.h5"
    network.save_weights(path)
    again = load_backbone(name, str(path))
    for before, after in zip(backbone.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_row_builds_what_it_says(name: str) -> None:
    backbone = BACKBONES[name]
    model = load_backbone(name, "none")
    assert model.input.dtype == "uint8"
    assert model.input_shape == (None, backbone.side_px, backbone.side_px, 3)
    assert model.output_shape == (None, backbone.feature_count)
    keras.backend.clear_session()


@pytest.mark.parametrize(
    ("name", "application"),
    [("mobilenet-v2", "mobilenet_v2"), ("vgg16", "vgg16"), ("densenet121", "densenet")],
)
def test_normalisation_is_that_of_keras(name: str, application: str) -> None:
    scaled = BACKBONES[name].pixel_range
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    ours = Normalization(scaled.mean, scaled.scale, bgr=scaled.bgr)(pixels)
    theirs = getattr(keras.applications, application).preprocess_input(pixels.astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected one of efficientnet-lite0, .*; got 'resnet999'"):
        load_backbone("resnet999")


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"w\.h5: no such weights file\. Expected imagenet, none, or"):
        load_backbone("mobilenet-v2", str(tmp_path / "w.h5"))


@pytest.mark.parametrize("ending", [".weights.h5", ".h5", ".keras"])
def test_a_corrupt_weights_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"broken{ending}"
    path.write_bytes(b"these are no weights")
    with pytest.raises(WeightsError, match="does not hold the weights of mobilenet-v2"):
        load_backbone("mobilenet-v2", str(path))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(path)
    with pytest.raises(WeightsError, match="does not hold the weights of efficientnet-lite0"):
        load_backbone("efficientnet-lite0", str(path))


def test_pth_is_for_lite0_only(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="for efficientnet-lite0 only, not for vgg16"):
        load_backbone("vgg16", str(path))


def test_a_failed_download_names_the_file_and_its_place(tmp_path: Path, monkeypatch, capsys) -> None:
    # Where nothing listens: the download fails as it does on a machine without a network.
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        load_backbone("mobilenet-v3-small")
    message = str(caught.value)
    assert "https://storage.googleapis.com/" in message
    assert str(Path("models", "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5")) in message
    assert "--weights" in message
    assert capsys.readouterr().out == ""
