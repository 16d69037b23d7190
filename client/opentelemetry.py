"""Traces and metrics of clients for OpenTelemetry. The extra graftserve[client-otel] brings the API, which is
all that is imported here; which SDK makes and sends them is the application's affair.

    hooks = OpenTelemetryHooks()
    with Client("localhost:8500", "flowers", hooks=hooks) as client:
        hooks.watch(client)

A call is a span in its caller's trace. A request is a span below that of the first call whose rows are in it
(of those that are sampled, if any is), with links to and from the others, since a span has one parent only.
Its context travels in the request's metadata, so the server's span comes below it.
Source: https://github.com/open-telemetry/semantic-conventions, docs/rpc, v1.45.0, where `rpc.status_code` is
what was `rpc.response.status_code` until v1.44.0. That a request which this side cancelled is no error
follows gRPC, which does not count those against a server: https://github.com/grpc/proposal/pull/558.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Final
from weakref import WeakKeyDictionary

from .base import BaseClient
from .hooks import CallEnd, CallStart, Hooks, RequestEnd, RequestStart
from .labels import OTHER, ROWS_BUCKETS, SECONDS_BUCKETS, Bounded, Clients, outcome
from .stats import Stats
from .wire.methods import PREDICT

try:
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context, get_current
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
    from opentelemetry.trace import Link, Span, SpanKind, StatusCode, TracerProvider
except ImportError as exc:
    raise ImportError(
        "graftserve.client.opentelemetry needs the API of OpenTelemetry: "
        f"pip install 'graftserve[client-otel]' ({exc})"
    ) from exc

__all__ = ["OpenTelemetryHooks"]

_SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.45.0"
# Of rpc.client.call.duration, by the conventions. Ours begin earlier and end later.
_RPC_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_MAX_ROUTES: Final = 100
_MAX_VERSIONS: Final = 100
_MAX_MESSAGE_CHARACTERS: Final = 1024

_Attributes = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class _Caller:
    """A call's span, and the context to make its requests' spans in."""

    span: Span
    context: Context


@dataclass(frozen=True, slots=True)
class _Route:
    """What the measurements of a kind of requests have in common, and their spans from the start."""

    name: str
    rpc: _Attributes
    ours: _Attributes


class OpenTelemetryHooks(Hooks):
    """Traces and measures what clients do; one for all clients of a process, or one each.

    tracer_provider, meter_provider: by default the global ones, also if they are set later.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        release = version("graftserve")
        provider = trace.get_tracer_provider() if tracer_provider is None else tracer_provider
        self._tracer = provider.get_tracer("graftserve.client", release, _SCHEMA_URL)
        self._instruments = _instruments(
            metrics.get_meter_provider() if meter_provider is None else meter_provider, release
        )
        self._spans: dict[RequestStart, Span] = {}
        # The metrics' attributes are bounded as those for Prometheus are, but that none can be dropped.
        self._models: Bounded[str, str] = Bounded(_MAX_ROUTES, str, lambda _: OTHER)
        self._routes: Bounded[tuple[str, str, str], _Route] = Bounded(
            _MAX_ROUTES, _route, lambda key: (OTHER, OTHER, key[2])
        )
        self._versions: Bounded[tuple[str, int], Mapping[str, str | int]] = Bounded(
            _MAX_VERSIONS,
            lambda key: {"graftserve.model.name": key[0], "graftserve.model.version": key[1]},
            lambda _: (OTHER, 0),
        )

    def watch(self, client: BaseClient) -> None:
        """Observe the client's queue, limits and circuit breakers (its `stats()`) at every collection, until
        it is closed or gone. Clients of the same model are added up.
        """
        self._instruments.clients.add(client)

    def call_started(self, call: CallStart) -> _Caller:
        """See Hooks."""
        context = get_current()
        span = self._tracer.start_span(
            f"{call.method} {call.model}",
            context,
            SpanKind.INTERNAL,
            {"graftserve.client.method": call.method, "graftserve.model.name": call.model},
        )
        return _Caller(span, trace.set_span_in_context(span, context))

    def call_ended(self, caller: _Caller | None, call: CallStart, end: CallEnd) -> None:
        """See Hooks."""
        name = outcome(end.error)
        attributes = {
            "graftserve.client.method": call.method,
            "graftserve.model.name": self._models[call.model],
        }
        if end.error is not None:
            attributes["error.type"] = name
        self._instruments.call_duration.record(
            end.duration_s, attributes, caller.context if caller is not None else None
        )
        if caller is None:
            return
        if end.error is not None and caller.span.is_recording():
            caller.span.set_attribute("error.type", type(end.error).__qualname__ if name == OTHER else name)
            caller.span.set_status(StatusCode.ERROR, str(end.error)[:_MAX_MESSAGE_CHARACTERS])
        caller.span.end()

    def request_started(self, request: RequestStart) -> Mapping[str, str | bytes]:
        """See Hooks."""
        callers = [caller for caller in request.callers if caller is not None]
        parent = next(
            (caller for caller in callers if caller.span.get_span_context().trace_flags.sampled),
            callers[0] if callers else None,
        )
        others = [caller for caller in callers if caller is not parent]
        context = Context() if parent is None else parent.context
        route = _route((request.target, request.model, request.method))
        span = self._tracer.start_span(
            route.name,
            context,
            SpanKind.CLIENT,
            {**route.rpc, **_request_attributes(request)},
            [Link(caller.span.get_span_context()) for caller in others],
        )
        self._spans[request] = span
        for caller in others:
            caller.span.add_link(span.get_span_context())
        self._measure_start(request)
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span, context))
        # Some propagators write their names as HTTP does.
        return {name.lower(): value for name, value in carrier.items()}

    def request_ended(self, request: RequestStart, end: RequestEnd) -> None:
        """See Hooks."""
        span = self._spans.pop(request, None)
        context = None if span is None else trace.set_span_in_context(span, Context())
        self._measure_end(request, end, context)
        if span is None:
            return
        if span.is_recording():
            span.set_attribute("rpc.status_code", end.code)
            if end.version is not None:
                span.set_attribute("graftserve.model.version", end.version)
            if end.invalid_rows:
                span.set_attribute("graftserve.rows.invalid", end.invalid_rows)
            if end.abandoned:
                # Nothing went wrong: the trace must not look as if it had.
                span.set_attribute("graftserve.request.abandoned", True)
            elif end.error:
                span.set_attribute("error.type", end.error)
                span.set_status(StatusCode.ERROR, end.details[:_MAX_MESSAGE_CHARACTERS])
        span.end()

    def _measure_start(self, request: RequestStart) -> None:
        instruments = self._instruments
        ours = self._routes[request.target, request.model, request.method].ours
        instruments.active_requests.add(1, ours)
        if request.hedge:
            instruments.hedges.add(1, ours)
        elif request.retry:
            instruments.retries.add(1, ours)
        if request.method == PREDICT.path:
            model = {"graftserve.model.name": ours["graftserve.model.name"]}
            instruments.request_rows.record(request.rows, model)
            if request.attempt == 1:
                instruments.queue_duration.record(request.queue_s, model)

    def _measure_end(self, request: RequestStart, end: RequestEnd, context: Context | None) -> None:
        instruments = self._instruments
        route = self._routes[request.target, request.model, request.method]
        instruments.active_requests.add(-1, route.ours)
        attributes = {**route.rpc, "rpc.status_code": end.code}
        if end.error and not end.abandoned:
            attributes["error.type"] = end.error
        instruments.rpc_duration.record(end.network_s, attributes, context)
        if end.version is not None and request.method == PREDICT.path and not end.error:
            versions = self._versions[request.model, end.version]
            valid_rows = request.rows - end.invalid_rows
            instruments.rows.add(valid_rows, {**versions, "graftserve.rows.valid": True})
            if end.invalid_rows:
                instruments.rows.add(end.invalid_rows, {**versions, "graftserve.rows.valid": False})


