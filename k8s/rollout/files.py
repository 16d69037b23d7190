"""Files that are either whole or as they were, and locks that end with their process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["LockedError", "locked", "replace_file"]


class LockedError(Exception):
    """Somebody else holds the lock. holder: what they wrote into the lock file, or ""."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` aside, make it durable and rename it to `path`, whose mode and owner are kept.

    Of a link, the file behind it is replaced. The name aside is always the same, so that what a killed
    process left is not left twice: hold a lock. Raises OSError; then `path` is as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            with suppress(FileNotFoundError):
                before = target.stat()
                os.fchmod(file.fileno(), before.st_mode & 0o7777)
                with suppress(PermissionError):  # only root gives files away
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's names no file
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the rename survives a power cut
    finally:
        os.close(folder)


@contextmanager
def locked(path: Path, *, wait: bool, holder: str = "") -> Iterator[None]:
    """Hold the lock file `path`, which stays: a lock on a file that others remove keeps nobody out.

    wait: for whoever holds it; otherwise raise LockedError at once.
    holder: written into the file, to tell others who holds it. A process that dies lets go of the lock.
    Raises OSError if the file cannot be made, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        os.close(descriptor)
