"""scikit-learn's handwritten digits as a folder of JPEG files, one folder for each digit.

Source: the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine
Learning Repository, 1998): 1,797 images of 8 x 8 pixels with 17 grey levels, shipped in scikit-learn's wheel.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["held_out_images", "write_digits"]

_SIDE_PX = 112
_DIGIT_PX = 64  # in the middle of a larger canvas, as an object is in a photo
_GREY_LEVELS = 16


def write_digits(folder: Path) -> int:
    """Write the images that are not there yet as folder/<digit>/<index>.jpg; returns how many there are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{index:04}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray((image * (255 / _GREY_LEVELS)).astype(np.uint8))
        canvas = Image.new("L", (_SIDE_PX, _SIDE_PX))
        margin_px = (_SIDE_PX - _DIGIT_PX) // 2
        canvas.paste(small.resize((_DIGIT_PX, _DIGIT_PX), Image.Resampling.BICUBIC), (margin_px, margin_px))
        temporary = path.with_suffix(".part")
        canvas.save(temporary, "JPEG", quality=92)
        temporary.replace(path)
    return len(digits.target)


def held_out_images(run_dir: Path, data_dir: Path) -> list[tuple[Path, str]]:
    """Path and label of every image of `data_dir` that the run held out for its test."""
    with (run_dir / "split.csv").open(encoding="utf-8", newline="") as file:
        return [
            (data_dir / row["path"], row["label"]) for row in csv.DictReader(file) if row["split"] == "test"
        ]
