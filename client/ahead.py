"""Images made fit to be sent, some ahead of their turn where that is work: Pillow lets go of the GIL."""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from .errors import InvalidImageError
from .images import ImageInput

__all__ = ["Encoded", "async_encoded", "encoded"]

Encoded: TypeAlias = tuple[int, bytes | InvalidImageError]
"""The index of an image, and its bytes or what is wrong with it."""


def encoded(
    images: Iterable[ImageInput], encode: Callable[[ImageInput], bytes], threads: int
) -> Iterator[Encoded]:
    """The images in their order.

    threads: how many encode, up to two images each ahead; 0: the calling thread does, none ahead.
    The images themselves are always taken in the calling thread. A source that is slower than the threads is
    never more than one image ahead.
    """
    if not threads:
        for index, image in enumerate(images):
            yield index, _try(encode, image)
        return
    coming: deque[tuple[int, Future[bytes | InvalidImageError]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="graftserve-encode") as pool:
        try:
            for index, image in enumerate(images):
                coming.append((index, pool.submit(_try, encode, image)))
                while coming and (len(coming) > 2 * threads or coming[0][1].done()):
                    number, future = coming.popleft()
                    yield number, future.result()
            while coming:
                number, future = coming.popleft()
                yield number, future.result()
        finally:
            for _, future in coming:
                future.cancel()


async def async_encoded(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput],
    encode: Callable[[ImageInput], Awaitable[bytes]],
    tasks: int,
) -> AsyncIterator[Encoded]:
    """The same for asyncio; tasks: how many images are encoded ahead."""
    coming: deque[tuple[int, asyncio.Task[bytes | InvalidImageError]]] = deque()
    try:
        async for index, image in _enumerate(images):
            if not tasks:
                yield index, await _async_try(encode, image)
                continue
            coming.append((index, asyncio.create_task(_async_try(encode, image))))
            while coming and (len(coming) > tasks or coming[0][1].done()):
                number, task = coming.popleft()
                yield number, await task
        while coming:
            number, task = coming.popleft()
            yield number, await task
    finally:
        for _, task in coming:
            task.cancel()


async def _enumerate(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput],
) -> AsyncIterator[tuple[int, ImageInput]]:
    index = 0
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield index, image
            index += 1
    else:
        for image in images:
            yield index, image
            index += 1


def _try(encode: Callable[[ImageInput], bytes], image: ImageInput) -> bytes | InvalidImageError:
    try:
        return encode(image)
    except InvalidImageError as error:
        return error


async def _async_try(
    encode: Callable[[ImageInput], Awaitable[bytes]], image: ImageInput
) -> bytes | InvalidImageError:
    try:
        return await encode(image)
    except InvalidImageError as error:
        return error
