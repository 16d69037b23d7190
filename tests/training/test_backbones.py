"""The backbone table, and the port of EfficientNet-Lite0 against what its weights are known to see."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from graftserve.training import WeightsError
from graftserve.training.backbones import (
    BACKBONES,
    Normalization,
    _packaged_lite0,
    backbone_names,
    load_backbone,
    network_of,
    truncate,
)
from graftserve.training.efficientnet_lite import build_efficientnet_lite, published_layer_name
from graftserve.training.errors import RecipeError
from graftserve.training.network import freeze
from graftserve.training.preprocess import decode_image
from graftserve.training.weight_files import read_weights
from graftserve.training.weights import WeightTable, load_weights

# ImageNet classes: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso; 657 missile.
TOP = {"chelsea": {281, 282, 285}, "coffee": {967}, "rocket": {657}}
QUICK = ("efficientnet-lite0", "vgg16", "mobilenet-v2")
REST = tuple(pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES if name not in QUICK)


@pytest.fixture(scope="module")
def lite0() -> keras.Model:
    return load_backbone("efficientnet-lite0")


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vgg16.weights.h5"
    network_of(load_backbone("vgg16", "none")).save_weights(path)
    return path


def some_pixels(side_px: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side_px, side_px, 3), np.uint8)


class TestTable:
    @pytest.mark.parametrize("name", [*QUICK, *REST])
    def test_every_row_is_what_it_says(self, name: str) -> None:
        keras.layers.Conv2D(1, 1)  # so that the numbers of unnamed layers do not begin at zero
        row = BACKBONES[name]
        tables: list[WeightTable] = []
        model = load_backbone(name, "none", listener=tables.append)
        network = network_of(model)
        assert model.name == name.replace("-", "_")
        assert model.input.dtype == "uint8"
        assert model.input_shape == (None, row.side_px, row.side_px, 3)
        assert model.output_shape == (None, row.feature_count)
        assert {found.status for found in tables[0].rows} == {"random"}
        assert sum(found.parameters for found in tables[0].rows) == network.count_params()

        names = [layer.name for layer in network.layers]
        assert len(set(names)) == len(names)
        assert 0.3 < names.index(row.boundary) / len(names) < 1
        depths = [names.index(layer) for layer in row.depth_layers]
        assert depths == sorted(depths)
        assert len(depths) == 5
        sides_px = [network.get_layer(layer).output.shape[1] for layer in row.depth_layers]
        assert sides_px == sorted(sides_px, reverse=True)
        assert sides_px[-1] == -(-row.side_px // 32) or (name, sides_px[-1]) in {
            ("inception-v3", 8),
            ("efficientnet-lite2", 9),
        }

        pixels = some_pixels(row.side_px, 1)
        features, below = model(pixels, training=False), truncate(model, row.feature_layer)(pixels)
        if name == "convnext-tiny":  # it normalises them once more
            below = network.layers[-1](below)
        np.testing.assert_allclose(below, features, rtol=1e-5, atol=1e-6)
        keras.backend.clear_session()

    @pytest.mark.parametrize("name", BACKBONES)
    def test_the_square_that_is_cut_out(self, name: str) -> None:
        preprocess = BACKBONES[name].preprocess
        assert preprocess.side_px == BACKBONES[name].side_px
        if name == "efficientnet-v2-s":
            assert (preprocess.resize, preprocess.crop_fraction) == ("squash", 1.0)
        elif "efficientnet" in name:
            assert preprocess.crop_fraction == pytest.approx(1 - 32 / (preprocess.side_px + 32))
        else:
            assert (preprocess.resize, preprocess.crop_fraction) == ("crop", 0.875)

    def test_the_default_comes_first(self) -> None:
        assert backbone_names()[0] == "efficientnet-lite0"
        assert len(backbone_names()) == 23

    @pytest.mark.parametrize(
        ("name", "application"),
        [("mobilenet-v2", "mobilenet_v2"), ("vgg16", "vgg16"), ("densenet121", "densenet")],
    )
    def test_normalisation_is_that_of_keras(self, name: str, application: str) -> None:
        scaled = BACKBONES[name].pixel_range
        pixels = some_pixels(4)
        ours = Normalization(scaled.mean, scaled.scale, bgr=scaled.bgr)(pixels)
        theirs = getattr(keras.applications, application).preprocess_input(pixels.astype(np.float32))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_normalisation_is_the_same_where_the_size_is_not_known(self) -> None:
        normalise = Normalization((103.939, 116.779, 123.68), (58.0, 57.0, 56.0), bgr=True)
        pixels = np.random.default_rng(1).integers(0, 256, (2, 5, 7, 3), np.uint8)
        spec = tf.TensorSpec((None, None, None, 3), tf.uint8)
        of_any_size = tf.function(normalise.call, input_signature=[spec])(pixels)
        np.testing.assert_allclose(normalise(pixels), of_any_size, rtol=1e-6)

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"expected one of efficientnet-lite0, .*; got 'resnet999'"):
            load_backbone("resnet999")


class TestNetworksOfKeras:
    @pytest.mark.slow
    def test_convnext_computes_what_it_did(self, tmp_path: Path) -> None:
        """Its blocks' sums are layers here, and its parts are unpacked; a file of the original fits it."""
        original = keras.applications.ConvNeXtTiny(
            include_top=False, weights=None, input_shape=(224, 224, 3), pooling="avg"
        )
        values = np.random.default_rng(0)
        original.set_weights([values.normal(0, 0.1, weight.shape) for weight in original.weights])
        original.save_weights(tmp_path / "original.weights.h5")
        backbone = load_backbone("convnext-tiny", str(tmp_path / "original.weights.h5"))
        pixels = some_pixels(224)
        np.testing.assert_allclose(
            backbone(pixels, training=False), original(pixels, training=False), rtol=1e-4, atol=1e-4
        )

    @pytest.mark.slow
    def test_efficientnet_sees_what_its_published_weights_expect(self, tmp_path: Path) -> None:
        """(x - mean) / deviation, from normalisation weights that divide by its root only."""
        original = keras.applications.EfficientNetB0(include_top=False, weights=None, pooling="avg")
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        scaling = next(x for x in original.layers if isinstance(x, keras.layers.Normalization))
        scaling.set_weights([mean, deviation, np.array(0)])
        original.save_weights(tmp_path / "original.weights.h5")
        network = network_of(load_backbone("efficientnet-b0", str(tmp_path / "original.weights.h5")))
        pixels = some_pixels(224).astype(np.float32)
        seen = keras.Model(network.input, network.get_layer("stem_conv_pad").input)(pixels)
        np.testing.assert_allclose(seen, (pixels / 255 - mean) / deviation, rtol=1e-4, atol=1e-4)


