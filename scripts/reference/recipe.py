"""The settings of a recipe: key as `--set` takes it, type, default, range, meaning."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from graftserve.training.recipe import Recipe

from .fields import described, introduction
from .markdown import code, heading, prose, table

__all__ = ["render"]

_TYPES: Mapping[Any, str] = MappingProxyType(
    {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
)
_HEADER = ("setting", "type", "default", "range", "meaning")


def render() -> str:
    return "\n\n".join(_describe(Recipe, prefix="", title=""))


def _describe(kind: type[Any], prefix: str, title: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    docstring = inspect.getdoc(kind) or ""
    fields = dataclasses.fields(kind)
    meanings = described(docstring, hints)
    ranges = _ranges(kind)
    intro = introduction(docstring, hints)
    if title:
        yield heading(2, title)
    yield prose(intro)
    rows = []
    nested = []
    for field in fields:
        hint = hints[field.name]
        parts = (hint, *typing.get_args(hint))
        inner: Any = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        if inner:
            number = "" if inner is hint else ".N"
            nested.append((inner, f"{field.name}{number}.", f"{field.name}{number}"))
            continue
        meaning = meanings[field.name]
        if not meaning and f"`{field.name}`" not in intro:
            raise LookupError(f"{kind.__name__}: its docstring says nothing of {field.name}")
        rows.append(
            (
                code(prefix + field.name),
                prose(_type(hint)),
                code(_default(field)),
                prose(ranges.get(field.name, "")),
                prose(meaning or "see above"),
            )
        )
    yield table(_HEADER, rows)
    for inner, inner_prefix, inner_title in nested:
        yield from _describe(inner, inner_prefix, inner_title)


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list: {_type(typing.get_args(hint)[0])}"
    return _TYPES[hint]


def _default(field: "dataclasses.Field[Any]") -> str:
    """As TOML writes it; "" for a setting that must be given."""
    value = field.default
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def _ranges(kind: type[Any]) -> dict[str, str]:
    """What the checks of `__post_init__` say they expect, by setting."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__post_init__)))
    calls = (
        [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_check"
    )
    return {str(key).rpartition(".")[2]: str(expected) for key, expected in calls}
