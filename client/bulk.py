"""The bookkeeping of one call for many images: what to take, to submit and to wait for; no I/O."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from .batching import Item, Lane
from .errors import ClientError, InvalidImageError

__all__ = ["Bulk"]

_GATHER_S: Final = 0.005


class Bulk:
    """Images on their way, in chunks of a batch, never more than a window of them.

    notify: becomes each Item's.
    deadline: of the call; None gives each image `timeout_s` from when it is submitted.
    caller: becomes each Item's.
    """

    def __init__(
        self,
        lane: Lane,
        notify: Callable[[Item], None],
        *,
        deadline: float | None,
        timeout_s: float,
        caller: object,
    ) -> None:
        self._lane = lane
        self._notify = notify
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._caller = caller
        self._chunk: list[tuple[int, Item]] = []
        self._chunk_bytes = 0
        self._chunk_since = 0.0
        self._index: dict[int, int] = {}  # of what is submitted, by id() of the item
        self._items: dict[int, Item] = {}  # by index, in the order of submission
        self._bytes = 0

    @property
    def outstanding(self) -> int:
        """How many are submitted and not back."""
        return len(self._items)

    def wants(self, window: tuple[int, int], held: int) -> bool:
        """Whether one more image may be taken; window: rows and bytes; held: how many results wait to be
        read.
        """
        rows, size_bytes = window
        return (
            len(self._items) + len(self._chunk) + held < rows and self._bytes + self._chunk_bytes < size_bytes
        )

    def add(self, index: int, content: bytes, now: float) -> None:
        """Take an image into the next chunk."""
        if not self._chunk:
            self._chunk_since = now
        self._chunk_bytes += len(content)
        item = Item(self._lane, content, 1, len(content), math.inf, self._notify, self._caller)
        self._chunk.append((index, item))

    def ripe(self, max_images: int, now: float) -> bool:
        """Whether the chunk should go now: it is as large as a batch, or its first image has waited for
        the source.
        """
        return bool(self._chunk) and (len(self._chunk) >= max_images or now - self._chunk_since > _GATHER_S)

    def chunk(self, now: float) -> Sequence[Item]:
        """The chunk, to be submitted."""
        chunk, self._chunk = self._chunk, []
        self._bytes += self._chunk_bytes
        self._chunk_bytes = 0
        for index, item in chunk:
            item.deadline = now + self._timeout_s if self._deadline is None else self._deadline
            self._index[id(item)] = index
            self._items[index] = item
        return [item for _, item in chunk]

    def back(self, item: Item) -> int:
        """An item is finished: its index. A bad image gets to know it."""
        index = self._index.pop(id(item))
        del self._items[index]
        self._bytes -= item.size_bytes
        if isinstance(item.result, InvalidImageError):
            item.result.indexes = (index,)
        return index

    def result(self, item: Item) -> tuple[int, Any]:
        """The index and the result of an item that is finished, as `back`; raises an error that is no bad
        image's, which ends the call.
        """
        index = self.back(item)
        if isinstance(item.result, ClientError) and not isinstance(item.result, InvalidImageError):
            raise item.result
        return index, item.result

    def oldest(self) -> Item | None:
        """The item whose deadline is the nearest."""
        return next(iter(self._items.values()), None)

    def unfinished(self) -> Sequence[Item]:
        """What is under way when the caller stops."""
        return [item for item in self._items.values() if not item.finished]
