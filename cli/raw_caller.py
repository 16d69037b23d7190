"""A request for each image over a bare gRPC stub, to compare the client with."""

from collections.abc import Mapping

import grpc

from graftserve.client import InternalError, InvalidImageError
from graftserve.client.channel import open_channel
from graftserve.client.errors import from_status
from graftserve.client.metadata import checked_metadata
from graftserve.client.wire import DataType, PredictRequest
from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, IMAGE_BYTES, SERVING_DEFAULT
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.tensors import TensorError, to_array

__all__ = ["RawCaller"]


class RawCaller:
    """Calls of one model over one channel: no batches, no retries; safe to use from many threads."""

    def __init__(
        self,
        target: str,
        model: str,
        version: int | None,
        timeout_s: float,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        channel_options: Mapping[str, str | int] | None = None,
    ) -> None:
        self._target, self._model, self._timeout_s = target, model, timeout_s
        self._metadata = checked_metadata(metadata)
        self._request = PredictRequest(output_filter=CLASSIFY_OUTPUTS)
        self._request.model_spec.name = model
        self._request.model_spec.signature_name = SERVING_DEFAULT
        if version is not None:
            self._request.model_spec.version.value = version
        tensor = self._request.inputs[IMAGE_BYTES]
        tensor.dtype = DataType.DT_STRING
        tensor.tensor_shape.dim.add(size=1)
        options = {"grpc.max_send_message_length": -1, "grpc.use_local_subchannel_pool": 1}
        self._channel = open_channel(
            target, credentials, [*options.items(), *(channel_options or {}).items()]
        )
        self._predict = self._channel.unary_unary(
            PREDICT.path,
            request_serializer=PREDICT.request.SerializeToString,
            response_deserializer=PREDICT.response.FromString,
        )

    def ask(self, content: bytes) -> None:
        """Classify one encoded image. Raises ClientError."""
        request = PredictRequest()
        request.CopyFrom(self._request)
        request.inputs[IMAGE_BYTES].string_val.append(content)
        try:
            response = self._predict(request, timeout=self._timeout_s, metadata=self._metadata)
            (valid,) = to_array(response.outputs["valid"]).tolist()
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
            details = (error.details() if isinstance(error, grpc.Call) else None) or ""
            raise from_status(code, details, target=self._target, model=self._model) from error
        except (TensorError, ValueError) as error:  # ValueError: more or less than one row
            raise InternalError(f"expected one answer with an output valid: {error}") from error
        if not valid:
            raise InvalidImageError("the image cannot be decoded")

    def close(self) -> None:
        """End the calls under way."""
        self._channel.close()
