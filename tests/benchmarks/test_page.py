"""The page of the benchmarks: every result is on it, and so is what failed or was not measured.

Claims, charts and numbers in prose are what the results hold.
"""

import json
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.pages.as_html import to_html
from benchmarks.pages.as_markdown import to_markdown
from benchmarks.pages.claims import Claim, verdicts
from benchmarks.pages.lookup import LookupFailedError, NotMeasuredError, find
from benchmarks.pages.plot import Line, Point, bars, lines
from benchmarks.pages.quotes import requote
from benchmarks.pages.report import Report, read_reports
from benchmarks.pages.views import section, views_of

_ROOT = Path(__file__).parents[2]
_RESULTS = sorted((_ROOT / "benchmarks" / "results").glob("*.json"))
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
    page = _Page(to_html(read_reports(*folders), []))
    for leaf in _leaves(_FAST):
        assert ("yes" if leaf is True else str(leaf)) in page.text


def test_a_ratio_has_its_ends_and_a_plot(folders: tuple[Path, Path]) -> None:
    page = _Page(to_html(read_reports(*folders), []))
    assert ["ours to theirs", "1.75", "1.5", "2.25", ""] in page.rows
    assert ["steps", "68.1", "", "", ""] in page.rows
    assert "svg" in page.tags


def test_ratios_come_before_numbers_and_not_again(folders: tuple[Path, Path]) -> None:
    (fast,) = (report for report in read_reports(*folders) if report.name == "fast")
    text = to_html([fast], [])
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
    page = _Page(to_html(read_reports(*folders), []))
    assert "peers · bad failed: does not install: no <release> fits" in page.text
    assert "peers · half · encode failed: takes no bytes" in page.text
    assert ["fast", "2 failed", "2026-01-02T03:04:05+00:00"] in page.rows


def test_what_was_not_measured_is_shown_as_such(folders: tuple[Path, Path]) -> None:
    reports = read_reports(*folders)
    assert [report.name for report in reports] == ["broken", "fast", "missing", "orphan"]
    page = _Page(to_html(reports, []))
    assert ["missing", "not measured yet", ""] in page.rows
    assert ["orphan", "measured", "not recorded"] in page.rows
    assert "broken.json cannot be read" in page.text
    assert "What missing measures." in page.text


def test_how_it_was_measured_is_there(folders: tuple[Path, Path]) -> None:
    page = _Page(to_html(read_reports(*folders), []))
    assert ["command", "python benchmarks/fast.py --output benchmarks/results"] in page.rows
    assert ["machine", "cpu A <fast> one, cpus 4, memory_gib 15.5"] in page.rows
    assert ["libraries", "numpy 2.3.4"] in page.rows
    assert ["rounds", "7"] in page.rows


def test_the_page_needs_nothing_else(folders: tuple[Path, Path]) -> None:
    text = to_html(read_reports(*folders), [])
    page = _Page(text)
    assert page.loaded == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert set(page.links) == {f"#{name}" for name in page.ids}


def test_the_markdown_has_what_was_measured_and_what_failed(folders: tuple[Path, Path]) -> None:
    text, figures = to_markdown(read_reports(*folders), [], "charts")
    lines_ = text.splitlines()
    assert "| ours to theirs | 1.75 (1.5–2.25) |" in lines_
    assert "| memory mb | 47, 48 |" in lines_
    assert "| ours to theirs · a | 0.5 | 0.25 |" in lines_
    assert "- **peers · bad failed**: does not install: no &lt;release&gt; fits" in lines_
    assert "## missing" not in lines_
    assert r"**broken.json cannot be read: " in text
    how = "2026-01-02, 4 CPUs (A &lt;fast&gt; one), 15.5 GiB, graftserve 0.1.0 at abc1234, 7 rounds."
    assert f"`python benchmarks/fast.py --output benchmarks/results`: {how}" in lines_
    assert figures == {}


def test_a_long_table_is_folded(folders: tuple[Path, Path]) -> None:
    rows = [{"name": f"row <{number}>", "a": number, "b": 0.5, "c": 2} for number in range(25)]
    text, _ = to_markdown([Report("long", "", {"rows": rows})], [], "charts")
    assert "<details><summary>rows</summary>" in text
    assert "<td>row &lt;24&gt;</td><td>row &lt;24&gt;</td><td>24</td>" in text
    assert "\n\n" not in text[text.index("<details>") : text.index("</details>")]


