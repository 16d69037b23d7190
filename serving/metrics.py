"""What the server counts and measures, as Prometheus reads it, and its access log.

Two families. TensorFlow Serving's own, under its own names with the leading colon and in microseconds, so
that dashboards and alerts for it work here. Beside them ours, in seconds, with what those lack: version,
signature, status code, time in the queue, images that could not be read, and each version's state.

Unlike there, a request for a model that the server does not know counts under the name "(unknown)": otherwise
anybody could make it hold series without bound. So does one that is refused unread, and there not counted.
Source: tensorflow_serving/servables/tensorflow/util.cc, tensorflow_serving/batching/{batching_session.cc,
batching_util.h} and tensorflow/cc/saved_model/loader.cc for names, labels and buckets.
"""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .errors import Code
from .manager import AspiredVersionsManager
from .policy import State
from .tracing import Origin, Tracer

__all__ = ["CONTENT_TYPE", "Call", "Metrics", "ModelTotals"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of `Metrics.render`. Source: https://prometheus.io/docs/instrumenting/exposition_formats/."""

_UNKNOWN_MODEL = "(unknown)"

# util.cc: Exponential(10, 1.8, 33), in microseconds.
_LATENCY_BUCKETS_US = tuple(10 * 1.8**power for power in range(33))
# util.cc: Exponential(1, 2, 15), in examples.
_EXAMPLE_BUCKETS = tuple(float(2**power) for power in range(15))
# batching_session.cc: Exponential(100, 1.2, 52), in microseconds.
_QUEUE_BUCKETS_US = tuple(100 * 1.2**power for power in range(52))
# batching_util.h: Exponential(1, 2, 14), in rows.
_ROWS_BUCKETS = tuple(float(2**power) for power in range(14))
_SECONDS_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)

_COUNTER_TYPE = re.compile(rb"^(# TYPE :\S+) unknown$|^(# TYPE :\S+) untyped$", re.MULTILINE)


@dataclass(slots=True)
class Call:
    """One request, from when it is taken up to its answer; what is not known yet is empty.

    api: "Predict" and so on. entrypoint: "GRPC" or "REST".
    origin: where it came from and how, for the code that it was answered with.
    queue_s: how long it waited for a thread. run_at_s: when the model began, on time.perf_counter's clock.
    runtime_s: how long it took. rows: of the answer, if its outputs agree on that.
    """

    api: str
    entrypoint: str
    origin: Callable[[Code], Origin]
    queue_s: float = 0.0
    began_s: float = field(default_factory=time.perf_counter)
    model_name: str = ""
    version: int | None = None
    signature_name: str = ""
    engine: str = ""
    run_at_s: float | None = None
    runtime_s: float | None = None
    rows: int | None = None
    examples: int | None = None
    valid_rows: int | None = None
    invalid_rows: int = 0


@dataclass(frozen=True)
class ModelTotals:
    """All requests for a model since the start. buckets: upper limit in seconds, count up to it; rising."""

    requests: int
    errors: int
    latency_sum_s: float
    buckets: Sequence[tuple[float, int]]


class _Registry(CollectorRegistry):
    """Without the time at which each series began: a third more text that nobody reads."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _PlainCounter(Collector):
    """A counter whose name does not end in `_total`, as prometheus_client insists."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def add(self, labels: tuple[str, ...], amount: float = 1) -> None:
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + amount

    def describe(self) -> Iterable[Metric]:
        return [Metric(self._name, self._documentation, "unknown")]

    def collect(self) -> Iterable[Metric]:
        metric = Metric(self._name, self._documentation, "unknown")
        with self._lock:
            values = list(self._values.items())
        for labels, value in values:
            metric.add_sample(self._name, dict(zip(self._labels, labels, strict=True)), value)
        return [metric]


