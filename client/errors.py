"""What can go wrong in a call, branched by what the caller can do about it.

ClientError
├── RetryError                  the same call may succeed later
│   ├── UnavailableError        UNAVAILABLE: no server reached, or it is going away
│   ├── OverloadedError         RESOURCE_EXHAUSTED: the server refuses more work
│   ├── DeadlineExceededError   DEADLINE_EXCEEDED: the time given has passed
│   └── AbortedError            ABORTED
├── RequestError                mend the request
│   ├── InvalidArgumentError    INVALID_ARGUMENT, OUT_OF_RANGE, ALREADY_EXISTS
│   ├── InvalidImageError       an image that cannot be read or decoded
│   ├── NotFoundError           NOT_FOUND: no such model or version
│   ├── FailedPreconditionError FAILED_PRECONDITION: no such signature, or a broken model
│   ├── ModelMismatchError      the model is there, but is not what the method needs
│   └── AccessError             UNAUTHENTICATED, PERMISSION_DENIED
└── GiveUpError                 neither helps
    ├── InternalError           INTERNAL, UNKNOWN, DATA_LOSS, an answer that makes no sense
    ├── UnimplementedError      UNIMPLEMENTED: not a model server, or an older one
    ├── CallCancelledError      CANCELLED
    └── ClosedError             the client was closed
"""

from typing import Final

import grpc

__all__ = [
    "AbortedError",
    "AccessError",
    "CallCancelledError",
    "ClientError",
    "ClosedError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "GiveUpError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidImageError",
    "ModelMismatchError",
    "NotFoundError",
    "OverloadedError",
    "RequestError",
    "RetryError",
    "UnavailableError",
    "UnimplementedError",
    "error_class",
    "from_status",
]


class ClientError(Exception):
    """Any failure of a call.

    code: the gRPC status, or None if the client itself found the fault.
    target: the address that was called, or "".
    model: the model's name, or "".
    details: the server's own words, or "".
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        target: str = "",
        model: str = "",
        details: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.target = target
        self.model = model
        self.details = details


class RetryError(ClientError):
    """The same call may succeed later."""


class UnavailableError(RetryError):
    """No server could be reached, or it went away during the call."""


class OverloadedError(RetryError):
    """The server refuses more work for now."""


class DeadlineExceededError(RetryError):
    """The time given to the call has passed."""


class AbortedError(RetryError):
    """The server broke the call off in favour of another."""


class RequestError(ClientError):
    """The request must change before it can succeed."""


class InvalidArgumentError(RequestError):
    """The server, or the client before sending, refuses the request's content."""


class InvalidImageError(RequestError):
    """An image that cannot be read (raised before sending) or that the server cannot decode.

    indexes: the positions of the bad images in the call, counted from 0; empty for a single image.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        target: str = "",
        model: str = "",
        details: str = "",
        indexes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, code=code, target=target, model=model, details=details)
        self.indexes = indexes


class NotFoundError(RequestError):
    """The server has no such model or version."""


class FailedPreconditionError(RequestError):
    """The model has no such signature, or cannot run."""


class ModelMismatchError(RequestError):
    """The model lacks the signature, inputs or outputs that the method needs."""


class AccessError(RequestError):
    """The credentials are missing or do not suffice."""


class GiveUpError(ClientError):
    """Neither a retry nor another request helps."""


class InternalError(GiveUpError):
    """The server failed, or its answer makes no sense."""


class UnimplementedError(GiveUpError):
    """The server does not know the RPC."""


class CallCancelledError(GiveUpError):
    """The call was cancelled."""


class ClosedError(GiveUpError):
    """The client was closed before or during the call."""


_CLASSES: Final[dict[grpc.StatusCode, type[ClientError]]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.ALREADY_EXISTS: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
    grpc.StatusCode.OK: InternalError,  # a failed call that says OK
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
}

_ADVICE: Final[dict[type[ClientError], str]] = {
    UnavailableError: "check the address and that the server is running",
    OverloadedError: "send fewer calls at a time, or try again later",
    DeadlineExceededError: "give it more time (timeout_s), or the server less work",
    NotFoundError: "check the model's name and version",
    AccessError: "check the credentials and metadata",
    UnimplementedError: "check that the address is a model server's gRPC port",
}


def error_class(code: grpc.StatusCode) -> type[ClientError]:
    """The class for a gRPC status; every status has one."""
    return _CLASSES.get(code, InternalError)


def from_status(
    code: grpc.StatusCode,
    details: str,
    *,
    target: str,
    model: str,
    attempts: int = 1,
    kind: type[ClientError] | None = None,
) -> ClientError:
    """The error for a call that ended with `code`; raise it `from` the gRPC error to keep the cause.

    details: the server's (or gRPC's own) message.
    attempts: how often the call was sent.
    kind: the class, where the status alone would say too little.
    """
    cls = kind or error_class(code)
    message = f"{code.name} from {target}, model {model!r}"
    if attempts > 1:
        message += f", after {attempts} attempts"
    message += f": {details or 'no details given'}"
    if cls in _ADVICE:
        message += f" ({_ADVICE[cls]})"
    return cls(message, code=code, target=target, model=model, details=details)
