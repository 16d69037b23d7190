"""From a run directory to a published version: a SavedModel that takes image bytes.

`export_run` does all of it. Importing this package imports nothing heavy: its modules do, when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ExportError, VerificationError, VersionError

if TYPE_CHECKING:
    from .batching import Batching
    from .publish import Exported, export_run, published_versions

__all__ = [
    "Batching",
    "ExportError",
    "Exported",
    "VerificationError",
    "VersionError",
    "export_run",
    "published_versions",
]

_LAZY = {
    "Batching": ".batching",
    "Exported": ".publish",
    "export_run": ".publish",
    "published_versions": ".publish",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
