"""Traces of requests for OpenTelemetry, sent over OTLP. The extra graftserve[otel] brings what is needed.

Each request becomes a server span, a child of the caller's where its headers name one (W3C trace context),
with two children: `queue`, the wait for a thread, and `run`, what the model took. They are made once the
request is answered and its times are known, so that a server without traces only ever tests for None, and
imports nothing. Where to send, how many, and as whom is left to the OTEL_* variables, which the SDK reads.
Source: https://github.com/open-telemetry/semantic-conventions, docs/{rpc,http}, v1.45.0, as the client's;
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables, https://www.w3.org/TR/trace-context.
"""

import importlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .errors import Code, ServingError

if TYPE_CHECKING:
    from .metrics import Call

__all__ = ["Origin", "Tracer"]

_SCHEMA_URL = "https://opentelemetry.io/schemas/1.45.0"
_EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}
_PACKAGES = {"grpc": "graftserve[otel]", "http/protobuf": "opentelemetry-exporter-otlp-proto-http"}
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

# The server's fault, by both conventions: others are the caller's, and leave a server span's status unset.
# Over HTTP these are the codes that become 5xx.
_FAULTS = frozenset(
    {
        *(Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL, Code.UNAVAILABLE),
        Code.DATA_LOSS,
    }
)
_MAX_MESSAGE_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """A request as the conventions of its protocol describe it.

    name: the span's. headers: lower-case names.
    """

    name: str
    headers: Mapping[str, str]
    attributes: Mapping[str, str | int]


class Tracer:
    """Turns answered requests into spans and sends them from a thread of its own. Thread-safe.

    Raises ServingError if the extra is not installed, or the protocol asked for is unknown.
    """

    def __init__(self) -> None:
        variable = next(filter(os.environ.get, _PROTOCOL_VARIABLES), _PROTOCOL_VARIABLES[-1])
        protocol = os.environ.get(variable) or "grpc"
        if protocol not in _EXPORTERS:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"{variable}: expected {' or '.join(_EXPORTERS)}, got {protocol!r}"
            )
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.context import Context
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            exporter = importlib.import_module(_EXPORTERS[protocol]).OTLPSpanExporter()
        except ImportError as exc:
            raise ServingError(
                Code.FAILED_PRECONDITION,
                f"--enable_tracing needs OpenTelemetry: pip install '{_PACKAGES[protocol]}' ({exc})",
            ) from exc
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "graftserve"}))
        # Not at exit as well: with a collector that is away it would hold up a process that has stopped.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("graftserve", version("graftserve"), _SCHEMA_URL)
        self._trace, self._propagate, self._context = trace, propagate, Context

    def record(self, call: "Call", origin: Origin, code: Code, message: str, seconds: float) -> str:
        """Make the spans of a request just answered; returns the trace's id in hexadecimal, sampled or not.

        seconds: from when it got its thread.
        """
        trace = self._trace
        end_ns = time.time_ns()

        def at_ns(perf_counter_s: float) -> int:
            return end_ns - int((call.began_s + seconds - perf_counter_s) * 1e9)

        began_ns = at_ns(call.began_s)
        queued_ns = at_ns(call.began_s - call.queue_s)
        parent = self._propagate.extract(origin.headers, self._context())
        span = self._tracer.start_span(
            *(origin.name, parent, trace.SpanKind.SERVER),
            attributes={**origin.attributes, **_attributes(call)},
            start_time=queued_ns,
        )
        if span.is_recording():
            here = trace.set_span_in_context(span, parent)
            if call.queue_s:
                self._tracer.start_span("queue", here, start_time=queued_ns).end(began_ns)
            if call.run_at_s is not None:
                run_ns = at_ns(call.run_at_s)
                child = self._tracer.start_span("run", here, start_time=run_ns)
                # Without a time of its own it is what failed, and the request ended with it.
                child.end(end_ns if call.runtime_s is None else run_ns + int(call.runtime_s * 1e9))
            if code is not Code.OK:
                span.set_attribute("error.type", code.name)
                span.set_attribute("graftserve.error.message", message[:_MAX_MESSAGE_CHARACTERS])
            if code in _FAULTS:
                span.set_status(trace.StatusCode.ERROR, message[:_MAX_MESSAGE_CHARACTERS])
        span.end(end_ns)
        return str(trace.format_trace_id(span.get_span_context().trace_id))

    def stop(self, timeout_s: float) -> bool:
        """Send what is left; returns whether that was done in time."""
        # The SDK takes as long as the collector does, so that somebody else must watch the time.
        thread = threading.Thread(target=self._provider.shutdown, name="graftserve-traces", daemon=True)
        thread.start()
        thread.join(timeout_s)
        return not thread.is_alive()


def _attributes(call: "Call") -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "graftserve.model.name": call.model_name,
        "graftserve.model.version": call.version,
        "graftserve.model.signature": call.signature_name,
        "graftserve.model.engine": call.engine,
        "graftserve.rows": call.rows,
        "graftserve.rows.invalid": call.invalid_rows if call.valid_rows is not None else None,
        "graftserve.queue_seconds": call.queue_s,
        "graftserve.runtime_seconds": call.runtime_s,
    }
    # What never became known is left out, as the conventions want.
    return {name: value for name, value in attributes.items() if value is not None and value != ""}
