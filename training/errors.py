"""What can go wrong in training, one class per thing the user can do about it.

TrainingError
├── DataError        mend the data folder
├── WeightsError     name another weights file, or fetch the one the message names
├── RecipeError      mend the recipe, or the flag that changed it
├── FitError         what was learnt is no use: the message says which setting to change
├── RunError         choose another run directory, --resume or --overwrite
└── ImageError       the bytes are no image this pipeline can read
"""

__all__ = [
    "DataError",
    "FitError",
    "ImageError",
    "RecipeError",
    "RunError",
    "TrainingError",
    "WeightsError",
]


class TrainingError(Exception):
    """Base of all; the message says what was expected, what came and what to do."""


class DataError(TrainingError):
    """The folder of images cannot be trained on."""


class WeightsError(TrainingError):
    """A backbone's weights are missing, unreadable or of another network."""


class RecipeError(TrainingError, ValueError):
    """A recipe has a setting that there is none of, or a value out of its range."""


class FitError(TrainingError):
    """Fitting could not go on: the loss is no number, nothing can learn, or the memory is too small."""


class RunError(TrainingError):
    """The run directory is not in the state that the call needs."""


class ImageError(TrainingError):
    """One file could not be read as an image."""