def test_points_of_a_benchmark_that_nobody_knows_are_a_curve() -> None:
    spread = {"median": 3.0, "min": 2.0, "max": 4.0}
    points = [{"work": 1, "cost": 1.5}, {"work": 10, "cost": spread}, {"work": 100, "cost": 30}]
    report = Report("unknown", "", {"curves": {"sorting": {"exponent": 1.1, "points": points}}})
    shown = section(report)
    (figure,) = shown.figures
    assert "sorting 30" in figure.alt
    root = ElementTree.fromstring(figure.svg)
    assert sum(element.tag.endswith("}circle") for element in root.iter()) == len(points)
    assert sum(element.attrib.get("class") == "whisker" for element in root.iter()) == 2  # and to the name
    assert [cells for _, table in shown.tables for cells in table.rows] == [
        ("sorting", ("1.5", "3 (2–4)", "30")),
        ("exponent", ("1.1",)),
    ]


def test_points_of_other_things_are_other_charts_and_nothing_breaks_them() -> None:
    curves = {
        "a": [{"n": 0, "ms": 1}, {"n": 1, "ms": 2}, {"n": 2, "ms": 3}],
        "b": [{"n": 0, "ms": 0}, {"n": 5, "ms": 2}, {"n": 9, "ms": 3}],
        "c": [
            {"rows": 1, "s": 1, "exponent": None},
            {"rows": 2, "s": 4, "min s": 1, "max s": 9, "exponent": 2},
            {"rows": 3, "s": 9, "exponent": 2},
        ],
        "no curve": [{"n": 1, "ms": 2}, {"n": 1}, {"x": 5}],
    }
    shown = section(Report("unknown", "", {"curves": curves}))
    assert [figure.caption for figure in shown.figures] == ["ms by n: curves", "s by rows: curves"]
    assert "n (logarithmic)" not in shown.figures[0].svg
    assert "rows (logarithmic)" in shown.figures[1].svg
    assert dict(shown.tables)["s by rows: curves"].rows == (("c", ("1", "4 (1–9)", "9")),)
    assert any("no curve" in caption for caption, _ in shown.tables)


@pytest.mark.parametrize("path", _RESULTS, ids=lambda path: path.stem)
def test_every_view_shows_something_of_the_result(path: Path) -> None:
    report = Report(path.stem, "", json.loads(path.read_text()))
    for view in views_of(report):
        assert [*view.figures(report), *view.tables(report)], view


def _places(svg: str, tag: str, *names: str) -> list[tuple[float, ...]]:
    found = (element for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}" + tag))
    return [tuple(float(element.attrib[name]) for name in names) for element in found]


def test_lines_are_where_their_numbers_are() -> None:
    line = Line("one", (Point(1, 10), Point(10, 100), Point(100, 1000)))
    (first, second, third) = _places(
        lines([line], "", "x", "y", log_x=True, log_y=True), "circle", "cx", "cy"
    )
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.2) != 0
    (first, second, third) = _places(lines([line], "", "x", "y"), "circle", "cx", "cy")
    assert (third[0] - first[0]) / (second[0] - first[0]) == pytest.approx(11, rel=0.01)
    assert (first[1] - third[1]) / (first[1] - second[1]) == pytest.approx(11, rel=0.02)


def test_what_no_logarithm_takes_is_left_out() -> None:
    line = Line("one", (Point(0, 10), Point(10, 0), Point(100, 5)))
    assert len(_places(lines([line], "", "x", "y", log_x=True, log_y=True), "circle", "cx")) == 1


def test_names_at_the_ends_of_lines_do_not_lie_on_each_other() -> None:
    series = [Line(f"line {number}", (Point(1, 5), Point(2, 100 + number / 10))) for number in range(15)]
    svg = lines(series, "", "x", "y")
    root = ElementTree.fromstring(svg)
    names = [e for e in root.iter() if e.tag.endswith("}text") and str(e.text).startswith("line ")]
    heights = sorted(float(name.attrib["y"]) for name in names)
    assert len(heights) == len(series)
    assert min(b - a for a, b in pairwise(heights)) >= 14
    assert heights[-1] < float(root.attrib["viewBox"].split()[3])