class _Family:
    """A labelled metric's children, found without prometheus_client's checks at every request."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._children: dict[tuple[str, ...], Any] = {}

    def __getitem__(self, labels: tuple[str, ...]) -> Any:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self._metric.labels(*labels)
        return child

    def samples(self) -> Iterator[Any]:
        for metric in self._metric.collect():
            yield from metric.samples


class Metrics:
    """One server's. Thread-safe.

    is_known: whether a name is a model's.
    access_log: write one line of JSON for each request to stderr.
    """

    def __init__(
        self, *, is_known: Callable[[str], bool] = lambda name: True, access_log: bool = False
    ) -> None:
        self.registry = registry = _Registry()
        ProcessCollector(registry=registry)
        self._is_known = is_known
        self._access_log = _access_logger() if access_log else None
        self._tracer: Tracer | None = None

        def counter(name: str, text: str, *labels: str) -> _PlainCounter:
            return _PlainCounter(name, text, labels, registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> _Family:
            return _Family(Histogram(name, text, labels, buckets=buckets, registry=registry))

        tensorflow = ":tensorflow:serving:"
        self._count = counter(f"{tensorflow}request_count", "Requests by status.", "model_name", "status")
        self._latency_us = histogram(
            f"{tensorflow}request_latency",
            "Microseconds from request to answer, of those that succeeded.",
            *(_LATENCY_BUCKETS_US, "model_name", "API", "entrypoint"),
        )
        self._runtime_us = histogram(
            f"{tensorflow}runtime_latency",
            "Microseconds that the model took.",
            *(_LATENCY_BUCKETS_US, "model_name", "API", "runtime"),
        )
        self._examples = histogram(
            f"{tensorflow}request_example_counts", "tf.Examples in a request.", _EXAMPLE_BUCKETS, "model_name"
        )
        self._examples_total = counter(
            f"{tensorflow}request_example_count_total", "tf.Examples in all requests.", "model_name"
        )
        saved_model = ":tensorflow:cc:saved_model:"
        self._loads = counter(f"{saved_model}load_attempt_count", "Attempts to load.", "model_path", "status")
        self._load_us = counter(f"{saved_model}load_latency", "Microseconds spent on loading.", "model_path")
        self._load_stage_us = histogram(
            f"{saved_model}load_latency_by_stage",
            "Microseconds spent on a stage of loading.",
            *(_LATENCY_BUCKETS_US, "model_path", "stage"),
        )
        self._warmup_us = histogram(
            f"{tensorflow}model_warmup_latency",
            "Microseconds spent on warmup.",
            *(_LATENCY_BUCKETS_US, "model_path", "status"),
        )
        self._warmup_records = counter(
            f"{tensorflow}model_warmup_records_read", "Warmup records replayed.", "model_path"
        )
        session = f"{tensorflow}batching_session:"
        self._batch_queue_us = histogram(
            f"{session}queuing_latency",
            "Microseconds that a request waited for its batch to be run.",
            *(_QUEUE_BUCKETS_US, "thread_pool_name"),
        )
        self._batch_runs = counter(f"{session}wrapped_run_count", "Batches that were run.")
        self._batch_input = histogram(
            f"{session}input_batch_size", "Rows of a request.", _ROWS_BUCKETS, "thread_pool_name"
        )
        self._batch_processed = histogram(
            f"{session}processed_batch_size",
            "Rows of a batch, padding included.",
            *(_ROWS_BUCKETS, "thread_pool_name"),
        )
        self._batch_padding = histogram(
            f"{session}padding_size", "Rows added to a batch.", _ROWS_BUCKETS, "execution_batch_size"
        )

        self._requests = _Family(
            Counter(
                "graftserve_requests",
                "Requests.",
                ("model_name", "version", "signature", "api", "entrypoint", "code"),
                registry=registry,
            )
        )
        self._seconds = histogram(
            "graftserve_request_seconds",
            "Seconds from request to answer, failures too.",
            *(_SECONDS_BUCKETS, "model_name", "api", "entrypoint"),
        )
        self._queue_seconds = histogram(
            "graftserve_queue_seconds",
            "Seconds that a request waited for a thread of the server (thread) or for its batch (batch), "
            "or an image for an interpreter (engine).",
            *(_SECONDS_BUCKETS, "model_name", "queue"),
        )
        self._batch_rows = histogram(
            "graftserve_batch_rows",
            "Rows that one run of a batched model computes, padding included.",
            *(_ROWS_BUCKETS, "model_name"),
        )
        self._valid = _Family(
            Counter("graftserve_valid_rows", "Images read.", ("model_name", "version"), registry=registry)
        )
        self._invalid = _Family(
            Counter(
                "graftserve_invalid_rows",
                "Images that could not be read.",
                ("model_name", "version"),
                registry=registry,
            )
        )
        self._in_flight = Gauge(
            "graftserve_in_flight_requests", "Requests that have a thread.", registry=registry
        )

    def watch(self, manager: AspiredVersionsManager) -> None:
        """Add the states of the manager's versions, read whenever somebody asks."""
        self.registry.register(_States(manager))

    def trace(self, tracer: Tracer) -> None:
        """Let requests that end from now on become spans, too."""
        self._tracer = tracer

    def begin(
        self, api: str, entrypoint: str, origin: Callable[[Code], Origin], *, queue_s: float = 0.0
    ) -> Call:
        """A request is taken up; `end` must follow."""
        self._in_flight.inc()
        return Call(api, entrypoint, origin, queue_s)

    def end(self, call: Call, code: Code, message: str = "") -> None:
        """The request is answered. message: what went wrong."""
        self._in_flight.dec()
        seconds = time.perf_counter() - call.began_s
        name = call.model_name if self._is_known(call.model_name) else _UNKNOWN_MODEL
        version = "" if call.version is None else str(call.version)
        self._count.add((name, code.name))
        self._requests[name, version, call.signature_name, call.api, call.entrypoint, code.name].inc()
        self._seconds[name, call.api, call.entrypoint].observe(seconds)
        if call.queue_s:
            self.waited(name, "thread", call.queue_s)
        if code is Code.OK:
            self._latency_us[name, call.api, call.entrypoint].observe(seconds * 1e6)
        if call.runtime_s is not None:
            runtime = "TF1" if call.engine == "tensorflow" else call.engine
            self._runtime_us[name, call.api, runtime].observe(call.runtime_s * 1e6)
        if call.examples is not None:
            self._examples[(name,)].observe(call.examples)
            self._examples_total.add((name,), call.examples)
        if call.valid_rows is not None:
            self._valid[name, version].inc(call.valid_rows)
            self._invalid[name, version].inc(call.invalid_rows)
        if self._tracer is None and self._access_log is None:
            return
        origin, trace_id = call.origin(code), ""
        if self._tracer is not None:
            trace_id = self._tracer.record(call, origin, code, message, seconds)
        if self._access_log is not None:
            self._access_log.info(_access_line(call, origin, code, message, seconds, trace_id))

    def refused(self, api: str, entrypoint: str) -> None:
        """A request was refused before it was read, since too many wait: nobody knows its model.

        api: empty where that is not known either.
        """
        code = Code.RESOURCE_EXHAUSTED.name
        self._count.add((_UNKNOWN_MODEL, code))
        self._requests[_UNKNOWN_MODEL, "", "", api, entrypoint, code].inc()

    def is_busy(self) -> bool:
        """Whether a request is under way."""
        return any(sample.value > 0 for metric in self._in_flight.collect() for sample in metric.samples)

    def loaded(self, model_path: str, code: Code, seconds: float) -> None:
        """An attempt to load a version ended."""
        self._loads.add((model_path, "success" if code is Code.OK else "fail"))
        if code is Code.OK:
            self._load_us.add((model_path,), seconds * 1e6)
            self._load_stage_us[model_path, "load"].observe(seconds * 1e6)

    def warmed_up(self, model_path: str, code: Code, seconds: float, records: int) -> None:
        """A version's warmup ended."""
        self._warmup_us[model_path, code.name].observe(seconds * 1e6)
        self._load_stage_us[model_path, "warmup"].observe(seconds * 1e6)
        self._warmup_records.add((model_path,), records)

    def waited(self, model_name: str, queue: str, seconds: float) -> None:
        """Something of a known model left a queue of the server: "thread", "batch" or "engine"."""
        self._queue_seconds[model_name, queue].observe(seconds)

    def batch_asked(self, thread_pool_name: str, rows: int) -> None:
        """A request of `rows` is to be batched."""
        self._batch_input[(thread_pool_name,)].observe(rows)

    def batch_waited(self, thread_pool_name: str, model_name: str, seconds: float) -> None:
        """A request, or a part of one, has left the queue to be run in a batch."""
        self._batch_queue_us[(thread_pool_name,)].observe(seconds * 1e6)
        self.waited(model_name, "batch", seconds)

    def batch_runs(self, thread_pool_name: str, model_name: str, rows: int, size: int) -> None:
        """A batch of `rows`, padded to `size`, is run."""
        self._batch_runs.add(())
        self._batch_processed[(thread_pool_name,)].observe(size)
        self._batch_padding[(str(size),)].observe(size - rows)
        self._batch_rows[(model_name,)].observe(size)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return _COUNTER_TYPE.sub(rb"\1\2 counter", generate_latest(self.registry))

    def totals(self) -> dict[str, ModelTotals]:
        """All requests so far by model."""
        requests: dict[str, int] = {}
        errors: dict[str, int] = {}
        sums: dict[str, float] = {}
        buckets: dict[str, dict[float, int]] = {}
        for sample in self._requests.samples():
            if sample.name == "graftserve_requests_total":
                name, count = sample.labels["model_name"], int(sample.value)
                requests[name] = requests.get(name, 0) + count
                if sample.labels["code"] != Code.OK.name:
                    errors[name] = errors.get(name, 0) + count
        for sample in self._seconds.samples():
            name = sample.labels["model_name"]
            if sample.name.endswith("_sum"):
                sums[name] = sums.get(name, 0.0) + sample.value
            elif sample.name.endswith("_bucket") and sample.labels["le"] != "+Inf":
                limit_s = float(sample.labels["le"])
                of_model = buckets.setdefault(name, {})
                of_model[limit_s] = of_model.get(limit_s, 0) + int(sample.value)
        return {
            name: ModelTotals(
                requests[name],
                errors.get(name, 0),
                sums.get(name, 0.0),
                sorted(buckets.get(name, {}).items()),
            )
            for name in requests
        }


