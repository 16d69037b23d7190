"""What the server's page shows, as /overview.json gives it."""

import time
from datetime import UTC, datetime
from importlib.metadata import version

from graftserve.client.wire import DataType, SignatureDef

from .core import ServerCore
from .errors import ServingError
from .manager import AspiredVersionsManager
from .metrics import Metrics, ModelTotals
from .page import ImageSignature, ModelOverview, Overview, VersionOverview

__all__ = ["make_overview"]

_NO_REQUESTS = ModelTotals(0, 0, 0.0, ())


def make_overview(
    core: ServerCore,
    manager: AspiredVersionsManager,
    metrics: Metrics,
    max_message_bytes: int,
    started_s: float,
) -> Overview:
    """The models with their versions, labels and image signatures, and the requests so far.

    started_s: when the server started, on time.time's clock.
    """
    totals = metrics.totals()
    started = datetime.fromtimestamp(started_s, UTC).isoformat(timespec="seconds")
    return Overview(
        server={
            "version": version("graftserve"),
            "started_at": started,
            "uptime_s": round(time.time() - started_s, 3),
        },
        max_message_bytes=max_message_bytes,
        models=[
            _model(core, manager, name, totals.get(name, _NO_REQUESTS)) for name in sorted(manager.names())
        ],
    )


def _model(
    core: ServerCore, manager: AspiredVersionsManager, name: str, totals: ModelTotals
) -> ModelOverview:
    versions = [
        VersionOverview(
            version=str(entry.id.version),
            state=entry.state.name,
            error="" if entry.error is None else entry.error.message,
            engine=manager.engine_of(name, entry.id.version),
        )
        for entry in manager.states(name)
    ]
    return ModelOverview(
        name=name,
        labels={label: str(number) for label, number in sorted(core.labels(name).items())},
        versions=versions,
        image_signatures=_image_signatures(manager, name),
        requests=totals.requests,
        errors=totals.errors,
        latency_sum_s=totals.latency_sum_s,
        latency_buckets=[[limit_s, count] for limit_s, count in totals.buckets],
    )


def _image_signatures(manager: AspiredVersionsManager, name: str) -> list[ImageSignature]:
    """The signatures of the highest AVAILABLE version whose only input is a string tensor."""
    try:
        with manager.handle(name) as handle:
            definitions = handle.servable.signature_def_map.signature_def
            return [
                _image_signature(signature_name, definitions[signature_name])
                for signature_name in sorted(definitions)
                if [info.dtype for info in definitions[signature_name].inputs.values()]
                == [DataType.DT_STRING]
            ]
    except ServingError:
        return []


def _image_signature(name: str, definition: SignatureDef) -> ImageSignature:
    ((input_name, info),) = definition.inputs.items()
    shape = info.tensor_shape
    return ImageSignature(
        name=name,
        input=input_name,
        outputs=sorted(definition.outputs),
        scalar=not shape.unknown_rank and len(shape.dim) == 0,
    )
