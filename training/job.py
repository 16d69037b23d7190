"""What all the methods of training share: the data, the backbone, and where features come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt

from .dataset import Dataset, Split
from .distribution import Workers
from .features import Features, compute_features
from .history import StageResult, Sweep
from .images import ImageStore
from .preprocess import Preprocess
from .progress import Listener
from .recipe import Recipe
from .run import RunDirectory

__all__ = ["Fitted", "Job"]


@dataclass(frozen=True)
class Job:
    """One run under way. features: of every example, by the backbone as it came."""

    recipe: Recipe
    run: RunDirectory
    dataset: Dataset
    backbone: keras.Model
    preprocess: Preprocess
    features: Features
    cache_dir: Path
    engine: str
    workers: Workers
    tensorboard: bool
    listener: Listener

    def labels(self, split: Split) -> npt.NDArray[np.int64]:
        """int64 [n] of one split, in the order of `dataset.of`."""
        return np.array([example.label for example in self.dataset.of(split)], np.int64)

    def paths(self, split: Split) -> tuple[str, ...]:
        """The images of one split, in the same order."""
        return tuple(example.path for example in self.dataset.of(split))

    def rows(self, features: Features, split: Split) -> npt.NDArray[np.float32]:
        """float32 [n, D] of one split, in the same order."""
        row_of = {path: row for row, path in enumerate(features.kept)}
        return features.features[[row_of[path] for path in self.paths(split)]]

    def compute(
        self,
        backbone: keras.Model,
        paths: Sequence[str],
        *,
        images: ImageStore | None = None,
        flip: bool = False,
    ) -> Features:
        """What a backbone, this one or a changed one, says of images of the dataset, or of others."""
        return compute_features(
            backbone,
            self.preprocess,
            images or self.dataset.images,
            paths,
            self.cache_dir,
            self.listener,
            engine=self.engine,
            flip=flip,
            peers=self.workers,
        )


@dataclass(frozen=True)
class Fitted:
    """What came out of a method. features: of every example, by `backbone`, which may have learnt.

    strength: the probe's penalty; stages: what fine-tuning did; sweeps: by stage; auto: what `auto` saw
    and why it picked what it did.
    """

    method: str
    backbone: keras.Model
    head: keras.Model
    features: Features
    strength: float | None = None
    stages: tuple[StageResult, ...] = ()
    sweeps: tuple[tuple[str, Sweep], ...] = ()
    auto: dict[str, object] | None = None

    def probabilities(self, job: Job, split: Split) -> npt.NDArray[np.float32]:
        """float32 [n, C] of one split."""
        rows = job.rows(self.features, split)
        if not len(rows):
            return np.empty((0, len(job.dataset.labels)), np.float32)
        return np.asarray(self.head(rows, training=False))
