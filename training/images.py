"""Where the bytes of images come from, and what tells that they are an image.

What a file holds decides whether it is an image, not what it is called.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

__all__ = [
    "HEAD_BYTES",
    "SIGNATURES",
    "FolderImages",
    "ImageStore",
    "content_key",
    "image_format",
    "in_threads",
    "why_no_image",
    "why_no_images",
]

SIGNATURES: Mapping[str, tuple[tuple[int, bytes], ...]] = MappingProxyType(
    {
        "jpeg": ((0, b"\xff\xd8\xff"),),
        "png": ((0, b"\x89PNG"),),
        "gif": ((0, b"GIF8"),),
        "bmp": ((0, b"BM"),),
        "webp": ((0, b"RIFF"), (8, b"WEBP")),
    }
)
"""The formats that are read, each with the bytes that tell it and where they stand."""

HEAD_BYTES = 12
"""How many of an image's first bytes tell its format."""

_KEY_BYTES = 16  # 128 bits of BLAKE2b: no two of 2**40 images collide by chance
_READERS = 8  # three times as fast as one where the disk has to be asked, no slower where it has not
_FILES_A_TASK = 64

_Result = TypeVar("_Result")


class ImageStore(Protocol):
    """The bytes of images by their paths. Every method is thread-safe."""

    def read(self, path: str) -> bytes:
        """The encoded image; raises OSError if it cannot be read."""
        ...

    def stamp(self, path: str) -> str | None:
        """A short text that changes when the stored bytes may have changed; None if that cannot be told."""
        ...


class FolderImages:
    """Files; a path is relative to `root`, with forward slashes, or absolute."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def read(self, path: str) -> bytes:
        """See ImageStore."""
        return (self._root / path).read_bytes()

    def stamp(self, path: str) -> str | None:
        """The absolute file, its size in bytes, when it was last changed in ns, and its inode."""
        file = self._root / path
        try:
            status = file.stat()
        except OSError:
            return None
        return f"{file}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def content_key(data: bytes) -> bytes:
    """16 bytes that name an image by its content: BLAKE2b."""
    return hashlib.blake2b(data, digest_size=_KEY_BYTES).digest()


def image_format(head: bytes) -> str | None:
    """The name in SIGNATURES for a file's first HEAD_BYTES bytes, None for anything else."""
    for name, parts in SIGNATURES.items():
        if all(head.startswith(part, offset) for offset, part in parts):
            return name
    return None


def why_no_image(head: bytes) -> str | None:
    """Why a file with these first bytes is no image; None if it looks like one."""
    if not head:
        return "the file is empty"
    return None if image_format(head) else "not a JPEG, PNG, GIF, BMP or WebP image"


def why_no_images(files: Sequence[str]) -> list[str | None]:
    """For each file, why it is no image, by its first bytes; None for those that look like one."""
    return list(in_threads(_sniff, files))


def in_threads(read: Callable[[str], _Result], paths: Sequence[str]) -> Iterator[_Result]:
    """What `read` gives for each path, in their order; several are read at once."""
    tasks = [paths[start : start + _FILES_A_TASK] for start in range(0, len(paths), _FILES_A_TASK)]
    with ThreadPoolExecutor(_READERS) as pool:
        results: Any = pool.map(lambda task: [read(path) for path in task], tasks)
        with closing(results):  # an interrupt drops the files that still wait
            yield from chain.from_iterable(results)


def _sniff(file: str) -> str | None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for its writer
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return "not a regular file"
            return why_no_image(os.read(descriptor, HEAD_BYTES))
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
