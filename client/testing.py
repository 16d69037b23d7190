"""A model server for the tests of whoever uses the client: real gRPC, answers and faults to order.

It runs in the test's own process, on a free port of 127.0.0.1, and needs no TensorFlow and no model. Without
any setup it serves a model called "flowers" whose answers depend on nothing but the image's bytes:

>>> from graftserve.client import Client, OverloadedError
>>> from graftserve.client.testing import FakeServer
>>> with FakeServer() as server, Client(server.target, "flowers") as client:
...     client.classify(b"some JPEG") == client.classify(b"some JPEG")
True

What it answers is a function of the image's bytes, or a mapping of them:

>>> def answer(image):
...     return {"rose": 0.9, "tulip": 0.1} if image.startswith(b"red") else "daisy"
>>> with FakeServer("flowers", answer=answer) as server, Client(server.target, "flowers") as client:
...     [prediction.label for prediction in client.classify_many([b"red", b"white"])]
['rose', 'daisy']

Faults come when they are ordered, so that a test shows what its code does about them:

>>> import grpc
>>> with FakeServer() as server, Client(server.target, "flowers") as client:
...     server.fail(grpc.StatusCode.UNAVAILABLE, times=1)  # the client tries again
...     client.classify(b"some JPEG").version
...     len(server.images)
...     server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, times=1)
...     try:
...         client.classify(b"some JPEG")
...     except OverloadedError as error:
...         print(error.code.name)
1
2
RESOURCE_EXHAUSTED

`holding` stops every answer until the test lets go, `latency_s` delays them, `model` has the versions, labels
and signatures, which may change, `calls` holds what was asked, and `stop` and `start` take the server away
and bring it back on the same port.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from .errors import InvalidImageError
from .results import TensorSpec, VersionState, VersionStatus
from .wire import (
    Code,
    DataType,
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    GetModelStatusRequest,
    GetModelStatusResponse,
    ModelSpec,
    ModelVersionStatus,
    PredictRequest,
    PredictResponse,
    SignatureDefMap,
    TensorInfo,
    TensorShapeProto,
)
from .wire.contract import FEATURES, IMAGE_BYTES, SERVING_DEFAULT
from .wire.methods import (
    GET_MODEL_METADATA,
    GET_MODEL_STATUS,
    METHODS,
    PREDICT,
    SIGNATURE_DEF_FIELD,
    pack_signature_def_map,
)
from .wire.tensors import to_array, write_tensor
from .wire.values import dtype_name, read_varint

__all__ = ["Answer", "Answers", "Call", "FakeModel", "FakeServer", "FakeSignature", "StatusError"]

Answer: TypeAlias = str | Mapping[str, float] | Exception | None
"""For one image: its label (with the score 1), scores by label, or None if it cannot be decoded.

