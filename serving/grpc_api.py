"""The gRPC front door: PredictionService, ModelService, health and reflection.

Source: tensorflow_serving/apis/{prediction_service,model_service}.proto,
tensorflow_serving/model_servers/{prediction_service_impl,model_service_impl,grpc_status_util,server}.cc,
https://github.com/grpc/grpc/blob/master/doc/{health-checking,server-reflection}.md.
"""

import logging
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from graftserve.client import wire
from graftserve.client.wire import methods
from graftserve.client.wire.tensors import to_proto, write_typed

from .cancellation import cancellable
from .errors import Code, ServingError
from .health import Health
from .manager import AspiredVersionsManager, ServableState
from .metrics import Call, Metrics
from .proto_tensors import ProtoInputs
from .reflection import descriptor_pool
from .service import Answer, ModelServiceImpl, ModelSpec, PredictionServiceImpl
from .tracing import Origin

__all__ = ["GrpcServer", "GrpcSettings", "status_to_proto"]

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
T = TypeVar("T")

_MESSAGE_LIMIT = 1024  # bytes; grpc_status_util.cc
_STATUS = {Code(status.value[0]): status for status in grpc.StatusCode}
_FOREVER_S = 1e9  # gRPC gives calls without a deadline either None or centuries


@dataclass(frozen=True)
class GrpcSettings:
    """How the front door is built.

    address: "host:port"; port 0 takes any free one. socket_path: a Unix socket beside it; may be empty.
    max_threads: calls answered at once. max_queued: calls that may wait; more get RESOURCE_EXHAUSTED.
    max_message_bytes: of requests; 0 is no limit.
    tls: None is plain text.
    """

    address: str
    socket_path: str = ""
    max_threads: int = 8
    max_queued: int = 1000
    max_message_bytes: int = 0
    channel_arguments: Sequence[tuple[str, str | int]] = ()
    tls: wire.SSLConfig | None = None
    packed_tensors: bool = False
    serve_health: bool = False


class GrpcServer:
    """Serves everything on one port, from a pool of threads; calls beyond it wait in line.

    Raises ServingError: UNAVAILABLE if the port cannot be had, INVALID_ARGUMENT if the certificates cannot
    be used. Nothing is accepted before `start`.
    """

    def __init__(
        self,
        settings: GrpcSettings,
        prediction: PredictionServiceImpl,
        model: ModelServiceImpl,
        metrics: Metrics,
    ) -> None:
        calls = _Calls(prediction, model, settings.packed_tensors)
        handlers = _handlers(calls, metrics)
        door = _Door(handlers, metrics)
        self._server = grpc.server(
            _TimedPool(settings.max_threads, "graftserve-grpc", door.took),
            interceptors=[door],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes or -1),
                ("grpc.max_send_message_length", -1),
                # On Linux two servers would otherwise share the port, each with half of the calls.
                ("grpc.so_reuseport", 0),
                *settings.channel_arguments,
            ],
            maximum_concurrent_rpcs=settings.max_threads + settings.max_queued,
        )
        self._health: Health | None = None
        for service, methods_of_it in handlers.items():
            self._server.add_registered_method_handlers(service, methods_of_it)
        names = [*handlers, reflection.SERVICE_NAME]
        if settings.serve_health:
            self._health = Health()
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
            names.append(health.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, descriptor_pool())
        try:
            self.port = self._bind(settings)
        except ServingError:
            self._server.stop(None)
            raise

    def start(self) -> None:
        """Accept calls."""
        self._server.start()
        if self._health is not None:
            self._health.serve()

    def watch(self, manager: AspiredVersionsManager) -> None:
        """Let each model's health follow its state."""
        if self._health is not None:
            manager.subscribe(self._health.on_state)

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those under way finish, and cancel what is left after grace_s."""
        if self._health is not None:
            self._health.stop()
        self._server.stop(grace_s).wait()

    def _bind(self, settings: GrpcSettings) -> int:
        credentials = None if settings.tls is None else _credentials(settings.tls)

        def bind(address: str) -> int:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)

        try:
            port = bind(settings.address)
        except RuntimeError as exc:
            raise ServingError(
                Code.UNAVAILABLE,
                f"Could not listen for gRPC on {settings.address}: is the port in use? Choose another one "
                "with --port",
            ) from exc
        if settings.socket_path:
            try:
                bind(f"unix:{settings.socket_path}")
            except RuntimeError as exc:
                raise ServingError(
                    Code.UNAVAILABLE,
                    f"Could not listen for gRPC on {settings.socket_path}: expected a path in a folder that "
                    "can be written to, where no other server listens; see --grpc_socket_path",
                ) from exc
        return port


class _Door(grpc.ServerInterceptor):
    """Counts the calls that gRPC refuses as one too many, which no handler and no thread ever sees.

    gRPC takes calls up one after another: it asks interceptors for the handler, then gives the call to the
    pool or refuses it. So what is not in the pool when the next call comes was refused.
    """

    def __init__(self, services: Mapping[str, Iterable[str]], metrics: Metrics) -> None:
        self._apis = {f"/{service}/{name}": name for service, names in services.items() for name in names}
        self._metrics = metrics
        self._came: str | None = None

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        if self._came is not None:
            self._metrics.refused(self._came, "GRPC")
        self._came = self._apis.get(handler_call_details.method)
        return continuation(handler_call_details)

    def took(self) -> None:
        """The call that came last is in the pool."""
        self._came = None


class _TimedPool(ThreadPoolExecutor):
    """Tells each call how long it waited for its thread, and calls `on_submit` with each."""

    _waited = threading.local()

    def __init__(self, max_workers: int, name: str, on_submit: Callable[[], None]) -> None:
        super().__init__(max_workers, name)
        self._on_submit = on_submit

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        self._on_submit()
        submitted_s = time.perf_counter()

        def run() -> T:
            self._waited.seconds = time.perf_counter() - submitted_s
            return fn(*args, **kwargs)

        return super().submit(run)

    @classmethod
    def waited_s(cls) -> float:
        """Of the call that the current thread is at."""
        return getattr(cls._waited, "seconds", 0.0)


def status_to_proto(state: ServableState) -> wire.ModelVersionStatus:
    """One version's state as GetModelStatus answers it."""
    status = wire.StatusProto()
    if state.error is not None:
        status = wire.StatusProto(error_code=state.error.code.name, error_message=state.error.message)
    return wire.ModelVersionStatus(version=state.id.version, state=state.state.name, status=status)


