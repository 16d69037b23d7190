"""Golden images, asked of a running server: does it say what the trained model said?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graftserve.client import Client
from graftserve.client.wire.contract import IMAGE_BYTES, SERVING_DEFAULT
from graftserve.export.goldens import GoldenImage, read_goldens, server_tolerance

from .output import CommandError

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """version: the one that answered. largest_difference: of a probability, or of a score where the version
    gives no probabilities. worst: the image that it is of. tolerance: what a server may differ by."""

    version: int
    images: int
    largest_difference: float
    worst: str
    tolerance: float


def replay(folder: Path, client: Client, model: str) -> Replay:
    """Ask for the golden images of the version in `folder`, one by one and all at once.

    Raises ClientError, VerificationError (no golden images there), CommandError (another version answered in
    between, or what it gives cannot be compared).
    """
    goldens, tolerance = read_goldens(folder), server_tolerance(folder)
    requests = [[golden] for golden in goldens] + [list(goldens)]
    versions: set[int] = set()
    worst = (0.0, goldens[0].name)
    for request in requests:
        content = np.array([golden.content for golden in request], object)
        answer = client.predict({IMAGE_BYTES: content}, signature=SERVING_DEFAULT)
        versions.add(answer.version)
        if len(versions) > 1:
            raise CommandError(
                f"{model}: versions {sorted(versions)} answered in turn; ask one with --version"
            )
        for golden, difference in zip(request, _differences(request, answer.outputs, model), strict=True):
            worst = max(worst, (difference, golden.name))
    return Replay(versions.pop(), len(goldens), *worst, tolerance)


def _differences(
    goldens: Sequence[GoldenImage], outputs: Mapping[str, npt.NDArray[Any]], model: str
) -> list[float]:
    """The largest difference in each row; infinite where the row has another shape, or is no number."""
    expected = np.array([golden.probabilities for golden in goldens])
    if "probabilities" in outputs:
        got = outputs["probabilities"]
    elif "scores" in outputs:
        got = outputs["scores"]
        expected = -np.sort(-expected, axis=1)[:, : got.shape[-1]]
    else:
        raise CommandError(
            f"{model}: {SERVING_DEFAULT}: expected probabilities or scores, got {sorted(outputs)}"
        )
    if got.shape != expected.shape:
        raise CommandError(
            f"{model}: {SERVING_DEFAULT}: expected answers of shape {list(expected.shape)}, got "
            f"{list(got.shape)}: another model answers"
        )
    differences = np.abs(got - expected).max(axis=1)
    return [float("inf") if np.isnan(difference) else float(difference) for difference in differences]
