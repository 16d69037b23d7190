"""Plain text as Markdown that shows it as it is, and tables."""

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["code", "heading", "prose", "table"]

_SPECIAL = re.compile(r"([\\*_\[\]{}|#])")
# What is code already, and what is to be: --options, and names_with_an_underscore.
_CODE = re.compile(r"`([^`]+)`|((?<![\w-])--[a-z][\w-]*|(?<![\w.-])[\w.]*[A-Za-z0-9]_\w+(?:\.\w+)*)")


def code(text: str) -> str:
    """As code, in tables too: Python-Markdown does not end a cell at a pipe between backticks."""
    return f"`{text}`" if text else ""


def prose(text: str) -> str:
    """A paragraph of a docstring or a help text: what is in backticks, options and names are code."""
    parts = []
    end = 0
    for match in _CODE.finditer(text):
        parts += [_plain(text[end : match.start()]), code(match[1] or match[2])]
        end = match.end()
    return " ".join("".join([*parts, _plain(text[end:])]).split())


def heading(level: int, text: str) -> str:
    return f"{'#' * level} {text}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown; a column without any content is left out."""
    rows = list(rows)
    used = [index for index, name in enumerate(header) if not index or any(row[index] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line[index] for index in used)} |" for line in lines)


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", html.escape(text, quote=False))
