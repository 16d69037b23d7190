"""A small model server with known answers, and faults to order."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from graftserve.client import TensorSpec, testing
from graftserve.client.testing import FakeModel, FakeSignature
from graftserve.client.wire import SignatureDefMap


def _answer(image: bytes) -> dict[str, float] | None:
    number = len(image) % 10
    return None if image.startswith(b"bad") else {f"c{number}": 0.75, f"c{(number + 1) % 10}": 0.25}


def _half_plus_two() -> FakeSignature:
    return FakeSignature(
        {"x": TensorSpec("float32", (None,))},
        {"y": TensorSpec("float32", (None,))},
        lambda inputs: {"y": inputs["x"] / np.float32(2) + np.float32(2)},
    )


class FakeServer(testing.FakeServer):
    """Serves the model "flowers", version 3; it listens from the start.

    The label of an image is "c" and its length modulo 10, its features are its length and its first byte;
    one that starts with "bad" is not valid. Signature "half_plus_two" computes y = x / 2 + 2. What the
    model declares is `signatures`, versions and their states are numbers as on the wire: a test may say what
    no model would.
    """

    def __init__(self, port: int = 0, **settings: Any) -> None:
        model = FakeModel(
            classes=[f"c{number}" for number in range(10)],
            answer=_answer,
            features=lambda image: [len(image), image[0] if image else 0],
            top=2,
            signatures={"half_plus_two": _half_plus_two()},
        )
        super().__init__(model, port=port, max_workers=16, **settings)
        self.requests: list[Any] = []  # without those for metadata, which clients send to explain errors
        self.metadata: list[tuple[str, str]] = []  # of the latest Predict
        self.faults: list[tuple[grpc.StatusCode, str]] = []  # for the next Predicts, one each
        self.versions: dict[int, tuple[int, int, str]] = {3: (30, 0, "")}  # state, error code, message
        self.known = True
        self.labels: dict[str, int] = {}
        self.entered = threading.Semaphore(0)  # released once per Predict
        self.hold_next: threading.Event | None = None  # the next Predict waits for it
        self.signatures = super()._signature_defs(model)
        self.start()

    def _next_failure(self, method: str) -> testing.StatusError | None:
        call = self.calls[-1]
        if method != "GetModelMetadata":
            self.requests.append(call.request)
        if method != "Predict":
            return super()._next_failure(method)
        self.metadata = list(call.metadata)
        self.entered.release()
        return testing.StatusError(*self.faults.pop(0)) if self.faults else super()._next_failure(method)

    def _wait(self, images: Sequence[bytes], context: grpc.ServicerContext) -> None:
        hold, self.hold_next = self.hold_next, None
        if hold is not None:
            hold.wait(30)
        super()._wait(images, context)

    def _version_rows(self, model: FakeModel) -> dict[int, testing._VersionRow]:
        rows = {version: testing._VersionRow(*row) for version, row in self.versions.items()}
        return rows if self.known else {}

    def _labels(self, model: FakeModel) -> dict[str, int]:
        return self.labels

    def _signature_defs(self, model: FakeModel) -> SignatureDefMap:
        return self.signatures


@pytest.fixture
def start_server() -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def start(port: int = 0, **settings: Any) -> FakeServer:
        servers.append(FakeServer(port, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start_server: Callable[..., FakeServer]) -> FakeServer:
    return start_server()


@pytest.fixture(scope="session")
def tensorflow() -> Any:
    """The real TensorFlow; its own warnings are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tensorflow")


@pytest.fixture(scope="session")
def serving_apis(tensorflow: Any) -> Any:
    """The messages of tensorflow-serving-api and TensorFlow by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tensorflow_serving.apis")
        from tensorflow.core.framework import tensor_pb2
        from tensorflow.core.protobuf import meta_graph_pb2
        from tensorflow_serving.apis import (
            get_model_metadata_pb2,
            get_model_status_pb2,
            model_management_pb2,
            model_pb2,
            predict_pb2,
            prediction_log_pb2,
            status_pb2,
        )
        from tensorflow_serving.config import (
            log_collector_config_pb2,
            logging_config_pb2,
            model_server_config_pb2,
        )
    modules = (
        tensor_pb2,
        meta_graph_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        model_management_pb2,
        model_pb2,
        predict_pb2,
        prediction_log_pb2,
        status_pb2,
        log_collector_config_pb2,
        logging_config_pb2,
        model_server_config_pb2,
    )
    names: dict[str, Any] = {}
    for module in modules:
        names |= {name: getattr(module, name) for name in module.DESCRIPTOR.message_types_by_name}
    return SimpleNamespace(**names)
