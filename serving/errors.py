"""The one error of the server: a canonical code and a message.

Nothing here knows gRPC or HTTP; `grpc_api` and `rest_api` translate at the boundary.
Codes are the canonical ones of google/rpc/code.proto, the same numbers on every transport.
"""

import enum

__all__ = ["Code", "ServingError", "invalid", "timed_out"]


class Code(enum.IntEnum):
    """A canonical status code."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ServingError(Exception):
    """A request, or a load, that failed.

    code: what kind of failure, for the caller's program.
    message: what was expected and what came, for the caller's eyes.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


def invalid(message: str) -> ServingError:
    """For a request that is not right: INVALID_ARGUMENT."""
    return ServingError(Code.INVALID_ARGUMENT, message)


def timed_out() -> ServingError:
    """For a request whose time was up while it waited for others; in the words of TensorFlow's Session."""
    return ServingError(Code.DEADLINE_EXCEEDED, "Timed out waiting for notification")
