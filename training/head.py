"""The linear softmax head: multinomial logistic regression on cached features.

L-BFGS with an L2 penalty (scikit-learn), whose strength is chosen on the validation split. On features that
are computed once this takes seconds, has no learning rate to tune, and gives the same head every time.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .evaluate import log_loss
from .progress import Listener, Progress, silent

__all__ = ["LinearHead", "fit_linear_head"]

_DEFAULT_STRENGTH = 1.0
# Inverse penalty from strong to weak, each fit starting at the one before; the search ends where validation
# gets worse, which spares the weak ones, the slowest.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_MAX_ITERATIONS = 300
_SAMPLE_ROWS = 10_000  # as many as it takes to choose a strength; the fit itself is then on all


@dataclass(frozen=True)
class LinearHead:
    """kernel: float32 [D, C]; bias: float32 [C]; strength: the inverse penalty C
    that scikit-learn was given, on centred features of unit mean variance."""

    kernel: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    strength: float

    def probabilities(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """float32 [N, D] to probabilities float32 [N, C]."""
        logits = features @ self.kernel + self.bias
        logits -= logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        result: npt.NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return result


def fit_linear_head(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    validation_features: npt.NDArray[np.float32],
    validation_labels: npt.NDArray[np.int64],
    class_count: int,
    listener: Listener = silent,
) -> LinearHead:
    """Fit on `features` float32 [N, D] and `labels` int64 [N], every class of 0 to class_count - 1 in them.

    The strength with the least validation log-loss wins; without validation images it is 1.
    """
    from sklearn.linear_model import LogisticRegression

    present = np.unique(labels)
    if len(present) != class_count:
        raise ValueError(f"labels: expected examples of all {class_count} classes, got {len(present)}")
    # One scale for all: scaling each feature alone would blow up those that are almost always zero.
    mean, scale = features.mean(axis=0), max(float(features.std()), 1e-12)
    scaled = (features - mean) / scale
    regression = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)

    def fit(rows: npt.NDArray[np.int64] | slice, strength: float) -> LinearHead:
        regression.set_params(C=strength)
        with warnings.catch_warnings():
            # At the iteration limit, which a weak penalty may reach, the candidate is judged as it is.
            warnings.simplefilter("ignore")
            regression.fit(scaled[rows], labels[rows])
        return _unscaled(regression.coef_, regression.intercept_, mean, scale, strength)

    sample = _sample(labels)
    on_all = len(sample) == len(labels)
    strengths = _STRENGTHS if len(validation_labels) else (_DEFAULT_STRENGTH,)
    progress = Progress("fitting the head", len(strengths) + (not on_all), listener)
    best, best_loss = fit(sample, strengths[0]), np.inf
    for done, strength in enumerate(strengths):
        head = best if done == 0 else fit(sample, strength)
        loss = log_loss(head.probabilities(validation_features), validation_labels)
        progress.advance()
        if loss >= best_loss:
            progress.advance(len(strengths) - done - 1)
            break
        best, best_loss = head, loss
    if not on_all:
        best = fit(slice(None), best.strength)
        progress.advance()
    return best


def _sample(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows to choose the strength on: all of them, or of many a random part, some of every class."""
    if len(labels) <= _SAMPLE_ROWS:
        return np.arange(len(labels))
    order = np.random.default_rng(0).permutation(len(labels))
    _, first_of_each = np.unique(labels[order], return_index=True)
    return np.unique(np.concatenate([order[:_SAMPLE_ROWS], order[first_of_each]]))


def _unscaled(
    coefficients: npt.NDArray[np.floating],
    intercept: npt.NDArray[np.floating],
    mean: npt.NDArray[np.floating],
    scale: float,
    strength: float,
) -> LinearHead:
    """Fold centring and scale into the weights; two classes come as one row, a sigmoid's."""
    kernel = (coefficients / scale).T.astype(np.float64)
    bias = intercept - mean.astype(np.float64) @ kernel
    if kernel.shape[1] == 1:
        kernel, bias = np.hstack([-kernel / 2, kernel / 2]), np.hstack([-bias / 2, bias / 2])
    return LinearHead(kernel.astype(np.float32), bias.astype(np.float32), strength)
