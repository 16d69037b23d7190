"""`graftserve status`: a model's versions on a running server."""

import json

import click

from graftserve.client import Client, VersionState

from .connection import Connection, connection_options

__all__ = ["command"]


@click.command("status")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    target: str,
    model: str,
    version: int | None,
    timeout_s: float,
    as_json: bool,
    connection: Connection,
) -> None:
    """Show a model's versions on a running server, the latest first.

    The exit status is 0 if one of them is available, 1 if none is.

    \b
    Example: graftserve status --target localhost:8500 --model flowers
    """
    arguments = connection.client_arguments()
    with Client(target, model, version=version, timeout_s=timeout_s, **arguments) as client:
        versions = client.status()
    if as_json:
        rows = [
            {
                "version": status.version,
                "state": status.state,
                "error_code": status.error_code,
                "error_message": status.error_message,
            }
            for status in versions
        ]
        click.echo(json.dumps({"target": target, "model": model, "versions": rows}, ensure_ascii=False))
    else:
        for status in versions:
            error = f"  {status.error_code}: {status.error_message}" if status.error_message else ""
            click.echo(f"{model}  version {status.version}  {status.state}{error}")
    if not any(status.state is VersionState.AVAILABLE for status in versions):
        click.get_current_context().exit(1)
