"""Results as they are read: ratios, failures, how it was measured, and tables of all else."""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Path_",
    "Ratio",
    "Report",
    "Table",
    "is_number",
    "is_rows",
    "is_spread",
    "items",
    "keys_of",
    "read_reports",
    "shown",
    "table_of",
    "tables",
    "title",
]

_DESCRIPTION = ("command", "date", "graftserve", "machine", "libraries", "rounds")
_WRITES = re.compile(r'write_result\(\s*arguments\.output,\s*"(\w+)"')
_IS_RATIO = re.compile(r"(^|_)to(_|$)|^times_|^share_of_|ratio| / ")
_MISSING = "not measured yet"
_SPREAD = {"median", "min", "max"}

Path_ = tuple[str, ...]
"""Where in a result a value is."""


@dataclass(frozen=True)
class Ratio:
    """low and high are None where it was measured once."""

    path: Path_
    median: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Report:
    """A benchmark and its result. text: what the script says of itself. problem: why there is no result."""

    name: str
    text: str
    values: Mapping[str, Any]
    problem: str = ""

    @property
    def is_missing(self) -> bool:
        """There is no result at all."""
        return self.problem == _MISSING

    def ratios(self) -> dict[Path_, list[Ratio]]:
        """By what they have in common."""
        groups: dict[Path_, list[Ratio]] = {}
        for ratio in _ratios(self.measured(), ()):
            groups.setdefault(ratio.path[:-1], []).append(ratio)
        return groups

    def numbers(self) -> list["Table"]:
        """All else."""
        return list(tables(_without_ratios(self.measured(), ()), ()))

    def failures(self) -> list[tuple[Path_, str]]:
        """What did not work, and in what words."""
        return list(_failures(self.measured(), ()))

    def described(self) -> list[tuple[str, str]]:
        """How, when and where it was measured."""
        found = ((name, self.values.get(name)) for name in _DESCRIPTION)
        return [(name, _pairs(value) if value else "not recorded") for name, value in found]

    def measured(self) -> dict[str, Any]:
        """All but how."""
        return {key: value for key, value in self.values.items() if key not in _DESCRIPTION}


@dataclass(frozen=True)
class Table:
    """cells: by row and column; what a row does not have is empty."""

    path: Path_
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def read_reports(results: Path, scripts: Path) -> list[Report]:
    """A report for each benchmark in `scripts` and each further result in `results`, by name."""
    texts = {}
    for script in sorted(scripts.glob("*.py")):
        source = script.read_text()
        if match := _WRITES.search(source):
            texts[match[1]] = ast.get_docstring(ast.parse(source)) or ""
    files = {path.stem: path for path in results.glob("*.json")}
    return [_read(name, texts.get(name, ""), files.get(name)) for name in sorted({*texts, *files})]


def _read(name: str, text: str, path: Path | None) -> Report:
    if path is None:
        return Report(name, text, {}, _MISSING)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        return Report(name, text, {}, f"{path.name} cannot be read: {exc}")
    if not isinstance(values, dict):
        return Report(name, text, {}, f"{path.name}: expected a JSON object, got {type(values).__name__}")
    return Report(name, text, values)


def _ratios(value: Any, path: Path_) -> Iterator[Ratio]:
    if isinstance(value, Mapping) and is_spread(value) and _is_ratio(path):
        yield Ratio(path, value["median"], value["min"], value["max"])
    elif is_number(value) and _is_ratio(path):
        yield Ratio(path, value)
    else:
        for label, item in items(value):
            yield from _ratios(item, (*path, label))


def _without_ratios(value: Any, path: Path_) -> Any:
    if _is_ratio(path) and (is_number(value) or (isinstance(value, Mapping) and is_spread(value))):
        return None
    if isinstance(value, Mapping) or is_rows(value):
        kept = {label: _without_ratios(item, (*path, label)) for label, item in items(value)}
        return {label: item for label, item in kept.items() if item not in (None, {})} or None
    return value


def _failures(value: Any, path: Path_) -> Iterator[tuple[Path_, str]]:
    for label, item in items(value):
        if label == "error" and item:
            parts = item if isinstance(item, Mapping) else {"": item}
            for part, words in parts.items():
                yield (*path, *([part] if part else [])), str(words)
        else:
            yield from _failures(item, (*path, label))


def tables(value: Any, path: Path_) -> Iterator[Table]:
    """Of all that nested objects hold."""
    if not isinstance(value, Mapping):
        return
    there = {label: item for label, item in value.items() if item not in (None, {})}
    nested = {label: item for label, item in there.items() if _depth(item)}
    plain = {label: item for label, item in there.items() if label not in nested}
    if plain:
        yield table_of(path, {"": plain})
    if not nested:
        return
    if not plain and all(_depth(item) <= 2 and not _is_table(item) for item in nested.values()):
        yield table_of(path, nested)
    else:
        for label, item in nested.items():
            yield from tables(item, (*path, label))


def table_of(path: Path_, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Turned so that it is long rather than wide."""
    flat = {label: dict(_flatten(column, "")) for label, column in columns.items()}
    names = list(dict.fromkeys(name for column in flat.values() for name in column))
    if len(flat) > len(names):  # better long than wide
        rows = [(label, tuple(column.get(name, "") for name in names)) for label, column in flat.items()]
        return Table(path, tuple(names), tuple(rows))
    rows = [(name, tuple(column.get(name, "") for column in flat.values())) for name in names]
    return Table(path, tuple(flat), tuple(rows))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and not is_spread(value):
        for label, item in value.items():
            yield from _flatten(item, f"{name} · {label}" if name else label)
    else:
        yield name, shown(value)


def items(value: Any) -> Iterator[tuple[str, Any]]:
    """Of an object, or of a list of objects, whose names are the values that tell them apart."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif is_rows(value):
        keys = keys_of(value)
        for number, row in enumerate(value):
            parts = (row[key] if isinstance(row[key], str) else f"{key} {row[key]}" for key in keys)
            yield ", ".join(parts) or str(number + 1), row


def keys_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells rows apart: as few of the first fields as do it."""
    keys: list[str] = []
    for key in rows[0]:
        if all(isinstance(row.get(key), str | int | float) for row in rows):
            keys.append(key)
        if keys and len({tuple(row[key] for key in keys) for row in rows}) == len(rows):
            break
    return keys


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def is_spread(value: Mapping[str, Any]) -> bool:
    return set(value) == _SPREAD and all(map(is_number, value.values()))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_ratio(path: Path_) -> bool:
    return any(_IS_RATIO.search(part) for part in path)


def _is_table(value: Mapping[str, Any]) -> bool:
    """Of objects alone."""
    return all(map(_depth, value.values()))


def _depth(value: Any) -> int:
    if not isinstance(value, Mapping) or is_spread(value):
        return 0
    return 1 + max(map(_depth, value.values()), default=0)


def shown(value: Any) -> str:
    """For people: three digits, a spread as its median and, in brackets, the least and the largest."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, Mapping) and is_spread(value):
        least, most = shown(value["min"]), shown(value["max"])
        return shown(value["median"]) + (f" ({least}–{most})" if least != most else "")
    if not is_number(value):
        return str(value)
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values)
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def title(path: Path_) -> str:
    return " · ".join(part.replace("_", " ") for part in path)