def test_bars_are_as_long_as_their_numbers() -> None:
    svg = bars({"": {"a": 10, "b": {"median": 40, "min": 30, "max": 50}}}, "", "ms", frozenset({"a"}))
    (_, one, other) = _places(svg, "rect", "width")
    assert other[0] == pytest.approx(4 * one[0], rel=0.01)
    assert svg == bars({"": {"a": 10, "b": {"median": 40, "min": 30, "max": 50}}}, "", "ms", frozenset({"a"}))


_REPORTS = {"fast": Report("fast", "", _FAST), "none": Report("none", "", {}, "not measured yet")}


def test_a_path_leads_to_values() -> None:
    assert find(_REPORTS, "fast/rows/engine=one,callers=8/per_s/ours") == {(): 43}
    assert find(_REPORTS, "fast/rows/callers=1/per_s/*") == {("ours",): 41, ("theirs",): 42}
    assert find(_REPORTS, "fast/memory_mb/*") == {("1",): 47, ("2",): 48}
    both = find(_REPORTS, "fast/rows/*/ours_to_theirs/a")
    assert both == {("one, callers 1",): 0.5, ("one, callers 8",): 0.25}
    slash = {"r": Report("r", "", {"a / b": {"x": 1}, "rows": [{"photo": "3 x 4, small", "ms": 2}]})}
    assert find(slash, "r/a / b/x") == {(): 1}
    assert find(slash, "r/rows/photo=3 x 4, small/ms") == {(): 2}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("fast/times_faster/stops", "expected 'stops' to be one of steps"),
        ("fast/rows/callers=2/per_s", "expected 'callers=2' to be one of one, callers 1, one, callers 8"),
        ("fast/rows/engine=one/per_s", "expected 'engine=one' to be one of"),  # two of them
        ("fast/rounds/more", "expected 'more' to be one of no keys"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_there_is(path: str, words: str) -> None:
    with pytest.raises(LookupFailedError, match=words):
        find(_REPORTS, path)


def test_what_was_not_measured_is_told_apart() -> None:
    for name in ("none", "other"):
        with pytest.raises(NotMeasuredError, match=f"there is no result {name}.json"):
            find(_REPORTS, f"{name}/x")


@pytest.mark.parametrize(
    ("path", "target", "met"),
    [
        ("fast/ours_to_theirs", ">= 1.5", "yes"),
        ("fast/ours_to_theirs", ">= 1.6", "partly"),
        ("fast/ours_to_theirs", ">= 2.3", "no"),
        ("fast/ours_to_theirs", "<= 2.25", "yes"),
        ("fast/ours_to_theirs", "<= 1.6", "partly"),
        ("fast/ours_to_theirs", "<= 1", "no"),
        ("fast/times_faster/steps", ">= 1", "yes"),
        ("fast/rows/*/ours_to_theirs/a", ">= 0.3", "no"),
        ("fast/rows/*/ours_to_theirs/a", "<= 0.3", "no"),
    ],
)
def test_a_claim_is_met_by_all_rounds_by_some_or_not(path: str, target: str, met: str) -> None:
    (verdict,), problems = verdicts(_REPORTS, [Claim(path, "what", "beside", target)])
    assert (verdict.met, problems) == (met, [])
    if "*" in path:
        assert (verdict.worst, verdict.value) == (
            ("one, callers 8", "0.25") if target.startswith(">") else ("one, callers 1", "0.5")
        )


def test_a_claim_without_a_result_is_left_out_and_one_that_leads_nowhere_is_said() -> None:
    claims = [Claim("none/x", "", "", ">= 1"), Claim("fast/x", "", "", ">= 1")]
    found, problems = verdicts(_REPORTS, claims)
    assert found == []
    assert len(problems) == 1
    assert problems[0].startswith("claim fast/x: expected 'x' to be one of ")


def test_claims_come_first_and_the_worst_is_named() -> None:
    claim = Claim("fast/rows/*/ours_to_theirs/a", "speed", "a peer", ">= 1")
    found, _ = verdicts(_REPORTS, [claim])
    text, _ = to_markdown([_REPORTS["fast"]], found, "charts")
    row = "| speed | 0.25 | a peer; the worst: one, callers 8 | ≥ 1 | **no** | [fast](#fast) |"
    assert text.index(row) < text.index("## fast")
    page = _Page(to_html([_REPORTS["fast"]], found))
    assert ["speed", "0.25", "a peer; the worst: one, callers 8", ">= 1", "no", "fast"] in page.rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.9<!-- fast/ours_to_theirs --> times", "1.8<!-- fast/ours_to_theirs --> times"),
        ("9<!-- fast/ours_to_theirs/max -->", "2<!-- fast/ours_to_theirs/max -->"),
        ("1<!-- sum fast/memory_mb/* -->", "95<!-- sum fast/memory_mb/* -->"),
        (
            "1.00<!-- least fast/rows/*/ours_to_theirs/a -->",
            "0.25<!-- least fast/rows/*/ours_to_theirs/a -->",
        ),
        ("1.0<!-- most fast/rows/*/ours_to_theirs/a -->", "0.5<!-- most fast/rows/*/ours_to_theirs/a -->"),
        (
            "1%<!-- fast/rows/callers=1/ours_to_theirs/a -->",
            "50%<!-- fast/rows/callers=1/ours_to_theirs/a -->",
        ),
        ("1%<!-- fast/ours_to_theirs above 1 -->", "75%<!-- fast/ours_to_theirs above 1 -->"),
        ("9<!-- fast/times_faster/steps times 100 -->", "6,810<!-- fast/times_faster/steps times 100 -->"),
        # Something is left of it.
        (
            "9<!-- fast/times_faster/steps times 0.0001 -->",
            "0.007<!-- fast/times_faster/steps times 0.0001 -->",
        ),
    ],
)
def test_a_number_in_prose_is_the_results(text: str, expected: str) -> None:
    assert requote(f"a 3 {text} b", _REPORTS) == (f"a 3 {expected} b", [])
    assert requote(expected, _REPORTS) == (expected, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1<!-- fast/x -->", "fast/x: expected 'x' to be one of"),
        ("1<!-- other/x -->", "other/x: there is no result other.json"),
        ("1<!-- fast/memory_mb/* -->", "expected sum, least or most before it, for 2 values"),
        ("1<!-- fast/peers/bad/error -->", "expected a number, got str"),
        ("1%<!-- fast/ours_to_theirs below 1 -->", "expected it to be below 1"),
        ("some<!-- fast/ours_to_theirs -->", "expected a number before it"),
    ],
)
def test_a_number_that_cannot_be_written_stays_and_is_said(text: str, problem: str) -> None:
    same, (said,) = requote(text, _REPORTS)
    assert same == text
    assert problem in said


