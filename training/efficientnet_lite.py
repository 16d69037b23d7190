"""EfficientNet-Lite in Keras, and what published weights call its layers.

Sources: Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1,
for the stages and the scaling rule; tensorflow/tpu, models/official/efficientnet/lite, for what Lite changes:
no squeeze-and-excitation, ReLU6 for swish, the stem, the first and the last stage's depth and the head left
unscaled. Input normalisation there: (x - 127) / 128.
"""

import math
import re
from typing import Any

import keras
from keras import layers

__all__ = ["build_efficientnet_lite", "published_layer_name"]

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

    width, depth: the scaling factors. Lite0 is (1.0, 1.0) at 224 px, Lite1 (1.0, 1.1) at 240 px, Lite2
        (1.1, 1.2) at 260 px.
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
    "stem/conv2d": "stem_conv",
    "stem/tpu_batch_normalization": "stem_bn",
    "head/conv2d": "head_conv",
    "head/tpu_batch_normalization": "head_bn",
    "head/dense": "logits",
}
_BLOCK_LAYERS = {
    "_expand_conv": "expand_conv",
    "_bn0": "expand_bn",
    "_depthwise_conv": "depthwise_conv",
    "_bn1": "depthwise_bn",
    "_project_conv": "project_conv",
    "_bn2": "project_bn",
    "conv2d": "expand_conv",
    "tpu_batch_normalization": "expand_bn",
    "depthwise_conv2d": "depthwise_conv",
    "tpu_batch_normalization_1": "depthwise_bn",
    "conv2d_1": "project_conv",
    "tpu_batch_normalization_2": "project_bn",
}
_FIRST_BLOCK_LAYERS = _BLOCK_LAYERS | {  # it expands nothing, and TensorFlow counts what there is
    "conv2d": "project_conv",
    "tpu_batch_normalization": "depthwise_bn",
    "tpu_batch_normalization_1": "project_bn",
}


def published_layer_name(name: str) -> str:
    """This network's name of a layer, from the one in published weights; any other name as it is.

    Those are the checkpoints of tensorflow/tpu ("efficientnet-lite1/blocks_3/conv2d") and the state dicts of
    the port for PyTorch ("_blocks.3._expand_conv").
    """
    name = re.sub(r"^efficientnet-lite\d/", "", name)
    in_block = re.fullmatch(r"_?blocks[._](\d+)[./](\w+)", name)
    if not in_block:
        return _TOP_LAYERS.get(name, name)
    layers_of_block = _FIRST_BLOCK_LAYERS if in_block[1] == "0" else _BLOCK_LAYERS
    return f"block{in_block[1]}_{layers_of_block.get(in_block[2], in_block[2])}"
