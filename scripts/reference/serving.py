"""The server's flags and metrics."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

from graftserve.cli.runtime import RUNTIME_FLAG
from graftserve.serving.errors import Code
from graftserve.serving.flags import FLAGS, UNUSED, VERSION_FLAG, Flag
from graftserve.serving.manager import AspiredVersionsManager
from graftserve.serving.metrics import Metrics
from graftserve.serving.policy import State
from graftserve.serving.tracing import Origin

from .markdown import code, prose, table

__all__ = ["render_flags", "render_metrics", "render_unused_flags"]

_TYPES = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}


def render_flags() -> str:
    return _flags_table((RUNTIME_FLAG, *FLAGS, VERSION_FLAG))


def render_unused_flags() -> str:
    return _flags_table(unused.flag for unused in UNUSED.values())


def render_metrics() -> str:
    """From what a server's own registry tells once each of its metrics has a value, and so its labels."""
    metrics = Metrics()
    _use_all(metrics)
    rows = []
    for family in metrics.registry.collect():
        labels = list(dict.fromkeys(label for s in family.samples for label in s.labels if label != "le"))
        if not family.samples:
            raise LookupError(f"{family.name}: expected a value of it, got none")
        kind = "counter" if family.type == "unknown" else family.type  # as `Metrics.render` says it
        name = family.samples[0].name if kind == "counter" else family.name
        rows.append((code(name), kind, ", ".join(map(code, labels)), prose(family.documentation)))
    return table(("metric", "type", "labels", "what it tells"), rows)


def _flags_table(flags: Iterable[Flag]) -> str:
    rows = [
        (code(f"--{flag.name}"), prose(_TYPES[flag.type]), code(_default(flag)), prose(flag.help))
        for flag in flags
    ]
    return table(("flag", "type", "default", "what it does"), rows)


def _default(flag: Flag) -> str:
    return str(flag.default).lower() if flag.type is bool else str(flag.default)


def _use_all(metrics: Metrics) -> None:
    """Let every metric have a value: a request, a load, a warmup, a batch and an available version."""
    call = metrics.begin("Predict", "GRPC", lambda code: Origin("", {}, {}), queue_s=1)
    call.model_name, call.version, call.signature_name = "flowers", 1, "serving_default"
    call.runtime_s, call.examples, call.valid_rows = 1.0, 1, 1
    metrics.end(call, Code.OK)
    metrics.loaded("flowers", Code.OK, 1)
    metrics.warmed_up("flowers", Code.OK, 1, 1)
    metrics.batch_asked("pool", 1)
    metrics.batch_waited("pool", "flowers", 1)
    metrics.batch_runs("pool", "flowers", 1, 1)
    version = SimpleNamespace(id=SimpleNamespace(version=1), state=State.AVAILABLE)
    manager: Any = SimpleNamespace(
        names=lambda: ["flowers"], states=lambda name: [version], engine_of=lambda name, number: "litert"
    )
    metrics.watch(cast(AspiredVersionsManager, manager))
