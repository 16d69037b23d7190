"""A thin client for TensorFlow Serving's gRPC API: NumPy, gRPC and protobuf, no TensorFlow.

from graftserve.client import Client

with Client("localhost:8500", "flowers") as client:
    client.wait_until_ready()
    print(client.classify("rose.jpg").label)
"""

from .client import Client
from .errors import (
    AbortedError,
    AccessError,
    CallCancelledError,
    ClientError,
    ClosedError,
    DeadlineExceededError,
    FailedPreconditionError,
    GiveUpError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
    NotFoundError,
    OverloadedError,
    RequestError,
    RetryError,
    UnavailableError,
    UnimplementedError,
)
from .images import ImageInput
from .results import (
    ModelMetadata,
    Prediction,
    PredictResult,
    Signature,
    TensorSpec,
    VersionState,
    VersionStatus,
)

__all__ = [
    "AbortedError",
    "AccessError",
    "CallCancelledError",
    "Client",
    "ClientError",
    "ClosedError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "GiveUpError",
    "ImageInput",
    "InternalError",
    "InvalidArgumentError",
    "InvalidImageError",
    "ModelMetadata",
    "ModelMismatchError",
    "NotFoundError",
    "OverloadedError",
    "PredictResult",
    "Prediction",
    "RequestError",
    "RetryError",
    "Signature",
    "TensorSpec",
    "UnavailableError",
    "UnimplementedError",
    "VersionState",
    "VersionStatus",
]
