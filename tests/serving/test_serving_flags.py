"""Flags as tensorflow_model_server spells them."""

import subprocess
import sys
from pathlib import Path

import pytest

from graftserve.serving.flags import FLAGS, Options, parse_args, schedulable_cpus

BASE = "--model_base_path=models/digits"


def test_defaults_are_upstreams() -> None:
    options = Options.from_args([BASE])
    assert (options.model_name, options.port, options.rest_api_port) == ("default", 8500, 0)
    assert (options.rest_timeout_s, options.file_system_poll_wait_seconds) == (30.0, 1)
    assert (options.max_num_load_retries, options.load_retry_interval_s) == (5, 60.0)
    assert (options.tags, options.enable_model_warmup) == (("serve",), True)
    assert options.grpc_threads >= 4


def test_threads_follow_a_containers_quota(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    free = schedulable_cpus(quota)  # no such file: no quota
    assert free >= 1
    for text, expected in {
        "max 100000": free,
        f"{100_000 * (free + 3)} 100000": free,
        "100000 100000": 1,
        "20000 100000": 1,
        "nonsense": free,
    }.items():
        quota.write_text(f"{text}\n")
        assert schedulable_cpus(quota) == expected, text
    quota.write_text(f"{100_000 * free - 30_000} 100000\n")
    assert schedulable_cpus(quota) == free  # what is left of a CPU counts


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
        (["--model_base_path="], "--model_base_path: expected the model's folder, or --model_config_file"),
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
        ([BASE, "--per_process_gpu_memory_fraction=2"], "expected 0 to 1, got 2.0"),
        ([BASE, "--engine=onnx"], "--engine: expected auto, tensorflow, litert, litert_int8, got 'onnx'"),
        ([BASE, "--grpc_channel_arguments=a"], "--grpc_channel_arguments: expected name=value, got 'a'"),
        (
            [BASE, "--batching_parameters_file=b.config"],
            "--batching_parameters_file: expected --enable_batching beside it, got b.config alone",
        ),
        ([BASE, "--use_alts_credentials"], "--use_alts_credentials: there is no ALTS here"),
        ([BASE, "--max_message_bytes=2147483648"], "--max_message_bytes: expected 0 to 2147483647"),
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
    for flag in FLAGS:
        assert flag.type in (str, int, float, bool)
        assert flag.help
        assert type(flag.default) is flag.type


def test_a_flag_that_cannot_be_honoured_is_accepted_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Options.from_args([BASE, "--mixed_precision=bfloat16", "--flush_filesystem_caches=true"])
    assert caplog.messages == [
        "--mixed_precision: accepted, but a model runs in the precision that it was exported in"
    ]


# Every flag that tensorflow_model_server 2.20 has, with a value that it takes. Source:
# https://github.com/tensorflow/serving/blob/2.20.0/tensorflow_serving/model_servers/main.cc.
REAL_FLAGS = """
--port=8500 --grpc_socket_path=/run/s.sock --rest_api_port=8501 --rest_api_num_threads=8
--rest_api_timeout_in_ms=30000 --rest_api_enable_cors_support=true --enable_batching=true
--allow_version_labels_for_unavailable_models=true --batching_parameters_file=b.config
--model_config_file=m.config --model_config_file_poll_wait_seconds=5 --model_name=m --model_base_path=/m
--num_load_threads=2 --num_unload_threads=1 --max_num_load_retries=5
--load_retry_interval_micros=60000000 --file_system_poll_wait_seconds=1 --flush_filesystem_caches=true
--tensorflow_session_parallelism=0 --tensorflow_session_config_file=s.config
--tensorflow_intra_op_parallelism=2 --tensorflow_inter_op_parallelism=2 --use_alts_credentials=false
--ssl_config_file=ssl.config --platform_config_file= --per_process_gpu_memory_fraction=0.5
--saved_model_tags=serve
--grpc_channel_arguments=grpc.max_connection_age_ms=2000,grpc.http2.max_frame_size=16384
--grpc_max_threads=16 --enable_model_warmup=true --num_request_iterations_for_warmup=3 --version=false
--monitoring_config_file=mon.config --remove_unused_fields_from_bundle_metagraph=true
--prefer_tflite_model=false --num_tflite_pools=1 --num_tflite_interpreters_per_pool=1
--enable_signature_method_name_check=true --xla_cpu_compilation_enabled=false --enable_profiler=true
--thread_pool_factory_config_file= --mixed_precision= --skip_initialize_tpu=false
--enable_grpc_healthcheck_service=true --enable_serialization_as_tensor_content=true
--enable_per_model_batching_parameters=true
""".split()  # noqa: SIM905  # one flag a line would be two pages


def test_every_flag_of_the_real_server_is_taken() -> None:
    options = Options.from_args(REAL_FLAGS)
    assert options.channel_arguments == (
        ("grpc.max_connection_age_ms", 2000),
        ("grpc.http2.max_frame_size", 16384),
    )
    assert (options.grpc_threads, options.rest_threads) == (16, 8)


def test_flags_and_app_import_no_tensorflow() -> None:
    code = "import sys, graftserve.serving.app; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