class _Instruments:
    """Those of one meter; shared, since two of the same name would count what is observed twice."""

    def __init__(self, meter: Meter) -> None:
        self.clients = Clients()

        def seconds(name: str, description: str, buckets: tuple[float, ...]) -> metrics.Histogram:
            return meter.create_histogram(
                name, unit="s", description=description, explicit_bucket_boundaries_advisory=buckets
            )

        self.rpc_duration = seconds(
            "rpc.client.call.duration",
            "Measures the duration of an outgoing Remote Procedure Call (RPC).",
            _RPC_BUCKETS,
        )
        self.call_duration = seconds(
            "graftserve.client.call.duration",
            "Time of a call, waiting and retries included.",
            SECONDS_BUCKETS,
        )
        self.queue_duration = seconds(
            "graftserve.client.queue.duration",
            "Time that the oldest row of a request waited in the client before it was first sent.",
            SECONDS_BUCKETS,
        )
        self.request_rows = meter.create_histogram(
            "graftserve.client.request.rows",
            unit="{row}",
            description="Rows of a request.",
            explicit_bucket_boundaries_advisory=ROWS_BUCKETS,
        )
        self.rows = meter.create_counter(
            "graftserve.client.rows", "{row}", "Rows that were answered, with a value or an error each."
        )
        self.retries = meter.create_counter(
            "graftserve.client.retries", "{request}", "Requests sent again after they were lost."
        )
        self.hedges = meter.create_counter(
            "graftserve.client.hedges", "{request}", "Second copies of requests that took long."
        )
        self.active_requests = meter.create_up_down_counter(
            "graftserve.client.active_requests", "{request}", "Requests under way."
        )
        for name, unit, description, read in (
            ("queued_rows", "{row}", "Rows that wait in the client.", lambda stats: stats.queued),
            (
                "batches",
                "{batch}",
                "Batches under way, each in one request or more.",
                lambda stats: stats.in_flight,
            ),
            (
                "batches.limit",
                "{batch}",
                "Batches that may be under way at present.",
                lambda stats: stats.max_in_flight,
            ),
        ):
            callback = self._sums(read)
            meter.create_observable_up_down_counter(
                f"graftserve.client.{name}", [callback], unit=unit, description=description
            )
        meter.create_observable_gauge(
            "graftserve.client.circuit_open",
            [self._circuits],
            description="1 while a client leaves the target alone.",
        )

    def _sums(self, read: Callable[[Stats], int]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            sums: dict[str, int] = {}
            for client in self.clients.open():
                sums[client.model] = sums.get(client.model, 0) + read(client.stats())
            return [Observation(value, {"graftserve.model.name": model}) for model, value in sums.items()]

        return observe

    def _circuits(self, options: CallbackOptions) -> Iterable[Observation]:
        circuits: dict[tuple[str, str], bool] = {}
        for client in self.clients.open():
            for target in client.stats().targets:
                key = (client.model, target.target)
                circuits[key] = circuits.get(key, False) or target.circuit_open
        return [
            Observation(int(is_open), {"graftserve.model.name": model, **_server(target)})
            for (model, target), is_open in circuits.items()
        ]


_SHARED: Final[WeakKeyDictionary[MeterProvider, _Instruments]] = WeakKeyDictionary()
_LOCK: Final = threading.Lock()


def _instruments(provider: MeterProvider, release: str) -> _Instruments:
    with _LOCK:
        instruments = _SHARED.get(provider)
        if instruments is None:
            meter = provider.get_meter("graftserve.client", release, _SCHEMA_URL)
            instruments = _SHARED[provider] = _Instruments(meter)
        return instruments


def _route(key: tuple[str, str, str]) -> _Route:
    target, model, method = key
    server = _server(target)
    name = method.lstrip("/")
    rpc = {"rpc.system.name": "grpc", "rpc.method": name, **server}
    return _Route(name, rpc, {"graftserve.model.name": model, **server})


def _request_attributes(request: RequestStart) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "graftserve.model.name": request.model,
        "graftserve.rows": request.rows,
        "graftserve.queue_seconds": request.queue_s,
        "graftserve.request.bytes": request.size_bytes,
        "graftserve.request.attempt": request.attempt,
        "graftserve.request.hedge": request.hedge,
    }
    if request.signature:
        attributes["graftserve.model.signature"] = request.signature
    return attributes


@lru_cache(256)
def _server(target: str) -> dict[str, str | int]:
    """A target as the conventions describe it: host and port, or a socket's path, or, where it is several
    addresses or is looked up elsewhere, what names them all.

    Source: https://github.com/grpc/grpc/blob/master/doc/naming.md.
    """
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return {"server.address": rest.removeprefix("//")}
    if colon and scheme in ("dns", "ipv4", "ipv6") and "," not in rest:
        address = rest.removeprefix("//").rpartition("/")[2]
    elif "/" in target or "," in target:
        return {"server.address": target}
    else:
        address = target
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or (":" in host and not host.startswith("[")):
        return {"server.address": address.strip("[]")}
    return {"server.address": host.strip("[]"), "server.port": int(port)}
