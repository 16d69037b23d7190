"""EfficientNet-Lite in Keras, and its weights from a PyTorch state dict.

Sources: Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1,
for the stages and the scaling rule; tensorflow/tpu, models/official/efficientnet/lite, for what Lite changes:
no squeeze-and-excitation, ReLU6 for swish, the stem, the first and the last stage's depth and the head left
unscaled. Input normalisation there: (x - 127) / 128.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy.typing as npt
from keras import layers

from .errors import WeightsError

__all__ = ["build_efficientnet_lite", "convert_state_dict"]

_BN_EPSILON = 1e-3
_STEM_FILTERS = 32
_HEAD_FILTERS = 1280

# Repeats, kernel, stride, expansion, output filters: table 1 of the paper.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _round_filters(filters: int, width: float) -> int:
    """Scale and round to a multiple of 8, never more than 10% down (the paper's code)."""
    scaled = filters * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def build_efficientnet_lite(
    width: float, depth: float, side_px: int, *, classes: int | None = None
) -> keras.Model:
    """The network from normalised pixels float32 [N, side_px, side_px, 3] to features [N, 1280].

    width, depth: the scaling factors; Lite0 is (1.0, 1.0) at 224 px.
    classes: with a number, the original classification layer follows, giving logits [N, classes].
    """

    def convolve(x: Any, filters: int, kernel: int, stride: int, name: str) -> Any:
        return layers.Conv2D(filters, kernel, stride, padding="same", use_bias=False, name=name)(x)

    def normalise(x: Any, name: str) -> Any:
        return layers.BatchNormalization(epsilon=_BN_EPSILON, momentum=0.99, name=name)(x)

    image = keras.Input((side_px, side_px, 3), name="normalised")
    x = convolve(image, _STEM_FILTERS, 3, 2, "stem_conv")
    x = layers.ReLU(6.0, name="stem_relu")(normalise(x, "stem_bn"))

    block = 0
    for index, (repeats, kernel, stride, expansion, filters) in enumerate(_STAGES):
        at_an_end = index in (0, len(_STAGES) - 1)
        filters_out = _round_filters(filters, width)
        for repeat in range(repeats if at_an_end else math.ceil(repeats * depth)):
            prefix = f"block{block}_"
            shortcut, filters_in = x, x.shape[-1]
            if expansion != 1:
                x = convolve(x, filters_in * expansion, 1, 1, prefix + "expand_conv")
                x = layers.ReLU(6.0, name=prefix + "expand_relu")(normalise(x, prefix + "expand_bn"))
            block_stride = stride if repeat == 0 else 1
            x = layers.DepthwiseConv2D(
                kernel, block_stride, padding="same", use_bias=False, name=prefix + "depthwise_conv"
            )(x)
            x = layers.ReLU(6.0, name=prefix + "depthwise_relu")(normalise(x, prefix + "depthwise_bn"))
            x = normalise(convolve(x, filters_out, 1, 1, prefix + "project_conv"), prefix + "project_bn")
            if block_stride == 1 and filters_in == filters_out:
                x = layers.Add(name=prefix + "add")([shortcut, x])
            block += 1

    x = convolve(x, _HEAD_FILTERS, 1, 1, "head_conv")
    x = layers.ReLU(6.0, name="head_relu")(normalise(x, "head_bn"))
    x = layers.GlobalAveragePooling2D(name="features")(x)
    if classes is not None:
        x = layers.Dense(classes, name="logits")(x)
    return keras.Model(image, x, name="efficientnet_lite")


_TOP_LAYERS = {
    "_conv_stem": "stem_conv",
    "_bn0": "stem_bn",
    "_conv_head": "head_conv",
    "_bn1": "head_bn",
    "_fc": "logits",
}
_BLOCK_LAYERS = {
    "_expand_conv": "expand_conv",
    "_bn0": "expand_bn",
    "_depthwise_conv": "depthwise_conv",
    "_bn1": "depthwise_bn",
    "_project_conv": "project_conv",
    "_bn2": "project_bn",
}
_VARIABLES = {
    "weight": ("kernel", "gamma"),
    "bias": ("bias", "beta"),
    "running_mean": ("moving_mean",),
    "running_var": ("moving_variance",),
}


def convert_state_dict(state: Mapping[str, npt.NDArray[Any]], model: keras.Model) -> None:
    """Set every weight of `model` from a state dict of the EfficientNet-Lite port for PyTorch.

    Tensors for layers the model leaves out (the original classification layer) are passed over.
    Raises WeightsError if one of the model's weights has no tensor, or one of another shape.
    """
    targets = {
        f"{layer.name}/{weight.name}": (layer, weight) for layer in model.layers for weight in layer.weights
    }
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        in_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", owner)
        if in_block:
            layer_name = f"block{in_block[1]}_{_BLOCK_LAYERS.get(in_block[2], in_block[2])}"
        else:
            layer_name = _TOP_LAYERS.get(owner, owner)
        for variable in _VARIABLES.get(kind, ()):
            target = targets.pop(f"{layer_name}/{variable}", None)
            if target is None:
                continue
            layer, weight = target
            if tensor.ndim == 4:  # PyTorch: [out, in, h, w]; Keras: [h, w, in, out], depthwise [h, w, in, 1]
                depthwise = isinstance(layer, layers.DepthwiseConv2D)
                tensor = tensor.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
            elif tensor.ndim == 2:
                tensor = tensor.T
            if tensor.shape != tuple(weight.shape):
                raise WeightsError(
                    f"{name} has the shape {tensor.shape} where {layer_name} needs {tuple(weight.shape)}: "
                    "the weights are of another network"
                )
            weight.assign(tensor)
    if targets:
        some = ", ".join(sorted(targets)[:3])
        raise WeightsError(f"no tensor for {len(targets)} weights ({some}, ...): of another network")
