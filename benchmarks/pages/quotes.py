"""Numbers in prose that follow the results: `1.8<!-- serving/throughput/callers=8/litert_to_best_peer -->`.

The comment after a number names where it is from, as `lookup` reads it; of a spread the median is quoted.
The number is written anew with as many decimals as it had, before a % as percent. Before the path may stand
what to do with all that `*` leads to, `sum`, `least` or `most`. After it may stand a factor, as
` times 0.001`, and then ` above 1` or ` below 1`, for what a ratio is more or less than that.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .lookup import LookupFailedError, find
from .report import Report, is_number, is_spread

__all__ = ["quoted", "requote"]

_QUOTE = re.compile(
    r"(?P<number>\d[\d,]*(?:\.\d+)?)(?P<percent>%?)"
    r"(?P<comment><!-- (?:(?P<of>sum|least|most) )?(?P<path>\w+/[^>]+?)"
    r"(?: times (?P<factor>[\d.]+))?(?: (?P<side>above|below) 1)? -->)"
)
_MARK = re.compile(r"<!-- (?:(?:sum|least|most) )?\w+/[^>]* -->")
_OF: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "least": min, "most": max}


def quoted(text: str) -> list[str]:
    """The numbers that have a comment, as they are written."""
    return [match["number"] + match["percent"] for match in _QUOTE.finditer(text)]


def requote(text: str, reports: Mapping[str, Report]) -> tuple[str, list[str]]:
    """The text with its numbers as the results have them, and why some stay as they are."""
    problems = [
        f"{mark[0]}: expected a number before it"
        for mark in _MARK.finditer(text)
        if not any(match.end() == mark.end() for match in _QUOTE.finditer(text))
    ]

    def renew(match: re.Match[str]) -> str:
        try:
            number = _number(match, reports)
        except LookupFailedError as exc:
            problems.append(str(exc))
            return match[0]
        if number < 0:
            problems.append(
                f"{match['path']}: expected it to be {match['side']} 1; the sentence has to say otherwise now"
            )
            return match[0]
        return _written(number, match["number"]) + match["percent"] + match["comment"]

    return _QUOTE.sub(renew, text), problems


def _number(match: re.Match[str], reports: Mapping[str, Report]) -> float:
    values = [_plain(value, match["path"]) for value in find(reports, match["path"]).values()]
    if match["of"] is None and len(values) > 1:
        raise LookupFailedError(
            f"{match['path']}: expected sum, least or most before it, for {len(values)} values"
        )
    number = (_OF[match["of"]](values) if match["of"] else values[0]) * float(match["factor"] or 1)
    if match["side"]:
        number = number - 1 if match["side"] == "above" else 1 - number
    return number * (100 if match["percent"] else 1)


def _plain(value: Any, path: str) -> float:
    if isinstance(value, Mapping) and is_spread(value):
        return float(value["median"])
    if not is_number(value):
        raise LookupFailedError(f"{path}: expected a number, got {type(value).__name__}")
    return float(value)


def _written(number: float, before: str) -> str:
    """With more decimals than before where rounding would change it by more than a third."""
    decimals = len(before.partition(".")[2])
    while decimals < 6 and abs(round(number, decimals) - number) > abs(number) / 3:
        decimals += 1
    return f"{number:,.{decimals}f}"
