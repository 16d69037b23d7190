"""A small model server with known answers, and faults to order."""

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from graftserve.client.wire import (
    DataType,
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    GetModelStatusRequest,
    GetModelStatusResponse,
    ModelSpec,
    PredictRequest,
    PredictResponse,
    SignatureDefMap,
    TensorInfo,
    TensorShapeProto,
)
from graftserve.client.wire.methods import METHODS, SIGNATURE_DEF_FIELD, pack_signature_def_map
from graftserve.client.wire.tensors import to_array, to_proto


def _info(data_type: int, *dims: int) -> TensorInfo:
    return TensorInfo(
        dtype=data_type, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in dims])
    )


IMAGE = {"image_bytes": _info(DataType.DT_STRING, -1)}
VALID = {"valid": _info(DataType.DT_BOOL, -1)}


class FakeServer:
    """Serves the model "flowers", version 3, over real gRPC.

    The label of an image is "c" and its length modulo 10, its features are its length and its first byte;
    one that starts with "bad" is not valid. Signature "half_plus_two" computes y = x / 2 + 2. What the
    model has is `signatures`; a test may take from it.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        address: str = "",
        max_message_bytes: int = -1,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.requests: list[Any] = []
        self.metadata: list[tuple[str, str]] = []
        self.faults: list[tuple[grpc.StatusCode, str]] = []  # for the next Predicts, one each
        self.versions: dict[int, tuple[int, int, str]] = {3: (30, 0, "")}  # state, error code, message
        self.known = True
        self.labels: dict[str, int] = {}
        self.entered = threading.Semaphore(0)  # released once per Predict
        self.hold: threading.Event | None = None  # Predicts wait for it
        self.hold_next: threading.Event | None = None  # the next one waits for it
        self.pushback_ms: int | None = None  # goes with faults
        self.active = self.most_active = 0
        self.rewrite: Callable[[PredictResponse], None] = lambda response: None
        self.signatures = SignatureDefMap()
        default = self.signatures.signature_def["serving_default"]
        features = self.signatures.signature_def["features"]
        half = self.signatures.signature_def["half_plus_two"]
        outputs = {
            "classes": _info(DataType.DT_STRING, -1, 2),
            "scores": _info(DataType.DT_FLOAT, -1, 2),
            "probabilities": _info(DataType.DT_FLOAT, -1, 10),
            **VALID,
        }
        for signature, inputs, signature_outputs in (
            (default, IMAGE, outputs),
            (features, IMAGE, {"features": _info(DataType.DT_FLOAT, -1, 2), **VALID}),
            (half, {"x": _info(DataType.DT_FLOAT, -1)}, {"y": _info(DataType.DT_FLOAT, -1)}),
        ):
            for name, info in inputs.items():
                signature.inputs[name].CopyFrom(info)
            for name, info in signature_outputs.items():
                signature.outputs[name].CopyFrom(info)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(
            self._pool, options=[("grpc.max_receive_message_length", max_message_bytes)]
        )
        answers = {
            "Predict": self._predict,
            "GetModelMetadata": self._metadata,
            "GetModelStatus": self._status,
        }
        for service in {method.service for method in METHODS}:
            handlers = {
                method.name: grpc.unary_unary_rpc_method_handler(
                    answers[method.name],
                    request_deserializer=method.request.FromString,
                    response_serializer=method.response.SerializeToString,
                )
                for method in METHODS
                if method.service == service and method.name in answers
            }
            self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
        address = address or f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self.target = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self) -> None:
        """Break off what is under way and free the port."""
        self._server.stop(None).wait()
        if self.hold is not None:
            self.hold.set()
        self._pool.shutdown()

    @property
    def batches(self) -> list[list[bytes]]:
        """The images of every Predict received, in order."""
        return [
            list(request.inputs["image_bytes"].string_val)
            for request in self.requests
            if isinstance(request, PredictRequest)
        ]

    def _version(self, spec: ModelSpec, context: grpc.ServicerContext) -> int:
        available = [version for version, (state, _, _) in self.versions.items() if state == 30]
        if spec.version_label:
            if spec.version_label not in self.labels:
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"Unrecognized servable version label: {spec.version_label}",
                )
            return self.labels[spec.version_label]
        wanted = spec.version.value if spec.HasField("version") else max(available, default=0)
        if spec.name != "flowers" or wanted not in available:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Specific({spec.name}, {wanted})"
            )
        return wanted

    def _predict(self, request: PredictRequest, context: grpc.ServicerContext) -> PredictResponse:
        with self._lock:
            self.requests.append(request)
            self.metadata = [(key, value) for key, value in context.invocation_metadata()]
            fault = self.faults.pop(0) if self.faults else None
            hold, self.hold_next = self.hold_next or self.hold, None
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            self.entered.release()
            if hold is not None:
                hold.wait(30)
            if fault is not None:
                if self.pushback_ms is not None:
                    context.set_trailing_metadata((("grpc-retry-pushback-ms", str(self.pushback_ms)),))
                context.abort(*fault)
            return self._answer(request, context)
        finally:
            with self._lock:
                self.active -= 1

    def _answer(self, request: PredictRequest, context: grpc.ServicerContext) -> PredictResponse:
        version = self._version(request.model_spec, context)
        name = request.model_spec.signature_name
        if name not in self.signatures.signature_def:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.')
        signature = self.signatures.signature_def[name]
        if set(request.inputs) != set(signature.inputs):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Missing but required: {set(signature.inputs) - set(request.inputs)}",
            )
        for output in request.output_filter:
            if output not in signature.outputs:
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"output tensor alias not found in signature: {output}",
                )
        outputs: dict[str, np.ndarray]
        if "x" in request.inputs:
            outputs = {"y": to_array(request.inputs["x"]) / np.float32(2) + np.float32(2)}
        else:
            images = to_array(request.inputs["image_bytes"]).tolist()
            numbers = [len(image) % 10 for image in images]
            valid = np.array([not image.startswith(b"bad") for image in images], bool)
            probabilities = np.zeros((len(images), 10), np.float32)
            probabilities[np.arange(len(images)), numbers] = 1
            outputs = {
                "classes": np.array([[f"c{n}", f"c{(n + 1) % 10}"] for n in numbers], object),
                "scores": np.where(valid[:, None], np.float32([[0.75, 0.25]]), np.float32(0)),
                "probabilities": probabilities,
                "features": np.array([[len(image), image[0]] for image in images], np.float32),
                "valid": valid,
            }
        response = PredictResponse(model_spec=request.model_spec)
        response.model_spec.version.value = version
        for output in request.output_filter or signature.outputs:
            response.outputs[output].CopyFrom(to_proto(outputs[output]))
        self.rewrite(response)
        return response

    def _metadata(
        self, request: GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> GetModelMetadataResponse:
        response = GetModelMetadataResponse(model_spec=ModelSpec(name=request.model_spec.name))
        response.model_spec.version.value = self._version(request.model_spec, context)
        response.metadata[SIGNATURE_DEF_FIELD].CopyFrom(pack_signature_def_map(self.signatures))
        return response

    def _status(
        self, request: GetModelStatusRequest, context: grpc.ServicerContext
    ) -> GetModelStatusResponse:
        with self._lock:
            self.requests.append(request)
        response = GetModelStatusResponse()
        spec = request.model_spec
        for version, (state, code, message) in self.versions.items():
            if self.known and (not spec.HasField("version") or spec.version.value == version):
                item = response.model_version_status.add(version=version, state=state)
                item.status.error_code, item.status.error_message = code, message
        if not response.model_version_status:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}")
        return response


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
