"""How good the classifier is on images it has not seen."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ClassScores", "Evaluation", "evaluate", "label_ranks", "log_loss"]

_TOP = 5
_BINS = 15  # as in Guo et al. 2017
_RESAMPLES = 10_000  # from seed to seed, the ends then vary by about 1% of the interval's width
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class ClassScores:
    """One class among the images judged, each score 0 to 1 and None where there is nothing to divide by.

    images: that are of the class. precision: share of right ones among the images taken for it. recall: share
    of its images that were recognised. f1: the harmonic mean of the two.
    """

    images: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Evaluation:
    """accuracy, top5_accuracy: share of images whose label is the first, or among the first five, answers.

    accuracy_interval: low and high end of the 95% confidence interval. log_loss: nats.
    confusion: int64 [true, predicted]. reliability: float64 [15, 3], a row for each bin of equal width of the
    top score: images, mean top score, accuracy (both 0 in an empty bin).
    """

    images: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    top5_accuracy: float
    log_loss: float
    confusion: npt.NDArray[np.int64]
    reliability: npt.NDArray[np.float64]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, 0 to 1: how far top score and accuracy lie apart, averaged over images.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
        """
        images, score, accuracy = self.reliability.T
        return float((images * np.abs(score - accuracy)).sum() / self.images)

    @cached_property
    def classes(self) -> tuple[ClassScores, ...]:
        """The scores of each class, in the order of the outputs."""
        right = self.confusion.diagonal().tolist()
        images, predicted = (self.confusion.sum(axis=axis).tolist() for axis in (1, 0))
        return tuple(
            ClassScores(count, _share(hits, taken), _share(hits, count), _share(2 * hits, count + taken))
            for hits, count, taken in zip(right, images, predicted, strict=True)
        )

    @property
    def macro_precision(self) -> float:
        """Mean over the classes that have images; one that nothing was taken for counts as 0."""
        return self._mean("precision")

    @property
    def macro_recall(self) -> float:
        """Mean over the classes that have images, however many each has."""
        return self._mean("recall")

    @property
    def macro_f1(self) -> float:
        """Mean over the classes that have images, however many each has."""
        return self._mean("f1")

    def _mean(self, score: str) -> float:
        return float(np.mean([getattr(scores, score) or 0.0 for scores in self.classes if scores.images]))

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """The commonest mistakes: (true label, predicted label, images), the most frequent first."""
        mistakes = self.confusion.copy()
        np.fill_diagonal(mistakes, 0)
        order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
        pairs = (np.unravel_index(index, mistakes.shape) for index in order)
        return [(int(true), int(predicted), int(mistakes[true, predicted]))
                for true, predicted in pairs if mistakes[true, predicted]]  # fmt: skip

    def worst_classes(self, count: int) -> list[int]:
        """The labels of the least F1 among those with images, the worst first."""
        judged = [label for label, scores in enumerate(self.classes) if scores.images]
        return sorted(judged, key=lambda label: self.classes[label].f1 or 0.0)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the confusion only what is not 0, as [true, predicted, images]."""
        true, predicted = np.nonzero(self.confusion)
        return {
            "images": self.images,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "top5_accuracy": self.top5_accuracy,
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
            "macro_precision": self.macro_precision,
            "macro_recall": self.macro_recall,
            "macro_f1": self.macro_f1,
            "classes": [asdict(scores) for scores in self.classes],
            "confusion": np.stack([true, predicted, self.confusion[true, predicted]], axis=1).tolist(),
            "reliability": self.reliability.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`."""
        confusion = np.zeros((len(values["classes"]),) * 2, np.int64)
        for true, predicted, images in values["confusion"]:
            confusion[true, predicted] = images
        low, high = values["accuracy_interval"]
        return cls(
            values["images"],
            values["accuracy"],
            (low, high),
            values["top5_accuracy"],
            values["log_loss"],
            confusion,
            np.asarray(values["reliability"], np.float64),
        )


def evaluate(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], *, seed: int = 0
) -> Evaluation | None:
    """Judge probabilities [N, C] by the true labels [N]; None if there are no images to judge by.

    seed: of the draws that the confidence interval is made of.
    """
    if not len(labels):
        return None
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    right = predicted == labels
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    return Evaluation(
        images=len(labels),
        accuracy=float(right.mean()),
        accuracy_interval=_accuracy_interval(int(right.sum()), len(labels), seed),
        top5_accuracy=float((label_ranks(probabilities, labels) <= _TOP).mean()),
        log_loss=log_loss(probabilities, labels),
        confusion=confusion,
        reliability=_reliability(probabilities.max(axis=1), right),
    )


def log_loss(probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Mean negative log-probability (nats) of the true label, each at most 27.6; 0 for no examples."""
    if not len(labels):
        return 0.0
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(true, 1e-12)).mean())


def label_ranks(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Where each image's label stands among the answers, int64 [N]: 1 is the top one.

    Of equal probabilities the lower index comes first, as with argmax.
    """
    own = probabilities[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]
    ahead = (probabilities > own) | ((probabilities == own) & earlier)
    ranks: npt.NDArray[np.int64] = 1 + ahead.sum(axis=1, dtype=np.int64)
    return ranks


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _accuracy_interval(right: int, images: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over the images: how the accuracy varies when N of them are drawn anew.

    The right ones among N drawn with replacement are one binomial draw, so no image is drawn by itself. Where
    all or none are right, all draws would agree; the exact limit of that case stands in for the open end.
    Source: Efron and Tibshirani 1993, chapter 13; Clopper and Pearson 1934.
    """
    tail = (1 - _CONFIDENCE) / 2
    if right == images:
        return tail ** (1 / images), 1.0
    if right == 0:
        return 0.0, 1 - tail ** (1 / images)
    draws = np.random.default_rng(seed).binomial(images, right / images, _RESAMPLES)
    low, high = np.quantile(draws / images, [tail, 1 - tail])
    return float(low), float(high)


def _reliability(scores: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """See Evaluation; bin m holds the scores in ((m - 1) / 15, m / 15]."""
    bins = np.clip(np.ceil(scores.astype(np.float64) * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    images, score_sum, right_sum = (
        np.bincount(bins, weights, _BINS) for weights in (np.ones(len(bins)), scores, right)
    )
    filled = np.maximum(images, 1)
    return np.stack([images, score_sum / filled, right_sum / filled], axis=1)
