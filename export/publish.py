"""Export: the main path from a trained model to a published version, in the order it happens.

    graftserve export runs/flowers --model-base-path models/flowers

Everything is written under a name that no server takes for a version, loaded again, compared with the trained
model, made durable, and only then renamed to its number.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from graftserve.training.preprocess import decode_images
from graftserve.training.progress import Listener, silent
from graftserve.training.run import RunDirectory

from .batching import Batching
from .card import write_card
from .contract import WARMUP, read_contract, write_contract, write_warmup
from .decode_graph import write_decode_graph
from .errors import ExportError, GateError, StoreError, VersionError
from .goldens import EXTRA, read_goldens, write_goldens
from .manifest import MANIFEST, write_manifest
from .quantize import QuantizationCost, add_int8, int8_difference
from .rebatch import write_batching
from .run_source import open_run
from .signatures import ServingModule, available_outputs, save_model
from .source import Source
from .store import Store, is_url, local_path, open_store
from .tflite import LiteResult, add_lite
from .tune import Tuning, tune
from .verify import Check, verify_model, verify_version
from .versions import candidate, labelled_versions, parse_version, prune, publish, published_versions

__all__ = ["ExportOptions", "Exported", "ServingCheck", "export_model", "export_run", "republish"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServingCheck:
    """The goldens, asked of a real server before the version appears.

    server: which one. largest_difference: of a probability.
    """

    server: str
    largest_difference: float


ServerCheck = Callable[[Path, str], ServingCheck]
"""From a model's folder, with the candidate as its only version, and the model's name."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export.

    version: "next", "timestamp", or a number above 0.
    top_k: how many classes an answer names; all of them if there are fewer.
    batching: None leaves batching to the server.
    tune: choose the batching by measuring on this machine.
    signature_outputs: the outputs of each signature that there is to be; None: all of all.
    require_accuracy, require_top5: 0 to 1, what the run's test images must give.
    max_latency_ms: what the 95th percentile of one image by itself may take on this machine.
    quantize: add assets.extra/network.int8.tflite, if it costs at most max_accuracy_drop (0 to 1).
    keep: how many versions to leave there, besides those that model_config_file names; None leaves all.
    model_config_file: the server's --model_config_file, whose labelled versions are never removed.
    serving_check: asks a real server for the goldens before the version appears.
    Raises ExportError if a value is out of its range.
    """

    version: str | int = "next"
    top_k: int = 5
    batching: Batching | None = field(default_factory=Batching)
    tune: bool = False
    signature_outputs: Mapping[str, Sequence[str]] | None = None
    require_accuracy: float | None = None
    require_top5: float | None = None
    max_latency_ms: float | None = None
    quantize: bool = False
    max_accuracy_drop: float = 0.01
    keep: int | None = None
    model_config_file: Path | None = None
    serving_check: ServerCheck | None = None

    def __post_init__(self) -> None:
        parse_version(str(self.version))
        for name in ("top_k", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExportError(f"{name}: expected at least 1, got {value}")
        for name in ("require_accuracy", "require_top5", "max_accuracy_drop"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ExportError(f"{name}: expected a share from 0 to 1, got {value}")
        if self.max_latency_ms is not None and not self.max_latency_ms > 0:
            raise ExportError(f"max_latency_ms: expected a number above 0, got {self.max_latency_ms}")
        if self.tune and self.batching is None:
            raise ExportError("tune: there is no batching to tune; leave out one of the two")


@dataclass(frozen=True)
class Exported:
    """A published version.

    location: its folder, or its URL in an object store. size_bytes: of all files in it. lite: what became of
    network.tflite. pruned: the versions that were removed. notes: what there is to tell.
    """

    location: str
    version: int
    check: Check
    size_bytes: int
    seconds: float
    lite: LiteResult
    quantization: QuantizationCost | None = None
    tuning: Tuning | None = None
    serving: ServingCheck | None = None
    pruned: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder of a version on a file system."""
        return Path(self.location)


