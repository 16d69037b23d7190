"""How training images vary: geometry in one warp, RandAugment, mixup and CutMix.

Nothing here keeps a state: what an image becomes follows from the numbers drawn for it and the step's seed,
so a run that was killed goes on exactly.
"""

import math
from typing import Any

import keras
import tensorflow as tf

from .recipe import Augmentation

__all__ = ["DRAWS", "Augmenter", "mix"]

DRAWS = 5
"""Numbers that each image of a step needs: for its flip, zoom, shift in x and y, and rotation."""

_FILLS = {"nearest": "NEAREST", "reflect": "REFLECT", "constant": "CONSTANT"}


class Augmenter:
    """What `settings` does to the images of a batch. To be made outside of a tf.function; callable in one."""

    def __init__(self, settings: Augmentation) -> None:
        self._settings = settings
        self._warps = bool(
            settings.horizontal_flip or settings.zoom or settings.shift or settings.rotation_degrees
        )
        self._rand_augment = None
        if settings.rand_augment_count:
            self._rand_augment = keras.layers.RandAugment(
                (0, 255), num_ops=settings.rand_augment_count, factor=settings.rand_augment_strength
            )

    def __call__(self, pixels: tf.Tensor, draws: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Pixels [N, side, side, 3] of 0 to 255, any type, to float32 of the same shape and range.

        draws: float32 [N, DRAWS], uniform in [0, 1), each image's own. seed: int32 [2], the step's, for
        RandAugment, which draws its operations for the batch and their strength for each image (Cubuk et al.
        2019; Keras' layer). Without a setting the pixels come back as they are.
        """
        images = tf.cast(pixels, tf.float32)
        if self._warps:
            images = _warp(images, _transforms(images, draws, self._settings), self._settings)
        if self._rand_augment:
            images = _with_seeds(self._rand_augment, images, seed)
        return images


def mix(
    pixels: tf.Tensor, targets: tf.Tensor, seed: tf.Tensor, settings: Augmentation
) -> tuple[tf.Tensor, tf.Tensor]:
    """Each image with the next one of the batch, by mixup or CutMix, and its targets alike.

    pixels: float32 [N, side, side, 3]; targets: float32 [N, C]; seed: int32 [2], the batch's own. The share
    lambda, and for CutMix the box's place, are each image's own.
    Source: Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix", where a box of the other image covers the
    share 1 - lambda, corrected for what falls outside the image.
    """
    if not (settings.mixup or settings.cutmix):
        return pixels, targets
    if settings.mixup and settings.cutmix:
        coin = tf.random.stateless_uniform([], _folded(seed, 4)) < 0.5
        mixed: tuple[tf.Tensor, tf.Tensor] = tf.cond(
            coin,
            lambda: _mixup(pixels, targets, seed, settings.mixup),
            lambda: _cutmix(pixels, targets, seed, settings.cutmix),
        )
        return mixed
    if settings.mixup:
        return _mixup(pixels, targets, seed, settings.mixup)
    return _cutmix(pixels, targets, seed, settings.cutmix)


def _transforms(images: tf.Tensor, draws: tf.Tensor, settings: Augmentation) -> tf.Tensor:
    """float32 [N, 8], from a place in the result to one in the image, as ImageProjectiveTransform wants it.

    About the middle: result = flip * zoom * rotation * image + shift.
    """
    side_px = tf.cast(tf.shape(images)[1], tf.float32)

    def around_zero(column: int, largest: float) -> tf.Tensor:
        return (2 * draws[:, column] - 1) * largest

    flip = tf.where(draws[:, 0] < 0.5, -1.0, 1.0) if settings.horizontal_flip else 1.0
    zoom = 1 + around_zero(1, settings.zoom)
    shift_x, shift_y = (around_zero(column, settings.shift) * side_px for column in (2, 3))
    angle = around_zero(4, math.radians(settings.rotation_degrees))
    cosine, sine = tf.cos(angle) / zoom, tf.sin(angle) / zoom
    centre = (side_px - 1) / 2
    a, b, c, d = flip * cosine, flip * sine, -sine, cosine
    x, y = centre + shift_x, centre + shift_y
    zeros = tf.zeros_like(a)
    return tf.stack([a, b, centre - a * x - b * y, c, d, centre - c * x - d * y, zeros, zeros], axis=1)


def _warp(images: tf.Tensor, transforms: tf.Tensor, settings: Augmentation) -> tf.Tensor:
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=transforms,
        output_shape=tf.shape(images)[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode=_FILLS[settings.fill],
    )


def _with_seeds(layer: keras.layers.RandAugment, images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Keras' layer on float32 [N, side, side, 3], its random numbers drawn from `seed`, not its own state."""
    seeds = _Seeds(seed)
    layer._get_seed_generator = lambda backend=None: seeds
    transformation = layer.get_random_transformation(images, training=True)
    return tf.clip_by_value(layer.transform_images(images, transformation, training=True), 0.0, 255.0)


class _Seeds(keras.random.SeedGenerator):  # type: ignore[misc]
    """Keras' seeds, drawn from one seed instead of a variable."""

    def __init__(self, seed: tf.Tensor) -> None:
        self._seed, self._drawn = seed, 0

    def next(self, ordered: bool = True) -> Any:
        """The next seed, int32 [2]."""
        self._drawn += 1
        return _folded(self._seed, self._drawn)


def _mixup(
    pixels: tf.Tensor, targets: tf.Tensor, seed: tf.Tensor, alpha: float
) -> tuple[tf.Tensor, tf.Tensor]:
    share = _beta(tf.shape(pixels)[0], seed, alpha)
    of_pixels, of_targets = share[:, None, None, None], share[:, None]
    return (
        of_pixels * pixels + (1 - of_pixels) * tf.roll(pixels, 1, axis=0),
        of_targets * targets + (1 - of_targets) * tf.roll(targets, 1, axis=0),
    )


def _cutmix(
    pixels: tf.Tensor, targets: tf.Tensor, seed: tf.Tensor, alpha: float
) -> tuple[tf.Tensor, tf.Tensor]:
    count, side_px = tf.shape(pixels)[0], tf.shape(pixels)[1]
    box_px = tf.cast(side_px, tf.float32) * tf.sqrt(1 - _beta(count, seed, alpha))
    centres = tf.random.stateless_uniform([2, count], _folded(seed, 3)) * tf.cast(side_px, tf.float32)
    low = tf.cast(tf.round(tf.maximum(centres - box_px / 2, 0)), tf.int32)
    high = tf.cast(tf.round(tf.minimum(centres + box_px / 2, tf.cast(side_px, tf.float32))), tf.int32)
    places = tf.range(side_px)
    rows, columns = ((places >= low[axis][:, None]) & (places < high[axis][:, None]) for axis in range(2))
    inside = (rows[:, :, None] & columns[:, None, :])[..., None]
    share = 1 - tf.reduce_mean(tf.cast(inside[..., 0], tf.float32), axis=[1, 2])[:, None]
    return (
        tf.where(inside, tf.roll(pixels, 1, axis=0), pixels),
        share * targets + (1 - share) * tf.roll(targets, 1, axis=0),
    )


def _beta(count: tf.Tensor, seed: tf.Tensor, alpha: float) -> tf.Tensor:
    """float32 [count] of the distribution Beta(alpha, alpha), which two gammas make."""
    one, two = (tf.random.stateless_gamma([count], _folded(seed, kind), alpha) for kind in (1, 2))
    return one / tf.maximum(one + two, 1e-30)


def _folded(seed: tf.Tensor, kind: int) -> tf.Tensor:
    """Another seed, for numbers of another kind."""
    return tf.random.fold_in(seed, kind)
