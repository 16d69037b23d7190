"""What can go wrong in an export; nothing is left behind when it does.

ExportError
├── VersionError        the version exists, or is no version
└── VerificationError   the written model does not do what the trained one does
"""

__all__ = ["ExportError", "VerificationError", "VersionError"]


class ExportError(Exception):
    """Base of all; the message says what was expected, what came and what to do."""


class VersionError(ExportError):
    """The version cannot be published under that number."""


class VerificationError(ExportError):
    """The exported model fails, or answers differently from the model it was made of."""
