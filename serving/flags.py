"""The server's flags, spelled and defaulting as tensorflow_model_server's, and the options they become.

    options = Options.from_args(["--model_name=digits", "--model_base_path", "models/digits"])

Every field of `Options` is a flag of the same name, so `FLAGS` is the one table that a command line, a
help text or a test needs. Flags that tensorflow_model_server does not have say so in their help.
Source: tensorflow_serving/model_servers/main.cc.
"""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "ENGINES",
    "FLAGS",
    "OWN",
    "UNUSED",
    "VERSION_FLAG",
    "Flag",
    "Options",
    "UnusedFlag",
    "parse_args",
    "schedulable_cpus",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

ENGINES = ("auto", "tensorflow", "litert", "litert_int8")

OWN = "(graftserve's own)"
"""Ends the help of every flag that tensorflow_model_server does not know."""

_INT32_MAX = 2**31 - 1
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Flag:
    """One flag, for whoever builds a command line.

    name: without dashes.
    type: str, int, float or bool. A bool flag may stand alone, which means true.
    default: what applies when the flag is not given.
    """

    name: str
    type: type
    default: str | int | float | bool
    help: str


def _flag(default: T, help_text: str) -> T:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything the server can be told. Checked when made: raises ValueError that names the flag."""

    model_name: str = _flag("default", "Name under which the model is served.")
    model_base_path: str = _flag(
        "",
        "Folder of the model; its versions are the numbered folders directly under it. Needed unless "
        "--model_config_file is given.",
    )
    model_config_file: str = _flag(
        "", "File with a ModelServerConfig in text format: several models, version policies, labels."
    )
    model_config_file_poll_wait_seconds: int = _flag(
        0, "Seconds between two looks at --model_config_file. 0: look once, at the start."
    )
    host: str = _flag("0.0.0.0", f"Address to listen on; 0.0.0.0 is every interface. {OWN}")
    port: int = _flag(8500, "Port for gRPC. 0 takes any free port.")
    grpc_socket_path: str = _flag("", "Unix socket on which gRPC is served, too.")
    rest_api_port: int = _flag(0, "Port for HTTP/REST. 0 turns REST off; -1 takes any free port.")
    grpc_max_threads: int = _flag(0, "Calls answered at once over gRPC; more wait. 0: four for each CPU.")
    grpc_channel_arguments: str = _flag(
        "", "Comma-separated arguments for gRPC, such as grpc.max_connection_age_ms=2000."
    )
    rest_api_num_threads: int = _flag(
        0, "Requests answered at once over REST; more wait. 0: four for each CPU."
    )
    rest_api_timeout_in_ms: int = _flag(30_000, "Time limit for a REST request, in milliseconds.")
    rest_api_enable_cors_support: bool = _flag(False, "Let pages of other origins ask over REST.")
    max_queued_requests: int = _flag(
        1000,
        f"Requests that may wait for a thread; more are refused with RESOURCE_EXHAUSTED. {OWN}",
    )
    max_message_bytes: int = _flag(
        256 * 2**20, f"Largest request, in bytes, over gRPC and REST. 0: no limit. {OWN}"
    )
    ssl_config_file: str = _flag("", "File with an SSLConfig in text format: TLS and mutual TLS for gRPC.")
    enable_grpc_healthcheck_service: bool = _flag(
        False, "Serve grpc.health.v1; each model is a service there, beside the real server's names."
    )
    monitoring_config_file: str = _flag(
        "", "File with a MonitoringConfig in text format: where Prometheus finds the metrics over REST."
    )
    access_log: bool = _flag(False, f"Write one line of JSON to stderr for each request. {OWN}")
    enable_tracing: bool = _flag(
        False,
        "Send OpenTelemetry traces of requests over OTLP, as the OTEL_* variables say: "
        f"OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER and so on. {OWN}",
    )
    file_system_poll_wait_seconds: int = _flag(
        1, "Seconds between two looks for new versions. 0: look once, at the start. Negative: the same."
    )
    num_load_threads: int = _flag(0, "Versions loaded at the same time. 0: one after another.")
    num_unload_threads: int = _flag(0, "Versions unloaded at the same time. 0: one after another.")
    max_num_load_retries: int = _flag(5, "How often to try again after a version failed to load.")
    load_retry_interval_micros: int = _flag(
        60_000_000, "Microseconds from one attempt to load to the next. Negative: none."
    )
    allow_version_labels_for_unavailable_models: bool = _flag(
        False, "Let new labels name versions that are not available yet."
    )
    saved_model_tags: str = _flag("serve", "Comma-separated tags of the graph to load from a SavedModel.")
    enable_model_warmup: bool = _flag(
        True, "Replay assets.extra/tf_serving_warmup_requests before a version is served."
    )
    num_request_iterations_for_warmup: int = _flag(0, "How often to replay each of them. 0: once.")
    enable_signature_method_name_check: bool = _flag(
        False, "Answer Classify and Regress only by signatures whose method name says so."
    )
    enable_serialization_as_tensor_content: bool = _flag(
        False, "Answer Predict with packed tensor_content instead of the typed fields."
    )
    enable_batching: bool = _flag(
        False, "Gather the requests for models that do not do it themselves, and run them together."
    )
    batching_parameters_file: str = _flag(
        "", "File with a BatchingParameters in text format: how requests are gathered."
    )
    enable_per_model_batching_parameters: bool = _flag(
        False,
        "Batch only the versions that bring a batching_params.pbtxt, as it says; of "
        "--batching_parameters_file only the threads count then.",
    )
    engine: str = _flag(
        "auto",
        "What runs exported models: litert (CPU only), tensorflow, or auto: litert where it can. "
        "litert_int8: twice as fast, with answers a little off, where a version was exported with "
        f"--quantize int8. {OWN}",
    )
    tensorflow_session_config_file: str = _flag("", "File with TensorFlow's ConfigProto in text format.")
    tensorflow_session_parallelism: int = _flag(
        0, "Both of the following at once, where they are not given. 0: TensorFlow chooses."
    )
    tensorflow_intra_op_parallelism: int = _flag(0, "Threads within one operation. 0: TensorFlow chooses.")
    tensorflow_inter_op_parallelism: int = _flag(0, "Threads across operations. 0: TensorFlow chooses.")
    per_process_gpu_memory_fraction: float = _flag(
        0.0, "Share of the GPU's memory to take, 0 to 1. 0: TensorFlow chooses."
    )
    shutdown_grace_seconds: float = _flag(
        30.0, f"Seconds that requests under way have to finish when the server stops. {OWN}"
    )

    def __post_init__(self) -> None:
        for flag in FLAGS:
            _check_type(flag, getattr(self, flag.name))
        if not self.model_base_path and not self.model_config_file:
            raise ValueError(
                "--model_base_path: expected the model's folder, or --model_config_file, got neither: say "
                "where the model is"
            )
        if not self.model_name:
            raise ValueError("--model_name: expected a name, got nothing")
        if not self.tags:
            raise ValueError("--saved_model_tags: expected tags such as serve, got nothing")
        if self.engine not in ENGINES:
            raise ValueError(f"--engine: expected {', '.join(ENGINES)}, got {self.engine!r}")
        if self.batching_parameters_file and not self.enable_batching:
            raise ValueError(
                "--batching_parameters_file: expected --enable_batching beside it, got "
                f"{self.batching_parameters_file} alone: add it, or leave the file out"
            )
        self._check_range("port", 0, 65_535)
        self._check_range("rest_api_port", -1, 65_535)
        self._check_range("rest_api_timeout_in_ms", 1, _INT32_MAX)
        self._check_range("max_message_bytes", 0, _INT32_MAX)
        self._check_range("per_process_gpu_memory_fraction", 0, 1)
        for name in (
            "grpc_max_threads",
            "max_queued_requests",
            "model_config_file_poll_wait_seconds",
            "num_load_threads",
            "num_request_iterations_for_warmup",
            "num_unload_threads",
            "rest_api_num_threads",
            "max_num_load_retries",
            "tensorflow_session_parallelism",
            "tensorflow_intra_op_parallelism",
            "tensorflow_inter_op_parallelism",
            "shutdown_grace_seconds",
        ):
            self._check_range(name, 0, None)
        if self.rest_api_port > 0 and self.rest_api_port == self.port:
            raise ValueError(
                f"--rest_api_port: expected another port than --port, got {self.port} for both: choose two"
            )
        self.channel_arguments  # noqa: B018  # raises if they cannot be read

    @classmethod
    def from_flags(cls, values: Mapping[str, Any]) -> "Options":
        """Options from values by flag name; what is left out takes its default.

        A flag of the real server that has no meaning here is logged as a warning, unless its value is the
        default. Raises ValueError for an unknown flag or a value out of range, and if no model is given.
        """
        known = {flag.name for flag in FLAGS}
        for name, value in values.items():
            unused = UNUSED.get(name)
            if unused is not None:
                if value != unused.flag.default:
                    _log.warning("--%s: accepted, but %s", name, unused.reason)
            elif name not in known and name != VERSION_FLAG.name:
                raise ValueError(f"--{name}: there is no such flag")
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_args(cls, args: Sequence[str]) -> "Options":
        """Options from command-line arguments; see `parse_args`. Raises ValueError."""
        return cls.from_flags(parse_args(args))

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag.strip() for tag in self.saved_model_tags.split(",") if tag.strip())

    @property
    def grpc_threads(self) -> int:
        return self.grpc_max_threads or 4 * schedulable_cpus()

    @property
    def rest_threads(self) -> int:
        return self.rest_api_num_threads or 4 * schedulable_cpus()

    @property
    def rest_timeout_s(self) -> float:
        return self.rest_api_timeout_in_ms / 1e3

    @property
    def load_retry_interval_s(self) -> float:
        return max(0, self.load_retry_interval_micros) / 1e6

    @property
    def channel_arguments(self) -> tuple[tuple[str, str | int], ...]:
        """The pairs of --grpc_channel_arguments; numbers are int, as gRPC wants them."""
        pairs: list[tuple[str, str | int]] = []
        for text in filter(None, self.grpc_channel_arguments.split(",")):
            name, equals, value = (part.strip() for part in text.partition("="))
            if not name or not equals:
                raise ValueError(f"--grpc_channel_arguments: expected name=value, got {text!r}")
            pairs.append((name, int(value) if _INTEGER.fullmatch(value) else value))
        return tuple(pairs)

    def _check_range(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        if value < low or (high is not None and value > high):
            limits = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"--{name}: expected {limits}, got {value}")


FLAGS: tuple[Flag, ...] = tuple(
    Flag(
        entry.name,
        entry.type if isinstance(entry.type, type) else str,
        getattr(Options, entry.name),  # where a dataclass keeps a default
        entry.metadata["help"],
    )
    for entry in fields(Options)
)
"""Every flag, in the order of `Options`."""


VERSION_FLAG = Flag("version", bool, False, "Print the versions and stop.")
"""For a command line; it is no option of a server."""


@dataclass(frozen=True)
class UnusedFlag:
    """A flag of tensorflow_model_server that cannot be honoured here. reason: ends "accepted, but ..."."""

    flag: Flag
    reason: str


def _unused(name: str, default: str | int | bool, reason: str) -> tuple[str, UnusedFlag]:
    return name, UnusedFlag(Flag(name, type(default), default, f"Accepted, but {reason}."), reason)


_LITERT_SIZE = "LiteRT has one interpreter for each CPU here"
UNUSED: Mapping[str, UnusedFlag] = dict(
    [
        _unused("flush_filesystem_caches", True, "files are cached as the system sees fit"),
        _unused("platform_config_file", "", "TensorFlow is the only platform here"),
        _unused("remove_unused_fields_from_bundle_metagraph", True, "nothing is kept of them in any case"),
        _unused("prefer_tflite_model", False, "--engine decides"),
        _unused("num_tflite_pools", 0, _LITERT_SIZE),
        _unused("num_tflite_interpreters_per_pool", 0, _LITERT_SIZE),
        _unused("xla_cpu_compilation_enabled", False, "TF_XLA_FLAGS in the environment decides"),
        _unused("enable_profiler", True, "there is no profiler service"),
        _unused("thread_pool_factory_config_file", "", "TensorFlow's own thread pools are used"),
        _unused("mixed_precision", "", "a model runs in the precision that it was exported in"),
        _unused("skip_initialize_tpu", False, "there is no TPU support"),
        _unused("enable_tensorflow_io", False, "TensorFlow I/O is not loaded"),
        _unused("use_alts_credentials", False, "there is no ALTS here"),
    ]
)
"""Flags that are accepted for the sake of the same command line, by name."""


def parse_args(args: Sequence[str]) -> dict[str, str | int | float | bool]:
    """Values by flag name from `--flag=value`, `--flag value`, and `--flag` or `--flag=false` for a bool.

    The last one wins when a flag is given twice. Raises ValueError for an unknown flag, a missing value, or
    one that is not of the flag's type.
    """
    known = {flag.name: flag for flag in (*FLAGS, VERSION_FLAG)}
    known |= {name: unused.flag for name, unused in UNUSED.items()}
    values: dict[str, str | int | float | bool] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        flag = known.get(name) if arg.startswith("--") else None
        if flag is None:
            raise ValueError(f"{arg}: there is no such flag")
        if not equals:
            if flag.type is bool:
                text = "true"
            elif rest:
                text = rest.pop(0)
            else:
                raise ValueError(f"--{name}: expected a value, got nothing")
        values[name] = _convert(flag, text)
    if values.get("use_alts_credentials"):
        raise ValueError(
            "--use_alts_credentials: there is no ALTS here, and without it the server would be open: use "
            "--ssl_config_file"
        )
    return values


def _convert(flag: Flag, text: str) -> str | int | float | bool:
    if flag.type is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--{flag.name}: expected true or false, got {text!r}")
        return text.lower() in ("true", "1")
    try:
        value: str | int | float = flag.type(text)
    except ValueError as exc:
        raise ValueError(f"--{flag.name}: expected {_kind(flag)}, got {text!r}") from exc
    return value


def _check_type(flag: Flag, value: object) -> None:
    # bool is an int in Python, and an int will do for a float.
    right = type(value) is flag.type or (flag.type is float and type(value) is int)
    if not right or value != value:
        raise ValueError(f"--{flag.name}: expected {_kind(flag)}, got {value!r}")


def _kind(flag: Flag) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[flag.type]


def schedulable_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs that this process may use: what a container's quota leaves of them, rounded up.

    quota_file: "max 100000", or the microseconds of CPU time in each period of so many.
    Source: docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; in a container that file is its own.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cpus, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no quota
        return cpus
