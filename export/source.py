"""What an export is made of, wherever it comes from: a run, a Keras model, or a SavedModel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftserve.training.preprocess import Preprocess
from graftserve.training.run import RunDirectory

from .goldens import GoldenImage
from .network import Network

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """kind, name: what it is, and the backbone's or the model's name.

    goldens: at least one.
    are_goldens_real: whether they are photographs that the model has not seen, not patterns.
    temperature: what the network divides its logits by.
    run: where it comes from, if from a run; has the metrics, and the recipe with the data's place.
    notes: what the export is to tell: an assumption that was made, a part that is missing.
    """

    kind: Literal["run", "keras", "saved_model"]
    name: str
    network: Network
    labels: tuple[str, ...]
    preprocess: Preprocess
    goldens: tuple[GoldenImage, ...]
    are_goldens_real: bool = True
    temperature: float = 1.0
    run: RunDirectory | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def test_metrics(self) -> Mapping[str, Any] | None:
        """The run's evaluation on its test images; None without a run, or without a test image."""
        return self.run.metrics["evaluation"].get("test") if self.run else None

    @property
    def path(self) -> Path | None:
        """The run directory, if there is one."""
        return self.run.path if self.run else None
