"""The linear head and its evaluation, on data with known answers."""

import numpy as np
import pytest

from graftserve.training.evaluate import Evaluation, evaluate
from graftserve.training.head import fit_linear_head, log_loss

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


def test_log_loss() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], np.float32)
    labels = np.array([0, 1, 0])
    assert log_loss(probabilities, labels) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 3)
    assert log_loss(probabilities[2:], np.array([1])) == pytest.approx(-np.log(1e-12))


def test_evaluation_counts() -> None:
    probabilities = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 0]]
    result = evaluate(probabilities, np.array([0, 0, 1, 1, 1]))
    assert result is not None
    assert result.accuracy == pytest.approx(0.6)
    assert result.confusion.tolist() == [[2, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert result.recall(1) == pytest.approx(1 / 3)
    assert result.recall(2) is None
    assert result.most_confused(5) == [(1, 0, 1), (1, 2, 1)]
    again = Evaluation.from_dict(result.to_dict())
    assert again.confusion.tolist() == result.confusion.tolist()
    assert evaluate(np.empty((0, 3), np.float32), np.empty(0, np.int64)) is None
