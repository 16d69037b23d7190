"""What --enable_batching is told: the parameters of the server and those that a version brings along.

    options = read_batching(Options(enable_batching=True, batching_parameters_file="batching.config", ...))
    options = options.of_version(Path("models/digits/3"))     # with --enable_per_model_batching_parameters

Both files are a BatchingParameters in text format. A parameter that is left out takes TensorFlow's default.
Source: tensorflow_serving/servables/tensorflow/{bundle_factory_util,saved_model_bundle_factory}.cc,
tensorflow_serving/batching/batching_session.cc (what is checked), tensorflow_serving/model_servers/server.cc
and tensorflow/core/kernels/batching_util/shared_batch_scheduler.h (defaults).
"""

import itertools
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftserve.client.wire import BatchingParameters

from .config import read_text_proto
from .errors import Code, ServingError
from .flags import Options, schedulable_cpus

__all__ = ["VERSION_FILE", "BatchingOptions", "read_batching"]

_log = logging.getLogger(__name__)

VERSION_FILE = "batching_params.pbtxt"
"""Where a version's folder holds parameters of its own."""

_FLAG = "--batching_parameters_file"
_POOL = "model_server_batch_threads"  # server.cc: without a file
_POOL_OF_FILE = "batch_threads"  # shared_batch_scheduler.h: where the file names none


@dataclass(frozen=True, kw_only=True)
class BatchingOptions:
    """How the rows of concurrent requests are gathered.

    max_batch_size: the most rows of one request; without splitting also of one run.
    batch_timeout_s: how long an incomplete batch waits for more while a thread is free.
    max_enqueued_batches: that may wait in a queue; beyond them requests are refused.
    num_batch_threads: batches that run at the same time, of all models.
    thread_pool_name: of those threads, and in the metrics.
    allowed_batch_sizes: the sizes that are run, ascending; a batch is padded to the next. Empty: any size.
    pad_variable_length_inputs: requests whose shapes differ after the first axis are padded to run together.
    enable_large_batch_splitting: a request may be split over several runs.
    max_execution_batch_size: the most rows of a run when requests may be split; 0: max_batch_size.
    Raises ValueError that names the parameter.
    """

    max_batch_size: int = 1000
    batch_timeout_s: float = 0.0
    max_enqueued_batches: int = 10
    num_batch_threads: int = field(default_factory=schedulable_cpus)
    thread_pool_name: str = _POOL
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False
    enable_large_batch_splitting: bool = False
    max_execution_batch_size: int = 0

    def __post_init__(self) -> None:
        sizes = self.allowed_batch_sizes
        for name in ("max_batch_size", "max_enqueued_batches", "num_batch_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; was {getattr(self, name)}")
        if self.batch_timeout_s < 0:
            raise ValueError(
                f"batch_timeout_micros must be non-negative; was {round(self.batch_timeout_s * 1e6)}"
            )
        if self.max_execution_batch_size < 0:
            raise ValueError(
                f"max_execution_batch_size must be positive; was {self.max_execution_batch_size}"
            )
        if self.run_rows > self.max_batch_size:
            raise ValueError(
                "max_batch_size must be greater than or equal to max_execution_batch_size; "
                f"max_batch_size was {self.max_batch_size}, max_execution_batch_size {self.run_rows}"
            )
        if sizes and (sizes[0] < 1 or any(low >= high for low, high in itertools.pairwise(sizes))):
            raise ValueError(
                "allowed_batch_sizes entries must be positive and monotonically increasing; were "
                f"{', '.join(map(str, sizes))}"
            )
        if sizes and sizes[-1] != self.run_rows:
            limit = "max_execution_batch_size" if self.enable_large_batch_splitting else "max_batch_size"
            raise ValueError(
                f"Last entry in allowed_batch_sizes must match {limit}; last entry was {sizes[-1]}; "
                f"expected {self.run_rows}"
            )

    @property
    def run_rows(self) -> int:
        """The most rows that run at once."""
        if self.enable_large_batch_splitting and self.max_execution_batch_size:
            return self.max_execution_batch_size
        return self.max_batch_size

    def padded(self, rows: int) -> int:
        """The size in which a batch of `rows` is run."""
        return next((size for size in self.allowed_batch_sizes if size >= rows), rows)

    def of_version(self, path: Path) -> "BatchingOptions | None":
        """What the version in `path` asks for; None if it brings no parameters, and so is not batched.

        Only the threads, which all models share, are still those of the server.
        Raises ServingError (INVALID_ARGUMENT) if its file cannot be used.
        """
        file = path / VERSION_FILE
        if not file.exists():
            return None
        options = _read(file, "--enable_per_model_batching_parameters")
        return replace(
            options, num_batch_threads=self.num_batch_threads, thread_pool_name=self.thread_pool_name
        )


def read_batching(options: Options) -> BatchingOptions | None:
    """What the flags say; None if requests are not to be gathered. Raises ServingError (INVALID_ARGUMENT)."""
    if not options.enable_batching:
        return None
    if not options.batching_parameters_file:
        return BatchingOptions()
    return _read(Path(options.batching_parameters_file), _FLAG)


def _read(file: Path, flag: str) -> BatchingOptions:
    parameters = read_text_proto(file, BatchingParameters(), flag)
    try:
        options = _from_parameters(parameters)
    except ValueError as exc:
        raise ServingError(Code.INVALID_ARGUMENT, f"{flag}: {file}: {exc}") from exc
    if parameters.HasField("max_execution_batch_size") and not options.enable_large_batch_splitting:
        _log.warning("%s: %s: max_execution_batch_size is for enable_large_batch_splitting only", flag, file)
    return options


def _from_parameters(parameters: BatchingParameters) -> BatchingOptions:
    values: dict[str, int] = {
        name: getattr(parameters, name).value
        for name in (
            "max_batch_size",
            "max_enqueued_batches",
            "num_batch_threads",
            "max_execution_batch_size",
        )
        if parameters.HasField(name)
    }
    splitting = parameters.enable_large_batch_splitting.value
    if values.get("max_enqueued_batches") == 0 and not splitting:
        values["max_enqueued_batches"] = 1  # as AddQueue does, for the sake of files that say 0
    return BatchingOptions(
        **values,
        batch_timeout_s=parameters.batch_timeout_micros.value / 1e6,
        thread_pool_name=parameters.thread_pool_name.value or _POOL_OF_FILE,
        allowed_batch_sizes=tuple(parameters.allowed_batch_sizes),
        pad_variable_length_inputs=parameters.pad_variable_length_inputs,
        enable_large_batch_splitting=splitting,
    )
