"""What the engine keeps of the requests under way, and what it hands to its shell."""

from dataclasses import dataclass, field
from typing import Any

import grpc

from .batching import Item, Lane
from .errors import ClientError
from .isolation import Search

__all__ = ["Attempt", "Batch", "Failure", "Work"]


@dataclass(frozen=True)
class Failure:
    """How an attempt failed.

    error: where it did so on this side; else `code` and `details` are the server's or gRPC's own.
    pushback_s: what the server asked to wait for, if it did.
    cause: the exception behind it.
    """

    code: grpc.StatusCode | None = None
    details: str = ""
    pushback_s: float | None = None
    error: ClientError | None = None
    cause: BaseException | None = None


@dataclass(eq=False)
class Batch:
    """Items that share a request, until all of them are finished."""

    lane: Lane
    items: list[Item]
    attempts: list["Attempt"] = field(default_factory=list)  # under way
    sent: int = 0  # attempts so far, of what is asked now
    explained: bool = False
    search: Search[Item] | None = None
    asked: list[Item] = field(default_factory=list)
    refusal: Failure | None = None  # while its explanation is under way
    retry_at: float | None = None
    hedge_at: float | None = None
    last_failure: Failure | None = None
    adaptations: int = 0  # of the lane, when the batch was sent last
    rows: int = 0


@dataclass(eq=False)
class Attempt:
    """One request to one target.

    lane, items: what it asks.
    number: from 1; hedge: sent beside another.
    timeout_s: what gRPC gives it.
    handle: the shell's, to cancel it by; over: the engine waits for it no more.
    """

    batch: Batch
    lane: Lane
    items: list[Item]
    target: int
    number: int
    hedge: bool
    started: float
    timeout_s: float
    explains: bool = False
    handle: Any = None
    over: bool = False

    @property
    def rows(self) -> int:
        """In the request."""
        return sum(item.rows for item in self.items)

    @property
    def size_bytes(self) -> int:
        """Of the items' contents."""
        return sum(item.size_bytes for item in self.items)

    @property
    def queue_s(self) -> float:
        """How long the oldest of its items had waited when it was sent."""
        return max(0.0, self.started - min((item.submitted for item in self.items), default=self.started))


@dataclass
class Work:
    """What the shell has to do, in this order, after it has left the engine."""

    finished: list[Item] = field(default_factory=list)
    cancels: list[Attempt] = field(default_factory=list)
    sends: list[Attempt] = field(default_factory=list)
