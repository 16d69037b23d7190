"""What waits: shares, order, limits, and who is waited for."""

import math

import pytest

from graftserve.client.batching import Item, Latency, Pending, Return, share
from tests.client.engine_driver import PlainLane


def item(name, rows=1, size_bytes=1, deadline=100.0):
    return Item(None, name, rows, size_bytes, deadline, lambda _: None)


def names(items):
    return "".join(item.content for item in items)


@pytest.mark.parametrize(
    ("rows", "requests", "max_rows", "expected"),
    [
        (0, 4, 32, 1),
        (1, 4, 32, 1),
        (8, 4, 32, 2),
        (9, 4, 32, 2),
        (10, 4, 32, 3),  # to the nearest
        (64, 1, 32, 32),
        (64, 2, 32, 32),
        (64, 3, 32, 21),
        (5, 64, 32, 1),
    ],
)
def test_share(rows, requests, max_rows, expected):
    assert share(rows, requests, max_rows) == expected


@pytest.mark.parametrize(
    ("sizes", "max_rows", "max_bytes", "taken"),
    [
        ({"a": (1, 1), "b": (1, 1), "c": (1, 1)}, 2, 99, "ab"),
        ({"a": (1, 5), "b": (1, 5), "c": (1, 5)}, 9, 10, "ab"),
        ({"a": (9, 1), "b": (1, 1)}, 4, 99, "a"),  # above the limit by itself
        ({"a": (1, 50), "b": (1, 1)}, 4, 10, "a"),
        ({"a": (2, 1), "b": (3, 1), "c": (1, 1)}, 4, 99, "a"),  # nobody overtakes
        ({}, 4, 99, ""),
    ],
)
def test_take(sizes, max_rows, max_bytes, taken):
    pending = Pending(PlainLane())
    for name, (rows, size_bytes) in sizes.items():
        pending.add(item(name, rows, size_bytes))
    assert names(pending.take(max_rows, max_bytes)) == taken
    left = [size for name, size in sizes.items() if name not in taken]
    assert pending.rows == sum(rows for rows, _ in left)
    assert pending.size_bytes == sum(size_bytes for _, size_bytes in left)


def test_those_that_cannot_share_are_taken_one_by_one():
    pending = Pending(PlainLane(merges=False))
    for name in "ab":
        pending.add(item(name))
    assert [names(pending.take(9, 99)) for _ in range(3)] == ["a", "b", ""]


def test_what_is_put_back_comes_first():
    pending = Pending(PlainLane())
    for name in "abcd":
        pending.add(item(name))
    pending.put_back(pending.take(2, 99))
    assert pending.rows == 4
    assert names(pending.take(9, 99)) == "abcd"


def test_what_left_is_not_taken():
    pending = Pending(PlainLane())
    items = [item(name, rows=2, size_bytes=3) for name in "abc"]
    for each in items:
        pending.add(each)
    for gone in (items[0], items[1]):
        gone.finished = True
        pending.left(gone)
    assert (pending.rows, pending.size_bytes) == (2, 3)
    assert pending.oldest() is items[2]
    assert names(pending.take(99, 99)) == "c"


def test_the_nearest_deadline_is_forgotten_when_nothing_waits():
    pending = Pending(PlainLane())
    hurried = item("a", deadline=1.0)
    pending.add(hurried)
    pending.add(item("b", deadline=9.0))
    assert pending.nearest_deadline == 1.0
    pending.take(9, 99)
    assert pending.nearest_deadline == math.inf
    pending.add(hurried)
    hurried.finished = True
    pending.left(hurried)
    assert pending.nearest_deadline == math.inf
    pending.add(item("c", deadline=5.0))
    assert pending.nearest_deadline == 5.0


def test_those_who_return_are_counted_down():
    back = Return()
    assert (back.rows, back.until) == (0, -math.inf)
    back.answered(8, latency_s=0.01, now=1.0)
    assert (back.rows, back.until) == (8, pytest.approx(1.001))
    back.came(3)
    assert back.rows == 5
    back.answered(4, latency_s=0.01, now=1.0005)  # a second request ends meanwhile
    assert back.rows == 9
    back.came(100)
    assert back.rows == 0
    back.answered(2, latency_s=0.01, now=2.0)
    back.answered(3, latency_s=0.01, now=back.until)  # the two have not come in time
    assert back.rows == 3
    back.answered(1, latency_s=0.01, now=9.0)
    assert back.rows == 1


def test_nobody_is_waited_for_longer_than_two_milliseconds():
    back = Return()
    back.answered(8, latency_s=10.0, now=1.0)
    assert back.until == pytest.approx(1.002)


def test_slow_is_what_95_percent_stay_below():
    latency = Latency()
    for _ in range(9):
        latency.took(0.1)
    assert latency.slow_s is None
    latency.took(0.1)
    assert latency.slow_s == 0.1
    for number in reversed(range(200)):
        latency.took(float(number))
    # Of the last 128, which are 127 to 0.
    assert latency.slow_s == 121.0
