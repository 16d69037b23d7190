"""What travels beside the graph: the contract and the warmup requests."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from graftserve.client.wire import PredictionLog
from graftserve.client.wire.contract import (
    CLASSIFY,
    CLASSIFY_OUTPUTS,
    EMBED_OUTPUTS,
    EXAMPLES,
    FEATURES,
    IMAGE_BYTES,
    IMAGES,
    PIXELS,
    SERVING_DEFAULT,
)
from graftserve.client.wire.tensors import to_proto
from graftserve.training.files import write_json
from graftserve.training.preprocess import Preprocess

from .batching import Batching
from .errors import ExportError, VerificationError
from .goldens import EXTRA
from .source import Source

__all__ = [
    "WARMUP",
    "Contract",
    "example_of",
    "read_contract",
    "write_contract",
    "write_warmup",
]

WARMUP = "tf_serving_warmup_requests"

_FORMAT = 2
_MOST_RECORDS = 1000  # more fail the load: TensorFlow Serving, saved_model_warmup.cc


@dataclass(frozen=True)
class Contract:
    """What a version promises, as its contract.json says it.

    document: all of it. signatures: the outputs of each. labels: in the order of the probabilities.
    """

    document: Mapping[str, Any]
    signatures: Mapping[str, Sequence[str]]
    preprocess: Preprocess
    labels: tuple[str, ...]
    top_k: int
    batching: Batching | None


def write_contract(
    folder: Path,
    source: Source,
    batching: Batching | None,
    top_k: int,
    outputs: Mapping[str, Sequence[str]],
    engines: Mapping[str, Any],
) -> None:
    """Write assets.extra/contract.json: what the model expects, what it gives, where it comes from.

    engines: by the name of an engine beside TensorFlow, what there is for it.
    """
    test = source.test_metrics
    write_json(
        folder / EXTRA / "contract.json",
        {
            "format": _FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "graftserve": version("graftserve"),
            "tensorflow": tf.__version__,
            "source": source.kind,
            "backbone": source.name,
            "classes": len(source.labels),
            "features": source.network.widths.get(FEATURES),
            "top_k": top_k,
            "temperature": source.temperature,
            "signatures": {name: list(names) for name, names in outputs.items()},
            "preprocess": source.preprocess.to_dict(),
            "exif_orientation": "applied by the model; clients send files as they are",
            "batching": batching.to_dict() if batching else None,
            "engines": dict(engines),
            "goldens": "held-out images" if source.are_goldens_real else "made-up patterns",
            "test_accuracy": test["accuracy"] if test else None,
            "test_top5_accuracy": test["top5_accuracy"] if test else None,
            "test_images": test["images"] if test else 0,
            "notes": list(source.notes),
        },
    )


def read_contract(folder: Path) -> Contract:
    """The contract of the version in `folder`; raises VerificationError if it is none of ours, or damaged."""
    path = folder / EXTRA / "contract.json"
    if not path.is_file():
        raise VerificationError(
            f"{folder}: not a version that graftserve export wrote (no {EXTRA}/contract.json)"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.get("format")
        if found != _FORMAT:
            raise VerificationError(f"{path}: format {_FORMAT} expected, got {found}; export the run again")
        batching = document["batching"]
        return Contract(
            document,
            document["signatures"],
            Preprocess.from_dict(document["preprocess"]),
            tuple((folder / "assets" / "labels.txt").read_text(encoding="utf-8").splitlines()),
            document["top_k"],
            None if batching is None else Batching(**batching | {"sizes": tuple(batching["sizes"])}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path}: damaged ({error}); export the run again") from error


def example_of(image_bytes: bytes) -> bytes:
    """The serialized tf.Example that the signature `classify` takes for an encoded image."""
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image_bytes]))
    serialized: bytes = tf.train.Example(
        features=tf.train.Features(feature={"image/encoded": feature})
    ).SerializeToString()
    return serialized


def write_warmup(
    folder: Path,
    model_name: str,
    images: Sequence[bytes],
    pixels: npt.NDArray[np.uint8],
    batching: Batching | None,
    outputs: Mapping[str, Sequence[str]],
) -> int:
    """Write the requests that a server replays before it calls the version available; returns their number.

    images: encoded; pixels: uint8 [n, side_px, side_px, 3], the same decoded. outputs: of each signature.
    Every batch size once for each signature that takes image bytes, asked as the client asks; and once all
    outputs of each, for those who do not choose: TensorFlow optimises the graph anew for each set of outputs
    that it has not met. Pixels are large, so `pixels` is asked for one image only.
    Raises ExportError if there are more batch sizes than a server replays.
    Format: TFRecord of PredictionLog (TensorFlow Serving, g3doc/saved_model_warmup.md).
    """
    inputs: dict[str, tuple[str, Any]] = {
        SERVING_DEFAULT: (IMAGE_BYTES, images),
        FEATURES: (IMAGE_BYTES, images),
        PIXELS: (IMAGES, pixels),
        CLASSIFY: (EXAMPLES, [example_of(image) for image in images]),
    }
    asked = {SERVING_DEFAULT: CLASSIFY_OUTPUTS, FEATURES: EMBED_OUTPUTS}
    sizes = batching.sizes if batching else (1,)
    calls: list[tuple[str, tuple[str, ...], int]] = []
    for name, available in outputs.items():
        chosen = tuple(output for output in asked.get(name, ()) if output in available)
        if chosen and set(chosen) != set(available):
            calls += [(name, chosen, size) for size in sizes]
            calls.append((name, (), 1))
        else:
            calls += [(name, (), size) for size in (sizes if name != PIXELS else (1,))]
    if len(calls) > _MOST_RECORDS:
        raise ExportError(
            f"batching: {len(sizes)} sizes make {len(calls)} warmup requests, but a server replays at most "
            f"{_MOST_RECORDS}; allow fewer sizes"
        )
    with tf.io.TFRecordWriter(str(folder / EXTRA / WARMUP)) as writer:
        for signature, chosen, size in calls:
            log = PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = model_name
            request.model_spec.signature_name = signature
            request.output_filter.extend(chosen)
            source, rows = inputs[signature]
            batch = [rows[index % len(rows)] for index in range(size)]
            value = np.stack(batch) if signature == PIXELS else np.array(batch, object)
            request.inputs[source].CopyFrom(to_proto(value))
            writer.write(log.SerializeToString())
    return len(calls)
