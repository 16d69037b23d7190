"""The golden images of a version: what they are, and what the original model says of them.

Reading them needs no TensorFlow, so that any machine can ask a server for them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftserve.client.wire.contract import INT8_TOLERANCE
from graftserve.training.files import write_atomically, write_json

from .errors import VerificationError

__all__ = ["EXTRA", "GoldenImage", "read_goldens", "server_tolerance", "write_goldens"]

EXTRA = "assets.extra"
"""The folder that TensorFlow keeps its hands off."""

_TOLERANCE = 1e-3  # of a probability: GPUs round otherwise than CPUs


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


def write_goldens(folder: Path, goldens: Sequence[GoldenImage], int8_difference: float | None = None) -> None:
    """Write the images and what the original model says of them into assets.extra/goldens/.

    int8_difference: how far from that the network in int8 is at most, 0 to 1; None where there is none.
    """
    target = folder / EXTRA / "goldens"
    target.mkdir()
    for golden in goldens:
        with write_atomically(target / golden.name, "wb") as file:
            file.write(golden.content)
    rows: list[Mapping[str, Any]] = [
        {"file": golden.name, "label": golden.label, "probabilities": golden.probabilities}
        for golden in goldens
    ]
    document: dict[str, Any] = {"format": 1, "goldens": rows}
    if int8_difference is not None:
        document["int8_difference"] = int8_difference
    write_json(target / "goldens.json", document)


def server_tolerance(folder: Path) -> float:
    """How far a server's probability of a golden image may be from what the original model says of it.

    More where the version has its network in int8, too: from outside nobody sees which one answers.
    Raises VerificationError as `read_goldens`.
    """
    document = _read_document(folder)
    try:
        int8_difference = document.get("int8_difference")
        return _TOLERANCE if int8_difference is None else float(int8_difference) + INT8_TOLERANCE
    except (TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, error) from error


def read_goldens(folder: Path) -> tuple[GoldenImage, ...]:
    """What `write_goldens` wrote; raises VerificationError if there is none, or something is damaged."""
    path = folder / EXTRA / "goldens"
    document = _read_document(folder)
    try:
        goldens = tuple(
            GoldenImage(
                row["file"], (path / row["file"]).read_bytes(), row["label"], tuple(row["probabilities"])
            )
            for row in document["goldens"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    if not goldens:
        raise VerificationError(f"{path}: holds no golden image to check with")
    return goldens


def _read_document(folder: Path) -> Any:
    if not folder.is_dir():
        raise VerificationError(f"{folder}: no such folder; give a version's, such as models/flowers/3")
    path = folder / EXTRA / "goldens" / "goldens.json"
    if not path.is_file():
        raise VerificationError(
            f"{folder}: not a version that graftserve export wrote (no {EXTRA}/goldens/goldens.json)"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> VerificationError:
    return VerificationError(f"{folder / EXTRA / 'goldens'}: golden images are missing or damaged ({error})")
