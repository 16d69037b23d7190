"""Keeps the aspired versions loaded and hands them out to requests.

    set_aspired_versions -> policy -> START -> LOADING -> AVAILABLE -> UNLOADING -> END
                                                  `-> END with an error

Source: tensorflow_serving/core/{aspired_versions_manager,basic_manager,servable_state}.h.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .errors import Code, ServingError
from .policy import ActionKind, Snapshot, State, availability_preserving
from .servable import Engine, Servable, ServableId

__all__ = ["AspiredVersionsManager", "Handle", "ServableState"]

_log = logging.getLogger(__name__)

# Ended versions stay listed with their errors; the bound keeps a folder that goes through thousands of
# versions from growing the list for ever.
_MAX_ENDED_LISTED = 100


@dataclass(frozen=True)
class ServableState:
    """A version's state, as announced and as GetModelStatus shows it. error: why it ended, or None."""

    id: ServableId
    state: State
    error: ServingError | None = None


class _Version:
    """The manager's own record of one version; guarded by the manager's lock."""

    def __init__(self, servable_id: ServableId, path: Path) -> None:
        self.id = servable_id
        self.path = path
        self.state = State.START
        self.aspired = True
        self.servable: Servable | None = None
        self.handles = 0
        self.load_attempts = 0
        self.last_error: ServingError | None = None
        self.retry_at_s: float | None = None  # on time.monotonic's clock, between two attempts
        self.closing = False


class Handle:
    """A version that stays loaded for as long as the `with` block lasts."""

    __slots__ = ("_manager", "_version", "id", "servable")

    def __init__(self, manager: "AspiredVersionsManager", version: _Version, servable: Servable) -> None:
        self._manager = manager
        self._version = version
        self.id = version.id
        self.servable = servable

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager._release(self._version)


