"""The documentation's page: claims, and a section for each result, with its charts in files beside it."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from .claims import Verdict
from .report import Report, Table
from .views import Section, section

__all__ = ["to_markdown"]

_MOST_ROWS = 24
"""Longer tables are folded."""
_INTRODUCTION = (
    "Made from `benchmarks/results` by `benchmarks/page.py`. Numbers are medians of rounds, with the least "
    "and the largest in brackets; only ratios say something about another machine. `make bench` measures on "
    "yours, `make bench BENCHMARKS=serving` one of them."
)
_ABOUT_CLAIMS = (
    "Each line has a target: to be no worse than what is used instead (1), or as much better as we set out "
    "to be; or to come within a tenth of what nothing can beat (0.9 or 1.1). It is met if all rounds are "
    "there, and partly met if some are. Of several peers or sizes the worst number is shown."
)


def to_markdown(
    reports: Sequence[Report], claims: Sequence[Verdict], folder: str
) -> tuple[str, Mapping[str, str]]:
    """The page, and its charts by their names in `folder`, which is beside it."""
    parts = ["# Benchmarks", _INTRODUCTION]
    if claims:
        parts += ["## Claims", _ABOUT_CLAIMS, _claims(claims)]
    figures: dict[str, str] = {}
    order = [claim.benchmark for claim in claims]
    there = (report for report in reports if not report.is_missing)
    for report in sorted(there, key=lambda report: [*order, report.name].index(report.name)):
        shown = section(report)
        parts += _section(shown, folder)
        figures |= {f"{figure.name}.svg": figure.svg for figure in shown.figures}
    return "\n\n".join(parts) + "\n", figures


def _claims(claims: Sequence[Verdict]) -> str:
    lines = ["| what | number | beside | target | met | by |", "|---|--:|---|--:|---|---|"]
    for verdict in claims:
        claim, met = verdict.claim, verdict.met
        beside = f"{claim.beside}; the worst: {verdict.worst}" if verdict.worst else claim.beside
        cells = [_text(claim.what), verdict.value, _text(beside), _target(claim.target)]
        cells += [
            met if met == "yes" else f"**{met}**",
            f"[{_text(verdict.benchmark)}](#{verdict.benchmark})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _target(text: str) -> str:
    return text.replace(">=", "≥").replace("<=", "≤")


def _section(shown: Section, folder: str) -> list[str]:
    report = shown.report
    parts = [f"## {report.name}"]
    if report.text:
        parts.append(_prose(report.text.partition("\n\n")[0]))
    if report.problem:
        return [*parts, f"**{_text(report.problem)}**"]
    parts.append(_how(report))
    failures = [
        f"- **{_text(' · '.join(path))} failed**: {_text(words)}" for path, words in report.failures()
    ]
    if failures:
        parts.append("\n".join(failures))
    for figure in shown.figures:
        parts.append(f"**{_text(figure.caption)}**")
        parts.append(f"![{re.sub(r'[_|<>*`]|[][]', ' ', figure.alt)}]({folder}/{figure.name}.svg)")
    for caption, table in shown.tables:
        if len(table.rows) > _MOST_ROWS:
            parts.append(_folded(caption, table))
        else:
            parts += [*([f"**{_text(caption)}**"] if caption else []), _table(table)]
    path = f"benchmarks/results/{report.name}.json"
    parts.append(f"All numbers are in [`{path}`](../{path}).")
    return parts


def _how(report: Report) -> str:
    """In one line, what is known of it."""
    values = report.values
    machine, ours = values.get("machine") or {}, values.get("graftserve") or {}
    cpus = machine.get("cpus")
    known = [
        str(values["date"])[:10] if values.get("date") else "",
        f"{cpus} CPU{'s' if cpus != 1 else ''}" + (f" ({machine['cpu']})" if machine.get("cpu") else "")
        if cpus
        else "",
        f"{machine['memory_gib']} GiB" if machine.get("memory_gib") else "",
        f"Python {machine['python']}" if machine.get("python") else "",
        f"graftserve {ours['version']} at {ours['commit']}" if ours.get("commit") else "",
        f"{values['rounds']} round{'s' if values['rounds'] != 1 else ''}" if values.get("rounds") else "",
    ]
    command = values.get("command") or f"python benchmarks/{report.name}.py --output benchmarks/results"
    return (
        ": ".join([f"`{command}`", *filter(None, [", ".join(_text(part) for part in known if part)])]) + "."
    )


def _table(table: Table) -> str:
    columns = [_text(_words(column)) for column in table.columns]
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|--:' * len(columns)}|"]
    lines += [
        f"| {' | '.join(_text(cell) for cell in (_words(name), *cells))} |" for name, cells in table.rows
    ]
    return "\n".join(lines)


def _folded(caption: str, table: Table) -> str:
    """As HTML without an empty line, which would end it."""
    rows = [("", *map(_words, table.columns)), *((_words(name), *cells) for name, cells in table.rows)]
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    summary = f"<summary>{escape(caption or 'Numbers')}</summary>"
    return "\n".join([f"<details>{summary}", "<table>", *lines, "</table>", "</details>"])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _prose(text: str) -> str:
    """With its code."""
    parts = text.split("`")
    return "`".join(part if place % 2 else _text(part) for place, part in enumerate(parts))


def _text(text: str) -> str:
    """Shown as it is by CommonMark and by Python-Markdown, which takes no backslash before <."""
    plain = re.sub(r"([\\|\[\]*_`])", r"\\\1", text.replace("\n", " "))
    return plain.replace("<", "&lt;").replace(">", "&gt;")
