"""The linear softmax head: multinomial logistic regression on cached features.

L-BFGS with an L2 penalty (scikit-learn), whose strength is chosen on the validation split. On features that
are computed once this takes seconds, has no learning rate to tune, and gives the same head every time.
"""

import warnings
from dataclasses import dataclass

import keras
import numpy as np
import numpy.typing as npt

from .progress import Listener, Progress, silent

__all__ = ["LinearHead", "attach_head", "fit_linear_head", "log_loss"]

_DEFAULT_STRENGTH = 1.0
# Inverse penalty from strong to weak, each fit starting at the one before.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_MAX_ITERATIONS = 300


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

    # One scale for all: scaling each feature alone would blow up those that are almost always zero.
    mean, scale = features.mean(axis=0), max(float(features.std()), 1e-12)
    scaled = (features - mean) / scale
    strengths = _STRENGTHS if len(validation_labels) else (_DEFAULT_STRENGTH,)
    progress = Progress("fitting the head", len(strengths), listener)
    regression = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    best: LinearHead | None = None
    best_loss = np.inf
    for strength in strengths:
        regression.set_params(C=strength)
        with warnings.catch_warnings():
            # At the iteration limit, which a weak penalty may reach, the candidate is judged as it is.
            warnings.simplefilter("ignore")
            regression.fit(scaled, labels)
        head = _unscaled(regression.coef_, regression.intercept_, mean, scale, strength)
        loss = log_loss(head.probabilities(validation_features), validation_labels)
        if best is None or loss < best_loss:
            best, best_loss = head, loss
        progress.advance()
    if best is None or best.kernel.shape[1] != class_count:
        raise ValueError(f"labels: expected examples of all {class_count} classes")
    return best


def log_loss(probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Mean negative log-probability (nats) of the true label; 0 for no examples."""
    if not len(labels):
        return 0.0
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(true, 1e-12)).mean())


def attach_head(backbone: keras.Model, head: LinearHead) -> keras.Model:
    """Pixels uint8 [N, side, side, 3] to {"features": [N, D], "probabilities": [N, C]}, both float32."""
    dense = keras.layers.Dense(head.kernel.shape[1], activation="softmax", name="probabilities")
    probabilities = dense(backbone.output)
    dense.set_weights([head.kernel, head.bias])
    outputs = {"features": backbone.output, "probabilities": probabilities}
    return keras.Model(backbone.input, outputs, name=backbone.name)


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