class AspiredVersionsManager:
    """Loads, unloads and hands out versions. Every method may be called from any thread.

    Loads and unloads run on threads of the manager's own, never on a caller's. A version being unloaded
    waits for its handles.

    num_load_threads, num_unload_threads: how many versions load, or unload, at the same time. 0 for both:
        loads and unloads share one thread.
    max_num_load_retries: attempts after the first that failed.
    load_retry_interval_s: from one attempt to the next. Waiting blocks nothing: other versions load
        meanwhile, and it ends when the version is no longer aspired.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        num_load_threads: int = 0,
        num_unload_threads: int = 0,
        max_num_load_retries: int = 5,
        load_retry_interval_s: float = 60.0,
    ) -> None:
        self._engine = engine
        self._max_num_load_retries = max_num_load_retries
        self._load_retry_interval_s = load_retry_interval_s
        self._changed = threading.Condition()  # its lock guards everything below
        self._versions: dict[str, dict[int, _Version]] = {}
        self._available: dict[str, dict[int, _Version]] = {}
        self._latest: dict[str, _Version] = {}
        self._states: dict[str, dict[int, ServableState]] = {}
        self._observers: list[Callable[[ServableState], None]] = []
        self._stopping = False
        self._loaders = ThreadPoolExecutor(max(1, num_load_threads), "graftserve-load")
        self._unloaders = self._loaders
        if num_load_threads or num_unload_threads:
            self._unloaders = ThreadPoolExecutor(max(1, num_unload_threads), "graftserve-unload")
        self._thread = threading.Thread(target=self._run, name="graftserve-manager", daemon=True)
        self._thread.start()

    def set_aspired_versions(self, name: str, versions: Mapping[int, Path]) -> None:
        """Say which versions of a servable to serve, and from where; all others go.

        A version that ended with an error is tried again only after it was once not aspired.
        """
        with self._changed:
            if self._stopping:
                return
            known = self._versions.setdefault(name, {})
            changed = False
            for version, record in list(known.items()):
                aspired = version in versions
                changed = changed or record.aspired != aspired
                record.aspired = aspired
                if _is_over(record):
                    del known[version]
            for version, path in versions.items():
                if version not in known:
                    known[version] = _Version(ServableId(name, version), path)
                    self._announce(known[version])
                    changed = True
            if changed:
                self._changed.notify_all()

    def handle(self, name: str, version: int | None = None) -> Handle:
        """The AVAILABLE version asked for, or the highest one. Use it in a `with` statement.

        Raises ServingError (NOT_FOUND).
        """
        with self._changed:
            versions = self._available.get(name, {})
            record = self._latest.get(name) if version is None else versions.get(version)
            if record is None or record.servable is None:
                request = f"Latest({name})" if version is None else f"Specific({name}, {version})"
                raise ServingError(Code.NOT_FOUND, f"Servable not found for request: {request}")
            record.handles += 1
            return Handle(self, record, record.servable)

    def engine_of(self, name: str, version: int) -> str:
        """What runs an AVAILABLE version; empty if it is not AVAILABLE."""
        with self._changed:
            record = self._available.get(name, {}).get(version)
            return "" if record is None or record.servable is None else record.servable.engine

    def is_known(self, name: str) -> bool:
        """Whether the servable has, or had, a version."""
        return name in self._states

    def is_available(self, name: str, version: int) -> bool:
        """Whether the version takes requests now."""
        with self._changed:
            return version in self._available.get(name, {})

    def states(self, name: str) -> list[ServableState]:
        """Every known version of a servable, ended ones included, highest version first."""
        with self._changed:
            return [state for _, state in sorted(self._states.get(name, {}).items(), reverse=True)]

    def names(self) -> list[str]:
        """The servables that have, or had, a version."""
        with self._changed:
            return list(self._states)

    def subscribe(self, observer: Callable[[ServableState], None]) -> None:
        """Call `observer` with the state of every known version now, and at every transition, in order.

        AVAILABLE is announced after handles can be had, UNLOADING before they cannot. The observer runs
        under the manager's lock: it must be quick and must not wait for another thread.
        """
        with self._changed:
            self._observers.append(observer)
            for states in self._states.values():
                for state in states.values():
                    observer(state)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until `condition`, which is checked at every transition, holds. Returns whether it does."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def stop(self, timeout_s: float | None = None) -> bool:
        """Unload everything and end the threads; returns whether all was unloaded in time.

        Waits for a load that is under way and for handles, at most timeout_s. May be called again.
        """
        with self._changed:
            self._stopping = True
            for versions in self._versions.values():
                for record in versions.values():
                    record.aspired = False
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not any(self._versions.values()), timeout_s)
        if done:
            self._thread.join()
            self._loaders.shutdown()
            self._unloaders.shutdown()
        return done

    def _release(self, record: _Version) -> None:
        with self._changed:
            record.handles -= 1
            if record.handles == 0 and record.state is State.UNLOADING:
                self._changed.notify_all()

    def _run(self) -> None:
        with self._changed:
            while True:
                next_retry_s = self._reconcile()
                if self._stopping and not any(self._versions.values()):
                    return
                self._changed.wait(next_retry_s)

    def _reconcile(self) -> float | None:
        """Start everything that can be started now; returns the seconds until the next retry is due."""
        due_s: list[float] = []
        for versions in self._versions.values():
            self._settle(versions, due_s)
            while (action := availability_preserving(_snapshots(versions))) is not None:
                record = versions[action.version]
                if action.kind is ActionKind.LOAD:
                    self._start_load(record)
                else:
                    self._start_unload(record)
            for version in [number for number, record in versions.items() if _is_over(record)]:
                del versions[version]
        # Only `stop` and `wait_until` listen for records that went without a transition.
        self._changed.notify_all()
        return max(0.0, min(due_s) - time.monotonic()) if due_s else None

    def _settle(self, versions: Mapping[int, _Version], due_s: list[float]) -> None:
        for record in versions.values():
            if record.state is State.START and not record.aspired:
                self._announce(record, State.END)
            elif record.retry_at_s is not None:
                if not record.aspired:
                    record.retry_at_s = None
                    self._announce(record, State.END)
                elif record.retry_at_s <= time.monotonic():
                    self._start_load(record)
                else:
                    due_s.append(record.retry_at_s)
            elif record.state is State.UNLOADING and record.handles == 0 and not record.closing:
                record.closing = True
                self._unloaders.submit(self._close, record)

    def _start_load(self, record: _Version) -> None:
        record.retry_at_s = None
        record.load_attempts += 1
        if record.state is not State.LOADING:
            self._announce(record, State.LOADING)
        self._loaders.submit(self._load, record)

    def _start_unload(self, record: _Version) -> None:
        self._announce(record, State.UNLOADING)
        name = record.id.name
        del self._available[name][record.id.version]
        if self._available[name]:
            self._latest[name] = self._available[name][max(self._available[name])]
        else:
            del self._latest[name]
        if record.handles == 0:
            record.closing = True
            self._unloaders.submit(self._close, record)

    def _load(self, record: _Version) -> None:
        with self._changed:
            if not record.aspired:  # it waited behind another load and is no longer wanted
                self._announce(record, State.END)
                self._changed.notify_all()
                return
        began_s = time.monotonic()
        servable: Servable | None = None
        error: ServingError | None = None
        try:
            servable = self._engine.load(record.id, record.path)
        except ServingError as exc:
            error = exc
        except Exception as exc:
            _log.exception("loading model %s failed", record.id)
            error = ServingError(Code.INTERNAL, f"{type(exc).__name__}: {exc}")
        with self._changed:
            if servable is not None:
                self._publish(record, servable)
                _log.info(
                    "model %s is available (%s, %.1f s)",
                    *(record.id, servable.engine, time.monotonic() - began_s),
                )
            elif error is not None:
                self._load_failed(record, error)
            self._changed.notify_all()

    def _publish(self, record: _Version, servable: Servable) -> None:
        name, version = record.id.name, record.id.version
        record.servable = servable
        record.last_error = None
        available = self._available.setdefault(name, {})
        available[version] = record
        self._latest[name] = available[max(available)]
        self._announce(record, State.AVAILABLE)

    def _load_failed(self, record: _Version, error: ServingError) -> None:
        record.last_error = error
        left = self._max_num_load_retries + 1 - record.load_attempts
        if left > 0 and record.aspired:
            record.retry_at_s = time.monotonic() + self._load_retry_interval_s
            _log.warning(
                "loading model %s failed, %d more attempts, the next in %g s: %s",
                *(record.id, left, self._load_retry_interval_s, error),
            )
            return
        _log.error("loading model %s failed: %s", record.id, error)
        self._announce(record, State.END)

    def _close(self, record: _Version) -> None:
        try:
            if record.servable is not None:
                record.servable.close()
        except Exception:
            _log.exception("unloading model %s failed", record.id)
        with self._changed:
            record.servable = None
            self._announce(record, State.END)
            _log.info("model %s is unloaded", record.id)
            self._changed.notify_all()

    def _announce(self, record: _Version, state: State | None = None) -> None:
        """Move a version to `state` (None: it is new) and tell everyone."""
        if state is not None:
            record.state = state
        error = record.last_error if record.state is State.END else None
        announced = ServableState(record.id, record.state, error)
        states = self._states.setdefault(record.id.name, {})
        states[record.id.version] = announced
        ended = sorted(version for version, state in states.items() if state.state is State.END)
        for version in ended[:-_MAX_ENDED_LISTED]:
            del states[version]
        for observer in self._observers:
            try:
                observer(announced)
            except Exception:
                _log.exception("an observer of model states failed")


def _snapshots(versions: Mapping[int, _Version]) -> list[Snapshot]:
    return [Snapshot(number, record.state, record.aspired) for number, record in versions.items()]


def _is_over(record: _Version) -> bool:
    # A version that failed stays on record while it is aspired, so that it is not tried again and again.
    return record.state is State.END and not record.aspired
