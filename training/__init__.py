"""From a folder of images to a run directory: fine-tune a pretrained backbone.

`train` does all of it; `Recipe` says what, and `load_recipe` reads one from a file; `RunDirectory` reads what
came out, and `judge_run` judges it on other images.
Importing this package imports nothing heavy: its modules do, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    DataError,
    FitError,
    ImageError,
    RecipeError,
    RunError,
    TrainingError,
    WeightsError,
)
from .progress import Report
from .recipe import Recipe
from .recipe_files import load_recipe

if TYPE_CHECKING:
    from .fit import train
    from .judge import judge_run
    from .run import RunDirectory

__all__ = [
    "DataError",
    "FitError",
    "ImageError",
    "Recipe",
    "RecipeError",
    "Report",
    "RunDirectory",
    "RunError",
    "TrainingError",
    "WeightsError",
    "judge_run",
    "load_recipe",
    "train",
]

_LAZY = {"RunDirectory": ".run", "judge_run": ".judge", "train": ".fit"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