class _Calls:
    """Messages in, messages out."""

    def __init__(
        self, prediction: PredictionServiceImpl, model: ModelServiceImpl, packed_tensors: bool
    ) -> None:
        self._prediction = prediction
        self._model = model
        self._packed_tensors = packed_tensors

    def predict(
        self, call: Call, request: wire.PredictRequest, deadline_s: float | None
    ) -> wire.PredictResponse:
        inputs = ProtoInputs(request.inputs)
        answer = self._prediction.predict(
            call, _model_spec(request), lambda _: inputs, request.output_filter, deadline_s
        )
        response = wire.PredictResponse()
        for name, array in answer.result.items():
            if self._packed_tensors:
                response.outputs[name].CopyFrom(to_proto(array))
            else:
                write_typed(array, response.outputs[name])
        _write_spec(answer, response.model_spec)
        return response

    def classify(
        self, call: Call, request: wire.ClassificationRequest, deadline_s: float | None
    ) -> wire.ClassificationResponse:
        answer = self._prediction.classify(call, _model_spec(request), request.input, deadline_s)
        response = wire.ClassificationResponse(result=answer.result)
        _write_spec(answer, response.model_spec)
        return response

    def regress(
        self, call: Call, request: wire.RegressionRequest, deadline_s: float | None
    ) -> wire.RegressionResponse:
        answer = self._prediction.regress(call, _model_spec(request), request.input, deadline_s)
        response = wire.RegressionResponse(result=answer.result)
        _write_spec(answer, response.model_spec)
        return response

    def multi_inference(
        self, call: Call, request: wire.MultiInferenceRequest, deadline_s: float | None
    ) -> wire.MultiInferenceResponse:
        tasks = [(_model_spec(task), task) for task in request.tasks]
        answer = self._prediction.multi_inference(call, tasks, request.input, deadline_s)
        return wire.MultiInferenceResponse(results=answer.result)

    def get_model_metadata(
        self, call: Call, request: wire.GetModelMetadataRequest, deadline_s: float | None
    ) -> wire.GetModelMetadataResponse:
        answer = self._prediction.get_model_metadata(call, _model_spec(request), request.metadata_field)
        response = wire.GetModelMetadataResponse()
        _write_spec(answer, response.model_spec)
        packed = methods.pack_signature_def_map(answer.result)
        response.metadata[methods.SIGNATURE_DEF_FIELD].CopyFrom(packed)
        return response

    def get_model_status(
        self, call: Call, request: wire.GetModelStatusRequest, deadline_s: float | None
    ) -> wire.GetModelStatusResponse:
        states = self._model.get_model_status(call, _model_spec(request))
        return wire.GetModelStatusResponse(model_version_status=map(status_to_proto, states))

    def reload(
        self, call: Call, request: wire.ReloadConfigRequest, deadline_s: float | None
    ) -> wire.ReloadConfigResponse:
        self._model.reload(request.config, deadline_s)
        return wire.ReloadConfigResponse(status=wire.StatusProto())


def _model_spec(request: Any) -> ModelSpec | None:
    if not request.HasField("model_spec"):
        return None
    spec = request.model_spec
    choice = spec.WhichOneof("version_choice")
    return ModelSpec(
        spec.name,
        spec.version.value if choice == "version" else None,
        spec.version_label if choice == "version_label" else None,
        spec.signature_name,
    )


