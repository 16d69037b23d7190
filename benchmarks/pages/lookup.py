"""Values of results by a path: `serving/throughput/callers=8/litert_to_best_peer`.

The first part is the benchmark, and then come the keys of its result. A row of a list goes by what tells it
apart, `engine=litert,callers=8`; `*` is every key or row. A slash between spaces belongs to a key.
"""

import re
from collections.abc import Mapping
from typing import Any

from .report import Path_, Report, is_rows, items

__all__ = ["LookupFailedError", "NotMeasuredError", "benchmark_of", "find"]

_SLASH = re.compile(r"(?<! )/|/(?! )")
_COMMA = re.compile(r",(?=\w+=)")


class LookupFailedError(Exception):
    """A path leads nowhere. The message says how far it leads, and what there is."""


class NotMeasuredError(LookupFailedError):
    """Its benchmark has no result."""


def benchmark_of(path: str) -> str:
    """The first part."""
    return _SLASH.split(path)[0]


def find(reports: Mapping[str, Report], path: str) -> dict[Path_, Any]:
    """What is there, one or more values, by the keys that `*` stands for.

    Raises LookupFailedError.
    """
    name, *parts = _SLASH.split(path)
    if name not in reports or reports[name].problem:
        raise NotMeasuredError(f"{path}: there is no result {name}.json")
    found: dict[Path_, Any] = {(): reports[name].values}
    for part in parts:
        chosen = {}
        for stars, value in found.items():
            for label, item in _choose(value, part):
                chosen[(*stars, label) if part == "*" else stars] = item
        if not chosen:
            there = sorted({label for value in found.values() for label, _ in items(value)})
            raise LookupFailedError(f"{path}: expected {part!r} to be one of {', '.join(there) or 'no keys'}")
        found = chosen
    return found


def _choose(value: Any, part: str) -> list[tuple[str, Any]]:
    if part == "*":
        return list(items(value)) or [(str(place), item) for place, item in enumerate(_plain_list(value), 1)]
    if is_rows(value):
        wanted = dict(pair.split("=", 1) for pair in _COMMA.split(part) if "=" in pair)
        rows = [row for row in value if wanted and all(str(row.get(key)) == wanted[key] for key in wanted)]
        return [(part, rows[0])] if len(rows) == 1 else []
    return [(part, value[part])] if isinstance(value, Mapping) and part in value else []


def _plain_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
