"""Metrics of clients for Prometheus. The extra graftserve[prometheus] brings what is needed.

    hooks = PrometheusHooks()
    with Client("localhost:8500", "flowers", hooks=hooks) as client:
        hooks.watch(client)

Labels are those of our server's metrics, and buckets have the same limits, so that both can be laid over each
other. The number of series is bounded, whatever callers do: the first 100 combinations of target, model,
signature and RPC have series of their own, those that follow share "(other)"; of a model's versions the last
eight that answered are kept; outcomes and codes are few by nature.
"""

import os
import threading
from collections.abc import Iterable
from typing import Any, Final
from weakref import WeakValueDictionary

from .base import BaseClient
from .hooks import CallEnd, CallStart, Hooks, RequestEnd, RequestStart
from .labels import OTHER, ROWS_BUCKETS, SECONDS_BUCKETS, Bounded, Clients, Latest, outcome
from .wire.methods import PREDICT

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise ImportError(
        f"graftserve.client.prometheus needs prometheus-client: pip install 'graftserve[prometheus]' ({exc})"
    ) from exc

__all__ = ["PrometheusHooks"]

_MAX_ROUTES: Final = 100
_MAX_CALLS: Final = 100
_MAX_VERSIONS: Final = 8
_MAX_MODELS: Final = 100

_Route = tuple[str, str, str, str]  # target, model, signature, RPC


