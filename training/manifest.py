"""A table of images and their labels: CSV with a header, or JSON Lines.

    path,label,split            {"path": "a/1.jpg", "label": "daisy", "split": "train"}
    a/1.jpg,daisy,train         {"path": "b/2.jpg", "label": "roses"}
    b/2.jpg,roses,

The split may be left out or empty; other columns are passed over. Paths are absolute, or relative to the
manifest's folder.
"""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError
from .images import FolderImages, why_no_images
from .listing import SPLIT_NAMES, Listed, Listing, Skipped

__all__ = ["list_manifest"]

_REQUIRED = ("path", "label")


@dataclass(frozen=True, slots=True)
class _Row:
    """line: of the file, counted from 1. path: as the images are read by."""

    line: int
    listed: Listed


def list_manifest(manifest: Path) -> Listing:
    """The images of a manifest, by the ending of its name: .csv, or JSON Lines for any other.

    An image listed again in the same way counts once. Files that are missing or no images are skipped.
    Raises DataError, with the line, for a missing column, text that is no JSON, an unknown split, an empty
    label, or an image under two labels or in two splits.
    """
    rows: dict[str, _Row] = {}
    skipped: list[Skipped] = []
    with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        read = _csv_rows if manifest.suffix.lower() == ".csv" else _json_rows
        for line, values in read(manifest, file):
            row = _Row(line, _listed(f"{manifest}, line {line}", manifest.parent, values))
            first = rows.setdefault(row.listed.path, row)
            if first.listed != row.listed:
                raise DataError(
                    f"{manifest}, line {line}: {row.listed.path} is {_said(row.listed)} here and "
                    f"{_said(first.listed)} on line {first.line}; expected one label and one split"
                )
            if first is not row:
                skipped.append(Skipped(row.listed.path, f"listed again on line {line}; counted once"))
    if not rows:
        raise DataError(f"{manifest}: no images listed; expected a line for each, with its path and label")

    reasons = why_no_images([os.path.join(manifest.parent, path) for path in rows])
    listed: list[Listed] = []
    for row, reason in zip(rows.values(), reasons, strict=True):
        if reason is None:
            listed.append(row.listed)
        else:
            skipped.append(Skipped(row.listed.path, reason))
    labels = sorted({row.listed.label for row in rows.values()})
    return Listing(tuple(labels), tuple(listed), tuple(skipped), FolderImages(manifest.parent))


def _csv_rows(manifest: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(f"{manifest}, line 1", header)
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{manifest}, line {reader.line_num}: expected {len(header)} fields, got {len(fields)}; "
                    "put a field that holds a comma in quotes"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{manifest}, line {reader.line_num}: no CSV: {error}") from error


def _json_rows(manifest: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{manifest}, line {line}: no JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{manifest}, line {line}: expected a JSON object, got {text.strip()[:40]}")
        _check_columns(f"{manifest}, line {line}", list(values))
        yield line, values


def _check_columns(where: str, columns: Sequence[str]) -> None:
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise DataError(
            f"{where}: no {' and no '.join(missing)}; expected path, label and, if you like, split; got "
            f"{', '.join(columns) or 'nothing'}"
        )


def _listed(where: str, folder: Path, values: dict[str, Any]) -> Listed:
    """The row's values as the image they name; numbers may stand for labels."""
    path, label, split = values["path"], values["label"], values.get("split")
    if split is None:
        split = ""
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    for name, value in (("path", path), ("label", label), ("split", split)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name}: expected text, got {json.dumps(value)}")
    if not _is_file_name(path):
        raise DataError(f"{where}: path: expected the name of a file, got {path!r}")
    label, split = label.strip(), split.strip().lower()
    if not label:
        raise DataError(f"{where}: the label is empty")
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{where}: split: expected {', '.join(SPLIT_NAMES)} or nothing, got {split!r}")
    relative = _relative(folder, path)
    return Listed(relative, sys.intern(label), SPLIT_NAMES.get(split), relative)


def _is_file_name(path: str) -> bool:
    try:
        return bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def _relative(folder: Path, path: str) -> str:
    """One spelling for an image: relative to the manifest's folder where it lies below it."""
    path = os.path.normpath(path)
    folder_prefix = os.path.join(os.path.abspath(folder), "")
    return path.removeprefix(folder_prefix)


def _said(listed: Listed) -> str:
    return f"{listed.label}{f' ({listed.split})' if listed.split else ''}"