An exception stands for its being raised: InvalidImageError means the same as None, StatusError ends the whole
request with a gRPC status.
"""

Answers: TypeAlias = Callable[[bytes], Answer] | Mapping[bytes, Answer]
"""The answers by image; one that a mapping lacks ends the request with INVALID_ARGUMENT."""

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]

_FEATURE_COUNT: Final = 8
_POLL_S: Final = 0.02

# grpc.health.v1, by hand: HealthCheckResponse has one field, the status.
# Source: https://github.com/grpc/grpc/blob/master/src/proto/grpc/health/v1/health.proto
_HEALTH: Final = "grpc.health.v1.Health"
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


class StatusError(Exception):
    """Ends the request with a gRPC status; for answers and functions of signatures to raise."""

    def __init__(
        self, code: grpc.StatusCode, details: str = "", *, retry_pushback_ms: int | None = None
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.retry_pushback_ms = retry_pushback_ms


@dataclass(frozen=True)
class Call:
    """One request as the server got it.

    method: "Predict", "GetModelMetadata" or "GetModelStatus".
    images: the strings of the input `image_bytes`, if there is one.
    metadata: names in lower case and values.
    timeout_s: how much time its deadline left; None without a deadline.
    """

    method: str
    request: Any
    images: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...]
    timeout_s: float | None


@dataclass
class FakeSignature:
    """A signature of a fake model: what it declares, and the function that answers.

    function: from the inputs' arrays by name to the outputs by name, in anything that NumPy makes an array
        of; numbers are converted to the dtypes declared. It may raise StatusError, and runs in many threads.
    """

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    function: Callable[[Arrays], Mapping[str, npt.ArrayLike]]


@dataclass
class FakeModel:
    """A model of a fake server. Everything may be changed while the server runs.

    name: as in `Client(target, name)`.
    classes: the labels, in the order of the output `probabilities`.
    answer: the answers by image (see Answers); by default a class chosen by a hash of the image's bytes,
        whatever they are.
    features: the feature vector of an image, of always the same length; by default 8 numbers made of a hash.
    top: K, how many classes an answer names.
    versions: what the model has, by number, at first version 1; the latest that is AVAILABLE answers where a
        request names none. Once there are none the server does not know the model.
    labels: version labels and the versions that they stand for.
    signatures: by name; at first `serving_default` and `features`, as `graftserve export` makes them, and
        those given. Add more, or take some away.
    """

    name: str = "flowers"
    classes: Sequence[str] = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    answer: Answers | None = None
    features: Callable[[bytes], Sequence[float]] | None = None
    top: int = 5
    versions: dict[int, VersionStatus] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    signatures: dict[str, FakeSignature] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.classes or self.top < 1:
            raise ValueError(
                f"expected one class or more and top of 1 or more, got {len(self.classes)} and {self.top}"
            )
        if not self.versions:
            self.set_version(1)
        images = {IMAGE_BYTES: TensorSpec("string", (None,))}
        valid = {"valid": TensorSpec("bool", (None,))}
        top, count = min(self.top, len(self.classes)), len(self.classes)
        outputs = {
            "classes": TensorSpec("string", (None, top)),
            "scores": TensorSpec("float32", (None, top)),
            "probabilities": TensorSpec("float32", (None, count)),
            **valid,
        }
        vectors = {"features": TensorSpec("float32", (None, len(self._features_of(b"")))), **valid}
        self.signatures = {
            SERVING_DEFAULT: FakeSignature(dict(images), outputs, self._classify),
            FEATURES: FakeSignature(dict(images), vectors, self._embed),
            **self.signatures,
        }

    def set_version(
        self,
        version: int,
        state: VersionState = VersionState.AVAILABLE,
        *,
        error_code: str = "OK",
        error_message: str = "",
    ) -> None:
        """Add a version, or change its state: LOADING, END with an error, ..."""
        self.versions[version] = VersionStatus(version, state, error_code, error_message)

    def _classify(self, inputs: Arrays) -> Mapping[str, npt.ArrayLike]:
        rows = [self._scores_of(image) for image in inputs[IMAGE_BYTES].tolist()]
        top = min(self.top, len(self.classes))
        classes = np.full((len(rows), top), "", object)
        scores = np.zeros((len(rows), top), np.float32)
        probabilities = np.zeros((len(rows), len(self.classes)), np.float32)
        for index, row in enumerate(rows):
            if row is not None:
                ranked = sorted(row.items(), key=lambda item: -item[1])
                ranked += [(label, 0.0) for label in self.classes if label not in row]
                classes[index] = [label for label, _ in ranked[:top]]
                scores[index] = [score for _, score in ranked[:top]]
                probabilities[index] = [row.get(label, 0.0) for label in self.classes]
        return {
            "classes": classes,
            "scores": scores,
            "probabilities": probabilities,
            "valid": [row is not None for row in rows],
        }

    def _embed(self, inputs: Arrays) -> Mapping[str, npt.ArrayLike]:
        images = inputs[IMAGE_BYTES].tolist()
        valid = [self._scores_of(image) is not None for image in images]
        vectors = [self._features_of(image) for image in images]
        zeros = [0.0] * len(self._features_of(b""))
        rows = [vector if good else zeros for vector, good in zip(vectors, valid, strict=True)]
        return {"features": np.array(rows, np.float32).reshape(len(rows), len(zeros)), "valid": valid}

    def _scores_of(self, image: bytes) -> Mapping[str, float] | None:
        if self.answer is None:
            return self._scores_by_hash(image)
        if isinstance(self.answer, Mapping):
            if image not in self.answer:
                raise StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"the fake model {self.name!r} has no answer for {len(image)} bytes: {image[:20]!r}...",
                )
            answer = self.answer[image]
        else:
            try:
                answer = self.answer(image)
            except InvalidImageError:
                answer = None
        if isinstance(answer, InvalidImageError):
            return None
        if isinstance(answer, Exception):
            raise answer
        return {answer: 1.0} if isinstance(answer, str) else answer

    def _scores_by_hash(self, image: bytes) -> Mapping[str, float]:
        digest = hashlib.sha256(image).digest()
        best = self.classes[int.from_bytes(digest[:8]) % len(self.classes)]
        if len(self.classes) == 1:
            return {best: 1.0}
        score = 0.5 + digest[8] / 512
        rest = (1 - score) / (len(self.classes) - 1)
        return {label: score if label == best else rest for label in self.classes}

    def _features_of(self, image: bytes) -> Sequence[float]:
        if self.features is not None:
            return self.features(image)
        return [byte / 255 for byte in hashlib.sha256(image).digest()[:_FEATURE_COUNT]]


class _VersionRow(NamedTuple):
    """As in GetModelStatus: numbers of ModelVersionStatus.State and Code."""

    state: int
    error_code: int
    error_message: str


@dataclass
class _Order:
    """Failures to come; `left`: how many, None for without end."""

    method: str
    error: StatusError
    every: int
    left: int | None
    seen: int = 0


class FakeServer:
    """A model server over real gRPC in this process; a context manager.

    models: FakeModels, or names for default ones; without any, one called "flowers".
    answer: the answers by image of the models given by name (see Answers).
    host, port: where to listen; port 0 takes a free one, and keeps it through `stop` and `start`.
    address: where to listen instead, such as "unix:/path".
    max_message_bytes: the largest request taken; -1: no bound, where gRPC's own default is 4 MB.
    latency_s: how long a Predict takes at least: seconds, or a function from its images to seconds.
    latency_per_image_s: and how much longer for each image.
    credentials: grpc.ssl_server_credentials() and the like, for TLS.
    max_workers: how many requests are answered at a time; the others wait.

    Attributes, all of which may be read and changed while it runs:

    models: the models by name; `model` is the first.
    target: the address for a client, "127.0.0.1:port".
    calls: every request in the order of arrival (see Call); `images` and `batches` are what Predicts held.
    active, most_active: how many Predicts are under way, and the most that were.
    hold: an Event that every Predict waits for once it is recorded; None for no waiting. See `holding`.
    rewrite: may change each answer to a Predict before it is sent.
    serving: what grpc.health.v1 says of the server as a whole, service ""; of a model it says SERVING while
        one of its versions is AVAILABLE.

    Only Predict, GetModelMetadata, GetModelStatus and the health service are there; other RPCs end with
    UNIMPLEMENTED, as with an older server.
    """

    def __init__(
        self,
        *models: str | FakeModel,
        answer: Answers | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        address: str = "",
        max_message_bytes: int = -1,
        latency_s: float | Callable[[Sequence[bytes]], float] = 0.0,
        latency_per_image_s: float = 0.0,
        credentials: grpc.ServerCredentials | None = None,
        max_workers: int = 64,
    ) -> None:
        found = [FakeModel(model, answer=answer) if isinstance(model, str) else model for model in models]
        self.models = {model.name: model for model in found or [FakeModel(answer=answer)]}
        self.host = host
        self.port = port
        self.address = address
        self.max_message_bytes = max_message_bytes
        self.latency_s = latency_s
        self.latency_per_image_s = latency_per_image_s
        self.calls: list[Call] = []
        self.active = self.most_active = 0
        self.hold: threading.Event | None = None
        self.rewrite: Callable[[PredictResponse], None] = lambda response: None
        self.serving = True
        self._credentials = credentials
        self._max_workers = max_workers
        self._orders: list[_Order] = []
        self._changed = threading.Condition()  # guards what requests change: calls, active, orders
        self._running: tuple[grpc.Server, ThreadPoolExecutor] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def target(self) -> str:
        """The address, once the server has been started."""
        return self.address or f"{self.host}:{self.port}"

    @property
    def model(self) -> FakeModel:
        """The first model."""
        return next(iter(self.models.values()))

    @property
    def images(self) -> list[bytes]:
        """All images received, in order."""
        return [image for batch in self.batches for image in batch]

    @property
    def batches(self) -> list[list[bytes]]:
        """The images of every Predict received that held any, in order."""
        with self._changed:
            return [list(call.images) for call in self.calls if call.images]

    def start(self) -> Self:
        """Listen; raises RuntimeError if it does already, or the port is taken."""
        if self._running is not None:
            raise RuntimeError(f"expected a server that is stopped, but it listens at {self.target}")
        pool = ThreadPoolExecutor(self._max_workers, thread_name_prefix="graftserve-fake")
        # Two servers on one port would share its connections by chance.
        options = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.so_reuseport", 0),
        ]
        server = grpc.server(pool, options=options)
        server.add_generic_rpc_handlers(self._handlers())
        try:
            if self._credentials is None:
                self.port = server.add_insecure_port(self.target)
            else:
                self.port = server.add_secure_port(self.target, self._credentials)
        except RuntimeError:
            pool.shutdown()
            raise
        server.start()
        self._running = server, pool
        return self

    def stop(self, grace_s: float | None = None) -> None:
        """Stop listening and break off what is not answered within `grace_s`; a second time does nothing.

        `start` listens on the same port again, with all that was set and recorded.
        """
        running, self._running = self._running, None
        if running is not None:
            server, pool = running
            server.stop(grace_s).wait()
            pool.shutdown()

    def clear(self) -> None:
        """Forget the requests recorded so far."""
        with self._changed:
            self.calls.clear()
            self.most_active = self.active

    def fail(
        self,
        code: grpc.StatusCode,
        details: str = "ordered by the test",
        *,
        times: int | None = 1,
        every: int = 1,
        retry_pushback_ms: int | None = None,
        method: str = "Predict",
    ) -> None:
        """Let requests to come end with a status.

        times: how many; None for all until `heal`.
        every: only each second, third, ... request, counted from now.
        retry_pushback_ms: sent along as `grpc-retry-pushback-ms`: when to come again, negative for never.
        method: "Predict", "GetModelMetadata" or "GetModelStatus".
        A second order begins where the first ends.
        """
        if every < 1 or (times is not None and times < 1):
            raise ValueError(f"expected times and every of 1 or more, got {times} and {every}")
        if method not in {PREDICT.name, GET_MODEL_METADATA.name, GET_MODEL_STATUS.name}:
            raise ValueError(f"expected Predict, GetModelMetadata or GetModelStatus, got {method!r}")
        error = StatusError(code, details, retry_pushback_ms=retry_pushback_ms)
        with self._changed:
            self._orders.append(_Order(method, error, every, times))

    def heal(self) -> None:
        """Take all orders to `fail` back."""
        with self._changed:
            self._orders.clear()

    @contextmanager
    def holding(self) -> Iterator[threading.Event]:
        """Let no Predict be answered inside the `with` block, or until the event that it gives is set."""
        event = self.hold = threading.Event()
        try:
            yield event
        finally:
            if self.hold is event:
                self.hold = None
            event.set()

    def wait_for_predicts(self, count: int, timeout_s: float = 30.0) -> None:
        """Wait until `count` Predicts have arrived, those before included (see `clear`).

        Raises TimeoutError.
        """

        def arrived() -> int:
            return sum(call.method == PREDICT.name for call in self.calls)

        with self._changed:
            if not self._changed.wait_for(lambda: arrived() >= count, timeout_s):
                raise TimeoutError(f"expected {count} Predicts within {timeout_s:g} s, got {arrived()}")

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        answers: dict[str, Callable[[Any, grpc.ServicerContext], Message]] = {
            PREDICT.name: self._predict,
            GET_MODEL_METADATA.name: self._metadata,
            GET_MODEL_STATUS.name: self._status,
        }
        services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {
            _HEALTH: {
                "Check": grpc.unary_unary_rpc_method_handler(self._check_health),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch_health),
            }
        }
        for method in METHODS:
            if method.name in answers:
                services.setdefault(method.service, {})[method.name] = grpc.unary_unary_rpc_method_handler(
                    self._guarded(method.name, answers[method.name]),
                    request_deserializer=method.request.FromString,
                    response_serializer=lambda message: message.SerializeToString(),
                )
        return [
            grpc.method_handlers_generic_handler(service, handlers) for service, handlers in services.items()
        ]

    def _guarded(
        self, method: str, answer: Callable[[Any, grpc.ServicerContext], Message]
    ) -> Callable[[Any, grpc.ServicerContext], Message]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Message:
            try:
                return answer(request, context)
            except StatusError as error:
                if error.retry_pushback_ms is not None:
                    context.set_trailing_metadata((("grpc-retry-pushback-ms", str(error.retry_pushback_ms)),))
                context.abort(error.code, error.details)
                raise

        return guarded

    def _arrived(
        self, method: str, request: Any, context: grpc.ServicerContext
    ) -> tuple[Call, StatusError | None]:
        """Record a request; returns how it shall fail, too."""
        images: tuple[bytes, ...] = ()
        if isinstance(request, PredictRequest) and IMAGE_BYTES in request.inputs:
            images = tuple(to_array(request.inputs[IMAGE_BYTES]).ravel().tolist())
        left_s = context.time_remaining()
        metadata = tuple((key, value) for key, value in context.invocation_metadata())
        call = Call(method, request, images, metadata, left_s)
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
            return call, self._next_failure(method)

    def _next_failure(self, method: str) -> StatusError | None:
        order = next((order for order in self._orders if order.method == method), None)
        if order is None:
            return None
        order.seen += 1
        if order.seen % order.every:
            return None
        if order.left is not None:
            order.left -= 1
            if not order.left:
                self._orders.remove(order)
        return order.error

    def _predict(self, request: PredictRequest, context: grpc.ServicerContext) -> PredictResponse:
        call, failure = self._arrived(PREDICT.name, request, context)
        with self._changed:
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            self._wait(call.images, context)
            if failure is not None:
                raise failure
            return self._answer(request)
        finally:
            with self._changed:
                self.active -= 1

    def _wait(self, images: Sequence[bytes], context: grpc.ServicerContext) -> None:
        """Be as slow as ordered, but no longer than somebody waits for the answer."""
        ended = threading.Event()
        if not context.add_callback(ended.set):
            return
        hold = self.hold
        while hold is not None and not hold.wait(_POLL_S) and not ended.is_set():
            pass
        latency_s = self.latency_s(images) if callable(self.latency_s) else self.latency_s
        latency_s += self.latency_per_image_s * len(images)
        if latency_s > 0:
            ended.wait(latency_s)

    def _answer(self, request: PredictRequest) -> PredictResponse:
        model, version = self._resolve(request.model_spec)
        name = request.model_spec.signature_name or SERVING_DEFAULT
        signatures = self._signature_defs(model).signature_def
        if name not in signatures:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.'
            )
        declared = signatures[name]
        self._check_inputs(request, declared.inputs)
        for output in request.output_filter:
            if output not in declared.outputs:
                raise StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"output tensor alias not found in signature: {output}",
                )
        inputs = {key: to_array(proto) for key, proto in request.inputs.items()}
        outputs = model.signatures[name].function(inputs)
        response = PredictResponse()
        response.model_spec.CopyFrom(request.model_spec)
        response.model_spec.ClearField("version_label")
        response.model_spec.signature_name = name
        response.model_spec.version.value = version
        for output in request.output_filter or declared.outputs:
            value = outputs[output]
            dtype = declared.outputs[output].dtype
            if dtype != DataType.DT_STRING:
                value = np.asarray(value, dtype_name(dtype))
            write_tensor(value, response.outputs[output])
        self.rewrite(response)
        return response

    def _check_inputs(self, request: PredictRequest, declared: Mapping[str, TensorInfo]) -> None:
        if missing := set(declared) - set(request.inputs):
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"Missing but required: {missing}")
        if unknown := set(request.inputs) - set(declared):
            raise StatusError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Sent extra: {unknown}. Missing but required: {set()}",
            )
        for name, info in declared.items():
            if request.inputs[name].dtype != info.dtype:
                raise StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"input {name}: expected {dtype_name(info.dtype)}, "
                    f"got {dtype_name(request.inputs[name].dtype)}",
                )

    def _metadata(
        self, request: GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> GetModelMetadataResponse:
        _, failure = self._arrived(GET_MODEL_METADATA.name, request, context)
        if failure is not None:
            raise failure
        model, version = self._resolve(request.model_spec)
        response = GetModelMetadataResponse(model_spec=ModelSpec(name=model.name))
        response.model_spec.version.value = version
        packed = pack_signature_def_map(self._signature_defs(model))
        response.metadata[SIGNATURE_DEF_FIELD].CopyFrom(packed)
        return response

    def _status(
        self, request: GetModelStatusRequest, context: grpc.ServicerContext
    ) -> GetModelStatusResponse:
        _, failure = self._arrived(GET_MODEL_STATUS.name, request, context)
        if failure is not None:
            raise failure
        spec = request.model_spec
        response = GetModelStatusResponse()
        model = self.models.get(spec.name)
        for version, row in sorted(self._version_rows(model).items()) if model else ():
            if not spec.HasField("version") or spec.version.value == version:
                item = response.model_version_status.add(version=version, state=row.state)
                item.status.error_code = row.error_code  # type: ignore[assignment]  # an int, as on the wire
                item.status.error_message = row.error_message
        if not response.model_version_status:
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}")
        return response

    def _resolve(self, spec: ModelSpec) -> tuple[FakeModel, int]:
        model = self.models.get(spec.name)
        rows = self._version_rows(model) if model else {}
        available = [version for version, row in rows.items() if row.state == ModelVersionStatus.AVAILABLE]
        wanted = spec.version.value if spec.HasField("version") else max(available, default=0)
        if model and spec.version_label:
            labels = self._labels(model)
            if spec.version_label not in labels:
                raise StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"Unrecognized servable version label: {spec.version_label}",
                )
            wanted = labels[spec.version_label]
        if model is None or wanted not in available:
            which = f"Specific({spec.name}, {wanted})" if spec.HasField("version") else f"Latest({spec.name})"
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {which}")
        return model, wanted

    def _version_rows(self, model: FakeModel) -> Mapping[int, _VersionRow]:
        return {
            version: _VersionRow(
                ModelVersionStatus.State.Value(item.state.value),
                Code.Value(item.error_code),
                item.error_message,
            )
            for version, item in list(model.versions.items())
        }

    def _labels(self, model: FakeModel) -> Mapping[str, int]:
        return model.labels

    def _signature_defs(self, model: FakeModel) -> SignatureDefMap:
        packed = SignatureDefMap()
        for name, signature in list(model.signatures.items()):
            definition = packed.signature_def[name]
            for specs, infos in (
                (signature.inputs, definition.inputs),
                (signature.outputs, definition.outputs),
            ):
                for key, spec in specs.items():
                    infos[key].CopyFrom(_tensor_info(spec))
        return packed

    def _health(self, service: str) -> bytes | None:
        if not service:
            return _SERVING if self.serving else _NOT_SERVING
        model = self.models.get(service)
        if model is None:
            return None
        rows = self._version_rows(model).values()
        return _SERVING if any(row.state == ModelVersionStatus.AVAILABLE for row in rows) else _NOT_SERVING

    def _check_health(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        service = _service_of(request)
        status = self._health(service)
        if status is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Unknown service: {service}")
        return status or _SERVICE_UNKNOWN

    def _watch_health(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        service, told = _service_of(request), b""
        while context.is_active():
            status = self._health(service) or _SERVICE_UNKNOWN
            if status != told:
                told = status
                yield status
            time.sleep(_POLL_S)


def _service_of(request: bytes) -> str:
    """The one field of a HealthCheckRequest, the service's name."""
    if not request:
        return ""
    length, start = read_varint(request, 1, 32)
    return request[start : start + length].decode()


def _tensor_info(spec: TensorSpec) -> TensorInfo:
    name = next(name for name, value in DataType.items() if dtype_name(value) == spec.dtype)
    if spec.shape is None:
        return TensorInfo(dtype=name, tensor_shape=TensorShapeProto(unknown_rank=True))
    dims = [TensorShapeProto.Dim(size=-1 if size is None else size) for size in spec.shape]
    return TensorInfo(dtype=name, tensor_shape=TensorShapeProto(dim=dims))
