"""Export: the main path from a finished run to a published version, in the order it happens.

    graftserve export runs/flowers --model-base-path models/flowers

Everything is written under a name that no server takes for a version, loaded again, compared with the trained
model, made durable, and only then renamed to its number.
"""

import errno
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from graftserve.training.files import sync_directory
from graftserve.training.preprocess import decode_images
from graftserve.training.run import RunDirectory

from .batching import Batching
from .contract import EXTRA, write_contract, write_goldens, write_manifest, write_warmup
from .errors import ExportError, VersionError
from .signatures import ServingModule
from .verify import Check, verify_model

__all__ = ["Exported", "export_run", "published_versions"]


@dataclass(frozen=True)
class Exported:
    """A published version. path: its folder; size_bytes: of all files in it."""

    path: Path
    version: int
    check: Check
    warmup_records: int
    size_bytes: int
    seconds: float


def published_versions(model_base_path: Path) -> list[int]:
    """The version numbers in a model's folder, ascending; none if the folder is not there."""
    if not model_base_path.is_dir():
        return []
    return sorted(
        int(path.name) for path in model_base_path.iterdir() if path.is_dir() and path.name.isdecimal()
    )


def export_run(
    run_path: Path,
    model_base_path: Path,
    *,
    version: int | None = None,
    top_k: int = 5,
    batching: Batching | None = None,
) -> Exported:
    """Publish the run in `run_path` as a version below `model_base_path`.

    version: its number, above 0; None takes the next after the highest there.
    top_k: how many classes an answer names; all of them if there are fewer.
    Raises RunError (the run is not finished or damaged), VersionError (the number is taken),
    VerificationError (the written model is not the trained one), ExportError (the folder cannot be written).
    """
    started = time.monotonic()
    run = RunDirectory.open_finished(run_path)
    if version is not None and version < 1:
        raise VersionError(f"version: expected a number above 0, got {version}")
    if top_k < 1:
        raise ExportError(f"top_k: expected at least 1, got {top_k}")
    if version in published_versions(model_base_path):
        raise VersionError(f"{model_base_path / str(version)}: exists; versions are never overwritten")

    batching = batching or Batching()
    top_k = min(top_k, len(run.labels))
    model = run.load_model()
    images = [golden.file.read_bytes() for golden in run.goldens]
    trained = model(decode_images(images, run.preprocess), training=False)
    expected = {name: output.numpy() for name, output in trained.items()}
    _check_goldens(run, expected["probabilities"])

    temporary = model_base_path / f".exporting-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        module = ServingModule(model, run.labels, run.path / "labels.txt", run.preprocess, batching, top_k)
        tf.saved_model.save(module, str(temporary), signatures=module.functions)
        (temporary / EXTRA).mkdir()
        write_contract(temporary, run, batching, top_k)
        write_goldens(temporary, run.goldens)
        warmup_records = write_warmup(temporary, model_base_path.name, images, batching)
        check = verify_model(temporary, images, expected["probabilities"], expected["features"])
        write_manifest(temporary)
        size_bytes = _sync(temporary)
        published = _publish(temporary, model_base_path, version)
    except OSError as error:
        raise ExportError(f"{model_base_path}: cannot be written: {error.strerror or error}") from error
    except tf.errors.OpError as error:  # TensorFlow's own way of reporting a full disk
        raise ExportError(f"{model_base_path}: cannot be written: {error.message}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    seconds = time.monotonic() - started
    return Exported(published, int(published.name), check, warmup_records, size_bytes, seconds)


def _check_goldens(run: RunDirectory, probabilities: npt.NDArray[np.float32]) -> None:
    """The model read back from the run must still say what it said when it was trained."""
    recorded = np.array([golden.probabilities for golden in run.goldens])
    if recorded.shape != probabilities.shape or not np.allclose(recorded, probabilities, atol=1e-4):
        raise ExportError(
            f"{run.path}: model.keras answers differently from when it was trained (another TensorFlow, or a "
            "damaged file); train again"
        )


def _sync(folder: Path) -> int:
    """Make every file below `folder` durable; returns their bytes."""
    size_bytes = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with Path(directory, name).open("rb") as file:
                os.fsync(file.fileno())
                size_bytes += os.fstat(file.fileno()).st_size
        sync_directory(Path(directory))
    return size_bytes


def _publish(temporary: Path, model_base_path: Path, version: int | None) -> Path:
    """Rename to the number; when the next one is wanted and somebody else just took it, to the one after."""
    while True:
        number = version or max(published_versions(model_base_path), default=0) + 1
        target = model_base_path / str(number)
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if version is not None:
                raise VersionError(f"{target}: exists; versions are never overwritten") from error
        else:
            sync_directory(model_base_path)
            return target
