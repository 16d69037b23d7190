"""Flags as tensorflow_model_server spells them."""

import subprocess
import sys

import pytest

from graftserve.serving.flags import FLAGS, Options, parse_args

BASE = "--model_base_path=models/digits"


def test_defaults_are_upstreams() -> None:
    options = Options.from_args([BASE])
    assert (options.model_name, options.port, options.rest_api_port) == ("default", 8500, 0)
    assert (options.rest_timeout_s, options.file_system_poll_wait_seconds) == (30.0, 1)
    assert (options.max_num_load_retries, options.load_retry_interval_s) == (5, 60.0)
    assert (options.tags, options.enable_model_warmup) == (("serve",), True)
    assert options.grpc_threads >= 4


def test_both_spellings_and_bools() -> None:
    values = parse_args(
        [BASE, "--port", "9000", "--enable_model_warmup=false", "--shutdown_grace_seconds=2.5"]
    )
    assert values == {
        "model_base_path": "models/digits",
        "port": 9000,
        "enable_model_warmup": False,
        "shutdown_grace_seconds": 2.5,
    }
    assert parse_args(["--enable_model_warmup", "--port=1"]) == {"enable_model_warmup": True, "port": 1}
    assert parse_args(["--rest_api_port", "-1"]) == {"rest_api_port": -1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--model_base_path: expected the model's folder"),
        (["--model_base_path="], "--model_base_path: expected a folder, got nothing"),
        ([BASE, "--model_name="], "--model_name: expected a name"),
        ([BASE, "--prot=1"], "--prot=1: there is no such flag"),
        ([BASE, "models"], "models: there is no such flag"),
        ([BASE, "--port"], "--port: expected a value, got nothing"),
        ([BASE, "--port=http"], "--port: expected an integer, got 'http'"),
        ([BASE, "--port=65536"], "--port: expected 0 to 65535, got 65536"),
        ([BASE, "--rest_api_port=-2"], "--rest_api_port: expected -1 to 65535, got -2"),
        ([BASE, "--rest_api_port=8500"], "expected another port than --port, got 8500 for both"),
        ([BASE, "--enable_model_warmup=yes"], "--enable_model_warmup: expected true or false, got 'yes'"),
        ([BASE, "--grpc_max_threads=-1"], "--grpc_max_threads: expected 0 or more, got -1"),
        ([BASE, "--rest_api_timeout_in_ms=0"], "--rest_api_timeout_in_ms: expected 1 to"),
        ([BASE, "--saved_model_tags=,"], "--saved_model_tags: expected tags"),
        ([BASE, "--shutdown_grace_seconds=nan"], "--shutdown_grace_seconds: expected a number, got nan"),
    ],
)
def test_bad_flags_are_named(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r"--|models") as caught:
        Options.from_args(args)
    assert message in str(caught.value)


def test_values_from_a_command_line_library() -> None:
    assert Options.from_flags({"model_base_path": "m", "port": 0}) == Options(model_base_path="m", port=0)
    with pytest.raises(ValueError, match="--colour: there is no such flag"):
        Options.from_flags({"model_base_path": "m", "colour": 1})
    with pytest.raises(ValueError, match="--port: expected an integer, got '1'"):
        Options.from_flags({"model_base_path": "m", "port": "1"})


def test_every_flag_can_be_built_into_a_command_line() -> None:
    assert [flag.name for flag in FLAGS if flag.default is None] == ["model_base_path"]
    for flag in FLAGS:
        assert flag.type in (str, int, float, bool)
        assert flag.help
        assert flag.default is None or type(flag.default) is flag.type


def test_flags_and_app_import_no_tensorflow() -> None:
    code = "import sys, graftserve.serving.app; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
