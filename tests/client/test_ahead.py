"""Images encoded ahead of their turn."""

import asyncio
import threading

import pytest

from graftserve.client import Client, InvalidImageError, Prepare
from graftserve.client.ahead import async_encoded, encoded
from graftserve.client.testing import FakeServer
from tests.client.async_in_thread import AsyncInThread


def encode(image):
    if image == b"bad":
        raise InvalidImageError("bad")
    if image == b"fail":
        raise LookupError("fail")
    return image.upper()


def run(images, threads, encode=encode):
    return list(encoded(images, encode, threads))


def run_async(images, tasks, encode=encode):
    async def on_thread(image):
        return await asyncio.to_thread(encode, image)

    async def main():
        return [pair async for pair in async_encoded(images, on_thread, tasks)]

    return asyncio.run(main())


EITHER = pytest.mark.parametrize("collect", [run, run_async])


@EITHER
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_images_come_in_order_and_a_bad_one_in_its_place(collect, ahead):
    images = [b"bad" if number % 7 == 3 else b"x%d" % number for number in range(50)]
    results = collect(iter(images), ahead)
    assert [index for index, _ in results] == list(range(50))
    assert [isinstance(content, InvalidImageError) for _, content in results] == [
        image == b"bad" for image in images
    ]
    assert [content for _, content in results if isinstance(content, bytes)] == [
        image.upper() for image in images if image != b"bad"
    ]


@EITHER
@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_no_images_fault_is_raised(collect, ahead):
    with pytest.raises(LookupError, match="fail"):
        collect([b"a", b"fail", b"b"], ahead)


@EITHER
def test_several_are_encoded_at_a_time(collect):
    together = threading.Barrier(3, timeout=30)

    def wait(image):
        together.wait()
        return image

    assert len(collect([b"a"] * 6, 3, wait)) == 6


def test_a_bounded_number_is_taken_ahead():
    last = 0
    go = threading.Event()

    def images():
        nonlocal last
        for last in range(100):
            if last == 2 * 2:
                go.set()  # nothing is ready before
            yield b"%d" % last

    def wait(image):
        assert go.wait(30)
        return image

    results = encoded(images(), wait, 2)
    assert next(results) == (0, b"0")
    assert last == 2 * 2
    results.close()


@pytest.mark.parametrize("client_class", [Client, AsyncInThread])
def test_a_client_prepares_ahead_what_it_sends(client_class, tmp_path):
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (300 + number, 300)).save(paths[-1])
    paths[7].write_bytes(b"text")
    with (
        FakeServer("flowers") as server,
        client_class(server.target, "flowers", prepare=Prepare(max_side_px=64)) as client,
    ):
        results = client.classify_many(paths)
    assert [index for index, result in enumerate(results) if isinstance(result, InvalidImageError)] == [7]
    assert results[7].indexes == (7,)
    assert all(image.startswith(b"\xff\xd8") for image in server.images)
    assert len(server.images) == 19
