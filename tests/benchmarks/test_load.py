"""Callers: what they count, with and without corrupt images."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.load import Send, closed_loop, open_loop, with_corrupt

_IMAGES = [b"first image", b"second image"]


def _server(is_wrong: Callable[[bytes], bool]) -> tuple[Callable[[], Send], list[bytes]]:
    """What connects to a server that fails for some requests, and all that it got."""
    got: list[bytes] = []
    lock = threading.Lock()

    def send(content: bytes) -> None:
        with lock:
            got.append(content)
        if is_wrong(content):
            raise RuntimeError("500: wrong")

    return lambda: send, got


def test_every_hundredth_image_is_cut_off() -> None:
    contents = with_corrupt(_IMAGES, 100)
    assert len(contents) == 200
    assert [number for number, (_, is_whole) in enumerate(contents) if not is_whole] == [99, 199]
    assert [contents[99][0], contents[199][0]] == [b"first", b"second"]
    assert {content for content, is_whole in contents if is_whole} == set(_IMAGES)


def test_errors_of_corrupt_images_do_not_count() -> None:
    connect, got = _server(lambda content: content not in _IMAGES)
    result = closed_loop(connect, with_corrupt(_IMAGES, 4), callers=3, seconds=0.05)
    corrupt = sum(content not in _IMAGES for content in got)
    assert corrupt > 0
    assert result["errors"] == 0
    assert 0 < result["answers"] <= len(got) - corrupt - 6  # each asks twice before it counts


def test_errors_of_whole_images_count_and_are_no_answers() -> None:
    connect, got = _server(lambda content: content == _IMAGES[1])
    result = closed_loop(connect, with_corrupt(_IMAGES, 0), callers=1, seconds=0.05)
    assert result["errors"] == got.count(_IMAGES[1])
    assert result["answers"] == got.count(_IMAGES[0]) - 2
    assert result["first_error"] == "RuntimeError: 500: wrong"


def test_an_open_loop_asks_as_often_whatever_the_answers_are() -> None:
    good, all_of_them = _server(lambda content: False)
    half, some_of_them = _server(lambda content: content == _IMAGES[1])
    contents = with_corrupt(_IMAGES, 0)
    results = [open_loop(connect, contents, 2, 400.0, 0.25) for connect in (good, half)]
    assert len(all_of_them) == len(some_of_them) > 20
    assert results[0]["answers"] == results[1]["answers"] + results[1]["errors"]


def test_a_server_that_answers_nothing_is_said() -> None:
    connect, _ = _server(lambda content: True)
    with pytest.raises(
        SystemExit, match="expected answers, got 0; the first error: RuntimeError: 500: wrong"
    ):
        closed_loop(connect, with_corrupt(_IMAGES, 0), callers=2, seconds=0.05)


def test_an_answer_that_comes_after_the_loops_time_counts_for_no_rate() -> None:
    def send(content: bytes) -> None:
        time.sleep(0.1)

    # Two callers have two answers each in 0.25 s, and a third one later.
    result = closed_loop(lambda: send, with_corrupt(_IMAGES, 0), callers=2, seconds=0.25)
    assert result["per_s"] <= 2 / 0.1
    assert result["answers"] >= result["per_s"] * 0.25


def test_a_server_that_prefers_some_callers_is_as_fast_as_it_is() -> None:
    """One caller in four is answered first, always: the others' few answers must not count for more."""
    one_by_one = threading.Lock()
    served: list[float] = []
    numbers = itertools.count()

    def connect() -> Send:
        patience_s = 0.0 if next(numbers) == 0 else 0.03

        def send(content: bytes) -> None:
            time.sleep(patience_s)
            with one_by_one:
                time.sleep(0.01)
                served.append(time.perf_counter())

        return send

    result = closed_loop(connect, with_corrupt(_IMAGES, 0), callers=4, seconds=0.4)
    busiest = max(sum(first <= moment < first + 0.4 for moment in served) for first in served)
    assert result["per_s"] <= busiest / 0.4


def test_that_nobody_waits_at_first_does_not_count() -> None:
    with ThreadPoolExecutor(1) as one_by_one:
        result = closed_loop(
            lambda: lambda content: one_by_one.submit(time.sleep, 0.02).result(),
            with_corrupt(_IMAGES, 0),
            callers=8,
            seconds=0.1,
        )
    assert result["per_s"] < 1.2 / 0.02
