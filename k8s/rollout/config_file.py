"""A server's --model_config_file, in which one model's versions and labels are changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftserve.client.wire import ModelConfig, ModelServerConfig

from .config_text import edited, find_model, parse_config
from .errors import ConfigFileError, ConflictError, RefusedError
from .files import locked, replace_file
from .stage import Placement

__all__ = ["CANARY", "STABLE", "ModelConfigFile", "placement_of", "set_placement"]

STABLE, CANARY = "stable", "canary"


def placement_of(entry: ModelConfig) -> Placement:
    """What a model's part of the configuration asks for."""
    is_specific = entry.model_version_policy.WhichOneof("policy_choice") == "specific"
    versions = frozenset(entry.model_version_policy.specific.versions) if is_specific else None
    labels = entry.version_labels
    return Placement(versions, labels.get(STABLE), labels.get(CANARY))


def set_placement(entry: ModelConfig, placement: Placement) -> None:
    """Let a model's part ask for `placement`; labels of other names stay.

    placement.versions: not None, and not empty.
    """
    entry.model_version_policy.Clear()
    entry.model_version_policy.specific.versions.extend(sorted(placement.versions or ()))
    for label, version in ((STABLE, placement.stable), (CANARY, placement.canary)):
        if version is not None:
            entry.version_labels[label] = version
        elif label in entry.version_labels:
            del entry.version_labels[label]


class ModelConfigFile:
    """The file `path` and one of its models. Nothing is kept in memory: each call reads it."""

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self._model = model

    def base_path(self) -> str:
        """Where the model's versions are, as the server sees it. Raises ConfigFileError."""
        return self._entry(parse_config(self._read(), str(self.path))).base_path

    def has_labels(self) -> bool:
        """Whether the server starts from a file with labels, of any model. Raises ConfigFileError."""
        config = parse_config(self._read(), str(self.path))
        return any(entry.version_labels for entry in config.model_config_list.config)

    def placement(self) -> tuple[Placement, frozenset[int]]:
        """What the file asks for, and the versions that labels of other names need.

        Raises ConfigFileError.
        """
        entry = self._entry(parse_config(self._read(), str(self.path)))
        others = {version for label, version in entry.version_labels.items() if label not in (STABLE, CANARY)}
        return placement_of(entry), frozenset(others)

    @contextmanager
    def changing(self, placement: Placement, expected: Placement | None) -> Iterator[ModelServerConfig]:
        """Write `placement` into the file and give the whole configuration to send to the server.

        Others who change the file this way wait meanwhile, also for another model's sake. If the block raises
        RefusedError, the file gets back what it said before: it never keeps what its server does not take.
        Raises ConflictError if the file says neither `placement` nor `expected`, ConfigFileError.
        """
        try:
            with locked(self.path.with_name(f".{self.path.name}.lock"), wait=True):
                before = self._read()
                config = parse_config(before, str(self.path))
                entry = self._entry(config)
                found = placement_of(entry)
                if expected is not None and found not in (placement, expected):
                    raise ConflictError(
                        f"{self.path}: somebody else changed model {self._model}: expected [{expected}], got "
                        f"[{found}]; it is left as it is"
                    )
                set_placement(entry, placement)
                if found != placement:
                    replace_file(self.path, edited(before, config, self._model).encode())
                try:
                    yield config
                except RefusedError:
                    if found != placement:
                        replace_file(self.path, before.encode())
                    raise
        except OSError as error:
            raise ConfigFileError(f"{error.filename or self.path}: {error.strerror or error}") from error

    def _read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigFileError(f"{self.path}: cannot be read: {reason}") from error

    def _entry(self, config: ModelServerConfig) -> ModelConfig:
        return find_model(config, self._model, str(self.path))
