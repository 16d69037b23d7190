"""What travels beside the graph: contract, goldens, warmup requests, checksums."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from graftserve.client.wire import PredictionLog
from graftserve.client.wire.contract import (
    CLASSIFY_OUTPUTS,
    EMBED_OUTPUTS,
    FEATURES,
    IMAGE_BYTES,
    SERVING_DEFAULT,
)
from graftserve.client.wire.tensors import to_proto
from graftserve.training.files import write_atomically, write_json
from graftserve.training.run import Golden, RunDirectory

from .batching import Batching

__all__ = ["EXTRA", "write_contract", "write_goldens", "write_manifest", "write_warmup"]

EXTRA = "assets.extra"
"""The folder that TensorFlow keeps its hands off."""

MANIFEST = "manifest.sha256"
WARMUP = "tf_serving_warmup_requests"

_FORMAT = 1


def write_contract(folder: Path, run: RunDirectory, batching: Batching, top_k: int) -> None:
    """Write assets.extra/contract.json: what the model expects, what it gives, where it comes from."""
    test = run.evaluation("test")
    write_json(
        folder / EXTRA / "contract.json",
        {
            "format": _FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "graftserve": version("graftserve"),
            "tensorflow": tf.__version__,
            "backbone": run.metrics["backbone"],
            "classes": len(run.labels),
            "top_k": top_k,
            "signatures": [SERVING_DEFAULT, FEATURES],
            "preprocess": run.preprocess.to_dict(),
            "exif_orientation": "applied by the model; clients send files as they are",
            "batching": batching.to_dict(),
            "test_accuracy": test.accuracy if test else None,
            "test_images": test.images if test else 0,
        },
    )


def write_goldens(folder: Path, goldens: Sequence[Golden]) -> None:
    """Copy the held-out images and what the Keras model says of them into assets.extra/goldens/."""
    target = folder / EXTRA / "goldens"
    target.mkdir()
    for golden in goldens:
        with write_atomically(target / golden.file.name, "wb") as file:
            file.write(golden.file.read_bytes())
    rows: list[Mapping[str, Any]] = [
        {"file": golden.file.name, "label": golden.label, "probabilities": golden.probabilities}
        for golden in goldens
    ]
    write_json(target / "goldens.json", {"format": _FORMAT, "goldens": rows})


def write_warmup(folder: Path, model_name: str, images: Sequence[bytes], batching: Batching) -> int:
    """Write the requests that a server replays before it calls the version available; returns their number.

    Every batch size once for each signature, asked as the client asks, and the outputs that only others ask
    for: TensorFlow optimises the graph anew, for seconds, for each set of outputs that it has not met.
    Format: TFRecord of PredictionLog (TensorFlow Serving, g3doc/saved_model_warmup.md).
    """
    calls: list[tuple[str, tuple[str, ...], int]] = [
        (SERVING_DEFAULT, CLASSIFY_OUTPUTS, size) for size in batching.sizes
    ]
    calls += [(FEATURES, EMBED_OUTPUTS, size) for size in batching.sizes]
    calls.append((SERVING_DEFAULT, (), 1))
    with tf.io.TFRecordWriter(str(folder / EXTRA / WARMUP)) as writer:
        for signature, outputs, size in calls:
            log = PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = model_name
            request.model_spec.signature_name = signature
            request.output_filter.extend(outputs)
            rows = [images[index % len(images)] for index in range(size)]
            request.inputs[IMAGE_BYTES].CopyFrom(to_proto(np.array(rows, object)))
            writer.write(log.SerializeToString())
    return len(calls)


def write_manifest(folder: Path) -> None:
    """Write assets.extra/manifest.sha256: run `sha256sum -c assets.extra/manifest.sha256` in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with write_atomically(folder / EXTRA / MANIFEST) as manifest:
        for path in files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest.write(f"{digest}  {path.relative_to(folder).as_posix()}\n")
