"""The site: it builds strictly, offline, shows what a Git host shows, and its reference is complete."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import click
import pytest

from graftserve.cli.app import cli
from graftserve.client.wire.contract import SIGNATURE_OUTPUTS
from graftserve.serving.errors import Code
from graftserve.serving.flags import FLAGS, UNUSED
from graftserve.serving.metrics import Metrics
from graftserve.training.recipe import Augmentation, Head, PseudoLabels, Recipe, Stage
from tests.serving.containers import METRICS

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
_PAGES = sorted(path.relative_to(_DOCS).with_suffix("").as_posix() for path in _DOCS.rglob("*.md"))
_REFERENCE = [name for name in _PAGES if name.startswith("reference/")]

pytest.importorskip("mkdocs", reason="needs the extra docs")

# Building: no network, and no TensorFlow.
_BUILD = """
import socket, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(f"the build asks the network: {event} {args}")
sys.addaudithook(refuse)
from mkdocs.__main__ import cli
try:
    cli(sys.argv[1:], prog_name="mkdocs")
finally:
    assert "tensorflow" not in sys.modules
"""


def _build(root: Path, site: Path, config: str = "mkdocs.yml") -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-c", _BUILD, "build", "--strict", "-f", config, "--site-dir", str(site)]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    return subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = _build(_ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


class _Html(HTMLParser):
    """words: of the text. rows: of all tables, each cell as text. tags: how many of each.
    loaded: what a browser fetches to show it. links: where its text leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: dict[str, int] = {}
        self.loaded: list[str] = []
        self.links: list[str] = []
        self._text: list[str] = []
        self._is_permalink = self._is_in_cell = False
        self.feed(text)
        self.words = "".join(self._text).split()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._is_permalink = values.get("class") == "headerlink"
        if self._is_permalink:
            return
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._is_in_cell = True
        elif tag == "a":
            self.links.append(values.get("href", ""))
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])

    def handle_endtag(self, tag: str) -> None:
        self._is_permalink = False
        if tag in ("td", "th"):
            self._is_in_cell = False

    def handle_data(self, data: str) -> None:
        if not self._is_permalink:
            self._text.append(data)
            if self._is_in_cell:
                self.rows[-1][-1] += data


def _article(site: Path, name: str) -> _Html:
    """What a page says, without what is around it on every page."""
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    return _Html(text[text.index("<article") : text.index("</article>")])


def _first_cells(site: Path, name: str) -> list[str]:
    return [row[0] for row in _article(site, name).rows]


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    assert "index" in _PAGES
    for name in _PAGES:
        loaded = _Html((site / f"{name}.html").read_text(encoding="utf-8")).loaded
        assert len(loaded) >= 2, name  # a style and a script at least
        for address in loaded:
            assert ":" not in address, f"{name}: {address}"
            assert not address.startswith("/"), f"{name}: {address}"
            assert (site / name).parent.joinpath(address.partition("?")[0]).is_file(), f"{name}: {address}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert "@import" not in text
        assert "url(http" not in text


@pytest.mark.parametrize("name", [name for name in _PAGES if name not in _REFERENCE])
def test_a_page_shows_what_a_git_host_shows(site: Path, name: str) -> None:
    """Python-Markdown reads lists and escapes otherwise than CommonMark; pages keep to what both read."""
    markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    there = _Html(parser.render((_DOCS / f"{name}.md").read_text(encoding="utf-8")))
    here = _article(site, name)
    assert here.words == there.words
    for tag in ("h1", "h2", "h3", "p", "ul", "ol", "li", "pre", "table", "tr", "td", "strong", "em"):
        assert here.tags.get(tag, 0) == there.tags.get(tag, 0), tag


