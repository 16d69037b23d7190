"""What can go wrong in an export; nothing is left behind when it does.

ExportError
├── VersionError        the version exists, is no version, or has no such number
│   └── NoVersionsError there is no version at all: it may be another place than the one meant
├── SourceError         what is to be exported is not what its flags say, or cannot be exported
├── VerificationError   the written model does not do what the trained one does
├── ManifestError       files are missing, damaged, or nobody's
├── StoreError          a folder or an object store cannot be read or written
└── GateError           the model is sound, but not as good or as fast as was required
"""

__all__ = [
    "ExportError",
    "GateError",
    "ManifestError",
    "NoVersionsError",
    "SourceError",
    "StoreError",
    "VerificationError",
    "VersionError",
]


class ExportError(Exception):
    """Base of all; the message says what was expected, what came and what to do."""


class VersionError(ExportError):
    """The version cannot be published or found under that number."""


class NoVersionsError(VersionError):
    """A place that is empty, or not there: seen from elsewhere, or with other rights, it may be otherwise."""


class SourceError(ExportError):
    """The model, its labels or its preprocessing contradict each other or cannot be read."""


class VerificationError(ExportError):
    """The exported model fails, or answers differently from the model it was made of."""


class ManifestError(ExportError):
    """A folder's files are not those that its manifest lists."""


class StoreError(ExportError):
    """A place to publish to or to pull from cannot be read or written."""


class GateError(ExportError):
    """A requirement on accuracy or latency is not met."""
