"""What production does to a server: callers that give up, SIGKILL, SIGTERM under load, swaps under load."""

import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from graftserve.cli.server_process import ServerProcess
from graftserve.client import Client, RetryPolicy, UnavailableError, VersionState
from graftserve.client.wire import PredictRequest, PredictResponse
from graftserve.client.wire.contract import IMAGE_BYTES
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.tensors import to_array, to_proto
from graftserve.serving.app import Server

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODEL = "digits"


def await_true(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def send(channel: grpc.Channel, image: bytes, count: int = 1) -> Any:
    request = PredictRequest()
    request.model_spec.name = MODEL
    request.inputs[IMAGE_BYTES].CopyFrom(to_proto(np.array([image] * count, object)))
    call = channel.unary_unary(PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString)
    return call.future(request, timeout=120)


@pytest.fixture
def image(exported: Any) -> bytes:
    return (exported.path / "assets.extra" / "goldens" / "0.jpg").read_bytes()


def test_images_of_callers_that_have_gone_are_not_computed(
    exported: Any, image: bytes, start_server: Callable[..., Server], channel_to: Callable[..., grpc.Channel]
) -> None:
    server = start_server(exported.path.parent, model_name=MODEL, engine="litert", grpc_max_threads=3)
    with server.manager.handle(MODEL) as handle:
        servable: Any = handle.servable
    assert servable.engine == "litert"
    workers = len(servable._threads)
    gate, taken = threading.Event(), threading.Semaphore(0)
    computed: list[float] = []

    def hold(waited_s: float) -> None:
        computed.append(waited_s)
        taken.release()
        assert gate.wait(60)

    servable._on_image = hold
    channel = channel_to(server)
    busy = send(channel, image, workers)
    for _ in range(workers):
        assert taken.acquire(timeout=60)
    gone = send(channel, image, 5)
    await_true(lambda: len(servable._images._images) == 5)
    threads = [send(channel, image)]  # with the two above it has all of the pool's threads
    await_true(lambda: len(servable._images._images) == 6)
    gone.cancel()
    await_true(lambda: len(servable._images._images) == 1)  # while every worker is at another image
    threads.append(send(channel, image))  # takes the thread that came free
    await_true(lambda: len(servable._images._images) == 2)
    in_pool, behind_it = send(channel, image), send(channel, image)
    in_pool.cancel()
    gate.set()
    for answer in (busy, *threads, behind_it):
        assert to_array(answer.result().outputs["valid"]).all()
    assert len(computed) == workers + 3
    assert b'request_count{model_name="digits",status="CANCELLED"} 1.0' in server.metrics.render()


def ask_over_rest(server: Server) -> Any:
    body = b'{"instances": [1.0]}'
    url = f"http://127.0.0.1:{server.rest_port}/v1/models/default:predict"
    with urllib.request.urlopen(url, body, 60) as answer:
        return json.load(answer)


def test_connections_that_send_nothing_keep_no_thread(
    publish: Callable[[str, Path], Path], start_server: Callable[..., Server], tmp_path: Path
) -> None:
    publish("half_plus_two", tmp_path / "1")
    server = start_server(tmp_path, rest_api_num_threads=1)
    idle = [socket.create_connection(("127.0.0.1", server.rest_port or 0), 30) for _ in range(50)]
    try:
        assert ask_over_rest(server) == {"predictions": [2.5]}
        for late in (idle[0], idle[-1]):  # they are connections like any other
            late.sendall(b"GET /v1/models/default HTTP/1.1\r\nHost: here\r\n\r\n")
            assert late.recv(15) == b"HTTP/1.1 200 OK"
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(
    "head", ["", "POST /v1/models/default:predict HTTP/1.1\r\nContent-Length: 9999\r\n\r\n"]
)
def test_a_request_that_arrives_too_slowly_is_given_up(
    publish: Callable[[str, Path], Path], start_server: Callable[..., Server], tmp_path: Path, head: str
) -> None:
    publish("half_plus_two", tmp_path / "1")
    server = start_server(tmp_path, rest_api_num_threads=1, rest_api_timeout_in_ms=500)
    with socket.create_connection(("127.0.0.1", server.rest_port or 0), 0.05) as slow:
        slow.sendall(head.encode())
        answer = b""
        deadline_s = time.monotonic() + 30
        while not answer and time.monotonic() < deadline_s:
            slow.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = slow.recv(100)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
    assert ask_over_rest(server) == {"predictions": [2.5]}


@pytest.fixture(scope="module")
def fixed_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [f"--port={port}", f"--grpc_socket_path={tmp_path_factory.mktemp('socket')}/grpc"]


class Callers:
    """Clients that ask without a pause, in threads, until the `with` block ends. Only right answers will do.

    versions: that answered, in turn. refused: how often those clients met no server that do not try again.
    """

    def __init__(self, targets: list[str], image: bytes, expected: str) -> None:
        self.versions: list[int] = []
        self.refused = 0
        self.errors: list[BaseException] = []
        self._image, self._expected = image, expected
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(target, attempts), daemon=True)
            for target, attempts in itertools.product(targets, (1, 1000))
        ]

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        assert not self.errors

    def await_answers(self, count: int) -> None:
        """As many more."""
        wanted = len(self.versions) + count
        await_true(lambda: len(self.versions) >= wanted or bool(self.errors), 180)
        assert not self.errors

    def _ask(self, target: str, attempts: int) -> None:
        with Client(target, MODEL, retry=RetryPolicy(max_attempts=attempts), timeout_s=180) as client:
            while not self._stop.is_set():
                try:
                    answer = client.classify(self._image)
                    assert answer.label == self._expected
                    self.versions.append(answer.version)
                except UnavailableError as exc:
                    if attempts > 1:
                        self.errors.append(exc)
                        return
                    self.refused += 1
                    time.sleep(0.05)
                except BaseException as exc:
                    self.errors.append(exc)
                    return


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_server_starts_again_and_nothing_is_damaged(
    exported: Any, image: bytes, fixed_flags: list[str], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(exported.path, models / "1")
    best = max(
        zip(
            json.loads((exported.path / "assets.extra/goldens/goldens.json").read_text())["goldens"][0][
                "probabilities"
            ],
            (exported.path / "assets/labels.txt").read_text().splitlines(),
            strict=True,
        )
    )[1]
    port, socket_path = (flag.split("=")[1] for flag in fixed_flags)
    targets = [f"127.0.0.1:{port}", f"unix:{socket_path}"]

    def start() -> ServerProcess:
        return ServerProcess(MODEL, models, *fixed_flags)

    def is_loading(client: Client, version: int) -> bool:
        return any(
            status.version == version and status.state is VersionState.LOADING for status in client.status()
        )

    server = start()
    server.addresses()
    with Callers(targets, image, best) as callers, Client(targets[1], MODEL, timeout_s=180) as client:
        callers.await_answers(20)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL  # calls under way
        server = start()
        callers.await_answers(20)

        shutil.copytree(exported.path, models / "temp-2")
        (models / "temp-2").rename(models / "2")
        await_true(lambda: is_loading(client, 2))
        server.end(signal.SIGKILL)  # in the middle of a load
        server = start()
        callers.await_answers(20)
        assert callers.versions[-1] == 2

        (models / "3").mkdir()  # a copy that has not come to the graph
        shutil.copytree(exported.path / "variables", models / "3" / "variables")
        server.end(signal.SIGKILL)
        server = start()
        callers.await_answers(20)
        assert callers.versions[-1] == 2
        shutil.copytree(exported.path, models / "3", dirs_exist_ok=True)
        await_true(lambda: callers.versions[-1] == 3)
        assert callers.refused > 0
    assert server.end() == 0


@pytest.mark.slow
def test_sigterm_under_load_loses_no_call_that_was_taken(exported: Any, image: bytes) -> None:
    flags = ("--access_log", "--enable_grpc_healthcheck_service", "--engine=litert")
    server = ServerProcess(MODEL, exported.path.parent, *flags)
    target = server.addresses()["gRPC"]
    answered: list[bool] = []
    refused: list[grpc.StatusCode] = []

    def ask(channel: grpc.Channel) -> None:
        while not refused:
            try:
                answered.append(bool(to_array(send(channel, image).result().outputs["valid"]).all()))
            except grpc.RpcError as exc:
                call: Any = exc
                refused.append(call.code())

    channels = [
        grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(32)
    ]
    threads = [threading.Thread(target=ask, args=(channel,), daemon=True) for channel in channels]
    statuses: Iterator[Any] = watch_health(channels[0])
    assert next(statuses) == "SERVING"
    for thread in threads:
        thread.start()
    await_true(lambda: len(answered) > 100)
    status = server.end()
    for thread in threads:
        thread.join(60)
    assert status == 0
    assert next(statuses) == "NOT_SERVING"
    lines = [json.loads(line) for line in server.log if line.startswith("{")]
    assert {line["code"] for line in lines} == {"OK"}
    # gRPC says CANCELLED to a call that came in the very moment in which it stopped to take them.
    assert set(refused) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert all(answered)
    assert len(answered) == len(lines)


def watch_health(channel: grpc.Channel) -> Iterator[str]:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(channel)
    for answer in stub.Watch(health_pb2.HealthCheckRequest(service=MODEL)):
        yield health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["litert", "tensorflow"])
def test_swaps_under_load_lose_no_call_and_give_no_wrong_answer(
    exported: Any, tmp_path: Path, engine: str
) -> None:
    command = [sys.executable, str(BENCHMARKS / "soak.py"), f"--output={tmp_path}", f"--engine={engine}"]
    command += [f"--version={exported.path}", "--loop=closed", "--seconds=10", "--pause=1", "--callers=16"]
    subprocess.run(command, check=True, timeout=580)
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert (row["faults"], row["first_faults"]) == (0, [])
    assert row["calls"] > 100
    assert row["swaps"] >= 1
    assert row["versions_that_answered"] >= 2
