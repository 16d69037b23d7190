"""The thread that looks at the source again and again and passes on what it finds."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from .source import FileSystemStoragePathSource

__all__ = ["Poller"]

_log = logging.getLogger(__name__)


class Poller:
    """Calls `on_versions(name, versions)` for every servable of `source`, every `wait_s` seconds.

    A folder that cannot be read is logged when its trouble begins, changes or ends, and is not passed on:
    what is served stays. `on_versions` is called from the poller's own thread.
    """

    def __init__(
        self,
        source: FileSystemStoragePathSource,
        on_versions: Callable[[str, Mapping[int, Path]], None],
        wait_s: float,
    ) -> None:
        if wait_s <= 0:
            raise ValueError(f"wait_s: expected more than 0, got {wait_s}")
        self._source = source
        self._on_versions = on_versions
        self._wait_s = wait_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="graftserve-poller", daemon=True)
        self._troubles: dict[str, str] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end and wait for it. May be called before `start`, and more than once."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._wait_s):
            try:
                self._poll()
            except Exception:
                # One bad look at the folder must not end the watch.
                _log.exception("polling failed")

    def _poll(self) -> None:
        found, failed = self._source.poll()
        for name, error in failed.items():
            if self._troubles.get(name) != error.message:
                _log.error("model %s stays as it is: %s", name, error.message)
            self._troubles[name] = error.message
        for name, versions in found.items():
            if name in self._troubles:
                del self._troubles[name]
                _log.info("model %s: its base path can be read again", name)
            self._on_versions(name, versions)
