"""Every command, from click: its usage, what it says of itself, its options."""

import inspect
from collections.abc import Iterator

import click

from graftserve.cli.app import cli

from .markdown import code, heading, prose, table

__all__ = ["render"]


def render() -> str:
    return "\n\n".join(_describe(cli, "graftserve", parent=None))


def _describe(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    path = context.command_path
    yield heading(max(2, path.count(" ") + 1), path)
    yield from _help(command.help or "")
    if not isinstance(command, click.Group):
        usage = command.get_usage(context).removeprefix("Usage: ")
        yield f"```text\n{' '.join(usage.split())}\n```"
    options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
    records = [option.get_help_record(context) for option in options]
    rows = [(code(record[0]), prose(record[1])) for record in records if record]
    yield table(("option", "what it does"), rows)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            if found is None:
                raise LookupError(f"{path} lists {inner}, which it does not have")
            yield from _describe(found, inner, context)


def _help(text: str) -> Iterator[str]:
    """The paragraphs of a help text; what follows click's backspace character is kept line by line."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if not paragraph.startswith("\b\n"):
            yield prose(paragraph)
            continue
        title, colon, rest = paragraph.removeprefix("\b\n").partition(":")
        if title not in ("Example", "Examples") or not colon:
            yield "\n".join(["```text", *paragraph.splitlines()[1:], "```"])
            continue
        examples = [line.strip() for line in rest.splitlines() if line.strip()]
        yield "\n".join(["```sh", *examples, "```"])
