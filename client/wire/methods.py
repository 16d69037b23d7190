"""The RPCs that clients call and servers register, and the one packed message among their answers.

Source of the names: tensorflow_serving/apis/{prediction_service,model_service}.proto.
"""

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from .descriptors import AnyMessage
from .inference_pb2 import (
    ClassificationRequest,
    ClassificationResponse,
    MultiInferenceRequest,
    MultiInferenceResponse,
    RegressionRequest,
    RegressionResponse,
)
from .model_management_pb2 import ReloadConfigRequest, ReloadConfigResponse
from .prediction_pb2 import (
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    GetModelStatusRequest,
    GetModelStatusResponse,
    PredictRequest,
    PredictResponse,
    SignatureDefMap,
)

__all__ = [
    "CLASSIFY",
    "GET_MODEL_METADATA",
    "GET_MODEL_STATUS",
    "HANDLE_RELOAD_CONFIG_REQUEST",
    "METHODS",
    "MULTI_INFERENCE",
    "PREDICT",
    "REGRESS",
    "SIGNATURE_DEF_FIELD",
    "SIGNATURE_DEF_MAP_TYPE_URL",
    "Method",
    "pack_signature_def_map",
    "unpack_signature_def_map",
]

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True)
class Method(Generic[RequestT, ResponseT]):
    """One unary RPC."""

    service: str
    name: str
    request: type[RequestT]
    response: type[ResponseT]

    @property
    def path(self) -> str:
        """As gRPC wants it: "/service/name"."""
        return f"/{self.service}/{self.name}"


PREDICT: Final = Method("tensorflow.serving.PredictionService", "Predict", PredictRequest, PredictResponse)
CLASSIFY: Final = Method(
    "tensorflow.serving.PredictionService", "Classify", ClassificationRequest, ClassificationResponse
)
REGRESS: Final = Method(
    "tensorflow.serving.PredictionService", "Regress", RegressionRequest, RegressionResponse
)
MULTI_INFERENCE: Final = Method(
    "tensorflow.serving.PredictionService", "MultiInference", MultiInferenceRequest, MultiInferenceResponse
)
GET_MODEL_METADATA: Final = Method(
    "tensorflow.serving.PredictionService",
    "GetModelMetadata",
    GetModelMetadataRequest,
    GetModelMetadataResponse,
)
GET_MODEL_STATUS: Final = Method(
    "tensorflow.serving.ModelService", "GetModelStatus", GetModelStatusRequest, GetModelStatusResponse
)
HANDLE_RELOAD_CONFIG_REQUEST: Final = Method(
    "tensorflow.serving.ModelService",
    "HandleReloadConfigRequest",
    ReloadConfigRequest,
    ReloadConfigResponse,
)
METHODS: Final[tuple[Method[Message, Message], ...]] = (
    PREDICT,  # type: ignore[assignment]  # read as what it is above: a method of some messages
    CLASSIFY,
    REGRESS,
    MULTI_INFERENCE,
    GET_MODEL_METADATA,
    GET_MODEL_STATUS,
    HANDLE_RELOAD_CONFIG_REQUEST,
)

SIGNATURE_DEF_FIELD: Final = "signature_def"
"""The one `metadata_field` that GetModelMetadata knows, and its key in the answer."""

SIGNATURE_DEF_MAP_TYPE_URL: Final = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
"""The Any's type: TensorFlow Serving's name of the message, not that of our package."""


def pack_signature_def_map(signatures: SignatureDefMap) -> AnyMessage:
    """Wrap as GetModelMetadataResponse holds it under `signature_def`."""
    # Not AnyMessage.Pack: that would write our own package's name.
    return AnyMessage(
        type_url=SIGNATURE_DEF_MAP_TYPE_URL, value=signatures.SerializeToString(deterministic=True)
    )


def unpack_signature_def_map(packed: AnyMessage) -> SignatureDefMap:
    """Unwrap what `pack_signature_def_map` or TensorFlow Serving packed.

    Raises ValueError if it is another type or does not parse.
    """
    # The prefix before the last slash is free by Any's own definition.
    if packed.type_url.rpartition("/")[2] != SIGNATURE_DEF_MAP_TYPE_URL.rpartition("/")[2]:
        raise ValueError(f"expected {SIGNATURE_DEF_MAP_TYPE_URL}, got {packed.type_url or 'an empty Any'}")
    try:
        return SignatureDefMap.FromString(packed.value)
    except DecodeError as exc:
        raise ValueError(
            f"expected a serialized SignatureDefMap, got {len(packed.value)} other bytes"
        ) from exc