def _run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(_ROOT / "benchmarks" / "page.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)


def test_the_sites_page_is_made_from_the_results_that_are_committed(tmp_path: Path) -> None:
    html, markdown = tmp_path / "new" / "index.html", tmp_path / "benchmarks.md"
    done = _run("--results", "benchmarks/results", "--output", html, "--markdown", markdown)
    assert done.returncode == 0, done.stderr
    docs = _ROOT / "docs"
    assert markdown.read_text() == (docs / "benchmarks.md").read_text()
    charts = {path.name: path.read_text() for path in (docs / "benchmarks").iterdir()}
    assert {path.name: path.read_text() for path in (tmp_path / "benchmarks").iterdir()} == charts
    assert {path.stem for path in _RESULTS} <= set(_Page(html.read_text()).ids)


def test_all_is_written_before_what_is_wrong_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prose, chart = tmp_path / "prose", tmp_path / "benchmarks" / "old-1.svg"
    for path in (prose, chart.parent):
        path.mkdir()
    chart.write_text("<svg/>")
    (prose / "page.md").write_text("1.00<!-- fast/ours_to_theirs --> and 1<!-- fast/x -->")
    done = _run("--results", folders[0], "--markdown", tmp_path / "benchmarks.md", "--prose", prose)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{prose / 'page.md'}: fast/x: expected 'x' to be one of")
    assert (prose / "page.md").read_text() == "1.75<!-- fast/ours_to_theirs --> and 1<!-- fast/x -->"
    assert "ours to theirs" in (tmp_path / "benchmarks.md").read_text()
    assert not chart.exists()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = _run("--results", tmp_path / "none", "--output", tmp_path / "x")
    assert done.returncode == 2
    assert "--results: expected a folder" in done.stderr
    done = _run("--results", tmp_path, "--prose", tmp_path / "none")
    assert done.returncode == 2
    assert "--prose: expected a file or a folder" in done.stderr
