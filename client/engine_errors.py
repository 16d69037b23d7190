"""The errors of items that get no answer, in words that say what came before."""

import math

import grpc

from .attempts import Batch, Failure
from .batching import Item
from .errors import (
    CallCancelledError,
    ClientError,
    ClosedError,
    OverloadedError,
    UnavailableError,
    from_status,
)
from .options import Options

__all__ = ["EngineErrors"]


class EngineErrors:
    """Makes them for one client.

    load: how much waits and is under way, in words.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._name = f"model {options.model!r} at {options.target}"

    def failed(self, failure: Failure, attempts: int, kind: type[ClientError] | None = None) -> ClientError:
        """What a server or gRPC gave after so many attempts; kind: the class, if not that of the status."""
        error = from_status(
            failure.code or grpc.StatusCode.UNKNOWN,
            failure.details,
            target=self._options.target,
            model=self._options.model,
            attempts=attempts,
            kind=kind,
        )
        error.__cause__ = failure.cause
        return error

    def deadline(self, item: Item, batch: Batch | None, load: str) -> ClientError:
        """The item's time is over; batch: the one that it is part of, if it waits no more."""
        seconds = item.deadline - item.submitted
        if batch is None or not batch.sent:
            details = f"the call's {seconds:.3g} s were over before it could be sent; {load}"
        elif batch.retry_at is not None and batch.last_failure is not None:
            code = batch.last_failure.code
            details = (
                f"the call's {seconds:.3g} s were over before attempt {batch.sent + 1}; the last gave "
                f"{code.name if code else 'an error'}: {batch.last_failure.details or 'no details'}"
            )
        elif batch.refusal is not None:
            details = (
                f"the call's {seconds:.3g} s were over while a refusal was looked into: "
                f"{batch.refusal.details or 'no details'}"
            )
        else:
            details = f"no answer within the call's {seconds:.3g} s; {load}"
        return from_status(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            details,
            target=self._options.target,
            model=self._options.model,
            attempts=max(1, batch.sent if batch else 1),
        )

    def left(self) -> ClientError:
        """The caller waits no more."""
        return self._own(CallCancelledError, "the caller cancelled the call")

    def overloaded(self, load: str) -> ClientError:
        """No more may wait."""
        return self._own(
            OverloadedError,
            f"not sent to {self._name}: {load}, and no more may wait "
            f"(max_queued_images {self._options.max_queued_images}, max_queued_bytes "
            f"{self._options.max_queued_bytes}): send fewer calls at a time, or try again later",
        )

    def circuit(self, failures: int, rest_s: float) -> ClientError:
        """Every target is left alone, for so many seconds; infinity while one is on trial."""
        again = f"in {rest_s:.1f} s" if math.isfinite(rest_s) else "now, by another call"
        error = self._own(
            UnavailableError,
            f"not sent to {self._name}: the last {failures} attempts found no server; it is tried again "
            f"{again} (check the address and that the server is running)",
        )
        error.code = grpc.StatusCode.UNAVAILABLE
        return error

    def closed(self) -> ClientError:
        """The client was closed."""
        return self._own(ClosedError, f"the client of {self._name} is closed: make a new one")

    def _own(self, kind: type[ClientError], message: str) -> ClientError:
        return kind(message, target=self._options.target, model=self._options.model)
