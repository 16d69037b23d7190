"""Recipes from TOML files: the ones that come with graftserve, the user's own, and settings on top.

load_recipe("two-stage", "flowers/", ["stages.1.unfreeze=mixed6", "batch_size=16"])
"""

import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .recipe import DEFAULT_RECIPE, Recipe, nearest

__all__ = ["describe_recipe", "load_recipe", "recipe_names"]


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with graftserve, the default one first."""
    folder = files(__package__) / "recipes"
    names = sorted(
        path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml")
    )
    return tuple(sorted(names, key=lambda name: name != DEFAULT_RECIPE))


def describe_recipe(name: str) -> str:
    """The first line of a recipe's header: what it does."""
    return _text(name)[1].lstrip("# ").partition("\n")[0]


def load_recipe(
    name: str, data_dir: str, settings: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe `name` (one of `recipe_names`, or a .toml file) on `data_dir`.

    settings: "key=value" with a dotted key, as in "head.dropout=0.3" or "stages.0.epochs=5"; a key of a
        stage without its number, "stages.epochs=5", is for every stage, "stages.-1.epochs=5" for the last.
        The value is TOML; text may go without quotes.
    flags: keys, dotted alike, to values as they are; they win over the settings, which win over the file.
    Raises RecipeError for a file that is not there or no TOML, an unknown key, or a value out of its range.
    """
    label, text = _text(name)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name}: not a TOML file: {error}") from error
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {setting}: expected key=value, as in --set batch_size=16")
        _put(values, key.strip(), _parse(value.strip()))
    for key, value in (flags or {}).items():
        _put(values, key, value)
    return Recipe.from_dict(values | {"data_dir": data_dir, "recipe": label})


def _text(name: str) -> tuple[str, str]:
    """A recipe's name and the text of its file."""
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: not a TOML file: {error}") from error
    if name not in recipe_names():
        raise RecipeError(
            f"recipe {name!r}: there is none, and it is no .toml file{nearest(name, recipe_names())}"
        )
    return name, (files(__package__) / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables; what does not exist yet is made, and checked when it is built."""
    *path, last = key.split(".")
    if path[:1] == ["stages"] and "stages" not in values:
        raise RecipeError(f"{key}: the recipe has no stages; choose one that fine-tunes, such as two-stage")
    where: Any = values
    for index, part in enumerate(path):
        if isinstance(where, list):
            if not part.removeprefix("-").isdecimal():
                for element in where:
                    _put(element, ".".join([*path[index:], last]), value)
                return
            if not -len(where) <= int(part) < len(where):
                raise RecipeError(f"{key}: expected a number below {len(where)}, got {part}")
            where = where[int(part)]
        else:
            where = where.setdefault(part, {})
        if not isinstance(where, dict | list):
            raise RecipeError(f"{key}: {part} is no table")
    if isinstance(where, list):
        if last.removeprefix("-").isdecimal():
            raise RecipeError(f"{key}: expected a setting of the stage, as in {key}.epochs")
        for element in where:
            element[last] = value
    else:
        where[last] = value
