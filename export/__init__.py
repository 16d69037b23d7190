"""From a trained model to a published version: a SavedModel that takes image bytes.

`export_run` does all of it for a run, `export_model` for whatever `open_run`, `open_keras` and
`open_saved_model` open. Importing this package imports nothing heavy: its modules do, when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    ExportError,
    GateError,
    ManifestError,
    SourceError,
    StoreError,
    VerificationError,
    VersionError,
)

if TYPE_CHECKING:
    from .batching import Batching
    from .keras_source import open_keras
    from .publish import Exported, ExportOptions, export_model, export_run
    from .run_source import open_run
    from .saved_model_source import open_saved_model
    from .verify import verify_version
    from .versions import published_versions

__all__ = [
    "Batching",
    "ExportError",
    "ExportOptions",
    "Exported",
    "GateError",
    "ManifestError",
    "SourceError",
    "StoreError",
    "VerificationError",
    "VersionError",
    "export_model",
    "export_run",
    "open_keras",
    "open_run",
    "open_saved_model",
    "published_versions",
    "verify_version",
]

_LAZY = {
    "Batching": ".batching",
    "ExportOptions": ".publish",
    "Exported": ".publish",
    "export_model": ".publish",
    "export_run": ".publish",
    "open_keras": ".keras_source",
    "open_run": ".run_source",
    "open_saved_model": ".saved_model_source",
    "published_versions": ".versions",
    "verify_version": ".verify",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
