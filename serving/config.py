"""The server's configuration files, and the models that they name.

    models = read_models(options)      # what to serve, from --model_config_file or --model_base_path
    ssl = read_text_proto(Path("ssl.config"), SSLConfig(), "--ssl_config_file")

The files are protocol buffers in text format, as tensorflow_model_server takes them.
Source: tensorflow_serving/model_servers/{server.cc,server_core.cc,model_platform_types.h} and
https://github.com/tensorflow/serving/blob/master/tensorflow_serving/g3doc/serving_config.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from google.protobuf import text_format
from google.protobuf.message import Message

from graftserve.client.wire import ModelConfig, ModelServerConfig, ModelVersionPolicy

from .errors import Code, ServingError
from .flags import Options
from .source import All, Latest, MonitoredServable, Specific, VersionPolicy

__all__ = ["ModelSettings", "model_settings", "read_models", "read_text_proto"]

MessageT = TypeVar("MessageT", bound=Message)

_MAX_FILE_BYTES = 16 * 2**20
_PLATFORM = "tensorflow"


@dataclass(frozen=True)
class ModelSettings:
    """One model to serve: where it is, which of its versions, and their labels."""

    servable: MonitoredServable
    version_labels: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's."""
        return self.servable.name


def read_text_proto(path: Path, message: MessageT, flag: str) -> MessageT:
    """Fill `message` with what the file says, and return it.

    flag: the flag that names the file, for the error.
    Raises ServingError (INVALID_ARGUMENT) if the file cannot be read, or is not such a message.
    """
    kind = message.DESCRIPTOR.name
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"{flag}: {path}: expected at most {_MAX_FILE_BYTES} bytes"
            )
        text_format.Parse(content.decode(), message)
    except OSError as exc:
        raise ServingError(Code.INVALID_ARGUMENT, f"{flag}: cannot read {path}: {exc.strerror}") from exc
    except (text_format.ParseError, UnicodeDecodeError) as exc:
        raise ServingError(
            Code.INVALID_ARGUMENT, f"{flag}: {path}: expected a {kind} in text format: {exc}"
        ) from exc
    return message


def read_models(options: Options) -> dict[str, ModelSettings]:
    """The models to serve by name. Raises ServingError (INVALID_ARGUMENT)."""
    if not options.model_config_file:
        servable = MonitoredServable(options.model_name, Path(options.model_base_path))
        return {servable.name: ModelSettings(servable)}
    path = Path(options.model_config_file)
    config = read_text_proto(path, ModelServerConfig(), "--model_config_file")
    try:
        return model_settings(config)
    except ServingError as exc:
        raise ServingError(exc.code, f"--model_config_file: {path}: {exc.message}") from exc


def model_settings(config: ModelServerConfig) -> dict[str, ModelSettings]:
    """The models of a configuration by name. Raises ServingError (INVALID_ARGUMENT) that names the model."""
    if config.WhichOneof("config") != "model_config_list":
        raise ServingError(
            Code.INVALID_ARGUMENT, "Expected ServerCore config to have model_config_list set, got none"
        )
    models: dict[str, ModelSettings] = {}
    for index, entry in enumerate(config.model_config_list.config):
        if not entry.name:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"model_config_list.config[{index}]: expected a name, got none"
            )
        if entry.name in models:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"Illegal to list model {entry.name} multiple times in config list",
            )
        models[entry.name] = _settings(entry)
    return models


def _settings(entry: ModelConfig) -> ModelSettings:
    if not entry.base_path:
        raise ServingError(Code.INVALID_ARGUMENT, f"model {entry.name}: expected a base_path, got none")
    if "://" in entry.base_path:
        raise ServingError(
            Code.INVALID_ARGUMENT,
            f"model {entry.name}: base_path: expected a local folder, got {entry.base_path}: fetch it first "
            "with `graftserve pull`",
        )
    known_platform = entry.model_platform in ("", _PLATFORM) and entry.model_type != ModelConfig.OTHER
    if not known_platform:
        raise ServingError(
            Code.INVALID_ARGUMENT,
            f"model {entry.name}: expected model_platform {_PLATFORM!r}, got {entry.model_platform!r}",
        )
    policy = _policy(entry.name, entry.model_version_policy)
    servable = MonitoredServable(entry.name, Path(entry.base_path), policy)
    return ModelSettings(servable, dict(entry.version_labels))


def _policy(name: str, policy: ModelVersionPolicy) -> VersionPolicy:
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return All()
    if choice == "specific":
        if not policy.specific.versions:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"model {name}: policy specific: expected versions, got none"
            )
        return Specific(frozenset(policy.specific.versions))
    return Latest(policy.latest.num_versions or 1)
