"""What the documentation says of the results, and all of them as one page that needs nothing else.

    python benchmarks/page.py --results benchmarks/results --output build/bench/index.html
    python benchmarks/page.py --results benchmarks/results --markdown docs/benchmarks.md \\
      --prose README.md docs

The HTML has no scripts, loads nothing, and holds every number; what failed, and benchmarks without a result,
are shown as such. The Markdown, for the documentation's site, has claims, charts and compact tables; its
charts go into the folder beside it that has its name. Numbers in prose that name where they are from are
written anew (pages/quotes.py). Claims are in pages/claims.py, what is shown of a benchmark in pages/views.py.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from pages.as_html import to_html
from pages.as_markdown import to_markdown
from pages.claims import verdicts
from pages.quotes import requote
from pages.report import read_reports


def main() -> None:
    """Write all of it, then say what is wrong with claims and prose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of results")
    parser.add_argument("--output", type=Path, help="HTML file")
    parser.add_argument("--markdown", type=Path, help="Markdown file")
    parser.add_argument(
        "--prose", type=Path, nargs="+", default=[], help="Markdown files, and folders of them"
    )
    arguments = parser.parse_args()
    if not (arguments.output or arguments.markdown or arguments.prose):
        parser.error("expected --output, --markdown or --prose")
    if not arguments.results.is_dir():
        parser.error(f"--results: expected a folder, got {arguments.results}")
    for path in arguments.prose:
        if not path.exists():
            parser.error(f"--prose: expected a file or a folder, got {path}")
    reports = read_reports(arguments.results, Path(__file__).parent)
    by_name = {report.name: report for report in reports}
    claims, problems = verdicts(by_name)
    if arguments.output:
        _write(arguments.output, to_html(reports, claims))
    if arguments.markdown:
        folder = arguments.markdown.with_suffix("")
        text, figures = to_markdown(reports, claims, folder.name)
        _write(arguments.markdown, text)
        for name, svg in figures.items():
            _write(folder / name, svg)
        for stale in set(folder.glob("*.svg")) - {folder / name for name in figures}:
            stale.unlink()
    for path in _pages(arguments.prose):
        text, wrong = requote(path.read_text(), by_name)
        if text != path.read_text():
            _write(path, text)
        problems += [f"{path}: {words}" for words in wrong]
    if problems:
        sys.exit("\n".join(problems))


def _pages(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(path.rglob("*.md")) if path.is_dir() else [path]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