def export_run(run_path: Path, model_base_path: Path | str, **options: Any) -> Exported:
    """Publish the run in `run_path`; see `export_model` and, for the options, ExportOptions.

    Raises RunError, too: the run is not finished, or damaged.
    """
    chosen = ExportOptions(**options)
    return export_model(open_run(run_path), model_base_path, chosen)


def export_model(
    source: Source, model_base_path: Path | str, options: ExportOptions, listener: Listener = silent
) -> Exported:
    """Publish `source` as a version below `model_base_path`, a folder or an object store's URL.

    The last part of `model_base_path` is the model's name.
    Raises GateError (not as good or as fast as required), VersionError (the number is taken),
    VerificationError (the written model is not the trained one), StoreError (the place cannot be written),
    SourceError or ExportError for options that do not fit the source.
    """
    started = time.monotonic()
    destination = _destination(model_base_path, options)
    outputs = _chosen_outputs(source, options.signature_outputs)
    _check_accuracy(source, options)
    quantized_run = _run_of(source) if options.quantize else None

    top_k = min(options.top_k, len(source.labels))
    images = [golden.content for golden in source.goldens]
    pixels = decode_images(images, source.preprocess).numpy()
    probabilities = np.array([golden.probabilities for golden in source.goldens], np.float32)
    frozen = source.network.run(pixels)
    expected = frozen | {"probabilities": probabilities}

    with _writing(model_base_path), destination.candidate() as work:
        folder = work / "1"
        labels_file = work / "labels.txt"
        labels_file.write_text("".join(f"{label}\n" for label in source.labels), encoding="utf-8")
        batching = options.batching
        module = ServingModule(
            source.network, source.labels, labels_file, source.preprocess, batching, top_k, outputs
        )
        save_model(module, folder)
        (folder / EXTRA).mkdir()
        write_decode_graph(folder, source.preprocess)

        lite = add_lite(folder, source.network, pixels, expected)
        if lite.reason:
            _log.warning("left out network.tflite: %s", lite.reason)
        quantization = difference = None
        engines: dict[str, Any] = {}
        if lite.path:
            engines["litert"] = {"file": lite.path.name, "largest_difference": lite.largest_difference}
        if quantized_run:
            quantization = add_int8(folder, quantized_run, source.network, options.max_accuracy_drop)
            difference = int8_difference(folder, pixels, probabilities)
            engines["litert_int8"] = {
                "file": "network.int8.tflite",
                "accuracy_drop": quantization.drop,
                "largest_difference": difference,
            }
        write_goldens(folder, source.goldens, difference)
        write_contract(folder, source, batching, top_k, outputs, engines)
        tuning = None
        if options.tune:
            tuning = tune(folder, max_latency_ms=options.max_latency_ms, listener=listener)
            batching = tuning.chosen
            write_batching(folder, batching)

        write_warmup(folder, destination.model_name, images, pixels, batching, outputs)
        check = verify_model(folder, frozen.get("features"), time_it=options.max_latency_ms is not None)
        _check_latency(check, options)
        serving = options.serving_check(work, destination.model_name) if options.serving_check else None
        write_card(folder, destination.model_name, source, check, tuning)
        write_manifest(folder)
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        location, number = destination.publish(folder)

    return Exported(
        location,
        number,
        check,
        size_bytes,
        time.monotonic() - started,
        lite,
        quantization,
        tuning,
        serving,
        tuple(destination.prune(number)),
        source.notes,
    )


def republish(folder: Path, batching: Batching) -> Path:
    """Publish the version in `folder` once more, as its model's next, with another batching.

    Raises ManifestError or VerificationError if the version is damaged.
    """
    verify_version(folder)
    base = folder.resolve().parent
    with _writing(base), candidate(base) as work:
        copy = work / "1"
        shutil.copytree(folder, copy)
        (copy / MANIFEST).unlink()
        (copy / EXTRA / WARMUP).unlink()
        write_batching(copy, batching)
        contract, goldens = read_contract(copy), read_goldens(copy)
        images = [golden.content for golden in goldens]
        pixels = decode_images(images, contract.preprocess).numpy()
        write_warmup(copy, base.name, images, pixels, batching, contract.signatures)
        verify_model(copy)
        write_manifest(copy)
        return publish(copy, base, None)


