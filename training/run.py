"""The run directory: all that a run was asked, saw, learnt and measured.

recipe.json      what was asked, complete; written first
weights.txt      what was loaded into which layer of the backbone
labels.txt       one label a line, in the order of the outputs
split.csv        which image went where; skipped.csv: which did not, and why; duplicates.csv: the same twice
checkpoint.npz   where fine-tuning stands; gone when it is done
model.keras      backbone and head: pixels in, features and probabilities out
goldens/         a few held-out images, and what the model says of them (goldens.json)
predictions.csv  what it says of every image held out
report.html      for people, report.md in short
metrics.json     for machines, written last: a run that has it is finished
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import keras

from .backbones import Normalization
from .errors import RecipeError, RunError
from .evaluate import Evaluation
from .files import write_json
from .preprocess import Preprocess
from .recipe import Recipe

__all__ = ["Golden", "RunDirectory"]

_FORMAT = 2


@dataclass(frozen=True)
class Golden:
    """A held-out image, its label, and the probabilities (in the labels' order) the Keras model gives it."""

    file: Path
    label: str
    probabilities: tuple[float, ...]


class RunDirectory:
    """Reads and writes one run directory; every reader raises RunError for what is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open_finished(cls, path: Path) -> "RunDirectory":
        """A finished run, to export or report; raises RunError for anything else."""
        run = cls(path)
        if not run.started:
            raise RunError(
                f"{path}: not a run directory (no recipe.json); give the --output of graftserve train"
            )
        if not run.finished:
            raise RunError(f"{path}: the run is not finished; continue it with graftserve train --resume")
        return run

    @property
    def exists(self) -> bool:
        """Whether anything is there."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    @property
    def started(self) -> bool:
        """Whether what is there is a run."""
        return (self.path / "recipe.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "metrics.json").is_file()

    @cached_property
    def recipe(self) -> Recipe:
        """What was asked."""
        try:
            return Recipe.from_dict(self._document("recipe.json")["recipe"])
        except (RecipeError, KeyError) as error:
            raise self._damaged("recipe.json", error) from error

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the outputs."""
        try:
            return tuple((self.path / "labels.txt").read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise self._damaged("labels.txt", error) from error

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json` as it is."""
        return self._document("metrics.json")

    @cached_property
    def preprocess(self) -> Preprocess:
        """The decoding that the run trained on."""
        try:
            return Preprocess.from_dict(self.metrics["preprocess"])
        except (KeyError, ValueError) as error:
            raise self._damaged("metrics.json", error) from error

    @property
    def temperature(self) -> float:
        """What the logits are to be divided by for honest probabilities; 1 leaves them alone."""
        return float(self.metrics["temperature"])

    def evaluation(self, split: str) -> Evaluation | None:
        """How the model did on "validation" or "test"; None if that split was empty."""
        values = self.metrics["evaluation"].get(split)
        return Evaluation.from_dict(values) if values else None

    def load_model(self) -> keras.Model:
        """Pixels uint8 [N, side, side, 3] to {"features", "probabilities"}."""
        try:
            return keras.saving.load_model(
                self.path / "model.keras", compile=False, custom_objects={"Normalization": Normalization}
            )
        except Exception as error:  # Keras raises whatever its parsers met
            raise self._damaged("model.keras", error) from error

    @cached_property
    def goldens(self) -> tuple[Golden, ...]:
        """The held-out images with their expected probabilities."""
        folder = self.path / "goldens"
        try:
            return tuple(
                Golden(folder / row["file"], row["label"], tuple(row["probabilities"]))
                for row in self._document("goldens/goldens.json")["goldens"]
            )
        except KeyError as error:
            raise self._damaged("goldens/goldens.json", error) from error

    def write_recipe(self, recipe: Recipe, version: str) -> None:
        """Begin the run: until its metrics are written it is unfinished."""
        (self.path / "metrics.json").unlink(missing_ok=True)
        self.write_document("recipe.json", {"graftserve": version, "recipe": recipe.to_dict()})

    def write_document(self, name: str, values: dict[str, Any]) -> None:
        """Write one of the JSON files, with the number of the format that the readers expect."""
        write_json(self.path / name, {"format": _FORMAT} | values)

    def _document(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
            found = values.get("format", _FORMAT)
        except (OSError, ValueError, AttributeError) as error:
            raise self._damaged(name, error) from error
        if found != _FORMAT:
            raise RunError(f"{self.path / name}: format {_FORMAT} expected, got {found}; train again")
        return dict(values)

    def _damaged(self, name: str, error: Exception) -> RunError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return RunError(f"{self.path / name}: missing or damaged ({reason}); train again with --overwrite")