class TestEfficientNetLite0:
    def test_the_original_head_recognises_photographs(self, photos, encode) -> None:
        network = build_efficientnet_lite(1.0, 1.0, 224, classes=1000)
        table = load_weights(network, read_weights(_packaged_lite0()), layer_name=published_layer_name)
        assert not table.of("skipped")
        preprocess = BACKBONES["efficientnet-lite0"].preprocess
        for name, expected in TOP.items():
            pixels = decode_image(tf.constant(encode(photos[name], quality=95)), preprocess)
            logits = network((tf.cast(pixels[None], tf.float32) - 127) / 128, training=False).numpy()[0]
            assert set(np.argsort(-logits)[: len(expected)]) == expected, name

    def test_weights_from_a_file_equal_the_packaged_ones(self, lite0) -> None:
        tables: list[WeightTable] = []
        from_file = load_backbone("efficientnet-lite0", str(_packaged_lite0()), listener=tables.append)
        np.testing.assert_array_equal(
            lite0(some_pixels(224), training=False), from_file(some_pixels(224), training=False)
        )
        assert len(tables[0].of("loaded")) == 98
        assert [(row.layer, row.reason) for row in tables[0].of("skipped")] == [
            ("_fc", "not in this network")
        ]

    @pytest.mark.parametrize("size", [1, 2])
    def test_the_larger_ones_have_no_download(self, size: int) -> None:
        with pytest.raises(
            WeightsError, match=rf"no download .* of efficientnet-lite{size}\. Give a file with"
        ):
            load_backbone(f"efficientnet-lite{size}")

    def test_of_another_size_is_refused(self) -> None:
        with pytest.raises(WeightsError, match=r"the weights of efficientnet-lite2: \d+ layers do not fit"):
            load_backbone("efficientnet-lite2", str(_packaged_lite0()))


