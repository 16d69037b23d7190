"""Evaluation, calibration and predictions, against values by hand and scikit-learn's."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from sklearn import metrics

from graftserve.training.calibration import apply_temperature, fit_temperature
from graftserve.training.evaluate import ClassScores, Evaluation, evaluate, label_ranks, log_loss
from graftserve.training.predictions import Prediction, predictions, worst_mistakes, write_predictions


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def draw(images: int, classes: int, seed: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels; those of the labels are the probabilities at `temperature`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (images, classes))
    truth = softmax(logits).cumsum(axis=1)
    labels = (truth > rng.random((images, 1)) * truth[:, -1:]).argmax(axis=1)
    return softmax(logits * temperature), labels


def judged(probabilities: np.ndarray, labels: np.ndarray, **options: int) -> Evaluation:
    result = evaluate(probabilities, labels, **options)
    assert result is not None
    return result


def test_counts_by_hand() -> None:
    result = judged(np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 0]], np.array([0, 0, 1, 1, 1]))
    assert (result.images, result.accuracy) == (5, pytest.approx(0.6))
    assert result.confusion.tolist() == [[2, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert result.most_confused(5) == [(1, 0, 1), (1, 2, 1)]
    assert result.classes == (
        ClassScores(2, pytest.approx(2 / 3), 1.0, pytest.approx(0.8)),
        ClassScores(3, 1.0, pytest.approx(1 / 3), 0.5),
        ClassScores(0, 0.0, None, 0.0),
    )
    assert result.worst_classes(5) == [1, 0]
    assert result.macro_recall == pytest.approx(2 / 3)
    assert result.macro_f1 == pytest.approx(0.65)
    assert evaluate(np.empty((0, 3), np.float32), np.empty(0, np.int64)) is None


def test_a_class_without_images_or_answers_has_no_scores() -> None:
    result = judged(np.eye(3, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 0]))
    assert result.classes[2] == ClassScores(0, None, None, None)


def test_agrees_with_scikit_learn() -> None:
    probabilities, labels = draw(500, 7, seed=1)
    labels[labels == 6] = 0  # a class that is answered and never true
    result = judged(probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    assert result.accuracy == metrics.accuracy_score(labels, predicted)
    np.testing.assert_array_equal(result.confusion, metrics.confusion_matrix(labels, predicted))
    assert result.log_loss == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(7)), 1e-5)
    assert result.top5_accuracy == metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(7))
    precision, recall, f1, images = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(7), zero_division=0
    )
    assert [scores.precision for scores in result.classes] == pytest.approx(precision)
    assert [scores.recall for scores in result.classes[:6]] == pytest.approx(recall[:6])
    assert [scores.f1 for scores in result.classes] == pytest.approx(f1)
    assert [scores.images for scores in result.classes] == images.tolist()
    macro = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(6), average="macro", zero_division=0
    )
    assert (result.macro_precision, result.macro_recall, result.macro_f1) == pytest.approx(macro[:3])


def test_ranks_break_ties_as_argmax_does() -> None:
    probabilities = np.array([[0.4, 0.4, 0.2]] * 3 + [[0.2, 0.3, 0.5]], np.float32)
    assert label_ranks(probabilities, np.array([0, 1, 2, 0])).tolist() == [1, 2, 3, 3]


def test_log_loss() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], np.float32)
    assert log_loss(probabilities, np.array([0, 1, 0])) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 3)
    assert log_loss(probabilities[2:], np.array([1])) == pytest.approx(-np.log(1e-12))
    assert log_loss(probabilities[:0], np.empty(0, np.int64)) == 0.0


def test_calibration_error_by_hand() -> None:
    # Two of three right at a score of 0.95, none of one at 0.55: (3 |2/3 - 0.95| + 1 |0 - 0.55|) / 4.
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.95, 0.05], [0.45, 0.55]], np.float32)
    result = judged(probabilities, np.array([0, 0, 1, 0]))
    assert result.calibration_error == pytest.approx((3 * abs(2 / 3 - 0.95) + 0.55) / 4)
    assert result.reliability.shape == (15, 3)
    np.testing.assert_allclose(result.reliability[14], [3, 0.95, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(result.reliability[8], [1, 0.55, 0], rtol=1e-6)
    assert result.reliability[:, 0].sum() == 4


def test_a_score_on_a_bins_border_belongs_below_it() -> None:
    probabilities = np.array([[0.8, 0.2], [1.0, 0.0]], np.float64)
    filled = judged(probabilities, np.array([0, 0])).reliability[:, 0].nonzero()[0]
    assert filled.tolist() == [11, 14]  # 0.8 is 12/15, the upper end of the twelfth


@pytest.mark.parametrize(("images", "right"), [(40, 30), (1000, 900), (200, 3)])
def test_the_interval_is_the_binomials(images: int, right: int) -> None:
    labels = np.zeros(images, np.int64)
    labels[right:] = 1
    probabilities = np.tile(np.array([[0.9, 0.1]], np.float32), (images, 1))
    low, high = judged(probabilities, labels).accuracy_interval
    expected = binom.ppf([0.025, 0.975], images, right / images) / images
    np.testing.assert_allclose([low, high], expected, atol=1.01 / images)
    assert low < right / images < high
    assert judged(probabilities, labels).accuracy_interval == (low, high)


def test_the_seed_changes_the_draws() -> None:
    probabilities, labels = draw(20_000, 3, seed=0)
    one, two = (judged(probabilities, labels, seed=seed).accuracy_interval for seed in (0, 1))
    assert one != two
    assert one == pytest.approx(two, abs=1e-3)


def test_no_mistake_among_few_images_is_no_certainty() -> None:
    probabilities = np.tile(np.array([[0.9, 0.1]], np.float32), (10, 1))
    exact = binomtest(10, 10).proportion_ci(0.95, "exact").low
    assert judged(probabilities, np.zeros(10, np.int64)).accuracy_interval == (pytest.approx(exact), 1.0)
    assert judged(probabilities, np.ones(10, np.int64)).accuracy_interval == (0.0, pytest.approx(1 - exact))


def test_an_evaluation_survives_json() -> None:
    result = judged(*draw(200, 4, seed=2))
    document = json.loads(json.dumps(result.to_dict()))
    again = Evaluation.from_dict(document)
    assert again.to_dict() == document == result.to_dict()
    np.testing.assert_array_equal(again.confusion, result.confusion)
    assert again.confusion.dtype == np.int64
    assert document["classes"][0]["recall"] == result.classes[0].recall
    assert document["calibration_error"] == again.calibration_error


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6, 3.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    probabilities, labels = draw(5000, 5, seed=3, temperature=temperature)
    assert fit_temperature(probabilities, labels) == pytest.approx(temperature, rel=0.06)


def test_temperature_mends_the_calibration_of_new_images() -> None:
    found = fit_temperature(*draw(500, 5, seed=4, temperature=2.5))
    probabilities, labels = draw(2000, 5, seed=5, temperature=2.5)
    before, after = judged(probabilities, labels), judged(apply_temperature(probabilities, found), labels)
    assert before.calibration_error > 0.1
    assert after.calibration_error < 0.04
    assert after.log_loss < before.log_loss - 0.1
    np.testing.assert_array_equal(after.confusion, before.confusion)


@pytest.mark.parametrize("seed", range(10))
def test_the_fitted_temperature_never_raises_the_loss_it_was_fitted_on(seed: int) -> None:
    probabilities, labels = draw(60, 4, seed)
    found = fit_temperature(probabilities, labels)
    assert log_loss(apply_temperature(probabilities, found), labels) <= log_loss(probabilities, labels)


def test_images_that_cannot_tell_give_the_temperature_one() -> None:
    probabilities, labels = draw(200, 3, seed=6, temperature=4)
    assert fit_temperature(probabilities, labels) > 2
    assert fit_temperature(probabilities[:49], labels[:49]) == 1.0
    assert fit_temperature(probabilities[:0], labels[:0]) == 1.0
    assert fit_temperature(probabilities, np.ones_like(labels)) == 1.0
    assert fit_temperature(probabilities, probabilities.argmax(axis=1)) == 1.0
    certain = np.eye(3, dtype=np.float32)[np.arange(90) % 3]
    assert fit_temperature(certain, np.arange(90) % 3) == 1.0


def test_certain_and_wrong_is_met_with_a_high_temperature() -> None:
    labels = np.arange(90) % 3
    answers = labels.copy()
    answers[:30] += 1
    certain = np.eye(3, dtype=np.float32)[answers % 3]
    found = fit_temperature(certain, labels)
    assert 5 < found <= 10
    assert np.isfinite(apply_temperature(certain, found)).all()


def test_apply_temperature_by_hand() -> None:
    probabilities = np.array([[0.8, 0.2], [1.0, 0.0]], np.float32)
    applied = apply_temperature(probabilities, 2.0)
    assert applied.dtype == np.float32
    np.testing.assert_allclose(applied, [[2 / 3, 1 / 3], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(apply_temperature(probabilities, 1.0), probabilities, atol=1e-7)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a number above 0"):
            apply_temperature(probabilities, wrong)


PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.04, 0.06, 0.9]], np.float32)
ROWS = (
    ("a/1.jpg", "a/2.jpg", "b/é,.jpg"),
    ("test", "test", "train"),
    np.array([0, 2, 1]),
    PROBABILITIES,
    ("cat", "dog", "cow"),
)


def test_predictions_by_hand(tmp_path: Path) -> None:
    rows = list(predictions(*ROWS))
    assert rows[1] == Prediction("a/2.jpg", "test", "cow", "cat", 0.5, 3, pytest.approx(0.2))
    write_predictions(tmp_path / "predictions.csv", iter(rows))
    assert (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines() == [
        "path,split,label,predicted,score,label_rank,label_score",
        "a/1.jpg,test,cat,cat,0.7,1,0.7",
        "a/2.jpg,test,cow,cat,0.5,3,0.2",
        '"b/é,.jpg",train,dog,cow,0.9,2,0.06',
    ]


def test_an_interrupted_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("old")

    def rows():
        yield from list(predictions(*ROWS))[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, rows())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]


def test_the_surest_mistakes_come_first() -> None:
    mistakes = worst_mistakes(predictions(*ROWS))
    assert mistakes == [("b/é,.jpg", "dog", "cow", pytest.approx(0.9)), ("a/2.jpg", "cow", "cat", 0.5)]
    assert worst_mistakes(predictions(*ROWS), 1) == mistakes[:1]
