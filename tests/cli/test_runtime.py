import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftserve.cli.output import CommandError
from graftserve.cli.runtime import RUNTIME_FLAG, RUNTIMES, Runtime, choose, command_for, take_runtime
from graftserve.serving.errors import ServingError
from graftserve.serving.flags import FLAGS, OWN, Flag, Options

# Writes down how it was called, then waits for a signal.
_PROGRAM = """#!{python} -S
import json, os, signal, sys
call = dict(pid=os.getpid(), args=sys.argv, environment=dict(os.environ))
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(17))
with open({record!r} + ".part", "w") as file:
    json.dump(call, file)
os.rename({record!r} + ".part", {record!r})
signal.pause()
"""

_SERVE = """
import sys
from graftserve.cli.runtime import choose, command_for, execute, take_runtime
requested, flags = take_runtime(sys.argv[1:])
execute(command_for(choose(requested, flags), flags))
"""

_MODEL = "--model_base_path=/srv/models/flowers"


class Programs:
    """A folder that is the PATH. `record` is what a program in it wrote when it was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record.json"

    def add(self, name: str) -> str:
        path = self.folder / name
        path.write_text(_PROGRAM.format(python=sys.executable, record=str(self.record)))
        path.chmod(0o755)
        return str(path)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("GRAFTSERVE_SERVING_IMAGE", raising=False)
    return Programs(folder)


def test_take_runtime_leaves_all_other_arguments_as_they_are() -> None:
    args = ["--model_name", "a", "--runtime", "docker", "--port=1", "--enable_batching"]
    assert take_runtime(args) == ("docker", ["--model_name", "a", "--port=1", "--enable_batching"])
    assert take_runtime(["--runtime=embedded", _MODEL, "--runtime=docker"]) == ("docker", [_MODEL])
    assert take_runtime([_MODEL, "--runtime_x=1"]) == ("auto", [_MODEL, "--runtime_x=1"])
    with pytest.raises(ValueError, match=r"--runtime: expected auto, embedded, .*, got nothing"):
        take_runtime([_MODEL, "--runtime"])


def test_the_flag_is_one_of_our_own() -> None:
    assert RUNTIME_FLAG.help.endswith(OWN)
    assert RUNTIME_FLAG.default in RUNTIMES
    assert RUNTIME_FLAG.name not in {flag.name for flag in FLAGS}


def test_auto_is_embedded_where_nothing_is_installed(programs: Programs) -> None:
    assert choose("auto", [_MODEL]) == Runtime("embedded")
    assert choose("embedded", [_MODEL]) == Runtime("embedded")


def test_auto_takes_the_model_server_and_never_docker(programs: Programs) -> None:
    programs.add("docker")
    assert choose("auto", [_MODEL]) == Runtime("embedded")
    path = programs.add("tensorflow_model_server")
    assert choose("auto", [_MODEL]) == Runtime("tensorflow_model_server", path)
    assert choose("embedded", [_MODEL]) == Runtime("embedded")


def _with_another_value(flag: Flag) -> str:
    texts = {"host": "127.0.0.1", "engine": "litert"}
    value = texts.get(flag.name) or (not flag.default if flag.type is bool else flag.type(flag.default + 1))
    return f"--{flag.name}={value}"


_OWN_FLAGS = [flag for flag in FLAGS if flag.help.endswith(OWN)]


@pytest.mark.parametrize("flag", [*map(_with_another_value, _OWN_FLAGS), "--port=0", "--rest_api_port=-1"])
def test_auto_is_embedded_for_what_only_that_can_do(
    programs: Programs, caplog: pytest.LogCaptureFixture, flag: str
) -> None:
    path = programs.add("tensorflow_model_server")
    with caplog.at_level("INFO", "graftserve"):
        assert choose("auto", [_MODEL, flag]) == Runtime("embedded")
    name = flag.partition("=")[0]
    assert caplog.messages == [f"runtime: embedded, not {path}, because of {name}"]


def test_flags_of_our_own_are_no_reason_while_they_are_as_by_default(programs: Programs) -> None:
    programs.add("tensorflow_model_server")
    args = [_MODEL, *(f"--{flag.name}={flag.default}" for flag in _OWN_FLAGS)]
    if "engine" in {flag.name for flag in _OWN_FLAGS}:
        args.append("--engine=tensorflow")  # what the real server runs models with
    runtime = choose("auto", args)
    assert runtime.kind == "tensorflow_model_server"
    assert command_for(runtime, args) == [runtime.program, _MODEL]


@pytest.mark.parametrize("requested", ["tensorflow_model_server", "docker"])
def test_a_program_that_is_missing(programs: Programs, requested: str) -> None:
    with pytest.raises(CommandError, match=f"--runtime={requested}: expected {requested} on the PATH"):
        choose(requested, [_MODEL])
    path = programs.add(requested)
    assert choose(requested, [_MODEL]) == Runtime(requested, path)


def test_a_runtime_that_is_unknown(programs: Programs) -> None:
    with pytest.raises(ValueError, match=r"--runtime: expected auto, embedded, .*, got 'podman'"):
        choose("podman", [_MODEL])


def test_the_embedded_command_takes_the_flags_as_they_are() -> None:
    args = ["--model_name", "a", _MODEL, "--access_log"]
    command = command_for(Runtime("embedded"), args)
    assert command[-5:] == ["--runtime=embedded", *args]
    assert command[:4] == [sys.executable, "-m", "graftserve.cli", "serve"]


_SERVER = Runtime("tensorflow_model_server", "/opt/tensorflow_model_server")


def test_flags_are_written_as_the_model_server_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--model_name", "flowers", "--model_base_path", "models/flowers", "--enable_batching"]
    args += ["--enable_model_warmup=0", "--per_process_gpu_memory_fraction", "0.5", "--port=8500"]
    args += ["--batching_parameters_file=batching.config", "--num_tflite_pools=2"]
    assert command_for(_SERVER, args) == [
        "/opt/tensorflow_model_server",
        "--model_name=flowers",
        f"--model_base_path={tmp_path}/models/flowers",
        "--enable_batching=true",
        "--enable_model_warmup=false",
        "--per_process_gpu_memory_fraction=0.5",
        "--port=8500",
        f"--batching_parameters_file={tmp_path}/batching.config",
        "--num_tflite_pools=2",
    ]


def test_every_flag_of_the_model_server_arrives_with_its_value() -> None:
    given = {flag.name: flag.default for flag in FLAGS if not flag.help.endswith(OWN)}
    given |= {"model_base_path": "/srv/models/flowers", "port": 8500}
    command = command_for(_SERVER, [f"--{name}={value}" for name, value in given.items()])
    assert Options.from_args(command[1:]) == Options.from_flags(given)
    assert len(command) == 1 + len(given)


def test_addresses_in_object_stores_stay_as_they_are() -> None:
    args = ["--model_base_path=gs://bucket/models/flowers"]
    assert command_for(_SERVER, args)[1:] == args
    assert not any("--mount" in part for part in command_for(Runtime("docker", "docker"), args))


@pytest.mark.parametrize("kind", ["tensorflow_model_server", "docker"])
def test_version_needs_no_model(kind: str) -> None:
    assert command_for(Runtime(kind, "/program"), ["--version"])[-1] == "--version"


def test_what_the_model_server_can_do_without_is_dropped_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = [_MODEL, "--access_log", "--max_queued_requests=3", "--shutdown_grace_seconds=5"]
    assert command_for(_SERVER, args) == [_SERVER.program, _MODEL]
    (message,) = caplog.messages
    names = "--max_queued_requests, --access_log, --shutdown_grace_seconds"
    assert message == f"tensorflow_model_server does not know {names}: left out"


@pytest.mark.parametrize("flag", ["--host=127.0.0.1", "--port=0", "--rest_api_port=-1"])
def test_what_would_mean_something_else_is_refused(flag: str) -> None:
    name, _, value = flag.partition("=")
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got {value}.*or take --runtime=embedded"):
        command_for(_SERVER, [_MODEL, flag])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--model_base_path: expected the model's folder"),
        ([_MODEL, "--prot=1"], "--prot=1: there is no such flag"),
        ([_MODEL, "--port=70000"], "--port: expected 0 to 65535, got 70000"),
    ],
)
@pytest.mark.parametrize("kind", ["tensorflow_model_server", "docker"])
def test_wrong_flags_are_found_before_anything_runs(kind: str, args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_for(Runtime(kind, "/program"), args)


def _docker(*args: str) -> list[str]:
    return command_for(Runtime("docker", "/usr/bin/docker"), args)


def _values(command: list[str], option: str) -> list[str]:
    return [part.partition("=")[2] for part in command if part.startswith(f"{option}=")]


def test_the_container(programs: Programs) -> None:
    command = _docker(
        "--model_name=flowers", _MODEL, "--port=8500", "--rest_api_port=8501", "--host=127.0.0.1"
    )
    image = command.index("tensorflow/serving:2.19.1")
    assert command[:4] == ["/usr/bin/docker", "run", "--rm", "--init"]
    assert _values(command[:image], "--entrypoint") == ["tensorflow_model_server"]
    assert _values(command, "--publish") == ["127.0.0.1:8500:8500", "127.0.0.1:8501:8501"]
    flowers = "/srv/models/flowers"
    assert _values(command, "--mount") == [f"type=bind,source={flowers},target={flowers},readonly"]
    assert "--gpus=all" not in command
    served = ["--model_name=flowers", _MODEL, "--port=8500", "--rest_api_port=8501"]
    assert command[image + 1 :] == served


def test_the_container_has_the_gpus_of_the_machine(programs: Programs) -> None:
    programs.add("nvidia-smi")
    command = _docker(_MODEL)
    assert "--gpus=all" in command[: command.index("tensorflow/serving:2.19.1-gpu")]


def test_the_container_of_another_image(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTSERVE_SERVING_IMAGE", "registry.example/serving:7")
    command = _docker(_MODEL)
    assert command[-2:] == ["registry.example/serving:7", _MODEL]


def test_a_port_that_is_off_is_not_published(programs: Programs) -> None:
    assert _values(_docker(_MODEL), "--publish") == ["0.0.0.0:8500:8500"]
    assert _values(_docker(_MODEL, "--host=::1"), "--publish") == ["[::1]:8500:8500"]


def _write_config(path: Path, *base_paths: str) -> None:
    models = (f'config {{ name: "m{i}" base_path: "{base}" }}' for i, base in enumerate(base_paths))
    path.write_text(f"model_config_list {{ {' '.join(models)} }}")


def test_the_container_sees_what_the_files_name(programs: Programs, tmp_path: Path) -> None:
    config, batching = tmp_path / "models.config", tmp_path / "batching.config"
    _write_config(config, "/srv/a", "/srv/a/b", "gs://bucket/c", "/srv/d")
    mounts = _values(
        _docker(
            f"--model_config_file={config}", "--enable_batching", f"--batching_parameters_file={batching}"
        ),
        "--mount",
    )
    paths = [str(config), str(batching), "/srv/a", "/srv/d"]
    assert mounts == [f"type=bind,source={path},target={path},readonly" for path in paths]


def test_a_file_that_is_watched_comes_with_its_folder(programs: Programs, tmp_path: Path) -> None:
    config = tmp_path / "models.config"
    _write_config(config, "/srv/a")
    command = _docker(f"--model_config_file={config}", "--model_config_file_poll_wait_seconds=5")
    paths = [str(tmp_path), "/srv/a"]
    assert _values(command, "--mount") == [
        f"type=bind,source={path},target={path},readonly" for path in paths
    ]


def test_a_path_with_a_comma_or_a_quote_is_mounted(programs: Programs) -> None:
    (mount,) = _values(_docker('--model_base_path=/srv/a,"b'), "--mount")
    assert mount == 'type=bind,"source=/srv/a,""b","target=/srv/a,""b",readonly'


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_base_path=/etc"], "/etc cannot be mounted"),
        ([_MODEL, "--host=localhost"], "--host: expected an IP address of this machine, got 'localhost'"),
        ([_MODEL, "--grpc_socket_path=/tmp/s"], "--grpc_socket_path: a container's socket"),
        ([_MODEL, "--port=0"], "--port: expected 1 to 65535, got 0"),
    ],
)
def test_what_a_container_cannot_do(programs: Programs, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _docker(*flags)


def test_a_config_file_that_cannot_be_read(programs: Programs, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="--model_config_file: cannot read"):
        _docker(f"--model_config_file={tmp_path / 'missing'}")


@pytest.fixture
def served(programs: Programs) -> Any:
    """served(*args) runs them as `graftserve serve` would; gives the process and what the program wrote."""
    processes = []

    def serve(*args: str) -> tuple["subprocess.Popen[bytes]", dict[str, Any]]:
        environment = {**os.environ, "PATH": str(programs.folder), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment["TF_XLA_FLAGS"] = "--tf_xla_auto_jit=2"
        process = subprocess.Popen([sys.executable, "-c", _SERVE, *args], env=environment)
        processes.append(process)
        deadline = time.monotonic() + 30
        while not programs.record.exists():
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline, "it was not run"
            time.sleep(0.01)
        return process, json.loads(programs.record.read_text())

    yield serve
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["tensorflow_model_server", "docker"])
def test_signals_and_status_are_the_programs(
    programs: Programs, served: Callable[..., Any], kind: str
) -> None:
    path = programs.add(kind)
    process, call = served(f"--runtime={kind}", "--model_name", "flowers", _MODEL)
    assert call["pid"] == process.pid
    assert call["args"][0] == path
    assert call["args"][-2:] == ["--model_name=flowers", _MODEL]
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 17


def test_the_program_gets_the_environment_but_for_our_silence(
    programs: Programs, served: Callable[..., Any]
) -> None:
    programs.add("tensorflow_model_server")
    _, call = served(_MODEL)
    assert call["environment"]["TF_XLA_FLAGS"] == "--tf_xla_auto_jit=2"
    assert "TF_CPP_MIN_LOG_LEVEL" not in call["environment"]


def test_a_closed_pipe_ends_the_program_as_it_would_from_a_shell(programs: Programs) -> None:
    path = programs.folder / "tensorflow_model_server"
    path.write_text("#!/bin/sh\nkill -PIPE $$\nexit 3\n")
    path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, _MODEL], env={**os.environ, "PATH": str(programs.folder)}
    )
    assert done.returncode == -signal.SIGPIPE


def test_no_tensorflow_is_imported() -> None:
    code = "import sys, graftserve.cli.runtime; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
