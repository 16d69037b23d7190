"""Numbers in prose and claims are those of the results that are committed."""

import re
from pathlib import Path

import pytest

from benchmarks.pages.claims import verdicts
from benchmarks.pages.quotes import quoted, requote
from benchmarks.pages.report import read_reports

_ROOT = Path(__file__).parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").rglob("*.md"))]
_QUOTING = [page for page in _PAGES if quoted(page.read_text())]
_REPORTS = {
    report.name: report for report in read_reports(_ROOT / "benchmarks" / "results", _ROOT / "benchmarks")
}


def test_the_pages_that_speak_of_measurements_quote_them() -> None:
    names = {page.relative_to(_ROOT).as_posix() for page in _QUOTING}
    assert names >= {
        "README.md",
        "docs/client.md",
        "docs/explanation/batching.md",
        "docs/explanation/decoding.md",
    }


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(_ROOT).as_posix())
def test_numbers_are_those_of_the_results(page: Path) -> None:
    """`make bench-page` mends it."""
    text = page.read_text()
    new, problems = requote(text, _REPORTS)
    assert problems == []
    assert new == text


@pytest.mark.parametrize("page", _QUOTING, ids=lambda page: page.relative_to(_ROOT).as_posix())
def test_no_line_begins_with_a_comment(page: Path) -> None:
    """Which would end the paragraph."""
    assert not re.search(r"^ *<!-- (?!reference: )", page.read_text(), re.MULTILINE)


def test_every_claim_leads_to_a_number() -> None:
    found, problems = verdicts(_REPORTS)
    assert problems == []
    assert len(found) > 20
