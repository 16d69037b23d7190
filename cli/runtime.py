"""What `graftserve serve` runs: the embedded server, tensorflow_model_server, or its container.

    requested, flags = take_runtime(["--runtime=docker", "--model_base_path=models/digits", "--port=8500"])
    runtime = choose(requested, flags)
    if runtime.program:
        execute(command_for(runtime, flags))  # this process becomes the server

All three take the same flags. TensorFlow is not imported.
Source: tensorflow_serving/model_servers/{main,server,server_core}.cc,
https://docs.docker.com/reference/cli/docker/container/run/.
"""

import csv
import io
import ipaddress
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from graftserve.client.wire import ModelServerConfig
from graftserve.serving.config import read_text_proto
from graftserve.serving.flags import FLAGS, OWN, VERSION_FLAG, Flag, Options, parse_args

from .output import CommandError

__all__ = ["RUNTIMES", "RUNTIME_FLAG", "Runtime", "choose", "command_for", "execute", "take_runtime"]

_log = logging.getLogger(__name__)

_EMBEDDED, _MODEL_SERVER, _DOCKER = "embedded", "tensorflow_model_server", "docker"

RUNTIMES = ("auto", _EMBEDDED, _MODEL_SERVER, _DOCKER)

RUNTIME_FLAG = Flag(
    "runtime",
    str,
    "auto",
    f"What serves: embedded (this program), tensorflow_model_server, docker (its container), or auto: "
    f"tensorflow_model_server where it is on the PATH and knows all flags given, else embedded. {OWN}",
)
"""For a command line; `take_runtime` reads it."""

# The release that serving/Dockerfile stands on.
_IMAGE, _GPU_IMAGE = "tensorflow/serving:2.19.1", "tensorflow/serving:2.19.1-gpu"
_IMAGE_VARIABLE = "GRAFTSERVE_SERVING_IMAGE"

_REMEDIES = {
    _MODEL_SERVER: "install it (https://www.tensorflow.org/tfx/serving/setup), or take --runtime=embedded",
    _DOCKER: "install it (https://docs.docker.com/engine/install/), or take --runtime=embedded",
}

# Set for the program that is run. A tensorflow_model_server that is itself a script around `graftserve serve`
# would otherwise run itself for ever.
_EXECUTED_VARIABLE = "GRAFTSERVE_EXECUTED"

# What TensorFlow reads; those that are not set are not passed on.
_PASSED_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "TF_CPP_MIN_LOG_LEVEL", "TF_FORCE_GPU_ALLOW_GROWTH", "TF_XLA_FLAGS"),
)

_FILE_FLAGS = (
    "model_config_file",
    "batching_parameters_file",
    "monitoring_config_file",
    "platform_config_file",
    "ssl_config_file",
    "tensorflow_session_config_file",
    "thread_pool_factory_config_file",
)