@pytest.mark.parametrize("figure", sorted(_DOCS.rglob("*.svg")), ids=lambda path: path.stem)
def test_a_figure_stands_alone_on_any_background(figure: Path) -> None:
    """It is shown as an image, which knows nothing of the page's colours and may load nothing."""
    text = figure.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    _, _, width, height = root.attrib["viewBox"].split()
    card = next(child for child in root if child.tag.endswith("}rect"))
    assert card.attrib.items() >= {"class": "card", "width": width, "height": height}.items()
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"href|src=|<script|@import|url\((?!#)", text)
    shown = [
        alt
        for page in (_ROOT / "README.md", *_DOCS.rglob("*.md"))
        for alt, link in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        if (page.parent / link).resolve() == figure
    ]
    assert shown
    assert all(len(alt.split()) > 5 for alt in shown)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_documents_beside_the_site_lead_somewhere(site: Path, document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (_ROOT / document).read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if not name.startswith("https:"):
            assert (_ROOT / name).is_file(), link
            if anchor:
                page = site / Path(name).relative_to("docs").with_suffix(".html")
                assert f'id="{anchor}"' in page.read_text(encoding="utf-8"), link


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the site is made of, to change."""
    for part in ("benchmarks/results", "docs", "examples", "scripts"):
        shutil.copytree(_ROOT / part, tmp_path / part)
    for part in ("mkdocs.yml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(_ROOT / part, tmp_path)
    return tmp_path


def test_links_to_files_outside_lead_to_the_repository_once_it_has_an_address(copy: Path, site: Path) -> None:
    page = _article(site, "index")
    assert "README.md" in page.words
    assert not any("README.md" in link for link in page.links)
    with (copy / "mkdocs.yml").open("a") as file:
        file.write("repo_url: https://git.example/graftserve/\n")
    done = _build(copy, copy / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "https://git.example/graftserve/blob/main/README.md" in _article(copy / "site", "index").links


def test_what_is_broken_ends_the_build(copy: Path) -> None:
    (copy / "docs/forgotten.md").write_text("# Nowhere in the navigation\n")
    (copy / "docs/training.md").write_text(
        "# T\n[a](nothing.md) [b](#nothing) [c](export.md#nothing) [d](../nothing.md) [e](../../nothing)\n"
    )
    done = _build(copy, copy / "site")
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    for fault in ("nothing.md'", "'#nothing'", "export.md#nothing", "../nothing.md", "../../nothing"):
        assert any(fault in line and "training.md" in line for line in warnings), (fault, done.stderr)
    assert "forgotten.md" in done.stderr

    (copy / "docs/training.md").write_text("# T\n\n<!-- reference: everything -->\n")
    done = _build(copy, copy / "site")
    assert done.returncode != 0
    assert "training.md: there is no reference 'everything'" in done.stderr
    assert "Traceback" not in done.stderr


# The reference has everything


def _commands(
    command: click.Command, path: str, parent: click.Context | None
) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _commands(found, f"{path} {name}", context)


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    text = (site / "reference/commands.html").read_text(encoding="utf-8")
    found: dict[str, _Html] = {}
    for part in text[text.index("<article") : text.index("</article>")].split("<h")[1:]:
        if part[0] in "23":
            heading, _, rest = part.partition(">")[2].partition("<a ")
            found[heading] = _Html(rest.partition("</h")[2])
    commands = dict(_commands(cli, "graftserve", None))
    assert list(found) == list(commands)
    assert len(commands) > 20
    for path, command in commands.items():
        words = found[path].words
        for param in command.params:
            if isinstance(param, click.Option):
                cells = [row[0].replace(",", " ").split() for row in found[path].rows]
                for option in (*param.opts, *param.secondary_opts):
                    options = {word for cell in cells for part in cell for word in part.split("/")}
                    assert option in options, f"{path} {option}"
                text = " ".join((param.help or "").replace("`", "").split())
                assert text
                assert text in " ".join(words), f"{path} {param.opts}: {text}"
            else:
                assert param.make_metavar(click.Context(command)) in words, f"{path} {param.name}"


def test_every_setting_of_a_recipe_is_in_the_reference(site: Path) -> None:
    rows = {row[0]: row for row in _article(site, "reference/recipe").rows if row[0] != "setting"}
    groups: dict[str, Any] = {
        "": Recipe,
        "head.": Head,
        "augmentation.": Augmentation,
        "pseudo_labels.": PseudoLabels,
        "stages.N.": Stage,
    }
    nested = {prefix.split(".")[0] for prefix in groups}
    expected = {
        prefix + field.name: field
        for prefix, kind in groups.items()
        for field in dataclasses.fields(kind)
        if prefix or field.name not in nested
    }
    assert list(rows) == list(expected)
    for key, field in expected.items():
        _, kind, default, _, meaning = rows[key]
        assert kind, key
        assert meaning, key
        if field.default is not dataclasses.MISSING:
            assert default.strip('"[]').lower() == str(field.default).strip("()").lower(), key


def test_every_flag_is_in_the_reference(site: Path) -> None:
    names = _first_cells(site, "reference/flags")
    expected = {"flag", "--runtime", "--version", *(f"--{flag.name}" for flag in FLAGS)}
    assert set(names) == expected | {f"--{name}" for name in UNUSED}


def test_every_metric_is_in_the_reference(site: Path) -> None:
    rows = {row[0]: row for row in _article(site, "reference/metrics").rows[1:]}
    told = {
        line.split()[2]: line.split()[3]
        for line in Metrics().render().decode().splitlines()
        if line.startswith("# TYPE")
    }
    assert set(told) <= set(rows)
    for name, kind in told.items():
        assert rows[name][1] == kind
        assert rows[name][3]
    # The tests of dashboards and alerts hold these, and their labels, against servers that run.
    for name, labels in METRICS.items():
        family = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        row = rows.get(name) or rows.get(family)
        if name != "up":  # Prometheus' own
            assert row, name
            assert set(row[2].split(", ")) - {""} == labels - {"le"}, name


def _errors(package: str) -> set[str]:
    """Public exceptions of a package: those of its `errors`, and those that it names itself."""
    modules: list[ModuleType] = [importlib.import_module(f"graftserve.{package}")]
    if any(info.name == "errors" for info in pkgutil.iter_modules(modules[0].__path__)):
        modules.append(importlib.import_module(f"graftserve.{package}.errors"))
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }


@pytest.mark.parametrize("package", ["client", "export", "k8s.rollout", "training"])
def test_every_error_is_in_the_reference(site: Path, package: str) -> None:
    errors = _errors(package)
    assert len(errors) > 5
    assert errors <= set(_first_cells(site, "reference/errors"))


def test_every_status_code_is_in_the_reference(site: Path) -> None:
    assert {code.name for code in Code} <= set(_first_cells(site, "reference/errors"))


def test_every_signature_is_in_the_reference(site: Path) -> None:
    rows = {row[0]: row[2] for row in _article(site, "reference/contract").rows[: 1 + len(SIGNATURE_OUTPUTS)]}
    for name, outputs in SIGNATURE_OUTPUTS.items():
        for output in outputs:
            assert output in rows[name]


@pytest.mark.slow
def test_the_contract_that_is_written_has_the_keys_of_the_reference(site: Path, exported: Any) -> None:
    document = json.loads((exported.path / "assets.extra/contract.json").read_text())
    cells = set(_first_cells(site, "reference/contract"))
    assert set(document) <= cells
    for part in ("preprocess", "batching"):
        assert set(document[part]) - {"revision"} <= cells
