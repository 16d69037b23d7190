"""Pictures to measure with."""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from graftserve.cli.digits import write_digits

__all__ = ["photo_sheet", "write_few_digits"]

_WIDTH_PX = 4000


def photo_sheet() -> Image.Image:
    """As large as a telephone's, which no package ships: 4000 x 3000, small photographs side by side, so that
    every part is as rich in detail as they are."""
    tiles = [np.asarray(photo)[:300, :450] for photo in (data.coffee(), data.astronaut(), data.rocket())]
    row = np.concatenate([tiles[index % 3] for index in range(9)], axis=1)[:, :_WIDTH_PX]
    return Image.fromarray(np.concatenate([np.roll(row, 450 * index, axis=1) for index in range(10)]))


def write_few_digits(folder: Path, count: int) -> Path:
    """The first ones of scikit-learn's handwritten digits, in a folder for each digit; returns `folder`."""
    write_digits(folder)
    for image in folder.rglob("*.jpg"):
        if int(image.stem) >= count:
            image.unlink()
    return folder
