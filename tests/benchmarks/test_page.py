"""The page of the benchmarks: every result is on it, and so is what failed or was not measured."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import read_reports, to_html, to_markdown

_ROOT = Path(__file__).parents[2]
_SCRIPT = '''"""What {name} measures.

    python benchmarks/{name}.py --output benchmarks/results
"""

write_result(arguments.output, "{name}", result)
'''
_DESCRIPTION = {
    "command": "python benchmarks/fast.py --output benchmarks/results",
    "date": "2026-01-02T03:04:05+00:00",
    "graftserve": {"version": "0.1.0", "commit": "abc1234"},
    "machine": {"cpu": "A <fast> one", "cpus": 4, "memory_gib": 15.5},
    "libraries": {"numpy": "2.3.4"},
    "rounds": 7,
}
_FAST = {
    **_DESCRIPTION,
    "ours_to_theirs": {"median": 1.75, "min": 1.5, "max": 2.25},
    "times_faster": {"steps": 68.1},
    "rows": [
        {"engine": "one", "callers": 1, "per_s": {"ours": 41, "theirs": 42}, "ours_to_theirs": {"a": 0.5}},
        {"engine": "one", "callers": 8, "per_s": {"ours": 43, "theirs": 44}, "ours_to_theirs": {"a": 0.25}},
    ],
    "peers": {
        "good": {"ms": 45, "is_right": True},
        "bad": {"error": "does not install: no <release> fits"},
        "half": {"ms": 46, "error": {"encode": "takes no bytes"}},
    },
    "memory_mb": [47, 48],
}


class _Page(HTMLParser):
    """rows: the cells of each table's rows. loaded: what a browser would fetch. tags: all that there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag not in ("tr", "table"))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attrs:
            if name == "src" or (name == "href" and tag != "a"):
                self.loaded.append(str(value))
            elif name == "href":
                self.links.append(str(value))
            elif name == "id":
                self.ids.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Results and scripts: one was measured, one was not, one result is broken, and one has no script."""
    results, scripts = tmp_path / "results", tmp_path / "scripts"
    results.mkdir()
    scripts.mkdir()
    for name in ("fast", "missing", "broken"):
        (scripts / f"{name}.py").write_text(_SCRIPT.format(name=name))
    (scripts / "helper.py").write_text('"""No benchmark."""\n')
    (results / "fast.json").write_text(json.dumps(_FAST))
    (results / "broken.json").write_text("{")
    (results / "orphan.json").write_text(json.dumps({"images_per_s": 49}))
    return results, scripts


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [
            leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)
        ]
    return [value]


def test_every_value_is_on_the_page(folders: tuple[Path, Path]) -> None:
    page = _Page(to_html(read_reports(*folders)))
    for leaf in _leaves(_FAST):
        assert ("yes" if leaf is True else str(leaf)) in page.text


def test_a_ratio_has_its_ends_and_a_plot(folders: tuple[Path, Path]) -> None:
    page = _Page(to_html(read_reports(*folders)))
    assert ["ours to theirs", "1.75", "1.5", "2.25", ""] in page.rows
    assert ["steps", "68.1", "", "", ""] in page.rows
    assert "svg" in page.tags


def test_ratios_come_before_numbers_and_not_again(folders: tuple[Path, Path]) -> None:
    (fast,) = (report for report in read_reports(*folders) if report.name == "fast")
    text = to_html([fast])
    assert text.index("1.75") < text.index("per s")
    cells = [cell for table in fast.numbers() for _, row in table.rows for cell in row]
    assert not {"1.75", "68.1", "0.5", "0.25"} & set(cells)
    assert [path[-2:] for path in fast.ratios()] == [
        (),
        ("times_faster",),
        ("engine one, callers 1".removeprefix("engine "), "ours_to_theirs"),
        ("one, callers 8", "ours_to_theirs"),
    ]


def test_failed_peers_are_shown_as_such(folders: tuple[Path, Path]) -> None:
    page = _Page(to_html(read_reports(*folders)))
    assert "peers · bad failed: does not install: no <release> fits" in page.text
    assert "peers · half · encode failed: takes no bytes" in page.text
    assert ["fast", "2 failed", "2026-01-02T03:04:05+00:00"] in page.rows


def test_what_was_not_measured_is_shown_as_such(folders: tuple[Path, Path]) -> None:
    reports = read_reports(*folders)
    assert [report.name for report in reports] == ["broken", "fast", "missing", "orphan"]
    page = _Page(to_html(reports))
    assert ["missing", "not measured yet", ""] in page.rows
    assert ["orphan", "measured", "not recorded"] in page.rows
    assert "broken.json cannot be read" in page.text
    assert "What missing measures." in page.text


def test_how_it_was_measured_is_there(folders: tuple[Path, Path]) -> None:
    page = _Page(to_html(read_reports(*folders)))
    assert ["command", "python benchmarks/fast.py --output benchmarks/results"] in page.rows
    assert ["machine", "cpu A <fast> one, cpus 4, memory_gib 15.5"] in page.rows
    assert ["libraries", "numpy 2.3.4"] in page.rows
    assert ["rounds", "7"] in page.rows


def test_the_page_needs_nothing_else(folders: tuple[Path, Path]) -> None:
    text = to_html(read_reports(*folders))
    page = _Page(text)
    assert page.loaded == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert set(page.links) == {f"#{name}" for name in page.ids}


def test_the_markdown_has_ratios_and_failures(folders: tuple[Path, Path]) -> None:
    lines = to_markdown(read_reports(*folders)).splitlines()
    assert "| ours to theirs | 1.75 | 1.5 | 2.25 |" in lines
    assert "| rows · one, callers 8 · ours to theirs · a | 0.25 |  |  |" in lines
    assert r"- **peers · bad failed**: does not install: no \<release\> fits" in lines
    assert "**not measured yet**" in lines
    assert "| date | 2026-01-02T03:04:05+00:00 |" in lines


def test_the_sites_page_is_made_from_the_results_that_are_committed(tmp_path: Path) -> None:
    command = [sys.executable, str(_ROOT / "benchmarks" / "page.py"), "--results", "benchmarks/results"]
    command += ["--output", str(tmp_path / "new" / "index.html"), "--markdown", str(tmp_path / "page.md")]
    subprocess.run(command, check=True, cwd=_ROOT, capture_output=True)
    assert (tmp_path / "page.md").read_text() == (_ROOT / "docs" / "benchmarks.md").read_text()
    names = {path.stem for path in (_ROOT / "benchmarks" / "results").glob("*.json")}
    assert names <= set(_Page((tmp_path / "new" / "index.html").read_text()).ids)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    command = [sys.executable, str(_ROOT / "benchmarks" / "page.py"), f"--results={tmp_path / 'none'}"]
    done = subprocess.run([*command, f"--output={tmp_path / 'x'}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--results: expected a folder" in done.stderr
