"""What both `prometheus` and `opentelemetry` need: bounded labels, buckets, and the clients to look at."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar
from weakref import WeakSet

from .base import BaseClient
from .errors import ClientError

__all__ = ["OTHER", "ROWS_BUCKETS", "SECONDS_BUCKETS", "Bounded", "Clients", "Latest", "outcome"]

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")

OTHER: Final = "(other)"
"""Stands for all that came after a bound was reached."""

SECONDS_BUCKETS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
"""Upper limits for times; those of our server's metrics, as far as both have them."""

ROWS_BUCKETS: Final = tuple(float(2**power) for power in range(11))
"""Upper limits for the rows of a request; those of our server's metrics, as far as both have them."""


class Bounded(Generic[KeyT, ValueT]):
    """Makes a value for each of the first keys, and one for all later ones. Safe for threads.

    maximum: how many keys get a value of their own.
    other: the key that stands for a late one; there should be few of them.
    """

    def __init__(self, maximum: int, make: Callable[[KeyT], ValueT], other: Callable[[KeyT], KeyT]) -> None:
        self._maximum = maximum
        self._make = make
        self._other = other
        self._values: dict[KeyT, ValueT] = {}
        self._others: dict[KeyT, ValueT] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: KeyT) -> ValueT:
        value = self._values.get(key)
        if value is not None:
            return value
        with self._lock:
            values = self._values
            if key not in values and len(values) >= self._maximum:
                key, values = self._other(key), self._others
            if key not in values:
                values[key] = self._make(key)
            return values[key]


class Latest(Generic[KeyT, ValueT]):
    """Makes a value for each key and drops that of the key that was used longest ago. Safe for threads.

    maximum: how many are kept.
    drop: called with a key whose value goes.
    """

    def __init__(self, maximum: int, make: Callable[[KeyT], ValueT], drop: Callable[[KeyT], None]) -> None:
        self._maximum = maximum
        self._make = make
        self._drop = drop
        self._values: OrderedDict[KeyT, ValueT] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, key: KeyT) -> ValueT:
        with self._lock:
            if key not in self._values:
                self._values[key] = self._make(key)
            self._values.move_to_end(key)
            if len(self._values) > self._maximum:
                old, _ = self._values.popitem(last=False)
                self._drop(old)
            return self._values[key]


class Clients:
    """Open clients, as long as somebody else uses them. Safe for threads."""

    def __init__(self) -> None:
        self._clients: WeakSet[BaseClient] = WeakSet()
        self._lock = threading.Lock()

    def add(self, client: BaseClient) -> None:
        """A second time does nothing."""
        with self._lock:
            self._clients.add(client)

    def open(self) -> list[BaseClient]:
        """Those that are not closed; the others are forgotten."""
        with self._lock:
            clients = list(self._clients)
            for client in clients:
                if client.closed:
                    self._clients.discard(client)
        return [client for client in clients if not client.closed]


def outcome(error: BaseException | None) -> str:
    """How a call ended, in few words: "ok", the class of a ClientError, "cancelled" (the caller gave up) or
    "(other)" (the caller's own code, such as an iterable of images, failed).
    """
    if error is None:
        return "ok"
    if isinstance(error, ClientError):
        # Of a class of the caller's own, the nearest of ours.
        return next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == ClientError.__module__)
    if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
        return "cancelled"
    return OTHER
