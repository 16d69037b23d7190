"""What can go wrong in training, one class per thing the user can do about it.

TrainingError
├── DataError        mend the data folder
├── WeightsError     name another weights file, or fetch the one the message names
├── RunError         choose another run directory, --resume or --overwrite
└── ImageError       the bytes are no image this pipeline can read
"""

__all__ = ["DataError", "ImageError", "RunError", "TrainingError", "WeightsError"]


class TrainingError(Exception):
    """Base of all; the message says what was expected, what came and what to do."""


class DataError(TrainingError):
    """The folder of images cannot be trained on."""


class WeightsError(TrainingError):
    """A backbone's weights are missing, unreadable or of another network."""


class RunError(TrainingError):
    """The run directory is not in the state that the call needs."""


class ImageError(TrainingError):
    """One file could not be read as an image."""
