"""The bookkeeping of one call for many images."""

import pytest

from graftserve.client.bulk import Bulk
from graftserve.client.errors import InvalidImageError
from tests.client.engine_driver import PlainLane


def make(*, deadline=None, timeout_s=5.0):
    done = []
    return Bulk(PlainLane(), done.append, deadline=deadline, timeout_s=timeout_s, caller="caller"), done


def finish(item, result="answer"):
    item.finished = True
    item.result = result


@pytest.mark.parametrize(
    ("window", "held", "taken"),
    [
        ((4, 1000), 0, 4),  # rows
        ((4, 1000), 3, 1),  # results that wait to be read count
        ((4, 1000), 4, 0),
        ((99, 25), 0, 3),  # bytes: the one that passes the limit is the last
    ],
)
def test_no_more_than_a_window_is_taken(window, held, taken):
    bulk, _ = make()
    count = 0
    while bulk.wants(window, held):
        bulk.add(count, b"0123456789", 0.0)
        count += 1
    assert count == taken


def test_what_is_submitted_counts_until_it_is_back():
    bulk, _ = make()
    bulk.add(0, b"0123456789", 0.0)
    bulk.add(1, b"0123456789", 0.0)
    first, _ = bulk.chunk(0.0)
    assert bulk.outstanding == 2
    assert not bulk.wants((2, 1000), 0)
    assert not bulk.wants((99, 20), 0)
    finish(first)
    assert bulk.back(first) == 0
    assert bulk.outstanding == 1
    assert bulk.wants((2, 1000), 0)
    assert bulk.wants((99, 20), 0)


def test_a_chunk_goes_when_it_is_a_batch_or_the_source_is_slow():
    bulk, _ = make()
    assert not bulk.ripe(2, 100.0)
    bulk.add(0, b"a", 1.0)
    assert not bulk.ripe(2, 1.004)
    assert bulk.ripe(2, 1.006)
    bulk.add(1, b"b", 1.0)
    assert bulk.ripe(2, 1.0)
    assert [item.content for item in bulk.chunk(1.0)] == [b"a", b"b"]
    assert not bulk.ripe(2, 100.0)
    assert list(bulk.chunk(1.0)) == []


@pytest.mark.parametrize(("deadline", "deadlines"), [(50.0, [50.0, 50.0]), (None, [12.0, 15.0])])
def test_the_time_is_that_of_the_call_or_of_each_image(deadline, deadlines):
    bulk, _ = make(deadline=deadline)
    items = []
    for index, moment in enumerate((7.0, 10.0)):
        bulk.add(index, b"a", 0.0)
        items += bulk.chunk(moment)
    assert [item.deadline for item in items] == deadlines
    assert bulk.oldest() is items[0]
    finish(items[0])
    bulk.back(items[0])
    assert bulk.oldest() is items[1]


def test_items_know_what_they_are():
    bulk, done = make()
    bulk.add(3, b"abc", 0.0)
    (item,) = bulk.chunk(0.0)
    assert (item.content, item.rows, item.size_bytes, item.caller) == (b"abc", 1, 3, "caller")
    item.notify(item)
    assert done == [item]


def test_a_bad_image_gets_to_know_its_place():
    bulk, _ = make()
    for index in (4, 5, 9):  # those between were bad already
        bulk.add(index, b"a", 0.0)
    items = bulk.chunk(0.0)
    for item in items:
        finish(item, InvalidImageError("bad"))
    assert [bulk.back(item) for item in reversed(items)] == [9, 5, 4]
    assert [item.result.indexes for item in items] == [(4,), (5,), (9,)]


def test_who_stops_knows_what_is_under_way():
    bulk, _ = make()
    for index in range(3):
        bulk.add(index, b"a", 0.0)
    first, second, third = bulk.chunk(0.0)
    bulk.add(3, b"a", 0.0)  # not submitted yet
    finish(second)
    assert bulk.unfinished() == [first, third]
