"""The golden images of a version: what they are, and what the original model says of them.

Reading them needs no TensorFlow, so that any machine can ask a server for them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftserve.training.files import write_atomically, write_json

from .errors import VerificationError

__all__ = ["EXTRA", "GoldenImage", "read_goldens", "write_goldens"]

EXTRA = "assets.extra"
"""The folder that TensorFlow keeps its hands off."""


@dataclass(frozen=True)
class GoldenImage:
    """An image to check an export with.

    name: of its file. label: what it shows, if known. probabilities: what the network says of it, one for
    each label; the values that the model was trained to give, at the exported temperature.
    """

    name: str
    content: bytes
    label: str | None
    probabilities: tuple[float, ...]


def write_goldens(folder: Path, goldens: Sequence[GoldenImage]) -> None:
    """Write the images and what the original model says of them into assets.extra/goldens/."""
    target = folder / EXTRA / "goldens"
    target.mkdir()
    for golden in goldens:
        with write_atomically(target / golden.name, "wb") as file:
            file.write(golden.content)
    rows: list[Mapping[str, Any]] = [
        {"file": golden.name, "label": golden.label, "probabilities": golden.probabilities}
        for golden in goldens
    ]
    write_json(target / "goldens.json", {"format": 1, "goldens": rows})


def read_goldens(folder: Path) -> tuple[GoldenImage, ...]:
    """What `write_goldens` wrote; raises VerificationError if there is none, or something is damaged."""
    path = folder / EXTRA / "goldens"
    if not folder.is_dir():
        raise VerificationError(f"{folder}: no such folder; give a version's, such as models/flowers/3")
    if not (path / "goldens.json").is_file():
        raise VerificationError(
            f"{folder}: not a version that graftserve export wrote (no {EXTRA}/goldens/goldens.json)"
        )
    try:
        rows = json.loads((path / "goldens.json").read_text(encoding="utf-8"))["goldens"]
        goldens = tuple(
            GoldenImage(
                row["file"], (path / row["file"]).read_bytes(), row["label"], tuple(row["probabilities"])
            )
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{path}: golden images are missing or damaged ({error})") from error
    if not goldens:
        raise VerificationError(f"{path}: holds no golden image to check with")
    return goldens
