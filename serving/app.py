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
from functools import partial
from pathlib import Path
from types import FrameType

from graftserve.client.wire import MonitoringConfig, SSLConfig

from .config import read_models, read_text_proto
from .core import ServerCore
from .errors import Code, ServingError
from .flags import Options
from .grpc_api import GrpcServer, GrpcSettings
from .http_server import HttpServer
from .manager import AspiredVersionsManager
from .memory import freeze
from .metrics import Metrics
from .overview import make_overview
from .page import Overview
from .policy import State
from .poller import Poller
from .rest_api import RestApi, RestSettings
from .servable import Engine
from .service import ModelServiceImpl, PredictionServiceImpl
from .source import FileSystemStoragePathSource
from .tracing import Tracer

__all__ = ["Server", "run"]

_log = logging.getLogger(__name__)

# For what cannot be interrupted: a request's last operation after it was cut off, and the load of a version.
_CUT_OFF_TIMEOUT_S = 2.0
_UNLOAD_TIMEOUT_S = 10.0

# Source: tensorflow_serving/model_servers/http_server.cc.
_METRICS_PATH = "/monitoring/prometheus/metrics"

# Python runs signal handlers when the main thread wakes up, and a signal that comes just as it falls asleep
# does not wake it: it must not sleep for long.
_SIGNAL_CHECK_S = 0.25


