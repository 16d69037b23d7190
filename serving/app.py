"""The server as a whole: wiring, start, ready, drain, stop. Read it from top to bottom.

    run(Options(model_name="digits", model_base_path="models/digits", rest_api_port=8501))

Source: tensorflow_serving/model_servers/{main,server}.cc.
"""

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from types import FrameType

from .errors import Code, ServingError
from .flags import Options
from .grpc_api import GrpcServer
from .manager import AspiredVersionsManager
from .policy import State
from .poller import Poller
from .rest_api import RestApi, RestServer
from .servable import Engine
from .service import ModelServiceImpl, PredictionServiceImpl
from .source import FileSystemStoragePathSource, MonitoredServable

__all__ = ["Server", "run"]

_log = logging.getLogger(__name__)

# For what cannot be interrupted: a request's last operation after it was cut off, and the load of a version.
_CUT_OFF_TIMEOUT_S = 2.0
_UNLOAD_TIMEOUT_S = 10.0

# Python runs signal handlers when the main thread wakes up, and a signal that comes just as it falls asleep
# does not wake it: it must not sleep for long.
_SIGNAL_CHECK_S = 0.25


class Server:
    """One server in this process.

        server = Server(options)
        server.start()
        ...
        server.stop()

    engine: what loads and runs models; None is TensorFlow. `start` and `stop` are called once each, `stop`
    from any thread, also while `start` is at work.
    """

    def __init__(self, options: Options, engine: Engine | None = None) -> None:
        self.options = options
        self._engine = engine
        self._source = FileSystemStoragePathSource([MonitoredServable(options.model_name, options.base_path)])
        self._manager: AspiredVersionsManager | None = None
        self._poller: Poller | None = None
        self._grpc: GrpcServer | None = None
        self._rest: RestServer | None = None
        self._lock = threading.Lock()  # between `start` and `stop`
        self._stopping = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Load the model, then open the ports.

        Raises ServingError if there is nothing to serve, if no version could be loaded (naming each error),
        or if a port cannot be had; nothing is left running then.
        """
        try:
            versions = self._source.poll_at_start()
            manager = self._start_manager()
            for name, paths in versions.items():
                manager.set_aspired_versions(name, paths)
            for name in versions:
                self._await_first_version(manager, name)
            self._open_ports(manager)
        except BaseException:
            self.stop(0)
            raise

    @property
    def manager(self) -> AspiredVersionsManager:
        """For watching versions and their states. Raises RuntimeError before `start`."""
        if self._manager is None:
            raise RuntimeError("expected a started server: call start() first")
        return self._manager

    @property
    def grpc_port(self) -> int:
        """The port that gRPC is served on. Raises RuntimeError before `start`."""
        if self._grpc is None:
            raise RuntimeError("expected a started server: call start() first")
        return self._grpc.port

    @property
    def rest_port(self) -> int | None:
        """The port that REST is served on; None if it is off."""
        return None if self._rest is None else self._rest.port

    def describe(self) -> str:
        """One line on what is served where."""
        name = self.options.model_name
        available = [state for state in self.manager.states(name) if state.state is State.AVAILABLE]
        versions = ", ".join(str(state.id.version) for state in available)
        host = self.options.host
        rest = "off" if self.rest_port is None else _address(host, self.rest_port)
        return f"model {name} version {versions}, gRPC {_address(host, self.grpc_port)}, REST {rest}"

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the server has stopped; returns whether it has."""
        return self._stopped.wait(timeout_s)

    def stop(self, grace_s: float | None = None) -> bool:
        """Refuse new requests, finish those under way, unload.

        grace_s: how long they may take; None is what the options say. What is left then is cut off.
        Returns whether nothing was left running: neither a request nor the load of a version.
        """
        grace_s = self.options.shutdown_grace_seconds if grace_s is None else grace_s
        self._stopping.set()
        with self._lock:
            doors = [door for door in (self._grpc, self._rest) if door is not None]
            manager = self._manager
        if self._poller is not None:
            self._poller.stop()
        # Both at once: they share the grace.
        closers = [threading.Thread(target=door.stop, args=(grace_s,), daemon=True) for door in doors]
        give_up_s = time.monotonic() + grace_s + _CUT_OFF_TIMEOUT_S
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(max(0.0, give_up_s - time.monotonic()))
        clean = not any(closer.is_alive() for closer in closers)
        if manager is not None:
            clean = manager.stop(_UNLOAD_TIMEOUT_S) and clean
        self._stopped.set()
        return clean

    def _start_manager(self) -> AspiredVersionsManager:
        options = self.options
        engine = self._engine
        if engine is None:
            from .loader import TensorFlowEngine  # takes seconds, and a server with another engine needs none

            engine = TensorFlowEngine(
                tags=options.tags,
                enable_warmup=options.enable_model_warmup,
                intra_op_parallelism=options.tensorflow_intra_op_parallelism,
                inter_op_parallelism=options.tensorflow_inter_op_parallelism,
            )
        with self._lock:
            self._raise_if_stopping()
            self._manager = AspiredVersionsManager(
                engine,
                max_num_load_retries=options.max_num_load_retries,
                load_retry_interval_s=options.load_retry_interval_s,
            )
            return self._manager

    def _await_first_version(self, manager: AspiredVersionsManager, name: str) -> None:
        def settled() -> bool:
            states = {state.state for state in manager.states(name)}
            return State.AVAILABLE in states or states <= {State.END}

        manager.wait_until(settled)
        self._raise_if_stopping()
        states = manager.states(name)
        if not any(state.state is State.AVAILABLE for state in states):
            errors = "; ".join(f"model {state.id}: {state.error}" for state in states)
            raise ServingError(Code.UNAVAILABLE, f"No version could be loaded: {errors}")

    def _open_ports(self, manager: AspiredVersionsManager) -> None:
        options = self.options
        prediction, model = PredictionServiceImpl(manager), ModelServiceImpl(manager)
        with self._lock:
            self._raise_if_stopping()
            if options.rest_api_port:
                api = RestApi(prediction, model, timeout_s=options.rest_timeout_s)
                rest = RestServer(
                    options.host, max(0, options.rest_api_port), api, num_threads=options.rest_threads
                )
                rest.start()
                self._rest = rest
            self._grpc = GrpcServer(
                _address(options.host, options.port), prediction, model, max_threads=options.grpc_threads
            )
            self._grpc.start()
            if options.file_system_poll_wait_seconds > 0:
                self._poller = Poller(
                    self._source, manager.set_aspired_versions, options.file_system_poll_wait_seconds
                )
                self._poller.start()

    def _raise_if_stopping(self) -> None:
        if self._stopping.is_set():
            raise ServingError(Code.CANCELLED, "The server was stopped while it started")


