"""Predictions on their way to a file: what is done is kept, whatever ends the run.

A run appends each answer to `<output>.part`, JSON Lines whatever the output's format is: first a line with
the settings, then one for each image, in order. When all are done, the output is written from it, aside, and
renamed.
"""

import csv
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

from graftserve.client import InvalidImageError, Prediction

from .image_paths import printable
from .output import CommandError, write_whole

__all__ = [
    "FORMATS",
    "Begin",
    "PartFile",
    "Row",
    "errors_path",
    "part_path",
    "to_row",
    "write_errors",
    "write_rows",
]

Row: TypeAlias = dict[str, Any]
"""One image: `COLUMNS`, and `error_class`."""

Begin: TypeAlias = Literal["new", "overwrite", "resume"]

FORMATS: Final = (".jsonl", ".csv", ".parquet")
_COLUMNS: Final = ("image", "label", "score", "top", "version", "error")
_LAYOUT: Final = 1
# Some megabytes of rows, whatever their number.
_ROW_GROUP: Final = 16_384
_BLOCK_BYTES: Final = 2**16


def part_path(output: Path) -> Path:
    """Where the answers are kept until all are there."""
    return output.with_name(f"{output.name}.part")


def errors_path(output: Path) -> Path:
    """Where the images that failed are listed: beside the output."""
    return output.with_name(f"{output.stem}.errors.jsonl")


def to_row(path: str, result: Prediction | InvalidImageError, top: int) -> Row:
    """What is kept of an answer: the `top` best classes, or the error."""
    if isinstance(result, InvalidImageError):
        row = dict.fromkeys(_COLUMNS)
        return row | {"image": path, "error": str(result), "error_class": type(result).__name__}
    return {
        "image": path,
        "label": result.label,
        "score": result.score,
        "top": [{"label": label, "score": score} for label, score in result.top[:top]],
        "version": result.version,
        "error": None,
    }


class PartFile:
    """The answers so far, locked against a second run; a context manager.

    settings: what the answers depend on, by the names of the options; kept in the first line.
    begin: "new" raises CommandError if the file is there, "overwrite" empties it, "resume" keeps what it
        holds but for a last line that is not whole.
    Raises CommandError if another process writes it, or if it was begun with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], begin: Begin) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | (os.O_EXCL if begin == "new" else 0), 0o666)
        except FileExistsError as error:
            raise CommandError(
                f"{path}: a run was broken off: --resume continues it, --overwrite begins anew"
            ) from error
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CommandError(f"{path}: another graftserve classify is writing it") from error
            if begin == "overwrite":
                os.ftruncate(self._descriptor, 0)
            _cut_torn_line(self._descriptor)
            if os.fstat(self._descriptor).st_size:
                self._check(settings)
            else:
                self._write({"graftserve_classify": _LAYOUT, **settings})
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def append(self, row: Row) -> None:
        """Keep one answer; it survives the end of this process. Raises OSError, as for a full disk."""
        self._write(row)

    def rows(self) -> Iterator[Row]:
        """What is kept, in order, read as it is needed."""
        with open(self._path, "rb") as file:
            next(file)
            for number, line in enumerate(file, 2):
                try:
                    row: Row = json.loads(line)
                except ValueError as error:
                    raise CommandError(
                        f"{self._path}: line {number} is damaged; cut the file before it and --resume, or "
                        "begin anew with --overwrite"
                    ) from error
                yield row

    def remove(self) -> None:
        """The answers are elsewhere, or there are none."""
        self._path.unlink(missing_ok=True)

    def _check(self, settings: Mapping[str, Any]) -> None:
        with open(self._path, "rb") as file:
            try:
                kept = json.loads(file.readline())
            except ValueError:
                kept = None
        if not isinstance(kept, dict) or kept.pop("graftserve_classify", None) != _LAYOUT:
            raise CommandError(
                f"{self._path}: expected what graftserve classify keeps there, got another file or one of "
                "another release; --overwrite begins anew"
            )
        for name, value in settings.items():
            if kept.get(name) != value:
                raise CommandError(
                    f"{self._path}: begun with {_as_option(name, kept.get(name))}, now "
                    f"{_as_option(name, value)}: give the same, or begin anew with --overwrite"
                )

    def _write(self, value: Mapping[str, Any]) -> None:
        # ASCII: a lone surrogate, of a name that is not UTF-8, is kept.
        line = json.dumps(value).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def write_rows(rows: Iterable[Row], output: Path) -> None:
    """Write the output, whole or not at all, in the format of its suffix and in bounded memory.

    .jsonl: an object a line; `top` is a list of label and score. .csv: `top` as that list in JSON, empty
    cells for what there is not. .parquet: row groups of 16,384 images.
    """
    writers = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    writers[output.suffix](rows, output)


def write_errors(rows: Iterable[Row], path: Path) -> None:
    """Write an object a line for each image that failed: image, error_class, error."""
    names = ("image", "error_class", "error")
    with write_whole(path) as file:
        for row in rows:
            if row["error"] is not None:
                file.write(_to_json({name: _cell(row, name) for name in names}) + "\n")


def _write_jsonl(rows: Iterable[Row], output: Path) -> None:
    with write_whole(output) as file:
        for row in rows:
            file.write(_to_json({name: _cell(row, name) for name in _COLUMNS}) + "\n")


def _write_csv(rows: Iterable[Row], output: Path) -> None:
    with write_whole(output) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in rows:
            cells = {name: _cell(row, name) for name in _COLUMNS}
            top = None if row["top"] is None else _to_json(row["top"])
            writer.writerow((cells | {"top": top}).values())


def _write_parquet(rows: Iterable[Row], output: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    text, score = pa.string(), pa.float32()  # what models give
    types = {"image": text, "label": text, "score": score, "version": pa.int64(), "error": text}
    types["top"] = pa.list_(pa.struct([("label", text), ("score", score)]))
    schema = pa.schema([(name, types[name]) for name in _COLUMNS])
    left = iter(rows)
    with write_whole(output, "wb") as file, ParquetWriter(file, schema) as writer:
        while group := list(islice(left, _ROW_GROUP)):
            columns = {name: [_cell(row, name) for row in group] for name in _COLUMNS}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROW_GROUP)


def _cell(row: Row, name: str) -> Any:
    value = row[name]
    return printable(value) if isinstance(value, str) else value


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_option(name: str, value: Any) -> str:
    return f"no --{name}" if value is None else f"--{name} {value}"


def _cut_torn_line(descriptor: int) -> None:
    """Cut what follows the last newline: a process that was killed, or a full disk, left it."""
    end = os.fstat(descriptor).st_size
    position = end
    while position > 0:
        start = max(0, position - _BLOCK_BYTES)
        newline = os.pread(descriptor, position - start, start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        os.ftruncate(descriptor, position)
