"""From a folder of images to a run directory: fine-tune a pretrained backbone.

`train` does all of it; `Recipe` says what, `RunDirectory` reads what came out.
Importing this package imports nothing heavy: its modules do, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import DataError, ImageError, RunError, TrainingError, WeightsError
from .progress import Report
from .recipe import Recipe

if TYPE_CHECKING:
    from .fit import train
    from .run import RunDirectory

__all__ = [
    "DataError",
    "ImageError",
    "Recipe",
    "Report",
    "RunDirectory",
    "RunError",
    "TrainingError",
    "WeightsError",
    "train",
]

_LAZY = {"RunDirectory": ".run", "train": ".fit"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
