"""grpc.health.v1, per model.

grpcio-health-checking's own servicer sends to its watchers under the lock that a watcher's end needs, too:
one that goes away at the wrong moment stops the server. Here one thread sends, and holds no lock meanwhile.
Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md; names of services:
tensorflow_serving/model_servers/server.cc.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .manager import ServableState
from .policy import State

__all__ = ["Health"]

_log = logging.getLogger(__name__)

_Status = health_pb2.HealthCheckResponse
_Send = Callable[[health_pb2.HealthCheckResponse | None], None]

# What the real server's health service knows; ours knows each model, too.
_SERVER = ("", "ModelService", "PredictionService")


class Health(health_pb2_grpc.HealthServicer):
    """The server is SERVING from `serve` to `stop`, a model while it has an AVAILABLE version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows; never held while anything is sent
        self._statuses: dict[str, Any] = dict.fromkeys(_SERVER, _Status.NOT_SERVING)
        self._available: dict[str, set[int]] = {}
        self._watchers: dict[object, tuple[str, _Send]] = {}
        self._stopped = False
        self._outbox: queue.SimpleQueue[tuple[_Send, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, name="graftserve-health", daemon=True)

    def serve(self) -> None:
        """Say SERVING of the server from now on; once."""
        self._thread.start()
        with self._lock:
            for name in _SERVER:
                self._set(name, _Status.SERVING)

    def stop(self) -> None:
        """Say NOT_SERVING of everything from now on."""
        with self._lock:
            for name in list(self._statuses):
                self._set(name, _Status.NOT_SERVING)
            self._stopped = True
        self._outbox.put(None)

    def on_state(self, entry: ServableState) -> None:
        """A version has another state."""
        with self._lock:
            available = self._available.setdefault(entry.id.name, set())
            if entry.state is State.AVAILABLE:
                available.add(entry.id.version)
            else:
                available.discard(entry.id.version)
            self._set(entry.id.name, _Status.SERVING if available else _Status.NOT_SERVING)

    def Check(  # noqa: N802  # the RPC's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Unknown service: {request.service}")
        return _Status(status=status)

    def Watch(  # type: ignore[override]  # noqa: N802  # without a thread it takes `send`
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send: _Send
    ) -> None:
        watcher = object()
        with self._lock:
            self._watchers[watcher] = (request.service, send)
            self._outbox.put((send, self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)))
        if not context.add_callback(lambda: self._forget(watcher)):
            self._forget(watcher)

    # gRPC then gives the call no thread, only `send`: a few watchers would take all threads from the models.
    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def _set(self, name: str, status: int) -> None:
        if self._stopped or self._statuses.get(name) == status:
            return
        self._statuses[name] = status
        for service, send in self._watchers.values():
            if service == name:
                self._outbox.put((send, status))

    def _forget(self, watcher: object) -> None:
        with self._lock:
            self._watchers.pop(watcher, None)

    def _deliver(self) -> None:
        while (message := self._outbox.get()) is not None:
            send, status = message
            try:
                send(_Status(status=status))
            except Exception:  # the watcher has gone
                _log.debug("a health watcher could not be told", exc_info=True)
