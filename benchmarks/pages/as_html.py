"""All results as one page that needs nothing else: claims, charts, tables, and all numbers."""

from collections.abc import Sequence
from html import escape
from math import log10

from .claims import Verdict
from .report import Path_, Ratio, Report, Table, shown, title
from .views import Section, section

__all__ = ["to_html"]

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
svg { display: block; max-width: 760px; }
figure { margin: 1.5rem 0; }
figcaption { font-weight: 600; }
""".strip()
_PLOT_WIDTH, _PLOT_HEIGHT = 240, 20


def to_html(reports: Sequence[Report], claims: Sequence[Verdict]) -> str:
    """The page."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>graftserve: benchmarks</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>",
        "<h1>graftserve: benchmarks</h1>",
        "<p>Numbers are medians of rounds, with the least and the largest. Only ratios say something about "
        "another machine.</p>",
        *([_html_claims(claims)] if claims else []),
        _html_contents(reports),
        *(_html_section(section(report)) for report in reports),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _html_claims(claims: Sequence[Verdict]) -> str:
    rows = []
    for verdict in claims:
        claim, worst = verdict.claim, f"; the worst: {verdict.worst}" if verdict.worst else ""
        kind = "" if verdict.met == "yes" else ' class="bad"'
        cells = (claim.what, verdict.value, claim.beside + worst, claim.target)
        rows.append(
            "<tr>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + f"<td{kind}>{verdict.met}</td>"
            + f'<td><a href="#{verdict.benchmark}">{verdict.benchmark}</a></td></tr>'
        )
    head = (
        "<tr><th>what</th><th>number</th><th>beside</th><th>target</th><th>met</th><th>measured by</th></tr>"
    )
    return _html_rows("Claims", head, rows)


def _html_contents(reports: Sequence[Report]) -> str:
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


def _html_section(shown_: Section) -> str:
    report = shown_.report
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
        parts.append(f'<p class="bad">{escape(title(path))} failed: {escape(words)}</p>')
    rows = [
        f'<tr><th scope="row">{name}</th><td>{escape(value)}</td></tr>' for name, value in report.described()
    ]
    parts.append(_html_rows("How it was measured", "", rows))
    for figure in shown_.figures:
        parts.append(f"<figure><figcaption>{escape(figure.caption)}</figcaption>\n{figure.svg}</figure>")
    parts += [_html_table(table, caption) for caption, table in shown_.tables]
    parts.append(
        "<details><summary>All ratios and numbers</summary>\n"
        "<p>On the plots, which are logarithmic, the line is 1.</p>"
    )
    parts += [_html_ratios(path, ratios) for path, ratios in report.ratios().items()]
    parts += [_html_table(table, title(table.path)) for table in report.numbers()]
    return "\n".join([*parts, "</details>", "</section>"])


def _html_ratios(path: Path_, ratios: list[Ratio]) -> str:
    ends = [value for ratio in ratios for value in (ratio.median, ratio.low, ratio.high) if value]
    least, most = min([*ends, 0.5]), max([*ends, 2.0])
    rows = []
    for ratio in ratios:
        cells = (shown(value) if value is not None else "" for value in (ratio.median, ratio.low, ratio.high))
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        name = escape(ratio.path[-1].replace("_", " "))
        plot = _plot(ratio, least, most)
        rows.append(f'<tr><th scope="row">{name}</th>{numbers}<td>{plot}</td></tr>')
    head = "<tr><th>ratio</th><th>median</th><th>least</th><th>largest</th><th></th></tr>"
    return _html_rows(title(path) or "ratios", head, rows)


def _plot(ratio: Ratio, least: float, most: float) -> str:
    """A dot on a line from the least to the largest, logarithmic."""

    def x(value: float) -> float:
        share = (log10(max(value, least)) - log10(least)) / (log10(most) - log10(least))
        return round(6 + share * (_PLOT_WIDTH - 12), 1)

    middle = _PLOT_HEIGHT / 2
    low, high = ratio.low or ratio.median, ratio.high or ratio.median
    return (
        f'<svg width="{_PLOT_WIDTH}" height="{_PLOT_HEIGHT}" role="img" aria-label="{shown(ratio.median)}">'
        f'<line x1="{x(1)}" x2="{x(1)}" y1="0" y2="{_PLOT_HEIGHT}" stroke="currentColor" opacity="0.5"/>'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}" stroke="var(--mark)"'
        f' stroke-width="3" opacity="0.5"/>'
        f'<circle cx="{x(ratio.median)}" cy="{middle}" r="4" fill="var(--mark)"/></svg>'
    )


def _html_table(table: Table, caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(column.replace("_", " "))}</th>' for column in table.columns)
    rows = [
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in table.rows
    ]
    header = f"<tr><td></td>{head}</tr>" if any(table.columns) else ""
    return _html_rows(caption or "Numbers", header, rows)


def _html_rows(caption: str, head: str, rows: list[str]) -> str:
    lines = [f"<caption>{escape(caption)}</caption>", head, *rows]
    return "\n".join(['<div class="wide"><table>', *filter(None, lines), "</table></div>"])
