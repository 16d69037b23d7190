"""Start, hot swap, warmup, stop: whole servers on folders of real models."""

import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from graftserve.client.wire import PredictRequest, PredictResponse
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.tensors import to_array, to_proto
from graftserve.serving.app import Server, run
from graftserve.serving.errors import ServingError
from graftserve.serving.flags import Options

Publish = Callable[[str, Path], Path]
Start = Callable[..., Server]
Predict = Callable[..., PredictResponse]


def predict_on(channel: grpc.Channel, x: Any, signature: str = "", timeout_s: float = 30) -> PredictResponse:
    call = channel.unary_unary(PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString)
    request = PredictRequest()
    request.model_spec.name = "default"
    request.model_spec.signature_name = signature
    request.inputs["x" if signature != "spin" else "rounds"].CopyFrom(to_proto(x))
    response: PredictResponse = call(request, timeout=timeout_s)
    return response


FLOATS = np.array([1, 2, 5], np.float32)


def await_version(server: Server, version: int, state: str) -> None:
    def reached() -> bool:
        states = server.manager.states("default")
        return any(entry.id.version == version and entry.state.name == state for entry in states)

    assert server.manager.wait_until(reached, 30), server.manager.states("default")


def test_versions_are_swapped_under_load_and_nobody_notices(
    publish: Publish, start_server: Start, tmp_path: Path, in_background: Callable[..., threading.Thread]
) -> None:
    publish("half_plus_two", tmp_path / "1")
    server = start_server(tmp_path)
    done = threading.Event()
    counts: list[int] = []

    def hammer() -> None:
        seen = 0
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            for count in itertools.count(1):
                last = done.is_set()  # before asking: an answer of before may only be read now
                response = predict_on(channel, FLOATS)
                version = response.model_spec.version.value
                assert version >= seen
                seen = version
                # Version 1 adds 2, and so on: the answer is the version's own.
                np.testing.assert_array_equal(to_array(response.outputs["y"]), FLOATS / 2 + version + 1)
                if last:
                    counts.append(count)
                    assert seen == 3
                    return

    threads = [in_background(hammer) for _ in range(4)]
    publish("half_plus_three", tmp_path / "2")
    await_version(server, 1, "END")
    publish("half_plus_four", tmp_path / "3")
    await_version(server, 2, "END")
    done.set()
    for thread in threads:
        thread.join(30)
    assert len(counts) == 4


def test_lost_storage_unloads_nothing(
    publish: Publish,
    start_server: Start,
    tmp_path: Path,
    channel_to: Callable[[Server], grpc.Channel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish("half_plus_two", tmp_path / "base" / "1")
    server = start_server(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "away")
    deadline_s = time.monotonic() + 20
    while "stays as it is: Could not find base path" not in caplog.text and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert caplog.text.count("stays as it is") == 1
    assert predict_on(channel_to(server), FLOATS).model_spec.version.value == 1
    (tmp_path / "away").rename(tmp_path / "base")
    publish("half_plus_three", tmp_path / "base" / "2")
    await_version(server, 1, "END")


def test_polling_can_be_off(publish: Publish, start_server: Start, tmp_path: Path) -> None:
    def pollers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "graftserve-poller"}

    publish("half_plus_two", tmp_path / "1")
    before = pollers()  # those of servers that all tests share
    start_server(tmp_path, file_system_poll_wait_seconds=0)
    assert pollers() <= before


def test_starts_that_cannot_succeed_say_why(publish: Publish, start_server: Start, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="Could not find base path"):
        start_server(tmp_path / "missing")
    (tmp_path / "v1").mkdir()
    with pytest.raises(ServingError, match="Did you forget to name your leaf directory as a number"):
        start_server(tmp_path)
    (tmp_path / "1").mkdir()
    with pytest.raises(
        ServingError, match=r"1 servable\(s\) did not become available: model default version 1: NOT_FOUND"
    ):
        start_server(tmp_path, max_num_load_retries=0)
    shutil.rmtree(tmp_path / "1")
    publish("half_plus_two", tmp_path / "1")
    with pytest.raises(ServingError, match="gpu"):
        start_server(tmp_path, max_num_load_retries=0, saved_model_tags="serve,gpu")


@pytest.mark.parametrize(("flag", "api"), [("port", "gRPC"), ("rest_api_port", "REST")])
def test_a_port_in_use_is_named(
    publish: Publish, start_server: Start, tmp_path: Path, many_server: Server, flag: str, api: str
) -> None:
    publish("half_plus_two", tmp_path / "1")
    taken = many_server.grpc_port if flag == "port" else many_server.rest_port
    with pytest.raises(ServingError, match=f"Could not listen for {api} on 127.0.0.1:{taken}.*--{flag}"):
        start_server(tmp_path, **{flag: taken})


def test_the_ports_open_only_once_a_version_is_available(
    publish: Publish,
    tmp_path: Path,
    base_options: Mapping[str, Any],
    in_background: Callable[..., threading.Thread],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "1").mkdir()  # as if the copy were still to come
    options = Options(
        model_base_path=str(tmp_path),
        max_num_load_retries=1000,
        load_retry_interval_micros=50_000,
        **base_options,
    )
    server = Server(options)
    thread = in_background(server.start)
    deadline_s = time.monotonic() + 20
    while "more attempts" not in caplog.text and time.monotonic() < deadline_s:
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match="expected a started server"):
        _ = server.grpc_port
    assert server.rest_port is None
    (tmp_path / "1").rmdir()
    publish("half_plus_two", tmp_path / "1")
    thread.join(30)
    try:
        assert server.rest_port is not None
        for port in (server.grpc_port, server.rest_port):
            socket.create_connection(("127.0.0.1", port), 5).close()
        expected = f"gRPC 127.0.0.1:{server.grpc_port}, REST 127.0.0.1:{server.rest_port}"
        assert server.describe() == f"model default version 1 (tensorflow), {expected}"
    finally:
        server.stop(0)


