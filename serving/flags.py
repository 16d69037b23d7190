"""The server's flags, spelled and defaulting as tensorflow_model_server's, and the options they become.

    options = Options.from_args(["--model_name=digits", "--model_base_path", "models/digits"])

Every field of `Options` is a flag of the same name, so `FLAGS` is the one table that a command line, a
help text or a test needs. Flags that tensorflow_model_server does not have say so in their help.
Source: tensorflow_serving/model_servers/main.cc.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["FLAGS", "Flag", "Options", "parse_args"]

T = TypeVar("T")

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Flag:
    """One flag, for whoever builds a command line.

    name: without dashes.
    type: str, int, float or bool. A bool flag may stand alone, which means true.
    default: what applies when the flag is not given; None if there is none and the flag must be given.
    """

    name: str
    type: type
    default: str | int | float | bool | None
    help: str


def _flag(default: T, help_text: str) -> T:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything the server can be told. Checked when made: raises ValueError that names the flag."""

    model_base_path: str = field(
        metadata={"help": "Folder of the model; its versions are the numbered folders directly under it."}
    )
    model_name: str = _flag("default", "Name under which the model is served.")
    host: str = _flag("0.0.0.0", "Address to listen on; 0.0.0.0 is every interface. (graftserve's own)")
    port: int = _flag(8500, "Port for gRPC. 0 takes any free port.")
    rest_api_port: int = _flag(0, "Port for HTTP/REST. 0 turns REST off; -1 takes any free port.")
    grpc_max_threads: int = _flag(0, "Calls answered at once over gRPC; more wait. 0: four for each CPU.")
    rest_api_num_threads: int = _flag(
        0, "Requests answered at once over REST; more wait. 0: four for each CPU."
    )
    rest_api_timeout_in_ms: int = _flag(30_000, "Time limit for a REST request, in milliseconds.")
    file_system_poll_wait_seconds: int = _flag(
        1, "Seconds between two looks for new versions. 0: look once, at the start. Negative: the same."
    )
    max_num_load_retries: int = _flag(5, "How often to try again after a version failed to load.")
    load_retry_interval_micros: int = _flag(60_000_000, "Microseconds from one attempt to load to the next.")
    saved_model_tags: str = _flag("serve", "Comma-separated tags of the graph to load from a SavedModel.")
    enable_model_warmup: bool = _flag(
        True, "Replay assets.extra/tf_serving_warmup_requests before a version is served."
    )
    tensorflow_intra_op_parallelism: int = _flag(0, "Threads within one operation. 0: TensorFlow chooses.")
    tensorflow_inter_op_parallelism: int = _flag(0, "Threads across operations. 0: TensorFlow chooses.")
    shutdown_grace_seconds: float = _flag(
        30.0, "Seconds that requests under way have to finish when the server stops. (graftserve's own)"
    )

    def __post_init__(self) -> None:
        for flag in FLAGS:
            _check_type(flag, getattr(self, flag.name))
        if not self.model_base_path:
            raise ValueError("--model_base_path: expected a folder, got nothing")
        if not self.model_name:
            raise ValueError("--model_name: expected a name, got nothing")
        if not self.tags:
            raise ValueError("--saved_model_tags: expected tags such as serve, got nothing")
        self._check_range("port", 0, 65_535)
        self._check_range("rest_api_port", -1, 65_535)
        self._check_range("rest_api_timeout_in_ms", 1, _INT32_MAX)
        for name in (
            "grpc_max_threads",
            "rest_api_num_threads",
            "max_num_load_retries",
            "load_retry_interval_micros",
            "tensorflow_intra_op_parallelism",
            "tensorflow_inter_op_parallelism",
            "shutdown_grace_seconds",
        ):
            self._check_range(name, 0, None)
        if self.rest_api_port > 0 and self.rest_api_port == self.port:
            raise ValueError(
                f"--rest_api_port: expected another port than --port, got {self.port} for both: choose two"
            )

    @classmethod
    def from_flags(cls, values: Mapping[str, Any]) -> "Options":
        """Options from values by flag name; what is left out takes its default.

        Raises ValueError for an unknown flag or a value out of range, and if model_base_path is missing.
        """
        known = {flag.name for flag in FLAGS}
        for name in values:
            if name not in known:
                raise ValueError(f"--{name}: there is no such flag")
        if "model_base_path" not in values:
            raise ValueError(
                "--model_base_path: expected the model's folder, got nothing: say where the model is"
            )
        return cls(**values)

    @classmethod
    def from_args(cls, args: Sequence[str]) -> "Options":
        """Options from command-line arguments; see `parse_args`. Raises ValueError."""
        return cls.from_flags(parse_args(args))

    @property
    def base_path(self) -> Path:
        return Path(self.model_base_path)

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag.strip() for tag in self.saved_model_tags.split(",") if tag.strip())

    @property
    def grpc_threads(self) -> int:
        return self.grpc_max_threads or 4 * _schedulable_cpus()

    @property
    def rest_threads(self) -> int:
        return self.rest_api_num_threads or 4 * _schedulable_cpus()

    @property
    def rest_timeout_s(self) -> float:
        return self.rest_api_timeout_in_ms / 1e3

    @property
    def load_retry_interval_s(self) -> float:
        return self.load_retry_interval_micros / 1e6

    def _check_range(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        if value < low or (high is not None and value > high):
            limits = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"--{name}: expected {limits}, got {value}")


FLAGS: tuple[Flag, ...] = tuple(
    Flag(
        entry.name,
        entry.type if isinstance(entry.type, type) else str,
        None if entry.default is MISSING else entry.default,
        entry.metadata["help"],
    )
    for entry in fields(Options)
)
"""Every flag, in the order of `Options`."""


def parse_args(args: Sequence[str]) -> dict[str, str | int | float | bool]:
    """Values by flag name from `--flag=value`, `--flag value`, and `--flag` or `--flag=false` for a bool.

    The last one wins when a flag is given twice. Raises ValueError for an unknown flag, a missing value, or
    one that is not of the flag's type.
    """
    known = {flag.name: flag for flag in FLAGS}
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


def _schedulable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
