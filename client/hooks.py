"""What a client tells those who watch it.

`prometheus` and `opentelemetry` beside this module are such; the client imports neither.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from .metadata import sendable

__all__ = ["CallEnd", "CallStart", "Hooks", "RequestEnd", "RequestStart", "Watched"]

_LOGGER: Final = logging.getLogger("graftserve.client")


@dataclass(frozen=True)
class CallStart:
    """A method of a client is called.

    method: its name, such as "classify"; "stream" stands for `stream_as_completed`, too.
    model: the client's.
    """

    method: str
    model: str


@dataclass(frozen=True)
class CallEnd:
    """How a call ended.

    duration_s: from first to last, with encoding, queue and retries; of a stream also what the caller does
        between the answers.
    error: what the call raised: a ClientError, whatever the caller's own iterable or `prepare` raised, or
        asyncio.CancelledError and KeyboardInterrupt where the caller gave up. None if it returned, also for
        a stream that the caller left early.
    """

    duration_s: float
    error: BaseException | None


@dataclass(frozen=True, eq=False, slots=True)
class RequestStart:
    """A request that is about to be sent. Compared and hashed by identity; `request_ended` gets the same.

    method: the RPC's path; signature: "" where it has none.
    rows, size_bytes: the items in it and their contents.
    attempt: from 1; hedge: a second copy beside another.
    explains: asks for the model's signatures, to find out why the request before was refused.
    queue_s: how long the oldest of its items waited, earlier attempts included.
    callers: what `call_started` returned for each of the calls whose items are in it.
    """

    target: str
    model: str
    method: str
    signature: str
    rows: int
    size_bytes: int
    attempt: int
    hedge: bool
    explains: bool
    queue_s: float
    callers: tuple[Any, ...]

    @property
    def retry(self) -> bool:
        """Whether it is sent since another got lost."""
        return self.attempt > 1 and not self.hedge and not self.explains


@dataclass(frozen=True)
class RequestEnd:
    """How a request ended.

    code: the gRPC status by name; "OK" if an answer came, "INTERNAL" if it could not be sent at all.
    network_s: from sending to the answer.
    version: of the model that answered, if one did.
    error: "" if all is well, otherwise `code`, or the class of the ClientError where this side found the
        fault: with the code "OK", an answer that makes no sense.
    details: what is wrong, in the words of the server, of gRPC or of that ClientError; "" if nothing is.
    invalid_rows: rows of the answer that are an error each, such as images that do not decode.
    abandoned: this side cancelled it, since another copy was answered or nobody waits any more.
    """

    code: str
    network_s: float
    version: int | None
    error: str = ""
    details: str = ""
    invalid_rows: int = 0
    abandoned: bool = False


class Hooks:
    """Told of every call and every request; subclass it and override what you need.

    Called from the threads that do the work (or in the event loop), so be quick and safe for threads.
    One object may serve several clients. Every start is followed by its end.
    What a hook raises is logged and otherwise ignored.
    """

    def call_started(self, call: CallStart) -> Any:
        """A method of the client is called, in the caller's own thread or task; returns what its requests
        name.
        """

    def call_ended(self, caller: Any, call: CallStart, end: CallEnd) -> None:
        """It returned, or raised; caller: what `call_started` returned, None if that raised."""

    def request_started(self, request: RequestStart) -> Mapping[str, str | bytes] | None:
        """A request is about to be sent; returns metadata to send along, names in lower case."""

    def request_ended(self, request: RequestStart, end: RequestEnd) -> None:
        """It was answered, failed or was cancelled."""


class Watched:
    """Calls the hooks and keeps what they raise away from the client.

    model: the client's.
    A call's `caller` is a tuple here, and its request several RequestStarts: one for each of the hooks.
    """

    def __init__(self, hooks: Hooks | Sequence[Hooks] | None, model: str) -> None:
        self._hooks = (hooks,) if isinstance(hooks, Hooks) else tuple(hooks or ())
        self._model = model
        self._failures: dict[str, int] = {}

    def call(self, method: str) -> AbstractContextManager[tuple[Any, ...] | None]:
        """Surrounds a call; gives its `caller`."""
        return _Call(self, CallStart(method, self._model)) if self._hooks else _UNWATCHED

    def call_started(self, call: CallStart) -> tuple[Any, ...]:
        """As Hooks."""
        return tuple(self._try(hooks, "call_started", call) for hooks in self._hooks)

    def call_ended(self, caller: tuple[Any, ...], call: CallStart, end: CallEnd) -> None:
        """As Hooks."""
        for hooks, own in zip(self._hooks, caller, strict=True):
            self._try(hooks, "call_ended", own, call, end)

    def request_started(self, started: Sequence[RequestStart]) -> tuple[tuple[str, str | bytes], ...]:
        """As Hooks. Leaves out metadata that gRPC would not take."""
        metadata: list[tuple[str, str | bytes]] = []
        for hooks, request in zip(self._hooks, started, strict=True):
            for pair in _pairs(self._try(hooks, "request_started", request)):
                if sendable(*pair):
                    metadata.append(pair)
                else:
                    self._failed(hooks, "request_started", f"gave metadata that gRPC does not take: {pair!r}")
        return tuple(metadata)

    def request_ended(self, started: Sequence[RequestStart], end: RequestEnd) -> None:
        """As Hooks."""
        for hooks, request in zip(self._hooks, started, strict=True):
            self._try(hooks, "request_ended", request, end)

    def _try(self, hooks: Hooks, name: str, *arguments: Any) -> Any:
        try:
            return getattr(hooks, name)(*arguments)
        except Exception as exc:
            self._failed(hooks, name, "failed", exc)
            return None

    def _failed(self, hooks: Hooks, name: str, what: str, cause: Exception | None = None) -> None:
        name = f"{type(hooks).__name__}.{name}"
        count = self._failures[name] = self._failures.get(name, 0) + 1
        # Told of every one, a log would be full before anybody has read it.
        if str(count).strip("0") == "1":
            _LOGGER.error("%s %s, %d times so far; calls go on without it", name, what, count, exc_info=cause)


class _Call:
    """From `call_started` to `call_ended`."""

    __slots__ = ("_call", "_caller", "_since", "_watched")

    def __init__(self, watched: Watched, call: CallStart) -> None:
        self._watched = watched
        self._call = call

    def __enter__(self) -> tuple[Any, ...]:
        self._since = time.monotonic()
        self._caller = self._watched.call_started(self._call)
        return self._caller

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        error = None if isinstance(exc, GeneratorExit) else exc
        self._watched.call_ended(self._caller, self._call, CallEnd(time.monotonic() - self._since, error))


_UNWATCHED: Final = nullcontext()


def _pairs(metadata: Any) -> list[tuple[Any, Any]]:
    if metadata is None:
        return []
    return list(metadata.items()) if isinstance(metadata, Mapping) else [("", metadata)]
