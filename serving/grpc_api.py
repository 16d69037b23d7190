"""The gRPC front door: TensorFlow Serving's PredictionService and ModelService.

Source: tensorflow_serving/apis/{prediction_service,model_service}.proto and
tensorflow_serving/model_servers/{prediction_service_impl,grpc_status_util,server}.cc.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from graftserve.client import wire
from graftserve.client.wire import methods
from graftserve.client.wire.tensors import write_typed

from .errors import Code, ServingError
from .manager import ServableState
from .proto_tensors import ProtoInputs
from .service import ModelServiceImpl, ModelSpec, PredictionServiceImpl

__all__ = ["GrpcServer", "status_to_proto"]

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

_MESSAGE_LIMIT = 1024  # characters; grpc_status_util.cc
_STATUS = {Code(status.value[0]): status for status in grpc.StatusCode}
_FOREVER_S = 1e9  # gRPC gives calls without a deadline either None or centuries


class GrpcServer:
    """Serves both services on one port, from a pool of threads; calls beyond it wait in line.

    address: "host:port"; port 0 takes any free one.
    Raises ServingError (UNAVAILABLE) if the port cannot be had. Nothing is accepted before `start`.
    """

    def __init__(
        self, address: str, prediction: PredictionServiceImpl, model: ModelServiceImpl, *, max_threads: int
    ) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=max_threads, thread_name_prefix="graftserve-grpc"),
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                # On Linux two servers would otherwise share the port, each with half of the calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        calls = _Calls(prediction, model)
        for service, handlers in _handlers(calls).items():
            self._server.add_registered_method_handlers(service, handlers)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as exc:
            self._server.stop(None)
            raise ServingError(
                Code.UNAVAILABLE,
                f"Could not listen for gRPC on {address}: is the port in use? Choose another one with --port",
            ) from exc

    def start(self) -> None:
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those under way finish, and cancel what is left after grace_s."""
        self._server.stop(grace_s).wait()


def status_to_proto(state: ServableState) -> wire.ModelVersionStatus:
    """One version's state as GetModelStatus answers it."""
    status = wire.StatusProto()
    if state.error is not None:
        status = wire.StatusProto(error_code=state.error.code.name, error_message=state.error.message)
    return wire.ModelVersionStatus(version=state.id.version, state=state.state.name, status=status)


class _Calls:
    """Messages in, messages out."""

    def __init__(self, prediction: PredictionServiceImpl, model: ModelServiceImpl) -> None:
        self._prediction = prediction
        self._model = model

    def predict(self, request: wire.PredictRequest, deadline_s: float | None) -> wire.PredictResponse:
        inputs = ProtoInputs(request.inputs)
        prediction = self._prediction.predict(
            _model_spec(request), lambda _: inputs, request.output_filter, deadline_s
        )
        response = wire.PredictResponse()
        for name, array in prediction.outputs.items():
            write_typed(array, response.outputs[name])
        spec = response.model_spec
        spec.name = prediction.id.name
        spec.version.value = prediction.id.version
        spec.signature_name = prediction.signature_name
        return response

    def get_model_metadata(
        self, request: wire.GetModelMetadataRequest, deadline_s: float | None
    ) -> wire.GetModelMetadataResponse:
        servable_id, signatures = self._prediction.get_model_metadata(
            _model_spec(request), request.metadata_field
        )
        response = wire.GetModelMetadataResponse()
        response.model_spec.name = servable_id.name
        response.model_spec.version.value = servable_id.version
        response.metadata[methods.SIGNATURE_DEF_FIELD].CopyFrom(methods.pack_signature_def_map(signatures))
        return response

    def get_model_status(
        self, request: wire.GetModelStatusRequest, deadline_s: float | None
    ) -> wire.GetModelStatusResponse:
        states = self._model.get_model_status(_model_spec(request))
        return wire.GetModelStatusResponse(model_version_status=map(status_to_proto, states))


def _model_spec(
    request: wire.PredictRequest | wire.GetModelMetadataRequest | wire.GetModelStatusRequest,
) -> ModelSpec | None:
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


def _handlers(calls: _Calls) -> "dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]":
    services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}

    def add(
        method: methods.Method[RequestT, ResponseT], call: Callable[[RequestT, float | None], ResponseT]
    ) -> None:
        behaviour: Callable[[Any, grpc.ServicerContext], Any] = _behaviour(call)
        services.setdefault(method.service, {})[method.name] = grpc.unary_unary_rpc_method_handler(
            behaviour,
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )

    add(methods.PREDICT, calls.predict)
    add(methods.GET_MODEL_METADATA, calls.get_model_metadata)
    add(methods.GET_MODEL_STATUS, calls.get_model_status)
    return services


def _behaviour(
    call: Callable[[RequestT, float | None], ResponseT],
) -> Callable[[RequestT, grpc.ServicerContext], ResponseT]:
    """Add to a call what all of them share: deadlines, dropped clients, errors as statuses."""

    def behave(request: RequestT, context: grpc.ServicerContext) -> ResponseT:
        try:
            return call(request, _deadline_s(context))
        except ServingError as exc:
            code, message = exc.code, exc.message
        except Exception as exc:
            _log.exception("a call failed in an unforeseen way")
            code, message = Code.INTERNAL, f"{type(exc).__name__}: {exc}"
        if len(message) > _MESSAGE_LIMIT:
            message = message[:_MESSAGE_LIMIT] + "...TRUNCATED"
        return context.abort(_STATUS[code], message)

    return behave


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