def test_a_call_that_waited_past_its_deadline_is_not_computed(
    publish: Publish,
    start_server: Start,
    tmp_path: Path,
    channel_to: Callable[[Server], grpc.Channel],
    in_background: Callable[..., threading.Thread],
) -> None:
    publish("many", tmp_path / "1")
    server = start_server(tmp_path, grpc_max_threads=1, rest_api_port=0)
    channel = channel_to(server)
    with server.manager.handle("default") as handle:
        servable = handle.servable
    runs: list[str] = []
    original = servable.run

    def counted(signature: Any, *rest: Any) -> Any:
        runs.append(signature.name)
        return original(signature, *rest)

    servable.run = counted  # type: ignore[method-assign]
    busy = in_background(lambda: predict_on(channel, np.array(100_000, np.int32), "spin"))
    deadline_s = time.monotonic() + 20
    while not runs and time.monotonic() < deadline_s:
        time.sleep(0.005)
    # The one thread is busy: these wait in line, one of them too long and one until it is given up.
    with pytest.raises(grpc.RpcError) as caught:
        predict_on(channel, FLOATS, "divide", timeout_s=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    busy.join(60)
    assert predict_on(channel, np.array(1, np.int32), "spin").outputs["y"].int_val[0] == 1
    assert runs == ["spin", "spin"]


MAIN = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from graftserve.serving.app import run
from graftserve.serving.flags import Options
sys.exit(run(Options.from_args(sys.argv[1:])))
"""


def start_process(base_path: Path) -> tuple["subprocess.Popen[str]", list[str], str, str]:
    """The process, the lines it logs from now on, and its two addresses."""
    args = ["--host=127.0.0.1", "--port=0", "--rest_api_port=-1", f"--model_base_path={base_path}"]
    process = subprocess.Popen([sys.executable, "-c", MAIN, *args], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "ready: " in line:
            break
    ready = lines[-1].split("ready: ")[1].split()
    assert ready[:6] == ["model", "default", "version", "1", "(tensorflow),", "gRPC"], lines
    return process, lines, ready[6].rstrip(","), ready[8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_ends_with_0(
    publish: Publish, tmp_path: Path, in_background: Callable[..., threading.Thread], number: signal.Signals
) -> None:
    publish("many", tmp_path / "1")
    process, _, grpc_address, rest_address = start_process(tmp_path)
    rounds = 300_000
    answers: list[int] = []
    sent = threading.Barrier(3)

    def over_grpc() -> None:
        with grpc.insecure_channel(grpc_address) as channel:
            grpc.channel_ready_future(channel).result(10)
            sent.wait(20)
            answers.append(predict_on(channel, np.array(rounds, np.int32), "spin").outputs["y"].int_val[0])

    def over_rest() -> None:
        body = json.dumps({"signature_name": "spin", "inputs": rounds}).encode()
        sent.wait(20)
        with urllib.request.urlopen(f"http://{rest_address}/v1/models/default:predict", body, 60) as answer:
            answers.append(json.load(answer)["outputs"])

    try:
        threads = [in_background(over_grpc), in_background(over_rest)]
        sent.wait(20)
        time.sleep(0.3)  # the two requests take longer than this, and reach the server well within it
        assert not answers
        process.send_signal(number)
        for thread in threads:
            thread.join(60)
        assert answers == [rounds, rounds]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_second_signal_ends_it_at_once(
    publish: Publish, tmp_path: Path, in_background: Callable[..., threading.Thread]
) -> None:
    publish("many", tmp_path / "1")
    process, _, grpc_address, _ = start_process(tmp_path)
    stderr = process.stderr
    assert stderr is not None

    def hang() -> None:
        with grpc.insecure_channel(grpc_address) as channel, pytest.raises(grpc.RpcError):
            predict_on(channel, np.array(2**31 - 1, np.int32), "spin", timeout_s=120)

    try:
        in_background(hang)
        time.sleep(0.5)  # the call never ends by itself, and is under way well within this
        process.send_signal(signal.SIGINT)
        assert any("stopping" in line for line in stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_the_log_says_when_it_is_ready(
    caplog: pytest.LogCaptureFixture, publish: Publish, tmp_path: Path
) -> None:
    assert run(Options(model_base_path=str(tmp_path), host="127.0.0.1", port=0)) == 1
    assert "the server could not start: model default: no version to serve" in caplog.text