class TestTrainingMode:
    def test_is_the_callers_choice(self) -> None:
        backbone = load_backbone("efficientnet-lite0")
        pixels = some_pixels(224, 4)
        inferred = backbone(pixels, training=False).numpy()
        before = backbone.get_layer("efficientnet-lite0").get_layer("stem_bn").moving_mean.numpy()
        trained = backbone(pixels, training=True).numpy()
        after = backbone.get_layer("efficientnet-lite0").get_layer("stem_bn").moving_mean.numpy()
        assert np.abs(trained - inferred).max() > 0.1  # the batch's own statistics
        assert np.abs(after - before).max() > 0

    def test_freezing_is_inference(self, lite0) -> None:
        pixels = some_pixels(224)
        frozen = freeze(lite0)(tf.constant(pixels))[0]
        np.testing.assert_allclose(frozen, lite0(pixels, training=False), atol=1e-4)


class TestTruncation:
    def test_gives_the_means_of_a_layers_output(self, lite0) -> None:
        lower = truncate(lite0, "block4_add")
        assert lower.name == "efficientnet_lite0_until_block4_add"
        assert lower.output_shape == (None, 40)
        network = network_of(lite0)
        normalised = lite0.get_layer("normalization")(some_pixels(224))
        output = keras.Model(network.input, network.get_layer("block4_add").output)(
            normalised, training=False
        )
        np.testing.assert_allclose(
            lower(some_pixels(224), training=False), np.mean(output, (1, 2)), rtol=1e-4, atol=1e-5
        )
        assert network_of(lower).get_layer("stem_conv") is network.get_layer("stem_conv")
        assert lower.count_params() < lite0.count_params() / 10

    def test_on_loading_leaves_nothing_of_the_upper_part(self, vgg16_file: Path, tmp_path: Path) -> None:
        tables: list[WeightTable] = []
        options = {"truncate_at": "block3_pool", "listener": tables.append}
        backbone = load_backbone("vgg16", str(vgg16_file), **options)
        assert backbone.name == "vgg16_until_block3_pool"
        assert backbone.output_shape == (None, 256)
        assert backbone.count_params() == 1_735_488
        assert {row.layer[:6]: row.status for row in tables[0].rows} == {
            "block1": "loaded",
            "block2": "loaded",
            "block3": "loaded",
            "block4": "skipped",
            "block5": "skipped",
        }
        whole = load_backbone("vgg16", str(vgg16_file))
        pixels = some_pixels(224, 1)
        expected = truncate(whole, "block3_pool")(pixels, training=False)
        np.testing.assert_allclose(backbone(pixels, training=False), expected, rtol=1e-5, atol=1e-4)

        backbone.save(tmp_path / "lower.keras")
        again = keras.saving.load_model(tmp_path / "lower.keras")
        np.testing.assert_allclose(again(pixels, training=False), expected, rtol=1e-5, atol=1e-4)

    def test_needs_only_the_lower_weights(self, tmp_path: Path) -> None:
        lower = load_backbone("vgg16", "none", truncate_at="block2_pool")
        path = tmp_path / "lower.weights.h5"
        network_of(lower).save_weights(path)
        again = load_backbone("vgg16", str(path), truncate_at="block2_pool")
        for before, after in zip(lower.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)
        with pytest.raises(
            WeightsError, match=r"the weights of vgg16: 9 layers do not fit \(block3_conv1: not"
        ):
            load_backbone("vgg16", str(path))

    def test_happens_twice(self, lite0) -> None:
        lower = truncate(truncate(lite0, "block4_add"), "block2_add")
        np.testing.assert_allclose(
            lower(some_pixels(224), training=False),
            truncate(lite0, "block2_add")(some_pixels(224), training=False),
            rtol=1e-5,
        )

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ("block4_ad", r"efficientnet-lite0 has no layer 'block4_ad'; the nearest are block4_add, "),
            ("normalised", r"normalised of efficientnet-lite0 gives no features"),
        ],
    )
    def test_refuses_other_layers(self, lite0, layer: str, message: str) -> None:
        with pytest.raises(RecipeError, match=f"truncate_at: {message}"):
            truncate(lite0, layer)

    def test_needs_a_backbone(self) -> None:
        with pytest.raises(ValueError, match="expected a backbone"):
            network_of(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))


