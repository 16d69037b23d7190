"""Where a run stands, in one file that is whole or not there, so that a killed run goes on exactly."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .errors import RunError
from .files import write_atomically

__all__ = ["Checkpoint", "Snapshot", "restore", "snapshot"]

Snapshot = tuple[npt.NDArray[Any], ...]


def snapshot(variables: Sequence[keras.Variable]) -> Snapshot:
    """The variables' values, as copies."""
    return tuple(np.array(variable) for variable in variables)


def restore(variables: Sequence[keras.Variable], values: Snapshot) -> None:
    """Put a snapshot back. Raises RunError if it is of other variables."""
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [value.shape for value in values]:
        raise RunError("the checkpoint is of another network; train again with --overwrite")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class Checkpoint:
    """One file of arrays, by name, and a document of plain values."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, document: Mapping[str, Any], groups: Mapping[str, Snapshot]) -> None:
        """Replace what was saved before; durable when this returns."""
        arrays = {
            f"{name}/{index}": value for name, values in groups.items() for index, value in enumerate(values)
        }
        counts = {name: len(values) for name, values in groups.items()}
        text = json.dumps({"document": document, "counts": counts})
        with write_atomically(self._path, "wb") as file:
            np.savez(file, allow_pickle=False, document=np.array(text), **arrays)

    def load(self) -> tuple[dict[str, Any], dict[str, Snapshot]] | None:
        """What was saved last, None if nothing was; raises RunError if it is damaged."""
        try:
            with self._path.open("rb") as file, np.load(file) as saved:
                values = json.loads(str(saved["document"]))
                groups = {
                    name: tuple(saved[f"{name}/{index}"] for index in range(count))
                    for name, count in values["counts"].items()
                }
                return values["document"], groups
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(f"{self._path}: damaged ({error}); train again with --overwrite") from error

    def remove(self) -> None:
        """Forget it: the run is finished."""
        self._path.unlink(missing_ok=True)
