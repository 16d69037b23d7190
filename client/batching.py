"""Items in, batches out, limited by count and by bytes: no clocks, no threads."""

from collections.abc import Iterable, Iterator

__all__ = ["split"]


def split(
    items: Iterable[tuple[int, bytes]], max_items: int, max_bytes: int
) -> Iterator[list[tuple[int, bytes]]]:
    """Group (index, content) pairs in order, at most `max_items` and `max_bytes` of content to a batch.

    An item larger than `max_bytes` travels alone. Items are taken from the iterable only as batches are.
    """
    batch: list[tuple[int, bytes]] = []
    batch_bytes = 0
    for item in items:
        item_bytes = len(item[1])
        if batch and (len(batch) >= max_items or batch_bytes + item_bytes > max_bytes):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(item)
        batch_bytes += item_bytes
    if batch:
        yield batch
