"""All results as one page that needs nothing else: ratios first, how each was measured, then the numbers.

    python benchmarks/page.py --results benchmarks/results --output build/bench/index.html
    python benchmarks/page.py --results benchmarks/results --markdown docs/benchmarks.md

The page has no scripts and loads nothing. Whatever a result holds is shown, whichever benchmark wrote it;
what failed, and benchmarks without a result, are shown as such. The Markdown is for the documentation's site:
the ratios, the failures, and how each was measured.
"""

import argparse
import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from math import log10
from pathlib import Path
from typing import Any

__all__ = ["Ratio", "Report", "read_reports", "to_html", "to_markdown"]

_DESCRIPTION = ("command", "date", "graftserve", "machine", "libraries", "rounds")
_WRITES = re.compile(r'write_result\(\s*arguments\.output,\s*"(\w+)"')
_IS_RATIO = re.compile(r"(^|_)to(_|$)|^times_|ratio| / ")
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

    def ratios(self) -> dict[Path_, list[Ratio]]:
        """By what they have in common."""
        groups: dict[Path_, list[Ratio]] = {}
        for ratio in _ratios(self._measured(), ()):
            groups.setdefault(ratio.path[:-1], []).append(ratio)
        return groups

    def numbers(self) -> list["Table"]:
        """All else."""
        return list(_tables(_without_ratios(self._measured(), ()), ()))

    def failures(self) -> list[tuple[Path_, str]]:
        """What did not work, and in what words."""
        return list(_failures(self._measured(), ()))

    def described(self) -> list[tuple[str, str]]:
        """How, when and where it was measured."""
        found = ((name, self.values.get(name)) for name in _DESCRIPTION)
        return [(name, _pairs(value) if value else "not recorded") for name, value in found]

    def _measured(self) -> dict[str, Any]:
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
        return Report(name, text, {}, "not measured yet")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        return Report(name, text, {}, f"{path.name} cannot be read: {exc}")
    if not isinstance(values, dict):
        return Report(name, text, {}, f"{path.name}: expected a JSON object, got {type(values).__name__}")
    return Report(name, text, values)


def _ratios(value: Any, path: Path_) -> Iterator[Ratio]:
    if isinstance(value, Mapping) and _is_spread(value) and _is_ratio(path):
        yield Ratio(path, value["median"], value["min"], value["max"])
    elif _is_number(value) and _is_ratio(path):
        yield Ratio(path, value)
    else:
        for label, item in _items(value):
            yield from _ratios(item, (*path, label))


def _without_ratios(value: Any, path: Path_) -> Any:
    if _is_ratio(path) and (_is_number(value) or (isinstance(value, Mapping) and _is_spread(value))):
        return None
    if isinstance(value, Mapping) or _is_rows(value):
        kept = {label: _without_ratios(item, (*path, label)) for label, item in _items(value)}
        return {label: item for label, item in kept.items() if item not in (None, {})} or None
    return value


def _failures(value: Any, path: Path_) -> Iterator[tuple[Path_, str]]:
    for label, item in _items(value):
        if label == "error" and item:
            parts = item if isinstance(item, Mapping) else {"": item}
            for part, words in parts.items():
                yield (*path, *([part] if part else [])), str(words)
        else:
            yield from _failures(item, (*path, label))


def _tables(value: Any, path: Path_) -> Iterator[Table]:
    if not isinstance(value, Mapping):
        return
    items = {label: item for label, item in value.items() if item not in (None, {})}
    nested = {label: item for label, item in items.items() if isinstance(item, Mapping)}
    plain = {label: item for label, item in items.items() if label not in nested}
    if plain:
        yield _table(path, {"": plain})
    if not nested:
        return
    if not plain and all(_depth(item) <= 2 for item in nested.values()):
        yield _table(path, nested)
    else:
        for label, item in nested.items():
            yield from _tables(item, (*path, label))