class _States(Collector):
    def __init__(self, manager: AspiredVersionsManager) -> None:
        self._manager = manager

    def describe(self) -> Iterable[Metric]:
        return self._families([])

    def collect(self) -> Iterable[Metric]:
        return self._families(self._manager.names())

    def _families(self, names: Iterable[str]) -> list[Metric]:
        states = GaugeMetricFamily(
            "graftserve_model_state",
            "1 for the state that a version is in, 0 for all others.",
            labels=("model_name", "version", "state"),
        )
        engines = GaugeMetricFamily(
            "graftserve_model_engine_info",
            "What runs an available version: 1.",
            labels=("model_name", "version", "engine"),
        )
        for name in names:
            for entry in self._manager.states(name):
                version = str(entry.id.version)
                for state in State:
                    states.add_metric((name, version, state.name), float(entry.state is state))
                engine = self._manager.engine_of(name, entry.id.version)
                if engine:
                    engines.add_metric((name, version, engine), 1)
        return [states, engines]


def _access_logger() -> logging.Logger:
    logger = logging.getLogger("graftserve.access")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def _access_line(call: Call, origin: Origin, code: Code, message: str, seconds: float, trace_id: str) -> str:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "api": call.api,
        "entrypoint": call.entrypoint,
        "peer": origin.attributes["network.peer.address"],
        "model": call.model_name,
        "version": call.version,
        "signature": call.signature_name,
        "code": code.name,
        "seconds": round(seconds, 6),
        "queue_seconds": round(call.queue_s, 6),
        "runtime_seconds": None if call.runtime_s is None else round(call.runtime_s, 6),
        "engine": call.engine,
    }
    if trace_id:
        line["trace_id"] = trace_id
    if message:
        line["error"] = message
    return json.dumps(line, ensure_ascii=False)