def _write_spec(answer: Answer[Any], spec: wire.ModelSpec) -> None:
    spec.name = answer.id.name
    spec.version.value = answer.id.version
    if answer.signature_name:
        spec.signature_name = answer.signature_name


def _handlers(calls: _Calls, metrics: Metrics) -> "dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]":
    services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}

    def add(
        method: methods.Method[RequestT, ResponseT],
        call: Callable[[Call, RequestT, float | None], ResponseT],
    ) -> None:
        behaviour: Callable[[Any, grpc.ServicerContext], Any] = _behaviour(method, call, metrics)
        services.setdefault(method.service, {})[method.name] = grpc.unary_unary_rpc_method_handler(behaviour)

    add(methods.PREDICT, calls.predict)
    add(methods.CLASSIFY, calls.classify)
    add(methods.REGRESS, calls.regress)
    add(methods.MULTI_INFERENCE, calls.multi_inference)
    add(methods.GET_MODEL_METADATA, calls.get_model_metadata)
    add(methods.GET_MODEL_STATUS, calls.get_model_status)
    add(methods.HANDLE_RELOAD_CONFIG_REQUEST, calls.reload)
    return services


def _behaviour(
    method: methods.Method[RequestT, ResponseT],
    run: Callable[[Call, RequestT, float | None], ResponseT],
    metrics: Metrics,
) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """Add to a method what all of them share: parsing, deadlines, dropped clients, errors as statuses."""

    def behave(content: bytes, context: grpc.ServicerContext) -> bytes:
        origin = partial(_origin, method, context)
        call = metrics.begin(method.name, "GRPC", origin, queue_s=_TimedPool.waited_s())
        code, message = Code.OK, ""
        try:
            deadline_s = _deadline_s(context)
            # Parsed here and not by gRPC, which would call what it cannot parse an error of the server.
            request = method.request.FromString(content)
            with cancellable(context.add_callback):
                return run(call, request, deadline_s).SerializeToString()
        except DecodeError:
            code = Code.INVALID_ARGUMENT
            message = (
                f"Expected a serialized {method.request.DESCRIPTOR.name}, got {len(content)} other bytes"
            )
        except ServingError as exc:
            code, message = exc.code, exc.message
        except Exception as exc:
            _log.exception("a call failed in an unforeseen way")
            code, message = Code.INTERNAL, f"{type(exc).__name__}: {exc}"
        finally:
            metrics.end(call, code, message)
        return context.abort(_STATUS[code], _cut(message))

    return behave


def _origin(method: methods.Method[Any, Any], context: grpc.ServicerContext, code: Code) -> Origin:
    headers = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
    name = f"{method.service}/{method.name}"
    attributes: dict[str, str | int] = {
        "rpc.system.name": "grpc",
        "rpc.method": name,
        "rpc.status_code": code.name,
        **_peer(context.peer()),
    }
    return Origin(name, headers, attributes)


def _peer(name: str) -> dict[str, str | int]:
    """A caller's address and port, or its socket's path. name: gRPC's, such as "ipv6:%5B::1%5D:80"."""
    scheme, _, rest = urllib.parse.unquote(name).partition(":")
    host, _, port = rest.rpartition(":")
    if scheme in ("ipv4", "ipv6") and port.isdecimal():
        return {"network.peer.address": host.strip("[]"), "network.peer.port": int(port)}
    return {"network.peer.address": rest}


def _cut(message: str) -> str:
    """Short enough for a header: clients refuse those of more than 8 KiB, and a byte may take three there."""
    content = message.encode(errors="replace")
    if len(content) <= _MESSAGE_LIMIT:
        return content.decode()
    return content[:_MESSAGE_LIMIT].decode(errors="ignore") + "...TRUNCATED"


def _deadline_s(context: grpc.ServicerContext) -> float | None:
    """The call's deadline on time.monotonic's clock. Raises ServingError if nobody waits for the answer."""
    remaining_s = context.time_remaining()
    if remaining_s is not None and remaining_s <= 0:
        raise ServingError(Code.DEADLINE_EXCEEDED, "Deadline exceeded before the request could run")
    if not context.is_active():
        raise ServingError(Code.CANCELLED, "The client has gone")
    if remaining_s is None or remaining_s > _FOREVER_S:
        return None
    return time.monotonic() + remaining_s


def _credentials(config: wire.SSLConfig) -> grpc.ServerCredentials:
    for name in ("server_key", "server_cert"):
        if "-----BEGIN " not in getattr(config, name):
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"--ssl_config_file: {name}: expected the PEM text itself (-----BEGIN ...), "
                f"got {'nothing' if not getattr(config, name) else 'something else'}",
            )
    if config.client_verify and not config.custom_ca:
        raise ServingError(
            Code.INVALID_ARGUMENT,
            "--ssl_config_file: client_verify: expected custom_ca with it, the authority that signs the "
            "clients' certificates, as PEM text",
        )
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        root_certificates=config.custom_ca.encode() or None,
        require_client_auth=config.client_verify,
    )