def _table(path: Path_, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    flat = {label: dict(_flatten(column, "")) for label, column in columns.items()}
    names = list(dict.fromkeys(name for column in flat.values() for name in column))
    if len(flat) > len(names):  # better long than wide
        rows = [(label, tuple(column.get(name, "") for name in names)) for label, column in flat.items()]
        return Table(path, tuple(names), tuple(rows))
    rows = [(name, tuple(column.get(name, "") for column in flat.values())) for name in names]
    return Table(path, tuple(flat), tuple(rows))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for label, item in value.items():
            yield from _flatten(item, f"{name} · {label}" if name else label)
    else:
        yield name, _text(value)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Of an object, or of a list of objects, whose names are the values that tell them apart."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif _is_rows(value):
        keys: list[str] = []
        for key in value[0]:
            if all(isinstance(row.get(key), str | int | float) for row in value):
                keys.append(key)
            if keys and len({tuple(row[key] for key in keys) for row in value}) == len(value):
                break
        for number, row in enumerate(value):
            parts = (row[key] if isinstance(row[key], str) else f"{key} {row[key]}" for key in keys)
            yield ", ".join(parts) or str(number + 1), row


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _is_spread(value: Mapping[str, Any]) -> bool:
    return set(value) == _SPREAD and all(map(_is_number, value.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_ratio(path: Path_) -> bool:
    return any(_IS_RATIO.search(part) for part in path)


def _depth(value: Any) -> int:
    return 1 + max((_depth(item) for item in value.values()), default=0) if isinstance(value, Mapping) else 0


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else str(value)


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values)
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _title(path: Path_) -> str:
    return " · ".join(part.replace("_", " ") for part in path)


# -- HTML

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #0a7d6c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --mark: #5fd4c0; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 2px solid var(--line); padding-top: 1rem; margin-top: 3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.15rem 0.8rem 0.15rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: normal; }
pre { white-space: pre-wrap; }
.bad { color: var(--bad); }
svg { display: block; }
""".strip()
_PLOT_WIDTH, _PLOT_HEIGHT = 240, 20


def to_html(reports: list[Report]) -> str:
    """The page."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>graftserve: benchmarks</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>",
        "<h1>graftserve: benchmarks</h1>",
        "<p>Ratios are medians of rounds, with the least and the largest; on the plots, which are "
        "logarithmic, the line is 1. Only ratios say something about another machine.</p>",
        _html_contents(reports),
        *map(_html_report, reports),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _html_contents(reports: list[Report]) -> str:
    rows = []
    for report in reports:
        described = dict(report.described())
        failures = report.failures()
        state = report.problem or (f"{len(failures)} failed" if failures else "measured")
        kind = ' class="bad"' if report.problem or failures else ""
        when = "" if report.problem else described["date"]
        rows.append(
            f'<tr><th scope="row"><a href="#{report.name}">{escape(report.name)}</a></th>'
            f"<td{kind}>{escape(state)}</td><td>{escape(when)}</td></tr>"
        )
    head = "<tr><th>benchmark</th><th>result</th><th>date</th></tr>"
    return _html_rows("What there is", head, rows)


def _html_report(report: Report) -> str:
    parts = [f'<section>\n<h2 id="{report.name}">{escape(report.name)}</h2>']
    if report.text:
        first, _, rest = report.text.partition("\n\n")
        parts.append(f"<p>{escape(first)}</p>")
        parts.append(
            f"<details><summary>What is measured</summary><pre>{escape(rest.strip())}</pre></details>"
        )
    if report.problem:
        return "\n".join([*parts, f'<p class="bad">{escape(report.problem)}</p>\n</section>'])
    for path, words in report.failures():
        parts.append(f'<p class="bad">{escape(_title(path))} failed: {escape(words)}</p>')
    parts += [_html_ratios(path, ratios) for path, ratios in report.ratios().items()]
    rows = [
        f'<tr><th scope="row">{name}</th><td>{escape(value)}</td></tr>' for name, value in report.described()
    ]
    parts.append(_html_rows("How it was measured", "", rows))
    parts += map(_html_table, report.numbers())
    return "\n".join([*parts, "</section>"])


def _html_ratios(path: Path_, ratios: list[Ratio]) -> str:
    ends = [value for ratio in ratios for value in (ratio.median, ratio.low, ratio.high) if value]
    least, most = min([*ends, 0.5]), max([*ends, 2.0])
    rows = []
    for ratio in ratios:
        cells = (_text(value) if value is not None else "" for value in (ratio.median, ratio.low, ratio.high))
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        name = escape(ratio.path[-1].replace("_", " "))
        plot = _plot(ratio, least, most)
        rows.append(f'<tr><th scope="row">{name}</th>{numbers}<td>{plot}</td></tr>')
    head = "<tr><th>ratio</th><th>median</th><th>least</th><th>largest</th><th></th></tr>"
    return _html_rows(_title(path) or "ratios", head, rows)


def _plot(ratio: Ratio, least: float, most: float) -> str:
    """A dot on a line from the least to the largest, logarithmic."""

    def x(value: float) -> float:
        share = (log10(max(value, least)) - log10(least)) / (log10(most) - log10(least))
        return round(6 + share * (_PLOT_WIDTH - 12), 1)

    middle = _PLOT_HEIGHT / 2
    low, high = ratio.low or ratio.median, ratio.high or ratio.median
    return (
        f'<svg width="{_PLOT_WIDTH}" height="{_PLOT_HEIGHT}" role="img" aria-label="{_text(ratio.median)}">'
        f'<line x1="{x(1)}" x2="{x(1)}" y1="0" y2="{_PLOT_HEIGHT}" stroke="currentColor" opacity="0.5"/>'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}" stroke="var(--mark)"'
        f' stroke-width="3" opacity="0.5"/>'
        f'<circle cx="{x(ratio.median)}" cy="{middle}" r="4" fill="var(--mark)"/></svg>'
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column.replace("_", " "))}</th>' for column in table.columns)
    rows = [
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in table.rows
    ]
    header = f"<tr><td></td>{head}</tr>" if any(table.columns) else ""
    return _html_rows(_title(table.path) or "Numbers", header, rows)


