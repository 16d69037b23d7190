"""Check a written model the way a server will load it: through a v1 Session, signature by signature.

`tf.saved_model.load` tracks Python objects and can succeed on a folder that TensorFlow Serving refuses; the
Session restores and runs exactly what the server does.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.python.util import deprecation

from graftserve.client.wire import PredictionLog
from graftserve.client.wire.contract import (
    CLASSIFY,
    FEATURES,
    PIXELS,
    SERVING_DEFAULT,
    SIGNATURE_OUTPUTS,
)
from graftserve.training.preprocess import decode_images

from .contract import WARMUP, Contract, example_of, read_contract
from .decode_graph import check_decode_graph
from .errors import VerificationError
from .goldens import EXTRA, read_goldens
from .manifest import check_manifest
from .tflite import NETWORK_FILE, check_lite

__all__ = ["Check", "Signatures", "lint", "open_signatures", "verify_model", "verify_version"]

TOLERANCE = 1e-4
"""Largest difference of a probability; folding constants and other batch sizes reorder float32 sums."""

_TIMED_CALLS = 32

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Check:
    """What was checked. largest_difference: of a probability, over all signatures that give them.

    lite_difference: the same for network.tflite; None if there is none. latency_ms: of one image by itself in
    this process, the 95th percentile; None if it was not asked for. files: those with the manifest's sums; 0
    while there is no manifest yet.
    """

    images: int
    signatures: tuple[str, ...]
    largest_difference: float
    lite_difference: float | None
    warmup_records: int
    latency_ms: float | None = None
    files: int = 0


class Signatures:
    """The signatures of a SavedModel in an open Session."""

    def __init__(self, session: tf.compat.v1.Session, meta_graph: tf.compat.v1.MetaGraphDef) -> None:
        self._session, self.meta_graph = session, meta_graph

    @property
    def names(self) -> set[str]:
        """The signatures that clients can call."""
        return {name for name in self.meta_graph.signature_def if not name.startswith("__")}

    def run(
        self, name: str, rows: Sequence[bytes] | Array, outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.generic]]:
        """The outputs (None: all) of signature `name`, whose one input gets the rows: encoded images, or an
        array."""
        signature = self.meta_graph.signature_def[name]
        (source,) = signature.inputs.values()
        fetches = {output: signature.outputs[output].name for output in outputs or signature.outputs}
        is_text = source.dtype == tf.string.as_datatype_enum
        feed = {source.name: np.array(rows, object) if is_text else np.asarray(rows)}
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
            with session.graph.as_default(), deprecation.silence():
                tags = [tf.saved_model.SERVING]
                meta_graph = tf.compat.v1.saved_model.loader.load(session, tags, str(folder))
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            raise VerificationError(f"{folder}: does not load in a Session: {error}") from error
        yield Signatures(session, meta_graph)
    finally:
        session.close()


def lint(meta_graph: Any) -> None:
    """Raise VerificationError unless the first axis of every input and output is a batch of any size.

    TensorFlow Serving's batcher joins and splits along it, and REST's row format counts it.
    """
    faults = []
    for name, signature in meta_graph.signature_def.items():
        if name.startswith("__"):
            continue
        for kind, tensors in (("input", signature.inputs), ("output", signature.outputs)):
            for key, info in tensors.items():
                shape = info.tensor_shape
                if shape.unknown_rank:
                    faults.append(f"{name}: {kind} {key} has no known rank")
                elif not shape.dim:
                    faults.append(f"{name}: {kind} {key} is a scalar")
                elif shape.dim[0].size != -1:
                    faults.append(f"{name}: {kind} {key} has a first axis of {shape.dim[0].size}")
    if faults:
        raise VerificationError(
            f"expected the batch, of any size, as first axis everywhere, but {'; '.join(sorted(faults))}"
        )


def verify_version(folder: Path) -> Check:
    """Check a published version by itself: its sums, and all that `verify_model` does.

    Raises ManifestError or VerificationError.
    """
    read_contract(folder)  # first: whether it is one of ours at all
    files = check_manifest(folder)
    return replace(verify_model(folder), files=files)


def verify_model(
    folder: Path, features: npt.NDArray[np.float32] | None = None, *, time_it: bool = False
) -> Check:
    """Run every signature on the goldens among broken images, one by one, and on none; network.tflite and
    decode.pb, too.

    features: float32 [N, D], what the original model gives for the goldens, where that is at hand.
    time_it: measure the latency, too.
    Raises VerificationError naming the signature and what differs.
    """
    contract, goldens = read_contract(folder), read_goldens(folder)
    images = [golden.content for golden in goldens]
    probabilities = np.array([golden.probabilities for golden in goldens], np.float32)
    if probabilities.shape[1:] != (len(contract.labels),):
        raise VerificationError(
            f"{folder}: assets/labels.txt has {len(contract.labels)} labels, but the goldens have "
            f"{probabilities.shape[-1]} probabilities"
        )
    pixels = decode_images(images, contract.preprocess).numpy()
    broken = [b"", b"not an image", images[0][: len(images[0]) // 2]]
    rows: dict[str, tuple[Sequence[bytes] | Array, Sequence[bytes] | Array]] = {
        SERVING_DEFAULT: (images, broken),
        FEATURES: (images, broken),
        PIXELS: (pixels, pixels[:0]),
        CLASSIFY: ([example_of(image) for image in images], [*map(example_of, broken), b"not an Example"]),
    }
    check_decode_graph(folder, images, pixels)
    lite_difference = _check_network_file(folder, pixels, probabilities)
    warmup_records = _check_warmup(folder, contract)
    latency_ms = None
    with open_signatures(folder) as signatures:
        lint(signatures.meta_graph)
        if signatures.names != set(contract.signatures):
            raise VerificationError(
                f"signatures: expected {sorted(contract.signatures)}, got {sorted(signatures.names)}"
            )
        checker = _Checker(signatures, contract, probabilities, features)
        for name in contract.signatures:
            checker.check(name, *rows[name])
        if time_it:
            first = next(name for name in rows if name in contract.signatures)
            latency_ms = _latency_ms(signatures, first, rows[first][0])
    return Check(
        len(images),
        tuple(contract.signatures),
        checker.largest_difference,
        lite_difference,
        warmup_records,
        latency_ms,
    )


class _Checker:
    """Compares what signatures answer with what is expected of them."""

    def __init__(
        self,
        signatures: Signatures,
        contract: Contract,
        probabilities: npt.NDArray[np.float32],
        features: npt.NDArray[np.float32] | None,
    ) -> None:
        self._signatures, self._contract = signatures, contract
        self._probabilities = probabilities
        self._expected: dict[str, Array] = {
            "probabilities": probabilities,
            "scores": -np.sort(-probabilities, axis=1)[:, : contract.top_k],
        }
        if features is not None:
            self._expected["features"] = features
        self.largest_difference = 0.0

    def check(self, name: str, rows: Sequence[bytes] | Array, broken: Sequence[bytes] | Array) -> None:
        """rows: N good ones, for the N goldens. broken: such as must not spoil them."""
        mixed = [*rows[:1], *broken, *rows[1:]]
        is_good = np.array([True] + [False] * len(broken) + [True] * (len(rows) - 1))
        results = self._run(name, mixed)
        if set(results) != set(self._contract.signatures[name]):
            raise VerificationError(
                f"{name}: outputs: expected {sorted(self._contract.signatures[name])}, got {sorted(results)}"
            )
        alone = self._run(name, rows[:1])
        for output in sorted(results, key=list(SIGNATURE_OUTPUTS[name]).index, reverse=True):
            values = results[output]
            if len(values) != len(mixed):
                raise VerificationError(
                    f"{name}: {output}: expected {len(mixed)} rows for {len(mixed)} images, got {len(values)}"
                )
            if output == "valid":
                if not np.array_equal(values, is_good):
                    raise VerificationError(f"{name}: valid: expected {is_good}, got {values}")
                continue
            if np.any(values[~is_good] != (b"" if values.dtype == object else 0)):
                raise VerificationError(f"{name}: {output}: expected nothing for broken images")
            if output == "classes":
                self._check_classes(name, values[is_good])
            elif output in self._expected:
                self._compare(name, output, values[is_good], self._expected[output])
                self._compare(name, output, alone[output], self._expected[output][:1])
            elif not np.isfinite(values.astype(np.float64)).all() or not values[is_good].any(axis=1).all():
                raise VerificationError(f"{name}: {output}: expected finite numbers, not all of them zero")
        empty = self._run(name, rows[:0])
        if any(len(values) for values in empty.values()):
            raise VerificationError(f"{name}: expected no rows for no images")

    def _run(self, name: str, rows: Sequence[bytes] | Array) -> dict[str, npt.NDArray[np.generic]]:
        shape = self._contract.preprocess.side_px
        if name == PIXELS:
            rows = np.reshape(np.asarray(rows, np.uint8), (-1, shape, shape, 3))
        try:
            return self._signatures.run(name, rows)
        except tf.errors.OpError as error:
            raise VerificationError(f"{name}: fails on {len(rows)} images in a Session: {error}") from error

    def _compare(self, name: str, output: str, got: Array, expected: Array) -> None:
        difference = _difference(got, expected)
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"{name}: {output} differ by {difference:.3g} from the trained model (tolerance "
                f"{TOLERANCE:g})"
            )
        if output != "features":
            self.largest_difference = max(self.largest_difference, difference)

    def _check_classes(self, name: str, classes: Array) -> None:
        """The labels of the largest probabilities, in their order; any, of those as good as equal."""
        columns = {label.encode(): column for column, label in enumerate(self._contract.labels)}
        for row, answer in enumerate(classes):
            try:
                got = self._probabilities[row, [columns[label] for label in answer]]
            except KeyError as error:
                raise VerificationError(f"{name}: classes: {error} is not in assets/labels.txt") from error
            if not np.abs(got - self._expected["scores"][row]).max() <= 2 * TOLERANCE:
                raise VerificationError(
                    f"{name}: classes: expected the labels of the largest probabilities, got {list(answer)}"
                )


def _difference(got: Array, expected: Array) -> float:
    """The largest difference, relative to the largest value where that exceeds 1, as features do."""
    scale = max(1.0, float(np.abs(expected).max()))
    return float(np.abs(np.asarray(got, np.float64) - expected).max()) / scale


def _latency_ms(signatures: Signatures, name: str, rows: Sequence[bytes] | Array) -> float:
    seconds = []
    for index in range(_TIMED_CALLS):
        row = index % len(rows)
        started = time.perf_counter()
        signatures.run(name, rows[row : row + 1])
        seconds.append(time.perf_counter() - started)
    return float(np.quantile(seconds, 0.95)) * 1000


def _check_network_file(
    folder: Path, pixels: npt.NDArray[np.uint8], probabilities: npt.NDArray[np.float32]
) -> float | None:
    path = folder / NETWORK_FILE
    expected: Mapping[str, Array] = {"probabilities": probabilities}
    return check_lite(path.read_bytes(), pixels, expected) if path.exists() else None


def _check_warmup(folder: Path, contract: Contract) -> int:
    """The number of warmup records, all of them requests to signatures that there are."""
    path = folder / EXTRA / WARMUP
    count = 0
    try:
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            count += 1
            spec = PredictionLog.FromString(record).predict_log.request.model_spec
            if spec.signature_name not in contract.signatures:
                raise VerificationError(
                    f"{path}: record {count} asks for signature {spec.signature_name!r}, which there is not"
                )
    except (tf.errors.OpError, DecodeError) as error:
        raise VerificationError(f"{path}: missing or damaged: {error}") from error
    return count
