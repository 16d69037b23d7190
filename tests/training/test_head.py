"""The linear head, on data with known answers."""

import numpy as np
import pytest

from graftserve.training.head import fit_linear_head

NOTHING = np.empty((0, 4), np.float32), np.empty(0, np.int64)


def blobs(classes: int, count: int, seed: int, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.eye(classes, 4) * 3 + 100  # far from zero: centring matters
    return (centres[labels] + rng.normal(0, spread, (count, 4))).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_separable_classes_are_learnt(classes: int) -> None:
    head = fit_linear_head(*blobs(classes, 300, 0), *blobs(classes, 100, 1), classes)
    features, labels = blobs(classes, 200, 2)
    probabilities = head.probabilities(features)
    assert head.kernel.shape == (4, classes)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (probabilities.argmax(axis=1) == labels).mean() > 0.97


def test_noise_is_met_with_a_strong_penalty() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 4)).astype(np.float32), np.arange(60) % 2
    held_out = rng.normal(size=(200, 4)).astype(np.float32), np.arange(200) % 2
    assert fit_linear_head(*noise, *held_out, 2).strength < fit_linear_head(*noise, *NOTHING, 2).strength


def test_the_same_data_give_the_same_head() -> None:
    one, two = (fit_linear_head(*blobs(3, 90, 0), *NOTHING, 3) for _ in range(2))
    np.testing.assert_array_equal(one.kernel, two.kernel)


def test_constant_features_are_no_division_by_zero() -> None:
    features, labels = np.ones((10, 4), np.float32), np.arange(10) % 2
    head = fit_linear_head(features, labels, *NOTHING, 2)
    np.testing.assert_allclose(head.probabilities(features), 0.5, atol=1e-3)


def test_a_class_without_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected examples of all 3 classes"):
        fit_linear_head(*blobs(2, 20, 0), *NOTHING, 3)


def test_of_many_rows_a_part_chooses_the_strength_and_all_are_learnt() -> None:
    features, labels = blobs(3, 24_000, 0, spread=1.5)
    features, labels = np.append(features, [[100, 100, 100, 103]], 0).astype(np.float32), np.append(labels, 3)
    head = fit_linear_head(features, labels, *blobs(3, 600, 1, spread=1.5), 4)
    again = fit_linear_head(features[:-1][:9000], labels[:-1][:9000], *blobs(3, 600, 1, spread=1.5), 3)
    assert head.kernel.shape == (4, 4)
    held_out, truth = blobs(3, 3000, 2, spread=1.5)
    accuracies = [(each.probabilities(held_out).argmax(axis=1) == truth).mean() for each in (head, again)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)
    # The one example of the last class is not in the part drawn by chance, and still the head knows it.
    own, others = (head.probabilities(rows)[:, 3].mean() for rows in (features[-1:], features[:-1]))
    assert own > 10 * others