def _html_rows(caption: str, head: str, rows: list[str]) -> str:
    lines = [f"<caption>{escape(caption)}</caption>", head, *rows]
    return "\n".join(['<div class="wide"><table>', *filter(None, lines), "</table></div>"])


# -- Markdown


def to_markdown(reports: list[Report]) -> str:
    """The site's page."""
    parts = [
        "# Benchmarks",
        "Made from `benchmarks/results` by `benchmarks/page.py`. Ratios are medians of rounds, with the "
        "least and the largest; only they say something about another machine. `make bench` measures on "
        "yours.",
    ]
    for report in reports:
        parts.append(f"## {report.name}")
        if report.text:
            parts.append(_markdown_text(report.text.partition("\n\n")[0]))
        if report.problem:
            parts.append(f"**{_markdown_text(report.problem)}**")
            continue
        parts += [
            f"- **{_markdown_text(_title(path))} failed**: {_markdown_text(words)}"
            for path, words in report.failures()
        ]
        rows = [
            f"| {_markdown_text(_title(ratio.path))} | {' | '.join(_ends(ratio))} |"
            for ratios in report.ratios().values()
            for ratio in ratios
        ]
        if rows:
            parts.append("\n".join(["| ratio | median | least | largest |", "|---|---|---|---|", *rows]))
        described = (f"| {name} | {_markdown_text(value)} |" for name, value in report.described())
        parts.append("\n".join(["| measured | |", "|---|---|", *described]))
    return "\n\n".join(parts) + "\n"


def _ends(ratio: Ratio) -> list[str]:
    values = (ratio.median, ratio.low, ratio.high)
    return [_text(value) if value is not None else "" for value in values]


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\|<>\[\]*_])", r"\\\1", text.replace("\n", " "))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of results")
    parser.add_argument("--output", type=Path, help="HTML file")
    parser.add_argument("--markdown", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    if not (arguments.output or arguments.markdown):
        parser.error("expected --output or --markdown")
    if not arguments.results.is_dir():
        parser.error(f"--results: expected a folder, got {arguments.results}")
    reports = read_reports(arguments.results, Path(__file__).parent)
    for path, render in ((arguments.output, to_html), (arguments.markdown, to_markdown)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render(reports))
            print(f"written to {path}")


if __name__ == "__main__":
    main()
