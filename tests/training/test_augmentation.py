"""Augmentation on a real photograph, against other people's geometry and by what is drawn."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from graftserve.training.augmentation import DRAWS, Augmenter, mix
from graftserve.training.recipe import Augmentation

SIDE_PX = 64
NOTHING = np.full((4, DRAWS), 0.5, np.float32)  # the middle of every range, and no flip
SEED = tf.constant([1, 2])


@pytest.fixture(scope="module")
def image(photos: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.fromarray(photos["chelsea"]).resize((SIDE_PX, SIDE_PX)))


@pytest.fixture(scope="module")
def batch(image: np.ndarray, photos: dict[str, Any]) -> np.ndarray:
    other = np.asarray(Image.fromarray(photos["coffee"]).resize((SIDE_PX, SIDE_PX)))
    return np.stack([image, other, image[::-1], other[:, ::-1]])


def augmented(pixels: np.ndarray, draws: np.ndarray, seed: Any = SEED, **settings: Any) -> np.ndarray:
    return np.asarray(Augmenter(Augmentation(**settings))(pixels, draws, seed))


def drawn(**columns: float) -> np.ndarray:
    draws = NOTHING.copy()
    for column, value in columns.items():
        draws[:, ("flip", "zoom", "x", "y", "angle").index(column)] = value
    return draws


def test_the_middle_of_every_range_changes_nothing(batch: np.ndarray) -> None:
    settings = {"horizontal_flip": True, "zoom": 0.3, "shift": 0.3, "rotation_degrees": 30.0}
    result = augmented(batch, NOTHING, **settings)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, batch, atol=0.01)
    np.testing.assert_array_equal(augmented(batch, NOTHING), batch)


def test_a_flip_is_exact_and_each_images_own(batch: np.ndarray) -> None:
    draws = NOTHING.copy()
    draws[[0, 2], 0] = 0.49
    result = augmented(batch, draws, horizontal_flip=True)
    np.testing.assert_array_equal(result[[0, 2]], batch[[0, 2], :, ::-1])
    np.testing.assert_array_equal(result[[1, 3]], batch[[1, 3]])


def test_a_shift_moves_whole_pixels(batch: np.ndarray) -> None:
    right = augmented(batch, drawn(x=1.0), shift=0.25)  # 16 pixels
    np.testing.assert_allclose(right[:, :, 16:], batch[:, :, :-16], atol=0.01)
    np.testing.assert_allclose(right[:, :, :16], np.repeat(batch[:, :, :1], 16, axis=2), atol=0.01)
    down = augmented(batch, drawn(y=1.0), shift=0.25, fill="constant")
    np.testing.assert_allclose(down[:, 16:], batch[:, :-16], atol=0.01)
    assert not down[:, :16].any()
    mirrored = augmented(batch, drawn(x=1.0), shift=0.25, fill="reflect")
    np.testing.assert_allclose(mirrored[:, :, :16], batch[:, :, 15::-1], atol=0.01)


@pytest.mark.parametrize(("draw", "angle"), [(1.0, 30.0), (0.0, -30.0)])
def test_a_rotation_is_pillows(image: np.ndarray, draw: float, angle: float) -> None:
    result = augmented(image[None], drawn(angle=draw)[:1], rotation_degrees=30.0, fill="constant")[0]
    candidates = [
        np.asarray(Image.fromarray(image).rotate(turn, Image.Resampling.BILINEAR)) for turn in (angle, -angle)
    ]
    middle = slice(12, -12)
    differences = [np.abs(result - other)[middle, middle].mean() for other in candidates]
    assert min(differences) < 1.5
    assert max(differences) > 10


def test_zoom_scales_about_the_middle(image: np.ndarray) -> None:
    larger = augmented(image[None], drawn(zoom=1.0)[:1], zoom=0.3)[0]
    side = SIDE_PX / 1.3
    margin = (SIDE_PX - side) / 2
    box = (margin, margin, margin + side, margin + side)
    expected = Image.fromarray(image).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, box)
    assert np.abs(larger - np.asarray(expected)).mean() < 2
    smaller = augmented(image[None], drawn(zoom=0.0)[:1], zoom=0.3, fill="constant")[0]
    assert not smaller[:8].any()
    assert smaller[12:-12, 12:-12].any(axis=-1).all()


def test_rand_augment_follows_its_seed(batch: np.ndarray) -> None:
    augmenter = Augmenter(Augmentation(rand_augment_count=2, rand_augment_strength=0.5))
    call = tf.function(lambda seed: augmenter(batch, NOTHING, seed))
    results = [np.asarray(call(tf.constant([3, step]))) for step in range(12)]
    np.testing.assert_array_equal(results[0], call(tf.constant([3, 0])))
    again = Augmenter(Augmentation(rand_augment_count=2, rand_augment_strength=0.5))
    np.testing.assert_allclose(results[0], again(batch, NOTHING, tf.constant([3, 0])), atol=1e-3)
    assert len({result.tobytes() for result in results}) == 12
    for result in results:
        assert result.shape == batch.shape
        assert result.min() >= 0
        assert result.max() <= 255


def two_classes(count: int) -> np.ndarray:
    return np.eye(2, dtype=np.float32)[np.arange(count) % 2]


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_targets_say_what_the_pixels_hold(settings: dict[str, float]) -> None:
    """Black images of class 0 and white ones of class 1: the share of white is the target of class 1."""
    pixels = np.zeros((6, SIDE_PX, SIDE_PX, 3), np.float32)
    pixels[1::2] = 1
    for step in range(5):
        mixed, targets = mix(pixels, two_classes(6), tf.constant([0, step]), Augmentation(**settings))
        np.testing.assert_allclose(
            np.asarray(mixed).mean(axis=(1, 2, 3)), np.asarray(targets)[:, 1], atol=1e-5
        )
        np.testing.assert_allclose(np.asarray(targets).sum(axis=1), 1, rtol=1e-5)
        assert len(np.unique(np.round(targets, 4))) > 4


def test_cutmix_pastes_a_box_and_mixup_blends() -> None:
    pixels = np.zeros((2, SIDE_PX, SIDE_PX, 3), np.float32)
    pixels[1] = 1
    cut, _ = mix(pixels, two_classes(2), SEED, Augmentation(cutmix=1.0))
    assert set(np.unique(cut)) == {0.0, 1.0}
    inside = np.argwhere(np.asarray(cut)[0, :, :, 0] == 1)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    assert np.prod(high - low) == len(inside)
    blended, _ = mix(pixels, two_classes(2), SEED, Augmentation(mixup=1.0))
    assert len(np.unique(np.asarray(blended)[0])) == 1


def test_both_kinds_of_mixing_are_used() -> None:
    pixels = np.zeros((2, 8, 8, 3), np.float32)
    pixels[1] = 1
    settings = Augmentation(mixup=1.0, cutmix=1.0)
    kinds = {
        len(np.unique(mix(pixels, two_classes(2), tf.constant([0, step]), settings)[0][0])) > 1
        for step in range(20)
    }
    assert kinds == {True, False}


def test_shares_are_beta_distributed() -> None:
    targets = two_classes(2000)
    pixels = np.zeros((2000, 1, 1, 1), np.float32)
    for alpha in (0.2, 1.0):
        _, mixed = mix(pixels, targets, SEED, Augmentation(mixup=alpha))
        shares = np.where(targets[:, 0] == 1, np.asarray(mixed)[:, 0], np.asarray(mixed)[:, 1])
        assert shares.mean() == pytest.approx(0.5, abs=0.03)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_one_image_is_mixed_with_itself(image: np.ndarray) -> None:
    pixels = image[None].astype(np.float32)
    for settings in (Augmentation(mixup=1.0), Augmentation(cutmix=1.0)):
        mixed, targets = mix(pixels, two_classes(1), SEED, settings)
        np.testing.assert_allclose(mixed, pixels, atol=1e-3)
        np.testing.assert_allclose(targets, two_classes(1), atol=1e-6)
    same, _ = mix(pixels, two_classes(1), SEED, dataclasses.replace(Augmentation()))
    assert same is pixels
