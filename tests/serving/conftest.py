"""Real SavedModels, and real servers on free ports."""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from graftserve.client.wire import SignatureDefMap
from graftserve.serving.app import Server
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.flags import Options
from graftserve.serving.servable import Array, ServableId, Signature


class FakeServable:
    engine = "fake"
    signatures: Mapping[str, Signature] = {}
    signature_def_map = SignatureDefMap()

    def __init__(self) -> None:
        self.closed = threading.Event()

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed.set()


class FakeEngine:
    """Fails as often as `failures` says, then loads; waits for `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures: dict[int, int] = {}
        self.failed = threading.Event()
        self.loading = threading.Semaphore(0)  # released as each load begins
        self.attempts: list[int] = []
        self.threads: set[threading.Thread] = set()

    def load(self, servable_id: ServableId, path: Path) -> FakeServable:
        self.attempts.append(servable_id.version)
        self.threads.add(threading.current_thread())
        self.loading.release()
        assert self.gate.wait(10)
        if self.failures.get(servable_id.version, 0) > 0:
            self.failures[servable_id.version] -= 1
            self.failed.set()
            raise ServingError(Code.DATA_LOSS, "broken file")
        return FakeServable()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of version folders to copy: half_plus_two, half_plus_three, half_plus_four, many, slow."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("saved_models")
    floats = tf.TensorSpec([None], tf.float32, name="x")

    class Half(tf.Module):
        def __init__(self, plus: float) -> None:
            super().__init__()
            self.plus = tf.Variable(plus)

        @tf.function(input_signature=[floats])
        def serve(self, x: Any) -> dict[str, Any]:
            return {"y": x * 0.5 + self.plus}

    for name, plus in {"half_plus_two": 2.0, "half_plus_three": 3.0, "half_plus_four": 4.0}.items():
        module = Half(plus)
        tf.saved_model.save(module, str(root / name), signatures={"serving_default": module.serve})

    class Many(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def text(self, text: Any) -> dict[str, Any]:
            return {"length": tf.strings.length(text)}

        @tf.function(input_signature=[tf.TensorSpec(None, tf.string, name="raw")])
        def echo(self, raw: Any) -> dict[str, Any]:
            return {"text": tf.identity(raw), "raw_bytes": tf.identity(raw), "again": tf.strings.lower(raw)}

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, 2], tf.int64, name="a"),
                tf.TensorSpec([None, 2], tf.float64, name="b"),
            ]
        )
        def add(self, a: Any, b: Any) -> dict[str, Any]:
            total = tf.cast(a, tf.float64) + b
            return {"sum": total, "positive": total > 0, "a": a * 1, "count": tf.size(total)}

        @tf.function(input_signature=[floats])
        def divide(self, x: Any) -> dict[str, Any]:
            return {"y": 1.0 / x}

        @tf.function(input_signature=[tf.TensorSpec([], tf.string, name="message")])
        def fail(self, message: Any) -> dict[str, Any]:
            return {"y": tf.ensure_shape(tf.io.decode_raw(message, tf.int32), [7])}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="rounds")])
        def spin(self, rounds: Any) -> dict[str, Any]:
            return {"y": tf.while_loop(lambda i: i < rounds, lambda i: [i + 1], [tf.constant(0)])[0]}

    many = Many()
    names = ("text", "echo", "add", "divide", "fail", "spin")
    signatures = {name: getattr(many, name) for name in names}
    tf.saved_model.save(many, str(root / "many"), signatures=signatures | {"serving_default": many.text})
    return root


@pytest.fixture
def publish(saved_models: Path) -> Callable[[str, Path], Path]:
    """publish(name, target) copies a SavedModel to a version folder, which appears by one rename."""

    def publish(name: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"temp-{target.name}"
        shutil.copytree(saved_models / name, temporary)
        return temporary.rename(target)

    return publish


@pytest.fixture(scope="session")
def base_options() -> Mapping[str, Any]:
    return {"host": "127.0.0.1", "port": 0, "rest_api_port": -1, "shutdown_grace_seconds": 10.0}


@pytest.fixture
def start_server(base_options: Mapping[str, Any]) -> Iterator[Callable[..., Server]]:
    """start_server(base_path, **flags) gives a started server, which is stopped after the test."""
    servers: list[Server] = []

    def start(base_path: Path | None, **flags: Any) -> Server:
        server = Server(Options(model_base_path=str(base_path or ""), **{**base_options, **flags}))
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop(0)


@pytest.fixture(scope="session")
def many_server(
    saved_models: Path, tmp_path_factory: pytest.TempPathFactory, base_options: Mapping[str, Any]
) -> Iterator[Server]:
    """One server for every test that only asks: the model `text`, version 3, with many signatures."""
    base_path = tmp_path_factory.mktemp("base")
    shutil.copytree(saved_models / "many", base_path / "3")
    server = Server(Options(model_base_path=str(base_path), model_name="text", **base_options))
    server.start()
    yield server
    assert server.stop(5)


@pytest.fixture
def channel_to() -> Iterator[Callable[[Server], grpc.Channel]]:
    channels: list[grpc.Channel] = []

    def open_channel(server: Server) -> grpc.Channel:
        channels.append(grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}"))
        return channels[-1]

    yield open_channel
    for channel in channels:
        channel.close()


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], None]], threading.Thread]]:
    """Runs functions in threads; an exception in one fails the test."""
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []

    def start(function: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                function()
            except BaseException as exc:
                errors.append(exc)

        thread = threading.Thread(target=guarded, daemon=True)
        threads.append(thread)
        thread.start()
        return thread

    yield start
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
