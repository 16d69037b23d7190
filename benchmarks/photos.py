"""A photograph as large as a telephone's, since packages ship none."""

import numpy as np
from PIL import Image
from skimage import data

__all__ = ["photo_sheet"]

_WIDTH_PX = 4000


def photo_sheet() -> Image.Image:
    """4000 x 3000: small photographs side by side, so that every part is as rich in detail as they are."""
    tiles = [np.asarray(photo)[:300, :450] for photo in (data.coffee(), data.astronaut(), data.rocket())]
    row = np.concatenate([tiles[index % 3] for index in range(9)], axis=1)[:, :_WIDTH_PX]
    return Image.fromarray(np.concatenate([np.roll(row, 450 * index, axis=1) for index in range(10)]))
