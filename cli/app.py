"""The command group: subcommands come in when they are called, errors go out as one line.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout, all else to stderr.
"""

import importlib
import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import click

from .output import CommandError

__all__ = ["main"]

_FAILED, _INTERRUPTED = 1, 128 + signal.SIGINT

# Name: what the overview says of it. The module `graftserve.cli.<name>` holds the click command `command`;
# it is imported when the command is called, so that help needs nothing but click.
_COMMANDS = {
    "train": "Fine-tune a backbone on a folder of class folders.",
    "evaluate": "Judge a run on images it has not seen.",
    "features": "Write what a backbone says of each image to a table.",
    "dataset": "Look into a dataset, or pack it into TFRecord shards.",
    "cache": "Show or prune the features kept between runs.",
    "export": "Publish a run, a Keras model or a SavedModel as a version that a server can load.",
    "verify": "Check a version offline, or replay its goldens against a server.",
    "tune": "Choose a version's batching by measuring on this machine.",
    "compare": "Show where two versions of a model disagree.",
    "pull": "Fetch a version from an object store, every sum checked.",
    "serve": "Serve a model's versions over gRPC and REST.",
    "rollout": "Bring a version into service, on a server or in an overlay, compared with the one before.",
    "classify": "Classify images on a running server.",
    "bench": "Measure throughput and latency of a running server under load.",
    "status": "Show a model's versions on a running server.",
    "k8s": "Show the Kubernetes manifests, or render them.",
    "rehearsal": "Take a canary up and back behind a real Envoy, and abort a bad one, without a cluster.",
    "demo": "Do all of it on handwritten digits, and report.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".{cmd_name}", __package__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="graftserve", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks, and what TensorFlow has to say.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """From a folder of labelled photos to production inference, in TensorFlow."""
    ctx.obj = debug
    _set_up_logging(debug)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    debug = "--debug" in (sys.argv[1:] if args is None else args)
    if not debug:
        # gRPC's C core would narrate every connection that a server closes. It reads this when it is loaded,
        # which is when a command's module is.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        result: Any = cli.main(args, prog_name="graftserve", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except Exception as error:
        if debug:
            raise
        click.echo(f"Error: {_describe(error)}", err=True)
        return _FAILED


def _describe(error: Exception) -> str:
    known = isinstance(error, CommandError | OSError | ValueError) or _is_ours(error)
    message = str(error).strip()
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if known and message:
        return message
    return f"{type(error).__name__}: {message} (an unexpected failure; --debug shows where)"


def _is_ours(error: Exception) -> bool:
    return any(kind.__module__.startswith("graftserve.") for kind in type(error).__mro__)


def _set_up_logging(debug: bool) -> None:
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("graftserve").setLevel(level)
    if not debug:
        # TensorFlow's C++ and Python both narrate their start; its errors still come as exceptions.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        for name in ("tensorflow", "absl", "h5py"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for name in ("gcsfs", "s3fs"):  # they log the errors that they raise, with their tracebacks
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")