class Server:
    """One server in this process.

        server = Server(options)
        server.start()
        ...
        server.stop()

    engine: what loads and runs models; None is what the options say.
    owns_process: nothing else of importance runs in this process, so the server may set it up for itself.
    `start` and `stop` are called once each, `stop` from any thread, also while `start` is at work.
    """

    def __init__(self, options: Options, engine: Engine | None = None, *, owns_process: bool = False) -> None:
        self.options = options
        self.metrics = Metrics(is_known=self._is_known, access_log=options.access_log)
        self._engine = engine
        self._owns_process = owns_process
        self._manager: AspiredVersionsManager | None = None
        self._core: ServerCore | None = None
        self._pollers: list[Poller] = []
        self._grpc: GrpcServer | None = None
        self._rest: HttpServer | None = None
        self._tracer: Tracer | None = None
        self._config_file_trouble = ""
        self._config_file_seen = b""
        self._started_s = time.time()
        self._lock = threading.Lock()  # between `start` and `stop`
        self._stopping = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Load the models, then open the ports.

        Raises ServingError if there is nothing to serve, if a model has no version that could be loaded
        (naming each error), if a file that a flag names cannot be used, or if a port cannot be had; nothing
        is left running then.
        """
        options = self.options
        try:
            monitoring, tls = MonitoringConfig(), None
            if options.monitoring_config_file:
                file = Path(options.monitoring_config_file)
                read_text_proto(file, monitoring, "--monitoring_config_file")
            if options.ssl_config_file:
                tls = read_text_proto(Path(options.ssl_config_file), SSLConfig(), "--ssl_config_file")
            if options.enable_tracing:
                self._tracer = Tracer()
                self.metrics.trace(self._tracer)
            if options.model_config_file:
                self._config_file_seen = _content(Path(options.model_config_file))
            models = read_models(options)
            # Looked at here, too, since the engine's import takes seconds.
            FileSystemStoragePathSource(model.servable for model in models.values()).poll_at_start()
            manager, core = self._start_manager()
            try:
                core.start(models)
            except ServingError:
                self._raise_if_stopping()
                raise
            self._raise_if_stopping()
            self._open_ports(manager, core, monitoring, tls)
            self._start_pollers(core)
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
        models = []
        for name in self.manager.names():
            available = [state.id for state in self.manager.states(name) if state.state is State.AVAILABLE]
            versions = ", ".join(str(servable.version) for servable in available)
            engines = sorted({self.manager.engine_of(name, servable.version) for servable in available})
            models.append(f"model {name} version {versions} ({', '.join(engines)})")
        host = self.options.host
        rest = "off" if self.rest_port is None else _address(host, self.rest_port)
        return f"{', '.join(models)}, gRPC {_address(host, self.grpc_port)}, REST {rest}"

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
            pollers = list(self._pollers)
        for poller in pollers:
            poller.stop()
        # Both at once: they share the grace.
        closers = [threading.Thread(target=door.stop, args=(grace_s,), daemon=True) for door in doors]
        give_up_s = time.monotonic() + grace_s + _CUT_OFF_TIMEOUT_S
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(max(0.0, give_up_s - time.monotonic()))
        clean = not any(closer.is_alive() for closer in closers)
        if self._tracer is not None and not self._tracer.stop(max(0.0, give_up_s - time.monotonic())):
            _log.warning("traces of the last requests were not sent: the collector did not take them in time")
        if manager is not None:
            # Before the pollers: one of them may be waiting for a load.
            clean = manager.stop(_UNLOAD_TIMEOUT_S) and clean
        for poller in pollers:
            clean = poller.join(_CUT_OFF_TIMEOUT_S) and clean
        self._stopped.set()
        return clean

    def _start_manager(self) -> tuple[AspiredVersionsManager, ServerCore]:
        options = self.options
        engine = self._engine
        if engine is None:
            from .engines import ModelEngine  # takes seconds, and a server with another engine needs none

            engine = ModelEngine(options, self.metrics)
        if self._owns_process:
            freeze()  # before the first version, which shall be freed like any other
        with self._lock:
            self._raise_if_stopping()
            self._manager = AspiredVersionsManager(
                engine,
                num_load_threads=options.num_load_threads,
                num_unload_threads=options.num_unload_threads,
                max_num_load_retries=options.max_num_load_retries,
                load_retry_interval_s=options.load_retry_interval_s,
            )
            self._core = ServerCore(
                self._manager,
                allow_labels_for_unavailable=options.allow_version_labels_for_unavailable_models,
            )
            self.metrics.watch(self._manager)
            return self._manager, self._core

    def _open_ports(
        self,
        manager: AspiredVersionsManager,
        core: ServerCore,
        monitoring: MonitoringConfig,
        tls: SSLConfig | None,
    ) -> None:
        options = self.options
        prediction = PredictionServiceImpl(
            core, manager, check_method_names=options.enable_signature_method_name_check
        )
        model = ModelServiceImpl(core, manager)
        prometheus = monitoring.prometheus_config
        rest_settings = RestSettings(
            timeout_s=options.rest_timeout_s,
            max_body_bytes=options.max_message_bytes,
            allow_cors=options.rest_api_enable_cors_support,
            metrics_path=(prometheus.path or _METRICS_PATH) if prometheus.enable else "",
        )
        grpc_settings = GrpcSettings(
            _address(options.host, options.port),
            socket_path=options.grpc_socket_path,
            max_threads=options.grpc_threads,
            max_queued=options.max_queued_requests,
            max_message_bytes=options.max_message_bytes,
            channel_arguments=options.channel_arguments,
            tls=tls,
            packed_tensors=options.enable_serialization_as_tensor_content,
            serve_health=options.enable_grpc_healthcheck_service,
        )

        def overview() -> Overview:
            return make_overview(core, manager, self.metrics, options.max_message_bytes, self._started_s)

        with self._lock:
            self._raise_if_stopping()
            if options.rest_api_port:
                api = RestApi(rest_settings, prediction, model, self.metrics, overview)
                rest = HttpServer(
                    *(options.host, max(0, options.rest_api_port), api),
                    num_threads=options.rest_threads,
                    max_queued=options.max_queued_requests,
                    request_timeout_s=options.rest_timeout_s,
                    on_refused=partial(self.metrics.refused, "", "REST"),
                )
                rest.start()
                self._rest = rest
            self._grpc = GrpcServer(grpc_settings, prediction, model, self.metrics)
            self._grpc.watch(manager)
            self._grpc.start()

    def _start_pollers(self, core: ServerCore) -> None:
        options = self.options
        with self._lock:
            self._raise_if_stopping()
            if options.file_system_poll_wait_seconds > 0:
                wait_s = options.file_system_poll_wait_seconds
                self._pollers.append(Poller(core.poll, wait_s, "graftserve-poller"))
            if options.model_config_file and options.model_config_file_poll_wait_seconds > 0:
                wait_s = options.model_config_file_poll_wait_seconds
                self._pollers.append(Poller(self._poll_config_file, wait_s, "graftserve-config-poller"))
            for poller in self._pollers:
                poller.start()

    def _poll_config_file(self) -> None:
        """Follow an edited file. One that cannot be used is logged, and what is served stays."""
        core = self._core
        if core is None:
            return
        try:
            content = _content(Path(self.options.model_config_file))
            if content == self._config_file_seen:
                return
            core.reload(read_models(self.options))
        except ServingError as exc:
            # A label may wait for its version, or a folder for its first one: it is tried again.
            if exc.message != self._config_file_trouble:
                _log.error("the model configuration stays as it is: %s", exc.message)
            self._config_file_trouble = exc.message
            return
        self._config_file_seen = content
        self._config_file_trouble = ""

    def _is_known(self, name: str) -> bool:
        return self._manager is not None and self._manager.is_known(name)

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
    server = Server(options, engine, owns_process=True)
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


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # told by whoever reads it to use it
        return b""
