"""A thin client for TensorFlow Serving's gRPC API: NumPy, gRPC and protobuf, no TensorFlow.

from graftserve.client import Client

with Client("localhost:8500", "flowers") as client:
    client.wait_until_ready()
    print(client.classify("rose.jpg").label)
"""

from .aio import AsyncClient
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
from .hooks import CallEnd, CallStart, Hooks, RequestEnd, RequestStart
from .images import ImageInput
from .prepare import Prepare
from .results import (
    ModelMetadata,
    Prediction,
    PredictResult,
    Signature,
    TensorSpec,
    VersionState,
    VersionStatus,
)
from .retry import RetryPolicy
from .stats import Stats, TargetStats

__all__ = [
    "AbortedError",
    "AccessError",
    "AsyncClient",
    "CallCancelledError",
    "CallEnd",
    "CallStart",
    "Client",
    "ClientError",
    "ClosedError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "GiveUpError",
    "Hooks",
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
    "Prepare",
    "RequestEnd",
    "RequestError",
    "RequestStart",
    "RetryError",
    "RetryPolicy",
    "Signature",
    "Stats",
    "TargetStats",
    "TensorSpec",
    "UnavailableError",
    "UnimplementedError",
    "VersionState",
    "VersionStatus",
]
