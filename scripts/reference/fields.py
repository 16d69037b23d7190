"""What docstrings say of fields, in this project's way: "name: what it means." or "name, other: ..."."""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Field", "described", "introduction", "read_dataclass", "summary"]


@dataclass(frozen=True)
class Field:
    """Of a dataclass that is read from its source. type, default: as they are written there; "" for none."""

    name: str
    type: str
    default: str
    meaning: str


def described(docstring: str, names: Iterable[str]) -> dict[str, str]:
    """What the docstring says of each name; "" where it does not name it at all.

    A name without a place of its own refers to the one whose description mentions it.
    """
    names = list(names)
    entries = list(_entries(docstring, names))
    found = {name: text for group, text in entries for name in group}
    for name in names:
        if name not in found:
            at = [group[0] for group, text in entries if re.search(rf"\b{name}\b", text)]
            found[name] = f"see `{at[0]}`" if at else ""
    return {name: found[name] for name in names}


def introduction(docstring: str, names: Iterable[str]) -> str:
    """What stands before the first description."""
    first = _pattern(names).search(docstring)
    return " ".join(docstring[: first.start() if first else None].split())


def summary(docstring: str | None) -> str:
    """The first paragraph."""
    return " ".join((docstring or "").strip().split("\n\n")[0].split())


def read_dataclass(path: Path, name: str) -> tuple[str, list[Field]]:
    """The introduction and the fields of a dataclass, without importing its module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    lines: Mapping[str, ast.AnnAssign] = {
        node.target.id: node
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    docstring = ast.get_docstring(found) or ""
    meanings = described(docstring, lines)
    constants = {
        target.id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return introduction(docstring, lines), [
        Field(
            key,
            ast.unparse(line.annotation),
            "" if line.value is None else constants.get(default := ast.unparse(line.value), default),
            meanings[key],
        )
        for key, line in lines.items()
    ]


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    name = "|".join(map(re.escape, names))
    return re.compile(rf"(?:^\s*|(?<=[.;)]\s)\s*)((?:{name})(?:, (?:{name}))*):\s", re.MULTILINE)


def _entries(docstring: str, names: Iterable[str]) -> Iterable[tuple[list[str], str]]:
    matches = list(_pattern(names).finditer(docstring))
    ends = [*(match.start() for match in matches), len(docstring)][1:]
    for match, end in zip(matches, ends, strict=False):
        text = re.split(r"\n\s*\n|^\s*(?:Raises|Source)\b", docstring[match.end() : end], flags=re.MULTILINE)
        yield match[1].split(", "), " ".join(text[0].split()).rstrip(";.")
