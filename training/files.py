"""Files that are either whole or not there."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["naming", "sync_directory", "write_atomically", "write_json"]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file (a full disk's, as a rule) the name of the one being written."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def write_atomically(path: Path, mode: str = "w", *, temporary: Path | None = None) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on leaving without an error it is synced and takes its place.

    mode: "w" (UTF-8, newlines as written, undecodable file names kept as they are) or "wb".
    temporary: the temporary file, which is replaced if it is there; by default one that nobody else has.
    On an error the temporary file goes and `path` is untouched.
    """
    if temporary is None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        mode = mode.replace("w", "x")
    encoding, errors, newline = (None, None, None) if "b" in mode else ("utf-8", "surrogateescape", "")
    try:
        with naming(path), open(temporary, mode, encoding=encoding, errors=errors, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with write_atomically(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sync_directory(path: Path) -> None:
    """Make the names in a folder last, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