class _Destination:
    """A model's folder, or its place in an object store."""

    def __init__(self, base: Path | Store, model_name: str, options: ExportOptions) -> None:
        self.model_name = model_name
        self._base = base
        self._options = options
        self._number = parse_version(str(options.version))
        taken = base.versions() if isinstance(base, Store) else published_versions(base)
        if self._number is not None and self._number in taken:
            raise VersionError(
                f"version {self._number} of {model_name} exists; versions are never overwritten"
            )
        self._labelled: set[int] = set()
        if options.keep is not None and options.model_config_file is not None:
            self._labelled = labelled_versions(options.model_config_file, model_name)

    @contextmanager
    def candidate(self) -> Iterator[Path]:
        """A folder to write into; gone afterwards, whatever happens."""
        if isinstance(self._base, Path):
            with candidate(self._base) as work:
                yield work
        else:
            with tempfile.TemporaryDirectory(prefix="graftserve-") as work:
                yield Path(work)

    def publish(self, folder: Path) -> tuple[str, int]:
        """Its location and its number."""
        if isinstance(self._base, Path):
            path = publish(folder, self._base, self._number)
            return str(path), int(path.name)
        number = self._base.publish(folder, self._number)
        return f"{self._base.url}/{number}", number

    def prune(self, published: int) -> list[int]:
        """The versions removed."""
        keep = self._options.keep
        if keep is None:
            return []
        protected = {published, *self._labelled}
        if isinstance(self._base, Path):
            return prune(self._base, keep, protected)
        return self._base.prune(keep, protected)


def _destination(model_base_path: Path | str, options: ExportOptions) -> _Destination:
    if isinstance(model_base_path, str) and is_url(model_base_path):
        url = model_base_path.rstrip("/")
        return _Destination(open_store(url), url.rpartition("/")[2], options)
    path = local_path(str(model_base_path))
    return _Destination(path, path.resolve().name, options)


def _chosen_outputs(source: Source, chosen: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    available = available_outputs(source.network)
    if chosen is None:
        return available
    result: dict[str, tuple[str, ...]] = {}
    for name, outputs in chosen.items():
        if name not in available:
            raise ExportError(
                f"signature {name}: expected one of {', '.join(available)}, as far as the model has it"
            )
        unknown = [output for output in outputs if output not in available[name]]
        if unknown:
            raise ExportError(f"{name}: {unknown[0]}: expected some of {', '.join(available[name])}")
        result[name] = tuple(output for output in available[name] if output in outputs or not outputs)
    if not result:
        raise ExportError("signature outputs: expected at least one signature")
    return result


def _check_accuracy(source: Source, options: ExportOptions) -> None:
    for name, key, least in (
        ("accuracy", "accuracy", options.require_accuracy),
        ("top-5 accuracy", "top5_accuracy", options.require_top5),
    ):
        if least is None:
            continue
        test = source.test_metrics
        if test is None:
            raise GateError(
                f"{name}: expected at least {least:g}, but there are no test images to judge by; export a "
                "run that held some out"
            )
        if not test[key] >= least:
            raise GateError(
                f"{name}: expected at least {least:g}, got {test[key]:.4f} on {test['images']} test images"
            )


def _check_latency(check: Check, options: ExportOptions) -> None:
    most = options.max_latency_ms
    if most is not None and check.latency_ms is not None and not check.latency_ms <= most:
        raise GateError(
            f"latency: expected at most {most:g} ms for one image, got {check.latency_ms:.1f} ms (95th "
            "percentile, on this machine); choose a smaller backbone, or raise --max-latency-ms"
        )


def _run_of(source: Source) -> RunDirectory:
    if source.run is None:
        raise ExportError("quantize: needs the training images of a run; export a run directory")
    return source.run


@contextmanager
def _writing(place: Path | str) -> Iterator[None]:
    """TensorFlow's and the system's ways of reporting a full disk, as ours."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{place}: cannot be written: {error.strerror or error}") from error
    except tf.errors.OpError as error:
        raise StoreError(f"{place}: cannot be written: {error.message}") from error
