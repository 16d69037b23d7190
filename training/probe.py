"""The method "probe": a regularised linear head on features that are computed once."""

import numpy as np

from .features import Features
from .graft import build_head, set_linear
from .head import fit_linear_head
from .job import Fitted, Job

__all__ = ["fit_probe"]


def fit_probe(job: Job, features: Features | None = None) -> Fitted:
    """Fit the head on the job's features, or others of the same images by the same backbone."""
    features = features or job.features
    labels = job.dataset.labels
    linear = fit_linear_head(
        job.rows(features, "train"),
        job.labels("train"),
        job.rows(features, "validation"),
        job.labels("validation"),
        len(labels),
        job.listener,
    )
    head = build_head(np.shape(features.features)[1], len(labels), type(job.recipe.head)())
    set_linear(head, linear.kernel, linear.bias)
    return Fitted("probe", job.backbone, head, features, strength=linear.strength)
