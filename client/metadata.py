"""What gRPC takes as metadata.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, Custom-Metadata.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["checked_metadata", "sendable"]

_KEY: Final = re.compile(r"[0-9a-z_.-]+")
_VALUE: Final = re.compile(r"[ -~]*")


def sendable(key: Any, value: Any) -> bool:
    """Whether gRPC would send the pair: a value is ASCII text, or bytes if the name ends in "-bin"."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        return False
    if key.endswith("-bin"):
        return isinstance(value, bytes)
    return isinstance(value, str) and _VALUE.fullmatch(value) is not None


def checked_metadata(metadata: Mapping[str, str | bytes] | None) -> tuple[tuple[str, str | bytes], ...]:
    """The pairs; text may come as bytes, too. Raises ValueError, naming the pair that gRPC would not send."""
    pairs = tuple((metadata or {}).items())
    for key, value in pairs:
        # The value may be a secret.
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if not sendable(key, value) and not sendable(key, text):
            raise ValueError(
                "expected metadata with names of 0-9 a-z _ . - and values of printable ASCII text, or of "
                f"bytes if the name ends in -bin, got {key!r} with a value of type {type(value).__name__}"
            )
    return pairs
