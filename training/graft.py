"""The graft itself: a head on a backbone, as one model, and apart again."""

import keras
import numpy as np
import numpy.typing as npt

from .errors import RunError
from .recipe import Head

__all__ = ["build_head", "graft", "logits_of", "set_linear", "split_model"]


def build_head(feature_count: int, class_count: int, settings: Head, seed: int = 0) -> keras.Model:
    """Features float32 [N, D] to probabilities float32 [N, C], initialised from `seed`; named "head".

    Its layer "logits" gives what the softmax takes; both stay in float32 under any precision policy.
    """
    features = x = keras.Input((feature_count,), name="features")
    seeds = iter(range(seed, seed + 1000))
    for index, units in enumerate(settings.hidden):
        initial = keras.initializers.GlorotUniform(next(seeds))
        x = keras.layers.Dense(units, "relu", kernel_initializer=initial, name=f"hidden{index}")(x)
        if settings.dropout and index < len(settings.hidden) - 1:
            x = keras.layers.Dropout(settings.dropout, seed=next(seeds), name=f"dropout{index}")(x)
    if settings.dropout and len(settings.hidden) < 2:
        x = keras.layers.Dropout(settings.dropout, seed=next(seeds), name="dropout")(x)
    initial = keras.initializers.GlorotUniform(next(seeds))
    x = keras.layers.Dense(class_count, kernel_initializer=initial, dtype="float32", name="logits")(x)
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(x)
    return keras.Model(features, probabilities, name="head")


def logits_of(head: keras.Model) -> keras.Model:
    """The head without its softmax, on the same weights: features [N, D] to logits [N, C]."""
    return keras.Model(head.input, head.get_layer("logits").output, name="head_logits")


def set_linear(
    head: keras.Model, kernel: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]
) -> keras.Model:
    """Give a head without hidden layers the weights [D, C] and [C]; returns it."""
    head.get_layer("logits").set_weights([kernel, bias])
    return head


def graft(backbone: keras.Model, head: keras.Model) -> keras.Model:
    """Pixels uint8 [N, side, side, 3] to {"features": [N, D], "probabilities": [N, C]}, both float32."""
    outputs = {"features": backbone.output, "probabilities": head(backbone.output)}
    return keras.Model(backbone.input, outputs, name=backbone.name)


def split_model(model: keras.Model) -> tuple[keras.Model, keras.Model]:
    """The inverse of `graft`: (pixels to features, features to probabilities), on the same weights."""
    try:
        return keras.Model(model.input, model.output["features"], name=model.name), model.get_layer("head")
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"model {model.name}: expected the outputs features and probabilities and a layer named head"
        ) from error
