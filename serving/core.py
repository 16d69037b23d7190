"""What the server serves: the models of its configuration, and how to change them while it runs.

    core.start(models)       load them; returns once each has an AVAILABLE version
    core.reload(models)      from HandleReloadConfigRequest or an edited file: add, remove, move labels
    core.poll()              look into the models' folders for new versions
    core.resolve(spec)       a version number for a label

Source: tensorflow_serving/model_servers/server_core.cc. Unlike there, a reload that names a folder which is
missing or empty is refused (the real server waits for ever), and a refused reload changes nothing.
"""

import logging
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from .config import ModelSettings
from .errors import Code, ServingError
from .manager import AspiredVersionsManager, ServableState
from .policy import State
from .source import FileSystemStoragePathSource

__all__ = ["ServerCore"]

_log = logging.getLogger(__name__)


class ServerCore:
    """Thread-safe, except that `start` comes first and once.

    allow_labels_for_unavailable: let a label that is new name any version, also at the start.
    """

    def __init__(
        self, manager: AspiredVersionsManager, *, allow_labels_for_unavailable: bool = False
    ) -> None:
        self._manager = manager
        self._allow_labels_for_unavailable = allow_labels_for_unavailable
        self._lock = threading.Lock()  # guards what follows
        self._models: Mapping[str, ModelSettings] = {}
        self._labels: Mapping[str, Mapping[str, int]] = {}
        self._source = FileSystemStoragePathSource([])
        self._aspired: dict[str, Collection[int]] = {}
        self._reloading = threading.Lock()  # one reload at a time; taken before `_lock`
        self._polling = threading.Lock()  # one look at the folders at a time
        self._troubles: dict[str, str] = {}

    def start(self, models: Mapping[str, ModelSettings]) -> None:
        """Load `models` and wait until each of them has an AVAILABLE version.

        Raises ServingError that names every model that has none, and why, and every label that names a
        version which is not available.
        """
        if not self._allow_labels_for_unavailable:
            self._check_labels(models)
        source = FileSystemStoragePathSource(model.servable for model in models.values())
        self._adopt(models, source, source.poll_at_start())
        self._await(models, None)

    def reload(self, models: Mapping[str, ModelSettings], deadline_s: float | None = None) -> None:
        """Serve `models` instead; returns once each one that is new has an AVAILABLE version.

        deadline_s: on time.monotonic's clock. Past it the loads go on, but nobody waits for them.
        Raises ServingError. The configuration is as it was, but for UNKNOWN and DEADLINE_EXCEEDED: a new
        model failed to load, or is still loading.
        """
        with self._reloading:
            self._check_labels(models)
            source = FileSystemStoragePathSource(model.servable for model in models.values())
            with self._lock:
                before, known = self._models, dict(self._aspired)
            versions = source.poll_at_start(known)
            for name, model in models.items():
                old = before.get(name)
                if old is not None and old.servable.base_path != model.servable.base_path:
                    _log.info("model %s: versions that are loaded stay; new ones come from %s",
                              name, model.servable.base_path)  # fmt: skip
            self._adopt(models, source, versions)
            _log.info("configuration: models %s", ", ".join(models) or "none")
        self._await([name for name in models if name not in before], deadline_s)

    def poll(self) -> None:
        """Pass on what the folders hold now. A folder that cannot be read changes nothing.

        That is logged when the trouble begins, changes or ends.
        """
        with self._polling:
            with self._lock:
                source, known = self._source, dict(self._aspired)
            found, failed = source.poll(known)
            with self._lock:
                if source is not self._source:  # a reload came between
                    return
                for name, versions in found.items():
                    self._aspire(name, versions)
            self._tell_troubles(failed)

    def resolve(self, name: str, label: str) -> int:
        """The version that a label means. Raises ServingError (INVALID_ARGUMENT)."""
        version = self._labels.get(name, {}).get(label)
        if version is None:
            raise ServingError(Code.INVALID_ARGUMENT, f"Unrecognized servable version label: {label}")
        return version

    def labels(self, name: str) -> Mapping[str, int]:
        """The labels of a model."""
        return self._labels.get(name, {})

    def names(self) -> list[str]:
        """The models of the configuration."""
        return list(self._models)

    def _check_labels(self, models: Mapping[str, ModelSettings]) -> None:
        for name, model in models.items():
            for label, version in model.version_labels.items():
                now = self._labels.get(name, {}).get(label)
                if now == version or (now is None and self._allow_labels_for_unavailable):
                    continue
                if not self._manager.is_available(name, version):
                    raise ServingError(
                        Code.FAILED_PRECONDITION,
                        f"Request to assign label to version {version} of model {name}, which is not "
                        "currently available for inference",
                    )

    def _adopt(
        self,
        models: Mapping[str, ModelSettings],
        source: FileSystemStoragePathSource,
        versions: Mapping[str, Mapping[int, Path]],
    ) -> None:
        with self._lock:
            gone = [name for name in self._models if name not in models]
            self._models = dict(models)
            self._labels = {name: dict(model.version_labels) for name, model in models.items()}
            self._source = source
            for name in gone:
                self._manager.set_aspired_versions(name, {})
                self._aspired.pop(name, None)
            for name, paths in versions.items():
                self._aspire(name, paths)

    def _aspire(self, name: str, versions: Mapping[int, Path]) -> None:
        self._aspired[name] = frozenset(versions)
        self._manager.set_aspired_versions(name, versions)

    def _await(self, names: Collection[str], deadline_s: float | None) -> None:
        """Wait until every model has an AVAILABLE version, or can have none any more."""

        def settled() -> bool:
            return all(_is_settled(self._manager.states(name)) for name in names)

        timeout_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        if not self._manager.wait_until(settled, timeout_s):
            raise ServingError(Code.DEADLINE_EXCEEDED, f"Still loading: {', '.join(names)}")
        failed = [
            state
            for name in names
            if not any(state.state is State.AVAILABLE for state in self._manager.states(name))
            for state in self._manager.states(name)
        ]
        if failed:
            errors = "; ".join(f"model {state.id}: {state.error}" for state in failed)
            raise ServingError(Code.UNKNOWN, f"{len(failed)} servable(s) did not become available: {errors}")

    def _tell_troubles(self, failed: Mapping[str, ServingError]) -> None:
        for name, error in failed.items():
            if self._troubles.get(name) != error.message:
                _log.error("model %s stays as it is: %s", name, error.message)
        for name in self._troubles:
            if name not in failed and name in self._models:
                _log.info("model %s: its base path can be read again", name)
        self._troubles = {name: error.message for name, error in failed.items()}


def _is_settled(states: list[ServableState]) -> bool:
    return any(state.state is State.AVAILABLE for state in states) or all(
        state.state is State.END for state in states
    )