# A mount over one of these would hide what the container is made of.
_CONTAINER_FOLDERS = frozenset(
    f"/{name}" for name in ("", "bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "usr", "usr/bin")
)

_Values = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Runtime:
    """kind: one of `RUNTIMES`, but not auto. program: the path of what is run; empty for this one."""

    kind: str
    program: str = ""


def take_runtime(args: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --runtime, "auto" without it, and all other arguments, unchanged and in order.

    The last one wins when it is given twice. Raises ValueError if its value is missing.
    """
    requested, others = str(RUNTIME_FLAG.default), []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name != f"--{RUNTIME_FLAG.name}":
            others.append(arg)
        elif equals:
            requested = value
        elif rest:
            requested = rest.pop(0)
        else:
            raise ValueError(f"--runtime: expected {', '.join(RUNTIMES)}, got nothing")
    return requested, others


def choose(requested: str, args: Sequence[str] = ()) -> Runtime:
    """What to run for the value of --runtime and the other arguments.

    "auto" means the same answers on every machine, from the best server that is there. So it takes
    tensorflow_model_server where somebody has put it on the PATH, but never at the price of a flag: where one
    that only the embedded server can honour is given, it is embedded. It never means docker: that Docker is
    installed says nothing about serving, and a command that used to start in seconds would fetch gigabytes
    and run another release of TensorFlow than the one tested. Whoever wants that says so.

    Raises ValueError if `requested` is none of `RUNTIMES` or the arguments cannot be read, CommandError if
    the program asked for is not on the PATH.
    """
    if requested not in RUNTIMES:
        raise ValueError(f"--runtime: expected {', '.join(RUNTIMES)}, got {requested!r}")
    if requested == _EMBEDDED:
        return Runtime(_EMBEDDED)
    if requested == "auto":
        program = shutil.which(_MODEL_SERVER)
        if program is None or _EXECUTED_VARIABLE in os.environ:
            return Runtime(_EMBEDDED)
        values = parse_args(args)
        only_here = [*_refusals(_MODEL_SERVER, values), *_dropped(_MODEL_SERVER, values)]
        if only_here:
            _log.info("runtime: embedded, not %s, because of --%s", program, ", --".join(only_here))
            return Runtime(_EMBEDDED)
        _log.info("runtime: %s", program)
        return Runtime(_MODEL_SERVER, program)
    program = shutil.which(requested)
    if program is None:
        raise CommandError(
            f"--runtime={requested}: expected {requested} on the PATH, found none: {_REMEDIES[requested]}"
        )
    return Runtime(requested, program)


def command_for(runtime: Runtime, args: Sequence[str]) -> list[str]:
    """The command line that runs the server with these flags of `graftserve serve`, without --runtime.

    The flags are written as tensorflow_model_server reads them (`--flag=value`), paths are made absolute.
    Flags that only the embedded server has are left out with a warning, or refused where the server would
    then do something else than asked. For docker: a container that goes when it ends, the models and files
    mounted read-only where they are, the ports published on --host, all GPUs where there is nvidia-smi. Its
    image is $GRAFTSERVE_SERVING_IMAGE, or TensorFlow Serving's.

    Raises ValueError that names the flag; for docker also ServingError if --model_config_file cannot be read.
    """
    values = parse_args(args)
    if runtime.kind == _EMBEDDED:
        return [sys.executable, "-m", "graftserve.cli", "serve", f"--runtime={_EMBEDDED}", *args]
    if values.get(VERSION_FLAG.name):
        options, flags = None, [f"--{VERSION_FLAG.name}"]
    else:
        options = Options(**{flag.name: values[flag.name] for flag in FLAGS if flag.name in values})  # type: ignore[arg-type]
        refusals = _refusals(runtime.kind, values)
        if refusals:
            raise ValueError(f"{'; '.join(refusals.values())}, or take --runtime={_EMBEDDED}")
        dropped = _dropped(runtime.kind, values)
        if dropped:
            _log.warning("%s does not know --%s: left out", _MODEL_SERVER, ", --".join(dropped))
        flags = [_written(name, value) for name, value in values.items() if name not in _OWN]
    if runtime.kind == _MODEL_SERVER:
        return [runtime.program, *flags]
    return [*_container(runtime.program, values, options), *flags]


def execute(command: Sequence[str]) -> NoReturn:
    """Become this command, in the same process: signals reach it, and its exit status is ours.

    Raises OSError if it cannot be run.
    """
    environment = {**os.environ, _EXECUTED_VARIABLE: "1"}
    # The command line sets this for TensorFlow's Python. A server that logs no errors would help nobody.
    if environment.get("TF_CPP_MIN_LOG_LEVEL") == "3":
        del environment["TF_CPP_MIN_LOG_LEVEL"]
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these, and a program inherits what is ignored.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(command[0], list(command), environment)


_OWN = {flag.name: flag for flag in FLAGS if flag.help.endswith(OWN)}

# Values besides the default that say what the real server does in any case.
_TRUE_OF_IT = {"engine": "tensorflow"}


def _refusals(kind: str, values: _Values) -> dict[str, str]:
    """Flags without which the real server would do something else than asked; why, and what to do."""
    refusals = {}
    host = values.get("host", _OWN["host"].default)
    if kind == _MODEL_SERVER and host != _OWN["host"].default:
        refusals["host"] = (
            f"--host: expected {_OWN['host'].default}, got {host}: {_MODEL_SERVER} listens on every "
            "interface; take --runtime=docker"
        )
    if kind == _DOCKER and not _is_address(str(host)):
        refusals["host"] = f"--host: expected an IP address of this machine, got {host!r}: give its number"
    if values.get("port") == 0:
        refusals["port"] = f"--port: expected 1 to 65535, got 0: {_MODEL_SERVER} cannot choose one; give one"
    if values.get("rest_api_port") == -1:
        refusals["rest_api_port"] = (
            f"--rest_api_port: expected 0 to 65535, got -1: {_MODEL_SERVER} cannot choose one; give one"
        )
    if kind == _DOCKER and values.get("grpc_socket_path"):
        refusals["grpc_socket_path"] = (
            "--grpc_socket_path: a container's socket cannot be reached from here: use the port"
        )
    return refusals


def _dropped(kind: str, values: _Values) -> list[str]:
    """Flags given, and not as their default, that the real server can do without."""
    return [
        name
        for name, flag in _OWN.items()
        if name != "host" and values.get(name, flag.default) not in (flag.default, _TRUE_OF_IT.get(name))
    ]


def _written(name: str, value: str | float) -> str:
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif name in (*_FILE_FLAGS, "model_base_path"):
        value = _absolute(str(value))
    return f"--{name}={value}"


def _absolute(path: str) -> str:
    return path if not path or "://" in path else os.path.abspath(path)


def _container(program: str, values: _Values, options: Options | None) -> list[str]:
    """The container's command line up to the server's flags."""
    has_gpu = shutil.which("nvidia-smi") is not None
    image = os.environ.get(_IMAGE_VARIABLE) or (_GPU_IMAGE if has_gpu else _IMAGE)
    # With an init, since the server ignores SIGTERM as process 1; without the official image's script, which
    # names a model of its own.
    command = [program, "run", "--rm", "--init", f"--entrypoint={_MODEL_SERVER}"]
    if has_gpu:
        command.append("--gpus=all")
    command += [f"--env={name}" for name in _PASSED_VARIABLES]
    if options is not None:
        host = f"[{options.host}]" if ":" in options.host else options.host
        ports = [port for port in (options.port, options.rest_api_port) if port > 0]
        command += [f"--publish={host}:{port}:{port}" for port in ports]
        command += [f"--mount={_mount(path)}" for path in _without_nested(_mounted(values, options))]
    return [*command, image]


def _mounted(values: _Values, options: Options) -> list[str]:
    """Absolute paths of the files and folders that the server reads."""
    paths = [_absolute(str(values[name])) for name in _FILE_FLAGS if values.get(name)]
    if options.model_config_file:
        file = paths[0]
        config = read_text_proto(Path(file), ModelServerConfig(), "--model_config_file")
        if options.model_config_file_poll_wait_seconds:
            # An editor replaces a file, and the container would keep the one it was given.
            paths[0] = os.path.dirname(file)
        # A relative one is for the server to refuse.
        models = [model.base_path for model in config.model_config_list.config]
        paths += [path for path in models if os.path.isabs(path)]
    elif "://" not in options.model_base_path:
        paths.append(_absolute(options.model_base_path))
    for path in paths:
        if path in _CONTAINER_FOLDERS:
            raise ValueError(
                f"--runtime=docker: {path} cannot be mounted, the container has its own: move the models and "
                "the configuration into a folder of theirs"
            )
    return paths


def _without_nested(paths: Iterable[str]) -> list[str]:
    """Each path once, without those inside another one."""
    unique = dict.fromkeys(paths)
    return [path for path in unique if not any(str(parent) in unique for parent in Path(path).parents)]


def _mount(path: str) -> str:
    text = io.StringIO()  # Docker reads these as a line of CSV
    fields = ("type=bind", f"source={path}", f"target={path}", "readonly")
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