class PrometheusHooks(Hooks):
    """Counts and measures what clients do; one for all clients of a process, or one each.

    registry: by default prometheus_client's own, which its exporters read.
    namespace: what the names of the metrics begin with. Hooks with the same registry and namespace count
        together.
    Raises ValueError if the registry has metrics of those names from elsewhere.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, namespace: str = "graftserve_client"
    ) -> None:
        self._metrics = _metrics(REGISTRY if registry is None else registry, namespace)

    def watch(self, client: BaseClient) -> None:
        """Export the client's queue, limits and circuit breakers (its `stats()`) at every scrape, until it
        is closed or gone. Clients of the same model are added up. Not in prometheus_client's multiprocess
        mode, which knows no values made at the scrape.
        """
        self._metrics.clients.add(client)

    def call_started(self, call: CallStart) -> None:
        """See Hooks."""

    def call_ended(self, caller: Any, call: CallStart, end: CallEnd) -> None:
        """See Hooks."""
        calls = self._metrics.calls[call.model, call.method]
        calls.seconds.observe(end.duration_s)
        calls.outcomes[outcome(end.error)].inc()

    def request_started(self, request: RequestStart) -> None:
        """See Hooks."""
        requests = self._requests(request)
        requests.in_flight.inc()
        if request.hedge:
            requests.hedges.inc()
        elif request.retry:
            requests.retries.inc()
        if request.method == PREDICT.path:
            requests.rows.observe(request.rows)
            if request.attempt == 1:
                requests.queue_seconds.observe(request.queue_s)

    def request_ended(self, request: RequestStart, end: RequestEnd) -> None:
        """See Hooks."""
        requests = self._requests(request)
        requests.in_flight.dec()
        requests.seconds.observe(end.network_s)
        requests.codes[end.code].inc()
        if end.version is not None and request.method == PREDICT.path and not end.error:
            valid_rows, invalid_rows = self._metrics.versions[request.model][str(end.version)]
            valid_rows.inc(request.rows - end.invalid_rows)
            invalid_rows.inc(end.invalid_rows)

    def _requests(self, request: RequestStart) -> "_Requests":
        api = request.method.rpartition("/")[2]
        return self._metrics.requests[request.target, request.model, request.signature, api]


class _Calls:
    """The series of the calls of one method."""

    def __init__(self, metrics: "_Metrics", model: str, method: str) -> None:
        self.seconds = metrics.call_seconds.labels(model, method)
        self.outcomes: Bounded[str, Counter] = Bounded(
            _MAX_CALLS, lambda name: metrics.calls_total.labels(model, method, name), lambda _: OTHER
        )
        # A counter that is there from the start shows its first increase to rate().
        self.outcomes["ok"]


class _Requests:
    """The series of the requests of one route."""

    def __init__(self, metrics: "_Metrics", route: _Route) -> None:
        target, model, _, api = route
        self.in_flight = metrics.in_flight.labels(target, model)
        self.retries = metrics.retries.labels(target, model)
        self.hedges = metrics.hedges.labels(target, model)
        self.seconds = metrics.request_seconds.labels(target, model, api)
        self.queue_seconds = metrics.queue_seconds.labels(model)
        self.rows = metrics.rows.labels(model)
        self.codes: Bounded[str, Counter] = Bounded(
            _MAX_CALLS, lambda code: metrics.requests_total.labels(*route, code), lambda _: OTHER
        )


class _Metrics(Collector):
    """The metrics of one registry under one namespace."""

    def __init__(self, registry: CollectorRegistry, namespace: str) -> None:
        self.clients = Clients()
        self._namespace = namespace
        self._registry = registry  # kept, or another one could get its id, and with that these metrics
        options: dict[str, Any] = {"namespace": namespace, "registry": registry}
        seconds: dict[str, Any] = options | {"buckets": SECONDS_BUCKETS}
        self.calls_total = Counter(
            "calls", "Calls of the client's methods.", ("model_name", "method", "outcome"), **options
        )
        self.call_seconds = Histogram(
            "call_seconds",
            "Time of a call, waiting and retries included.",
            ("model_name", "method"),
            **seconds,
        )
        self.requests_total = Counter(
            "requests",
            "Requests sent, by how they ended.",
            ("target", "model_name", "signature", "api", "code"),
            **options,
        )
        self.request_seconds = Histogram(
            "request_seconds",
            "Time from sending a request to its answer: network and server.",
            ("target", "model_name", "api"),
            **seconds,
        )
        self.queue_seconds = Histogram(
            "queue_seconds",
            "Time that the oldest row of a request waited in the client before it was first sent.",
            ("model_name",),
            **seconds,
        )
        self.rows = Histogram(
            "request_rows", "Rows of a request.", ("model_name",), buckets=ROWS_BUCKETS, **options
        )
        self.retries = Counter(
            "retries", "Requests sent again after they were lost.", ("target", "model_name"), **options
        )
        self.hedges = Counter(
            "hedges", "Second copies of requests that took long.", ("target", "model_name"), **options
        )
        self.in_flight = Gauge(
            "in_flight_requests",
            "Requests under way.",
            ("target", "model_name"),
            multiprocess_mode="livesum",
            **options,
        )
        self.valid_rows = Counter(
            "valid_rows", "Rows that were answered.", ("model_name", "version"), **options
        )
        self.invalid_rows = Counter(
            "invalid_rows",
            "Rows that were answered with an error of their own, such as images that do not decode.",
            ("model_name", "version"),
            **options,
        )
        self.calls: Bounded[tuple[str, str], _Calls] = Bounded(
            _MAX_CALLS, lambda key: _Calls(self, *key), lambda key: (OTHER, key[1])
        )
        self.requests: Bounded[_Route, _Requests] = Bounded(
            _MAX_ROUTES, lambda route: _Requests(self, route), lambda route: (OTHER, OTHER, OTHER, route[3])
        )
        self.versions: Bounded[str, Latest[str, tuple[Counter, Counter]]] = Bounded(
            _MAX_MODELS, self._versions, lambda _: OTHER
        )
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """What `collect` gives, without values."""
        return self._families().values()

    def collect(self) -> Iterable[Metric]:
        """What is true now of the clients that are watched."""
        queued: dict[str, int] = {}
        in_flight: dict[str, int] = {}
        max_in_flight: dict[str, int] = {}
        max_rows: dict[str, int] = {}
        circuits: dict[tuple[str, str], bool] = {}
        for client in self.clients.open():
            model, stats = client.model, client.stats()
            for sums, value in (
                (queued, stats.queued),
                (in_flight, stats.in_flight),
                (max_in_flight, stats.max_in_flight),
            ):
                sums[model] = sums.get(model, 0) + value
            max_rows[model] = max(max_rows.get(model, 0), stats.max_batch_images)
            for target in stats.targets:
                key = (target.target, model)
                circuits[key] = circuits.get(key, False) or target.circuit_open
        families = self._families()
        for name, values in (
            ("queued_rows", queued),
            ("in_flight_batches", in_flight),
            ("max_in_flight_batches", max_in_flight),
            ("max_batch_rows", max_rows),
        ):
            for model, value in values.items():
                families[name].add_metric((model,), value)
        for key, is_open in circuits.items():
            families["circuit_open"].add_metric(key, is_open)
        return families.values()

    def _families(self) -> dict[str, GaugeMetricFamily]:
        of_model, of_target = ("model_name",), ("target", "model_name")
        return {
            name: GaugeMetricFamily(f"{self._namespace}_{name}", documentation, labels=labels)
            for name, documentation, labels in (
                ("queued_rows", "Rows that wait in the client.", of_model),
                ("in_flight_batches", "Batches under way, each in one request or more.", of_model),
                ("max_in_flight_batches", "Batches that may be under way at present.", of_model),
                ("max_batch_rows", "Rows that a batch may have at present.", of_model),
                ("circuit_open", "1 while a client leaves the target alone.", of_target),
            )
        }

    def _versions(self, model: str) -> "Latest[str, tuple[Counter, Counter]]":
        def drop(version: str) -> None:
            # There nothing can be removed: each process keeps a file until it ends.
            if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
                self.valid_rows.remove(model, version)
                self.invalid_rows.remove(model, version)

        return Latest(
            _MAX_VERSIONS,
            lambda version: (
                self.valid_rows.labels(model, version),
                self.invalid_rows.labels(model, version),
            ),
            drop,
        )


# By the id of a registry, which keeps its metrics alive as these keep the registry.
_SHARED: Final[WeakValueDictionary[tuple[int, str], _Metrics]] = WeakValueDictionary()
_LOCK: Final = threading.Lock()


def _metrics(registry: CollectorRegistry, namespace: str) -> _Metrics:
    with _LOCK:
        metrics = _SHARED.get((id(registry), namespace))
        if metrics is None:
            metrics = _SHARED[id(registry), namespace] = _Metrics(registry, namespace)
        return metrics
