"""Silence for what writes past Python: TensorFlow Lite's converter, and the interpreter's delegates."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

__all__ = ["quiet"]

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is written to the process's stdout and stderr within goes to the debug log."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with tempfile.TemporaryFile() as said:
        try:
            for descriptor in saved:
                os.dup2(said.fileno(), descriptor)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)
            said.seek(0)
            _log.debug("the converter says: %s", said.read().decode(errors="replace").strip())