class TestWeights:
    @pytest.mark.parametrize("name", ["efficientnet-lite0", "mobilenet-v2"])
    def test_survive_a_file(self, name: str, tmp_path: Path) -> None:
        backbone = load_backbone(name, "none")
        path = tmp_path / "some.weights.h5"
        network_of(backbone).save_weights(path)
        again = load_backbone(name, str(path))
        for before, after in zip(backbone.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)

    def test_of_a_trained_model_load_into_the_next_one(self, lite0, tmp_path: Path) -> None:
        """What a run leaves: the backbone as one layer beside its normalisation and a head."""
        features = keras.Input((1280,))
        head = keras.Model(features, keras.layers.Dense(3, name="logits")(features), name="head")
        outputs = {"features": lite0.output, "probabilities": head(lite0.output)}
        path = tmp_path / "model.keras"
        keras.Model(lite0.input, outputs).save(path)
        tables: list[WeightTable] = []
        backbone = load_backbone("efficientnet-lite0", str(path), listener=tables.append)
        pixels = some_pixels(224)
        np.testing.assert_array_equal(backbone(pixels, training=False), lite0(pixels, training=False))
        assert len(tables[0].of("loaded")) == 98
        assert [row.layer for row in tables[0].of("skipped")] == ["logits"]

    def test_load_in_part(self, lite0) -> None:
        tables: list[WeightTable] = []
        options = {"until": "block9_add", "exclude": ["stem"], "listener": tables.append}
        partial = network_of(load_backbone("efficientnet-lite0", **options))
        loaded = {row.layer for row in tables[0].of("loaded")}
        assert {row.layer: row.reason for row in tables[0].of("random")}["stem_conv"] == "excluded"
        assert "block9_project_bn" in loaded
        assert "block10_expand_conv" not in loaded
        for layer in network_of(lite0).layers:
            if layer.name.endswith("conv"):
                same = np.array_equal(layer.get_weights()[0], partial.get_layer(layer.name).get_weights()[0])
                assert same == (layer.name in loaded), layer.name

    def test_that_keras_downloads_load_in_part(self, vgg16_file: Path, monkeypatch) -> None:
        """Keras reads the file that it would have downloaded."""
        network = network_of(load_backbone("vgg16", str(vgg16_file)))
        original = keras.applications.VGG16

        def vgg16(weights, **options):
            return original(weights=str(vgg16_file) if weights == "imagenet" else weights, **options)

        monkeypatch.setattr(keras.applications, "VGG16", vgg16)
        tables: list[WeightTable] = []
        whole = network_of(load_backbone("vgg16", listener=tables.append))
        partial = network_of(load_backbone("vgg16", exclude=["block5"], listener=tables.append))
        assert (
            tables[0].summary()
            == "vgg16 from imagenet: 13 layers loaded (14,714,688 parameters), 0 random, 0 skipped"
        )
        assert [row.layer for row in tables[1].of("random")] == [
            "block5_conv1",
            "block5_conv2",
            "block5_conv3",
        ]
        for name, same in (("block4_conv3", True), ("block5_conv1", False)):
            kernels = (whole.get_layer(name).kernel.numpy(), partial.get_layer(name).kernel.numpy())
            assert np.array_equal(*kernels) == same
            assert np.array_equal(kernels[0], network.get_layer(name).kernel.numpy())

    def test_none_leave_nothing_to_choose(self) -> None:
        with pytest.raises(WeightsError, match="none leaves nothing to choose from"):
            load_backbone("vgg16", "none", until="block1_pool")

    def test_that_are_missing_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"w\.h5: no such weights file\. Expected imagenet, none, or"):
            load_backbone("mobilenet-v2", str(tmp_path / "w.h5"))

    def test_of_another_network_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "other.weights.h5"
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(path)
        with pytest.raises(
            WeightsError, match=r"does not hold the weights of efficientnet-lite0: none of its 1"
        ):
            load_backbone("efficientnet-lite0", str(path))

    def test_pth_is_for_efficientnet_lite_only(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        path.write_bytes(b"")
        with pytest.raises(WeightsError, match="for EfficientNet-Lite only, not for vgg16"):
            load_backbone("vgg16", str(path))

    def test_a_failed_download_names_the_file_and_its_place(
        self, tmp_path: Path, monkeypatch, capsys
    ) -> None:
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
