"""The client for asyncio."""

import asyncio
import math
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from .ahead import Encoded, async_encoded
from .attempts import Attempt, Work
from .base import POLL_S, POLL_TIMEOUT_S, BaseClient
from .batching import Item, Lane
from .bulk import Bulk
from .channel import channel_options
from .errors import ClientError, InvalidArgumentError, InvalidImageError, NotFoundError, RetryError
from .images import ImageInput, encode_image
from .lanes import ClassifyLane, EmbedLane
from .results import ModelMetadata, Prediction, PredictResult, VersionStatus
from .wire.contract import SERVING_DEFAULT
from .wire.methods import METHODS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["AsyncClient"]


class AsyncClient(BaseClient):
    __doc__ = f"""A client of one model, for any number of tasks of one event loop; an async context manager.

    Calls from several tasks share requests. Make and use it in the loop: it belongs to the loop of its
    first call. {BaseClient.__doc__}"""

    def _open(
        self,
        credentials: grpc.ChannelCredentials | None,
        interceptors: Sequence[Any],
    ) -> None:
        self._credentials = credentials
        self._interceptors = list(interceptors)
        self._channel_options = channel_options(self._options.health_check, self._options.channel_options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[dict[str, Any]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls under way end with ClosedError. A second time does nothing."""
        self._tell(self._engine.close)
        for channel in self._channels:
            await channel.close(None)
        # Their callers have got their errors already.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    async def classify(
        self,
        image: ImageInput,
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> Prediction:
        """As Client.classify."""
        with self._hooks.call("classify") as caller:
            deadline = self._deadline(timeout_s)
            try:
                content = await self._encoded(image)
            except InvalidImageError as exc:
                self._placed(exc)
                raise
            prediction: Prediction = await self._call(
                caller, self._classify_lane(metadata), content, deadline, size_bytes=len(content)
            )
            return prediction

    async def classify_many(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> list[Prediction | InvalidImageError]:
        """As Client.classify_many."""
        lane = self._classify_lane(metadata)
        with self._hooks.call("classify_many") as caller:
            async with aclosing(self._results(caller, lane, images, timeout_s)) as results:
                return self._in_order([result async for result in results])

    async def stream(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> AsyncIterator[Prediction | InvalidImageError]:
        """As Client.stream."""
        waiting: dict[int, Prediction | InvalidImageError] = {}
        turn = 0
        lane = self._classify_lane(metadata)
        with self._hooks.call("stream") as caller:
            async with aclosing(
                self._results(caller, lane, images, timeout_s, for_each=True, held=waiting)
            ) as results:
                async for index, result in results:
                    waiting[index] = result
                    while turn in waiting:
                        yield waiting.pop(turn)
                        turn += 1

    async def stream_as_completed(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> AsyncIterator[tuple[int, Prediction | InvalidImageError]]:
        """As Client.stream_as_completed."""
        lane = self._classify_lane(metadata)
        with self._hooks.call("stream") as caller:
            async with aclosing(self._results(caller, lane, images, timeout_s, for_each=True)) as results:
                async for pair in results:
                    yield pair

    async def embed(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> "npt.NDArray[np.float32]":
        """As Client.embed."""
        lane = self._embed_lane(metadata)
        with self._hooks.call("embed") as caller:
            async with aclosing(self._results(caller, lane, images, timeout_s)) as results:
                return self._stacked([result async for result in results])

    async def predict(
        self,
        inputs: "Mapping[str, npt.ArrayLike]",
        *,
        signature: str = SERVING_DEFAULT,
        outputs: Sequence[str] | None = None,
        merge_rows: bool = False,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> PredictResult:
        """As Client.predict."""
        with self._hooks.call("predict") as caller:
            deadline = self._deadline(timeout_s)
            lane, content, rows, size_bytes = self._predict_lane(
                inputs, signature, outputs, metadata, merge_rows
            )
            result: PredictResult = await self._call(
                caller, lane, content, deadline, rows=rows, size_bytes=size_bytes
            )
            return result

    async def status(self, *, timeout_s: float | None = None) -> tuple[VersionStatus, ...]:
        """As Client.status."""
        with self._hooks.call("status") as caller:
            return await self._status(caller, self._deadline(timeout_s), retries=True)

    async def metadata(self, *, timeout_s: float | None = None) -> ModelMetadata:
        """As Client.metadata."""
        with self._hooks.call("metadata") as caller:
            return await self._read_metadata(caller, self._deadline(timeout_s), retries=True)

    async def wait_until_ready(self, timeout_s: float = 30.0) -> int:
        """As Client.wait_until_ready."""
        with self._hooks.call("wait_until_ready") as caller:
            deadline = self._deadline(timeout_s)
            while True:
                poll_deadline = min(deadline, time.monotonic() + POLL_TIMEOUT_S)
                cause: ClientError | None = None
                try:
                    versions = await self._status(caller, poll_deadline, retries=False)
                    version = self._ready_version(versions)
                    if version is not None and self._options.version_label is not None:
                        return (await self._read_metadata(caller, poll_deadline, retries=False)).version
                    if version is not None:
                        return version
                    seen = self._seen(versions)
                except (RetryError, NotFoundError, InvalidArgumentError) as exc:
                    cause, seen = exc, str(exc)
                if time.monotonic() + POLL_S >= deadline:
                    raise self._not_ready(timeout_s, seen, cause)
                await asyncio.sleep(POLL_S)

    async def _status(self, caller: Any, deadline: float, *, retries: bool) -> tuple[VersionStatus, ...]:
        result: tuple[VersionStatus, ...] = await self._call(
            caller, self._status_lane(retries=retries), None, deadline
        )
        return result

    async def _read_metadata(self, caller: Any, deadline: float, *, retries: bool) -> ModelMetadata:
        lane = self._metadata_lane(retries=retries)
        result: ModelMetadata = await self._call(caller, lane, None, deadline)
        return result

    async def _encoded(self, image: ImageInput) -> bytes:
        # Bytes are taken as they are; whatever else there is to do would hold up the loop.
        if isinstance(image, bytes) and self._encode is encode_image:
            return self._encode(image)
        return await asyncio.to_thread(self._encode, image)

    # One item, and many

    async def _call(
        self, caller: Any, lane: Lane, content: Any, deadline: float, *, rows: int = 1, size_bytes: int = 0
    ) -> Any:
        """Wait for the result of one item; raises it if it is an error."""
        self._check_process()
        self._enter_loop()
        done = asyncio.Event()
        item = Item(lane, content, rows, size_bytes, deadline, lambda _: done.set(), caller)
        try:
            self._tell(partial(self._engine.submit, [item]))
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await done.wait()
            except TimeoutError:
                self._tell(partial(self._engine.expire, item))
            if isinstance(item.result, ClientError):
                raise item.result
            return item.result
        finally:
            if not item.finished:
                self._tell(partial(self._engine.leave, item))

    async def _results(
        self,
        caller: Any,
        lane: ClassifyLane | EmbedLane,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        timeout_s: float | None,
        *,
        for_each: bool = False,
        held: Mapping[int, Any] | None = None,
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """As Client._results."""
        self._check_process()
        self._messages.check_images(images)
        self._enter_loop()
        done: asyncio.Queue[Item] = asyncio.Queue()
        bulk = self._bulk(lane, done.put_nowait, timeout_s, caller, for_each=for_each)
        source: AsyncIterator[Encoded] | None = async_encoded(images, self._encoded, 2 * self._encoders)
        try:
            while source is not None or bulk.outstanding:
                while source is not None and bulk.wants(self._engine.window(), len(held or ())):
                    taken = await anext(source, None)
                    if taken is None:
                        source = None
                        break
                    index, content = taken
                    if isinstance(content, InvalidImageError):
                        yield index, self._placed(content, index)
                    else:
                        bulk.add(index, content, time.monotonic())
                    if bulk.ripe(self._options.max_batch_images, time.monotonic()):
                        break
                if not bulk.outstanding or self._engine.has_room(self._options.max_batch_images, 0):
                    self._tell(partial(self._engine.submit, bulk.chunk(time.monotonic())))
                more = source is not None and bulk.wants(self._engine.window(), len(held or ()))
                async for item in self._back(bulk, done, wait=not more):
                    yield bulk.result(item)
        finally:
            for item in bulk.unfinished():
                self._tell(partial(self._engine.leave, item))

    async def _back(self, bulk: Bulk, done: "asyncio.Queue[Item]", *, wait: bool) -> AsyncIterator[Item]:
        """As Client._back."""
        if not wait:
            # Whatever answers have come are read only when the loop gets its turn.
            await asyncio.sleep(0)
        while bulk.outstanding:
            oldest = bulk.oldest()
            try:
                if wait and oldest is not None:
                    async with asyncio.timeout(oldest.deadline - time.monotonic()):
                        item = await done.get()
                else:
                    item = done.get_nowait()
            except asyncio.QueueEmpty:
                return
            except TimeoutError:
                if oldest is not None:
                    self._tell(partial(self._engine.expire, oldest))
                continue
            yield item
            wait = False

    # Driving the engine

    def _enter_loop(self) -> None:
        """Open the channels in the loop that runs, once."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None:
            raise RuntimeError(
                "expected the event loop of this AsyncClient's first call: make one in each loop"
            )
        self._loop = loop
        for target in self._options.targets:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(
                    target, options=self._channel_options, interceptors=self._interceptors
                )
            else:
                channel = grpc.aio.secure_channel(
                    target, self._credentials, options=self._channel_options, interceptors=self._interceptors
                )
            self._channels.append(channel)
            self._stubs.append(
                {
                    method.path: channel.unary_unary(
                        method.path, response_deserializer=method.response.FromString
                    )
                    for method in METHODS
                }
            )

    def _tell(self, event: Callable[[float], Work]) -> None:
        """Tell the engine what happened, and do what it says."""
        now = time.monotonic()
        work = event(now)
        for item in work.finished:
            item.notify(item)
        for attempt in work.cancels:
            if attempt.handle is not None:
                attempt.handle.cancel()
        for attempt in work.sends:
            task = asyncio.create_task(self._send(attempt))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        wake_at = self._engine.wake_at(now)
        if self._loop is not None and wake_at < math.inf:
            self._wake(self._loop, wake_at - now)

    def _wake(self, loop: asyncio.AbstractEventLoop, delay_s: float) -> None:
        at = loop.time() + delay_s
        if self._timer is not None:
            if not self._timer.cancelled() and loop.time() < self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = loop.call_at(at, self._tell, self._engine.tick)

    async def _send(self, attempt: Attempt) -> None:
        if attempt.over:
            return
        started = self._request_start(attempt)
        since = time.monotonic()
        response: Any = None
        try:
            metadata = self._request_metadata(attempt, started)
            call = self._stubs[attempt.target][attempt.lane.method.path](
                attempt.lane.request([item.content for item in attempt.items]),
                timeout=max(0.0, attempt.timeout_s),
                metadata=metadata,
                wait_for_ready=self._options.wait_for_ready or None,
            )
            attempt.handle = call
            response = await call
            results = attempt.lane.results(response, [item.content for item in attempt.items])
        except (Exception, asyncio.CancelledError) as exc:
            if isinstance(exc, asyncio.CancelledError) and attempt.over:
                self._request_abandoned(started, since)
                return
            failure = self._failure(exc)
            self._request_failed(started, since, failure, response=response)
            self._tell(partial(self._engine.failed, attempt, failure))
            if isinstance(exc, asyncio.CancelledError):
                raise
        else:
            self._request_answered(started, since, response, results)
            self._tell(partial(self._engine.answered, attempt, results))
