"""Splitting as a table."""

import pytest

from graftserve.client.batching import split


@pytest.mark.parametrize(
    ("sizes", "max_items", "max_bytes", "batches"),
    [
        ([], 2, 10, []),
        ([1], 2, 10, [[1]]),
        ([1, 1, 1, 1, 1], 2, 10, [[1, 1], [1, 1], [1]]),
        ([4, 6, 1], 9, 10, [[4, 6], [1]]),
        ([4, 7, 1], 9, 10, [[4], [7, 1]]),
        ([4, 99, 1, 1], 9, 10, [[4], [99], [1, 1]]),
        ([99, 99], 9, 10, [[99], [99]]),
        ([0, 0, 0], 2, 1, [[0, 0], [0]]),
        ([1, 1], 1, 1, [[1], [1]]),
    ],
)
def test_split(sizes, max_items, max_bytes, batches):
    items = [(index, b"x" * size) for index, size in enumerate(sizes)]
    result = list(split(items, max_items, max_bytes))
    assert [[len(content) for _, content in batch] for batch in result] == batches
    assert [item for batch in result for item in batch] == items
