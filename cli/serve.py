"""`graftserve serve`: the embedded server, or the real one, with tensorflow_model_server's flags."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from graftserve.serving.flags import FLAGS, VERSION_FLAG, Options, parse_args

from .output import CommandError, import_tensorflow, require_extra
from .runtime import RUNTIME_FLAG, choose, command_for, execute, take_runtime

__all__ = ["command"]


class _ServeCommand(click.Command):
    """Reads flags as tensorflow_model_server does (`--flag=value`, `--flag value`, `--flag`); shows them
    as click does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if {"-h", "--help"} & set(args):
            return super().parse_args(ctx, args)
        try:
            requested, args = take_runtime(args)
            runtime = choose(requested, args)
            if runtime.program:
                execute(command_for(runtime, args))
            values = parse_args(args)
            if values.get(VERSION_FLAG.name):
                _print_version(ctx)
            ctx.params["options"] = Options.from_flags(values)
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from error
        except OSError as error:
            raise CommandError(f"the server cannot be run: {error}") from error
        return []


def _print_version(ctx: click.Context) -> None:
    """As the real server words it, for scripts that read it."""
    try:
        library = version("tensorflow")
    except PackageNotFoundError:
        library = "not installed"
    click.echo(f"TensorFlow ModelServer: graftserve {version('graftserve')}\nTensorFlow Library: {library}")
    ctx.exit()


def _help_only(name: str, kind: type, default: Any, text: str) -> click.Option:
    shown = str(default).lower() if kind is bool else default
    return click.Option(
        [f"--{name}"],
        metavar="BOOLEAN" if kind is bool else {str: "TEXT", int: "INTEGER", float: "NUMBER"}[kind],
        help=text if default == "" else f"{text}  [default: {shown}]",
        expose_value=False,
    )


def _serve(options: Options) -> None:
    for package in ("cheroot", "grpc_health", "grpc_reflection", "prometheus_client"):
        require_extra(package, "serving")
    import_tensorflow("serving")
    from graftserve.serving.app import run

    click.get_current_context().exit(run(options))


command = _ServeCommand(
    "serve",
    callback=_serve,
    params=[
        _help_only(flag.name, flag.type, flag.default, flag.help)
        for flag in (RUNTIME_FLAG, *FLAGS, VERSION_FLAG)
    ],
    help="""Serve a model's versions over gRPC and REST, as tensorflow_model_server does.

    A version that appears in the model's folder is loaded while the one before keeps serving. SIGTERM and
    Ctrl-C let requests under way finish.

    \b
    Example:
      graftserve serve --model_name flowers --model_base_path models/flowers --rest_api_port 8501
    """,
    short_help="Serve a model's versions over gRPC and REST.",
)
