"""The options of every command that talks to a server."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["connection_options"]

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def connection_options(command: CommandT) -> CommandT:
    """Add --target, --model, --version and --timeout-s."""
    options = (
        click.option(
            "--target", default="localhost:8500", show_default=True, help="gRPC address of the server."
        ),
        click.option("--model", required=True, help="Name of the model."),
        click.option(
            "--version", type=click.IntRange(min=0), help="Ask this version.  [default: the latest]"
        ),
        click.option(
            "--timeout-s",
            type=click.FloatRange(min=0, min_open=True),
            default=60.0,
            show_default=True,
            help="Seconds that a call may take, retries included.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
