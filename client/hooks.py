"""What a client tells those who watch it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import ClientError

__all__ = ["Hooks", "RequestEnd", "RequestStart", "Watched"]

_LOGGER: Final = logging.getLogger("graftserve.client")


@dataclass(frozen=True)
class RequestStart:
    """A request that is about to be sent.

    method: the RPC's path; signature: "" where it has none.
    rows, size_bytes: the items in it and their contents.
    attempt: from 1; hedge: a second copy beside another.
    queue_s: how long the oldest of its items waited.
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
    queue_s: float
    callers: tuple[Any, ...]


@dataclass(frozen=True)
class RequestEnd:
    """How a request ended.

    code: the gRPC status by name; "OK" for an answer.
    network_s: from sending to the answer.
    version: of the model that answered, if one did.
    """

    code: str
    network_s: float
    version: int | None


class Hooks:
    """Told of every call and every request; subclass it and override what you need.

    Called from the threads that do the work (or in the event loop), so be quick and safe for threads.
    What a hook raises is logged and otherwise ignored.
    """

    def call_started(self, method: str) -> Any:
        """A method of the client is called, in the caller's own thread or task; returns what its requests
        name.
        """

    def call_ended(self, caller: Any, method: str, duration_s: float, error: ClientError | None) -> None:
        """It returned, or raised."""

    def request_started(self, request: RequestStart) -> Mapping[str, str | bytes] | None:
        """A request is about to be sent; returns metadata to send along, names in lower case."""

    def request_ended(self, request: RequestStart, end: RequestEnd) -> None:
        """It was answered, failed or was cancelled."""


class Watched:
    """Calls the hooks and keeps what they raise away from the client."""

    def __init__(self, hooks: Hooks | None) -> None:
        self._hooks = hooks

    def __bool__(self) -> bool:
        return self._hooks is not None

    def call_started(self, method: str) -> Any:
        """As Hooks."""
        return self._try("call_started", method)

    def call_ended(self, caller: Any, method: str, duration_s: float, error: ClientError | None) -> None:
        """As Hooks."""
        self._try("call_ended", caller, method, duration_s, error)

    def request_started(self, request: RequestStart) -> tuple[tuple[str, str | bytes], ...]:
        """As Hooks."""
        metadata: Mapping[str, str | bytes] | None = self._try("request_started", request)
        return tuple(metadata.items()) if metadata else ()

    def request_ended(self, request: RequestStart, end: RequestEnd) -> None:
        """As Hooks."""
        self._try("request_ended", request, end)

    def _try(self, name: str, *arguments: Any) -> Any:
        if self._hooks is None:
            return None
        try:
            return getattr(self._hooks, name)(*arguments)
        except Exception:
            _LOGGER.exception("%s.%s failed; the call goes on without it", type(self._hooks).__name__, name)
            return None
