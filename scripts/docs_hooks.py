"""What MkDocs calls while it builds the site: the reference, and links to files that are not in it.

A page links to a file of the repository as a Git host wants it, `[the base](../k8s/base/services.yaml)`. On
the site that becomes a link below `repo_url`; without one in mkdocs.yml, the words and the path remain.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from reference import SECTIONS  # beside this file, which is where MkDocs looks

_log = get_plugin_logger("repository")

_ROOT = Path(__file__).resolve().parents[1]
_REFERENCE = re.compile(r"^<!-- reference: (.+) -->$", re.MULTILINE)
_TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_CODE = re.compile(r"`[^`\n]+`")
# Code first: what looks like a link in it is none.
_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]+`)|\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)", re.M | re.S
)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def link(match: re.Match[str]) -> str:
        return match[0] if match["code"] else _link(match, page, config)

    markdown = _TABLE_ROW.sub(lambda row: _CODE.sub(_unescape_pipes, row[0]), markdown)
    return _REFERENCE.sub(lambda match: _section(match[1], page), _LINK.sub(link, markdown))


def _unescape_pipes(code: re.Match[str]) -> str:
    """A pipe in a table's code: a Git host wants it escaped, Python-Markdown would show the backslash."""
    return code[0].replace("\\|", "|")


def _section(name: str, page: Page) -> str:
    if name not in SECTIONS:
        raise PluginError(f"{page.file.src_uri}: there is no reference {name!r}, only {', '.join(SECTIONS)}")
    return SECTIONS[name]()


def _link(match: re.Match[str], page: Page, config: MkDocsConfig) -> str:
    target = urlsplit(match["target"])
    here = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    path = posixpath.normpath(posixpath.join(here, target.path))
    if target.scheme or target.netloc or not target.path or path.startswith("docs/"):
        return match[0]  # MkDocs' own to check
    if path.startswith("../") or not (_ROOT / path).exists():
        _log.warning(
            "%s: the link to %s leads to no file of the repository", page.file.src_uri, match["target"]
        )
        return match[0]
    if not config.repo_url:
        name = f"`{path}`"
        return name if match["text"].strip("`") == path else f"{match['text']} ({name})"
    kind = "tree" if (_ROOT / path).is_dir() else "blob"
    anchor = f"#{target.fragment}" if target.fragment else ""
    return f"[{match['text']}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor})"