def run(options: Options, engine: Engine | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status: 0 after a clean stop, 1 if the start failed.

    To be called from the main thread. Logs one line when ready. The first signal lets requests under way
    finish, a second one ends the process at once. Signal handlers are restored at the end.
    """
    # The main thread only takes these in turn, so that a signal is heard at any moment of start and stop.
    events: queue.SimpleQueue[int | ServingError | None] = queue.SimpleQueue()
    signals: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(128 + number)
        events.put(number)

    def start() -> None:
        try:
            server.start()
        except ServingError as exc:
            events.put(exc)
        except Exception as exc:
            _log.exception("the server could not start")
            events.put(ServingError(Code.INTERNAL, f"{type(exc).__name__}: {exc}"))
        else:
            events.put(None)

    def next_event() -> int | ServingError | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return events.get(timeout=_SIGNAL_CHECK_S)

    def stop() -> None:
        stopped_clean.append(server.stop())

    stopped_clean: list[bool] = []
    server = Server(options, engine)
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        starter = threading.Thread(target=start, name="graftserve-start", daemon=True)
        starter.start()
        event = next_event()
        if event is None:
            _log.info("ready: %s", server.describe())
            event = next_event()
        if isinstance(event, ServingError):
            _log.error("the server could not start: %s", event.message)
            return 1
        _log.info("stopping: requests under way have %g s to finish", options.shutdown_grace_seconds)
        stopper = threading.Thread(target=stop, name="graftserve-stop", daemon=True)
        stopper.start()
        while stopper.is_alive() or starter.is_alive():
            stopper.join(_SIGNAL_CHECK_S)
            starter.join(_SIGNAL_CHECK_S)
        if stopped_clean != [True]:
            _log.warning("stopped with something still running: requests, or the load of a version")
            logging.shutdown()
            # Python would wait for their threads, and that may be for ever.
            os._exit(0)
        _log.info("stopped")
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
