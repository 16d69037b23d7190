"""How good the classifier is on images it has not seen."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .head import log_loss

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """accuracy: share of right top answers, 0 to 1; log_loss: nats; confusion: int64 [true, predicted]."""

    images: int
    accuracy: float
    log_loss: float
    confusion: npt.NDArray[np.int64]

    def recall(self, label: int) -> float | None:
        """Share of the label's images that were recognised; None if it has none here."""
        total = int(self.confusion[label].sum())
        return int(self.confusion[label, label]) / total if total else None

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """The commonest mistakes: (true label, predicted label, images), the most frequent first."""
        mistakes = self.confusion.copy()
        np.fill_diagonal(mistakes, 0)
        order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
        pairs = (np.unravel_index(index, mistakes.shape) for index in order)
        return [(int(true), int(predicted), int(mistakes[true, predicted]))
                for true, predicted in pairs if mistakes[true, predicted]]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "images": self.images,
            "accuracy": self.accuracy,
            "log_loss": self.log_loss,
            "confusion": self.confusion.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`."""
        return cls(**(values | {"confusion": np.asarray(values["confusion"], np.int64)}))


def evaluate(probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Evaluation | None:
    """Judge probabilities [N, C] by the true labels [N]; None if there are no images to judge by."""
    if not len(labels):
        return None
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    accuracy = float((predicted == labels).mean())
    return Evaluation(len(labels), accuracy, log_loss(probabilities, labels), confusion)
