"""Which images a command's arguments mean: files, folders, patterns, and paths from stdin."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Final

from graftserve.training.images import HEAD_BYTES, SIGNATURES

from .output import CommandError

__all__ = ["STDIN", "ImagePaths", "printable"]

STDIN: Final = "-"

# What model servers decode: what graftserve train takes.
_SERVED: Final = tuple(SIGNATURES.values())
# What may be sent, too, where images are converted before: TIFF, AVIF, HEIC. Videos begin with ftyp as well.
_BRANDS: Final = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1")
_CONVERTED: Final = (
    *(((0, start),) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *(((4, b"ftyp" + brand),) for brand in _BRANDS),
)
_CHUNK_BYTES: Final = 2**16
_LONGEST_PATH_BYTES: Final = 2**20
_LISTED: Final = 5


def printable(path: str) -> str:
    """A file's name need not be UTF-8; what is not becomes U+FFFD."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """walked: found in a folder, so that only its content tells whether it is meant."""

    path: str
    walked: bool = False


class ImagePaths:
    """The paths that `arguments` mean, in order; iterated once, taken as they are needed.

    A file is taken as it is. Of a folder, every image below it, by content; sorted as pathlib sorts, hidden
    files and folders left out, links to folders not followed. A pattern (`*`, `?`, `[`, and `**` for folders
    at any depth) that names no file gives the files that match it, sorted, without the hidden ones. "-" gives
    the paths on `stdin`, each ended by `separator`; they may be more than memory holds. Of folders, the names
    in those that are open are in memory, of a pattern all that match.

    stdin: unbuffered, so that a slow producer's paths are taken as they come.
    from_stdin: whether "-" is among them.
    converted: TIFF, AVIF and HEIC files in folders are meant, too.
    passed_over: how many files in folders were no images; `examples` are the first of them.
    Raises CommandError for a pattern that matches nothing and for two "-".
    """

    def __init__(
        self, arguments: Sequence[str], stdin: IO[bytes], *, separator: bytes = b"\n", converted: bool = False
    ) -> None:
        if arguments.count(STDIN) > 1:
            raise CommandError("expected one - for the paths on stdin, got several")
        for argument in arguments:
            if _is_pattern(argument) and not any(_matches(argument)):
                raise CommandError(f"{printable(argument)}: no file matches")
        self._arguments = arguments
        self._stdin, self._separator = stdin, separator
        self._formats = _SERVED + _CONVERTED if converted else _SERVED
        self._candidates = self._list()
        self.from_stdin = STDIN in arguments
        self.passed_over = 0
        self.examples: list[str] = []

    @property
    def total(self) -> int | None:
        """How many there are, where that is known before they are listed."""
        plain = not any(
            argument == STDIN or _is_pattern(argument) or os.path.isdir(argument)
            for argument in self._arguments
        )
        return len(self._arguments) if plain else None

    def __iter__(self) -> Iterator[str]:
        for candidate in self._candidates:
            if self._is_meant(candidate):
                yield candidate.path

    def skip(self, done: Iterable[str]) -> None:
        """Pass over the paths in `done`, which are the first of these.

        Raises CommandError if they are not: then the images are others than they were.
        """
        for number, path in enumerate(done, 1):
            while (candidate := next(self._candidates, None)) and candidate.path != path:
                if self._is_meant(candidate):
                    break
            if candidate is None or candidate.path != path:
                found = f"{printable(candidate.path)} in its place" if candidate else "no more images"
                raise CommandError(
                    f"the images are not those that this run began with: expected {printable(path)} as image "
                    f"{number}, which is done, got {found}; give the same images, or begin anew with "
                    "--overwrite"
                )

    def _is_meant(self, candidate: _Candidate) -> bool:
        if not candidate.walked or _may_be_image(candidate.path, self._formats):
            return True
        self.passed_over += 1
        if len(self.examples) < _LISTED:
            self.examples.append(candidate.path)
        return False

    def _list(self) -> Iterator[_Candidate]:
        for argument in self._arguments:
            if argument == STDIN:
                for path in _read_paths(self._stdin, self._separator):
                    yield _Candidate(path)
            elif _is_pattern(argument):
                for path in sorted(_matches(argument)):
                    yield _Candidate(path)
            elif os.path.isdir(argument):
                for path in _walk(argument):
                    yield _Candidate(path, walked=True)
            else:
                yield _Candidate(argument)


def _is_pattern(argument: str) -> bool:
    # A file may be called "a[1].jpg".
    return glob.has_magic(argument) and not os.path.lexists(argument)


def _matches(pattern: str) -> Iterator[str]:
    return (path for path in glob.iglob(pattern, recursive=True) if not os.path.isdir(path))


def _walk(folder: str) -> Iterator[str]:
    levels = [_visible(folder)]
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
        elif entry.endswith(os.sep):
            levels.append(_visible(entry))
        else:
            yield entry


def _visible(folder: str) -> Iterator[str]:
    """Paths of what is in a folder, sorted by name; folders end with a slash.

    A folder that cannot be read stands for itself, without one, so that it is missed.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink() and _is_folder(entry))
                for entry in entries
                if not entry.name.startswith(".")
            )
    except OSError:
        yield folder.rstrip(os.sep)
        return
    for name, is_folder, is_link_to_folder in names:
        if not is_link_to_folder:
            yield os.path.join(folder, name) + (os.sep if is_folder else "")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_be_image(path: str, formats: Sequence[Sequence[tuple[int, bytes]]]) -> bool:
    """Whether a file in a folder is to be asked about; one that cannot be read is, so that it is missed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for its writer
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return False
            head = os.read(descriptor, HEAD_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return True
    return any(all(head.startswith(part, offset) for offset, part in parts) for parts in formats)


def _read_paths(stdin: IO[bytes], separator: bytes) -> Iterator[str]:
    rest = b""
    while chunk := stdin.read(_CHUNK_BYTES):
        *paths, rest = (rest + chunk).split(separator)
        yield from _decoded(paths, separator)
        if len(rest) > _LONGEST_PATH_BYTES:
            raise _no_paths(separator)
    yield from _decoded([rest], separator)


def _decoded(paths: Iterable[bytes], separator: bytes) -> Iterator[str]:
    for path in paths:
        if b"\0" in path:
            raise _no_paths(separator)
        if path:
            yield os.fsdecode(path)


def _no_paths(separator: bytes) -> CommandError:
    if separator == b"\0":
        return CommandError("stdin: expected paths, each ended by a NUL (-0), got something else")
    return CommandError(
        "stdin: expected paths, one a line, got something else; -0 takes what find -print0 writes, and an "
        "image itself is not read from stdin"
    )
