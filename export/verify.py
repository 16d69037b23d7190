"""Check a written model the way a server will load it: through a v1 Session, signature by signature.

`tf.saved_model.load` tracks Python objects and can succeed on a folder that TensorFlow Serving refuses; the
Session restores and runs exactly what the server does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from graftserve.client.wire.contract import FEATURES, SERVING_DEFAULT

from .errors import VerificationError

__all__ = ["Check", "open_signatures", "verify_model"]

TOLERANCE = 1e-4
"""Largest difference of a probability; folding constants and other batch sizes reorder float32 sums."""


@dataclass(frozen=True)
class Check:
    """What was compared, and the largest difference of a probability."""

    images: int
    largest_difference: float


class Signatures:
    """The signatures of a SavedModel in an open Session; every input is a string [N]."""

    def __init__(self, session: tf.compat.v1.Session, meta_graph: tf.compat.v1.MetaGraphDef) -> None:
        self._session, self._meta_graph = session, meta_graph

    @property
    def names(self) -> set[str]:
        """The signatures that clients can call."""
        return {name for name in self._meta_graph.signature_def if not name.startswith("__")}

    def run(self, name: str, image_bytes: Sequence[bytes]) -> dict[str, npt.NDArray[np.generic]]:
        """The outputs of signature `name` for N encoded images."""
        signature = self._meta_graph.signature_def[name]
        (source,) = (info.name for info in signature.inputs.values())
        fetches = {output: info.name for output, info in signature.outputs.items()}
        feed = {source: np.array(image_bytes, object)}
        results: dict[str, npt.NDArray[np.generic]] = self._session.run(fetches, feed)
        return results


@contextmanager
def open_signatures(folder: Path) -> Iterator[Signatures]:
    """Load a SavedModel as TensorFlow Serving does.

    Raises VerificationError if it does not load.
    """
    session = tf.compat.v1.Session(graph=tf.Graph())
    try:
        try:
            with session.graph.as_default():
                tags = [tf.saved_model.SERVING]
                meta_graph = tf.compat.v1.saved_model.loader.load(session, tags, str(folder))
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            raise VerificationError(f"{folder}: does not load in a Session: {error}") from error
        yield Signatures(session, meta_graph)
    finally:
        session.close()


def verify_model(
    folder: Path,
    images: Sequence[bytes],
    probabilities: npt.NDArray[np.float32],
    features: npt.NDArray[np.float32],
) -> Check:
    """Run every signature on real images among broken ones, one by one, and on none.

    images: N encoded images; probabilities [N, C] and features [N, D]: what the Keras model says of them.
    Raises VerificationError naming the signature and what differs.
    """
    broken = [b"", b"not an image", images[0][: len(images[0]) // 2]]
    mixed = [*images[:1], *broken, *images[1:]]
    is_valid = np.array([True] + [False] * len(broken) + [True] * (len(images) - 1))
    largest = 0.0
    with open_signatures(folder) as signatures:
        expected = {SERVING_DEFAULT, FEATURES}
        if signatures.names != expected:
            raise VerificationError(
                f"signatures: expected {sorted(expected)}, got {sorted(signatures.names)}"
            )
        for name, output, values in (
            (SERVING_DEFAULT, "probabilities", probabilities),
            (FEATURES, "features", features),
        ):
            results = _run(signatures, name, mixed)
            if not np.array_equal(results["valid"], is_valid):
                raise VerificationError(f"{name}: valid: expected {is_valid}, got {results['valid']}")
            difference = _difference(name, output, results[output][is_valid], values)
            if np.any(results[output][~is_valid]):
                raise VerificationError(f"{name}: {output}: expected zeros for broken images")
            alone = _run(signatures, name, images[:1])
            difference = max(difference, _difference(name, output, alone[output], values[:1]))
            empty = _run(signatures, name, [])
            if any(len(rows) for rows in empty.values()):
                raise VerificationError(f"{name}: expected no rows for no images")
            if output == "probabilities":
                largest = difference
                _check_top(results, is_valid)
    return Check(len(images), largest)


def _run(signatures: Signatures, name: str, images: Sequence[bytes]) -> dict[str, npt.NDArray[np.generic]]:
    try:
        return signatures.run(name, images)
    except tf.errors.OpError as error:
        raise VerificationError(f"{name}: fails on {len(images)} images in a Session: {error}") from error


def _difference(
    name: str, output: str, got: npt.NDArray[np.generic], expected: npt.NDArray[np.float32]
) -> float:
    """The largest difference, relative to the largest value where that exceeds 1, as features do."""
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(np.asarray(got, np.float64) - expected).max()) / scale
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"{name}: {output} differ by {difference:.3g} from the trained model (tolerance {TOLERANCE:g})"
        )
    return difference


def _check_top(results: dict[str, npt.NDArray[np.generic]], is_valid: npt.NDArray[np.bool_]) -> None:
    scores, best = results["scores"][is_valid], results["probabilities"][is_valid].max(axis=1)
    if np.any(np.diff(scores) > 0) or not np.array_equal(scores[:, 0], best):
        raise VerificationError(f"{SERVING_DEFAULT}: scores: expected the largest probabilities, descending")
