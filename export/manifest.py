"""The sums of a version's files: what makes a copy of it trustworthy.

`sha256sum -c assets.extra/manifest.sha256` in the version's folder checks them, too.
"""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from graftserve.training.files import write_atomically

from .errors import ManifestError

__all__ = ["MANIFEST", "check_manifest", "file_digest", "read_manifest", "write_manifest"]

MANIFEST = "assets.extra/manifest.sha256"

_LINE = re.compile(r"([0-9a-f]{64})  ([^\0\n]+)")
_NAMED = 5


def file_digest(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the sums of all files below `folder` into its manifest.

    Raises ManifestError for a file name with a line break, which no line can hold.
    """
    names = sorted(_files(folder) - {MANIFEST})
    if broken := [name for name in names if "\n" in name]:
        raise ManifestError(f"{folder}: expected file names of one line, got {broken[0]!r}; rename the file")
    with write_atomically(folder / MANIFEST) as manifest:
        for name in names:
            manifest.write(f"{file_digest(folder / name)}  {name}\n")


def read_manifest(content: bytes, where: str) -> dict[str, str]:
    """The sum of each file, by its path relative to the version's folder.

    where: for the message. Raises ManifestError for lines that are none, and for a path that leads out of the
    folder or comes twice: a manifest may come from anywhere.
    """
    sums: dict[str, str] = {}
    lines = content.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ManifestError(
                f"{where}, line {number}: expected a SHA-256 sum and a path, got {line[:80]!r}; "
                "the manifest is damaged: publish or pull the version again"
            )
        path = PurePosixPath(match[2])
        is_inside = not path.is_absolute() and path.name and ".." not in path.parts
        if not is_inside or str(path) != match[2] or match[2] == MANIFEST:
            raise ManifestError(
                f"{where}, line {number}: expected a path inside the version, got {match[2]!r}; do not use it"
            )
        if match[2] in sums:
            raise ManifestError(f"{where}, line {number}: {match[2]} comes twice")
        sums[match[2]] = match[1]
    return sums


def check_manifest(folder: Path) -> int:
    """Compare the files below `folder` with its manifest; returns their number, without the manifest.

    Raises ManifestError naming files that are missing, changed, not listed, or cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"{path}: {error.strerror or error}; not a version that graftserve export finished"
        ) from error
    sums = read_manifest(content, str(path))
    there = _files(folder) - {MANIFEST}
    faults = {
        "missing": sums.keys() - there,
        "not listed": there - sums.keys(),
        "changed": {name for name in sums.keys() & there if _differs(folder / name, sums[name])},
    }
    found = [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
    if found:
        raise ManifestError(f"{folder}: {'; '.join(found)}; publish or pull the version again")
    return len(sums)


def _differs(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) != digest
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from error


def _files(folder: Path) -> set[str]:
    """Links to folders among them: nobody has summed what is behind one."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _some(names: Collection[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(sorted(names)[:_NAMED]) + (f" and {more} more" if more > 0 else "")
