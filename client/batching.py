"""What waits to be sent, and when how much of it goes: pure, time is passed in.

Natural batching: what comes while nothing holds it back is sent at once, alone if it is alone; the rest
gathers while requests are under way. It is shared out evenly among the requests that may be (`limits` finds
how many). The callers that an answer has just set free are likely to come back together, so for a moment
their number is waited for.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from .errors import ClientError
from .results import ModelMetadata
from .wire.methods import Method

__all__ = ["Item", "Lane", "Latency", "Pending", "Return", "share"]

_LONGEST_RETURN_S: Final = 0.002
_RETURN: Final = 0.1  # of the latency
_LATENCIES: Final = 128
_FEW_LATENCIES: Final = 10


class Lane(Protocol):
    """Items that may share a request, and how they do."""

    @property
    def key(self) -> Hashable:
        """Equal for lanes whose items may share a request."""

    @property
    def method(self) -> Method[Any, Any]:
        """The RPC."""

    @property
    def signature(self) -> str:
        """The model's signature, "" where there is none."""

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """gRPC metadata of the call."""

    @property
    def merges(self) -> bool:
        """Whether items may share a request at all."""

    @property
    def urgent(self) -> bool:
        """Sent at once, whatever is under way: questions about the server, not work for it."""

    @property
    def retries(self) -> bool:
        """Whether a lost request is sent again."""

    def request(self, contents: Sequence[Any]) -> bytes:
        """The serialized message for the items with these contents. Raises ClientError."""

    def results(self, response: Any, contents: Sequence[Any]) -> Sequence[Any]:
        """A value or a ClientError for each of the items. Raises ClientError for an answer that makes no
        sense.
        """

    def adapt(self, metadata: ModelMetadata) -> bool:
        """Fit the request to the model's signatures; True if that changes it."""

    def explain(
        self, metadata: ModelMetadata, error: ClientError, contents: Sequence[Any]
    ) -> ClientError | None:
        """What a refusal comes down to, given the model's signatures; None if they do not say more."""

    def blame(self, error: ClientError) -> ClientError:
        """The error for an item that was refused alone, by a model that its request fits."""


@dataclass(slots=True, eq=False)
class Item:
    """What one caller wants answered: an image, or the inputs of a Predict.

    rows, size_bytes: what it adds to a request.
    deadline: a moment, in the clock of whoever drives the engine.
    notify: called with the item, once, when it has its `result`: a value or a ClientError.
    caller: what the hooks made of the call.
    submitted: when the engine got it; -infinity before.
    """

    lane: Lane
    content: Any
    rows: int
    size_bytes: int
    deadline: float
    notify: Callable[["Item"], None]
    caller: Any = None
    submitted: float = -math.inf
    finished: bool = False
    result: Any = None


@dataclass(slots=True)
class Return:
    """The callers of one lane that were answered lately and may come back: how many rows, and until when."""

    rows: int = 0
    until: float = -math.inf

    def answered(self, rows: int, latency_s: float, now: float) -> None:
        """A request of several callers was answered."""
        self.rows = rows if now >= self.until else self.rows + rows
        self.until = now + min(_LONGEST_RETURN_S, _RETURN * latency_s)

    def came(self, rows: int) -> None:
        """Rows were submitted."""
        self.rows = max(0, self.rows - rows)


@dataclass(slots=True)
class Latency:
    """How long the last requests took.

    slow_s: what 95% of them stayed below; None before the tenth.
    """

    slow_s: float | None = None
    count: int = 0
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))

    def took(self, latency_s: float) -> None:
        """A request was answered."""
        self._last.append(latency_s)
        self.count += 1
        if self.count % _FEW_LATENCIES == 0:
            self.slow_s = sorted(self._last)[int(0.95 * len(self._last))]


@dataclass(eq=False)
class Pending:
    """The items of one lane that wait, oldest first; and what is known of the lane's requests."""

    lane: Lane
    back: Return = field(default_factory=Return)
    latency: Latency = field(default_factory=Latency)
    adaptations: int = 0  # how often the lane has fitted its requests to the model
    rows: int = 0
    size_bytes: int = 0
    nearest_deadline: float = math.inf  # of all that came since it was last empty
    _items: deque[Item] = field(default_factory=deque)

    def add(self, item: Item) -> None:
        """At the end."""
        self._items.append(item)
        self._count(item)

    def put_back(self, items: Sequence[Item]) -> None:
        """At the front, in this order."""
        for item in reversed(items):
            self._items.appendleft(item)
            self._count(item)

    def left(self, item: Item) -> None:
        """The item, which is finished now, waits no more."""
        # It stays in the deque until its turn comes: a search would take longer than all the rest.
        self._discount(item)

    def oldest(self) -> Item | None:
        """The one that has waited longest."""
        while self._items and self._items[0].finished:
            self._items.popleft()
        return self._items[0] if self._items else None

    def take(self, max_rows: int, max_bytes: int) -> list[Item]:
        """The oldest, up to the limits; one that is above them all by itself comes alone."""
        taken: list[Item] = []
        rows = size_bytes = 0
        while (item := self.oldest()) is not None:
            rows += item.rows
            size_bytes += item.size_bytes
            if taken and (rows > max_rows or size_bytes > max_bytes):
                break
            taken.append(self._items.popleft())
            self._discount(item)
            if not self.lane.merges:
                break
        return taken

    def _count(self, item: Item) -> None:
        self.rows += item.rows
        self.size_bytes += item.size_bytes
        self.nearest_deadline = min(self.nearest_deadline, item.deadline)

    def _discount(self, item: Item) -> None:
        self.rows -= item.rows
        self.size_bytes -= item.size_bytes
        if not self.rows:
            self.nearest_deadline = math.inf


def share(rows: int, requests: int, max_rows: int) -> int:
    """How many of `rows` one of `requests` takes: an equal part, at least 1 and at most `max_rows`."""
    return min(max_rows, max(1, (rows + requests // 2) // requests))
