"""The client for threads."""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from .ahead import Encoded, encoded
from .attempts import Attempt, Failure, Work
from .base import POLL_S, POLL_TIMEOUT_S, BaseClient
from .batching import Item, Lane
from .bulk import Bulk
from .channel import EndedCallError, channel_options, open_channel
from .errors import ClientError, InvalidArgumentError, InvalidImageError, NotFoundError, RetryError
from .hooks import RequestStart
from .images import ImageInput
from .interrupts import Uninterrupted, in_main_thread
from .lanes import ClassifyLane, EmbedLane
from .results import ModelMetadata, Prediction, PredictResult, VersionStatus
from .stats import Stats
from .ticker import Ticker
from .wire.contract import SERVING_DEFAULT
from .wire.methods import METHODS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Client"]

# A signal that comes in the moment in which the main thread begins to wait is heeded only when it ends to.
_WAIT_S: Final = 0.5


class Client(BaseClient):
    __doc__ = f"""A client of one model, for any number of threads; a context manager.

    Calls from several threads share requests. {BaseClient.__doc__}"""

    def _open(
        self,
        credentials: grpc.ChannelCredentials | None,
        interceptors: Sequence[Any],
    ) -> None:
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._ticker = Ticker(lambda: self._tell(self._engine.tick))
        self._todo = threading.local()
        self._channels: list[grpc.Channel] = []
        self._stubs: list[dict[str, Any]] = []
        for target in self._options.targets:
            options = channel_options(self._options.health_check, self._options.channel_options)
            channel = open_channel(target, credentials, options)
            self._channels.append(channel)
            intercepted = grpc.intercept_channel(channel, *interceptors) if interceptors else channel
            self._stubs.append(
                {
                    method.path: intercepted.unary_unary(
                        method.path, response_deserializer=method.response.FromString
                    )
                    for method in METHODS
                }
            )

    def stats(self) -> Stats:
        """What this client has done and is doing."""
        with self._lock:
            return super().stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls under way end with ClosedError. A second time does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._tell(self._engine.close)
        self._ticker.stop()
        for channel in self._channels:
            channel.close()

    def classify(
        self,
        image: ImageInput,
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> Prediction:
        """The model's answer for one image (see `images.encode_image` for what counts as one).

        metadata: sent with this call's request, which it shares only with calls that have the same.
        Raises InvalidImageError if the image cannot be read or decoded, ModelMismatchError if the model's
        `serving_default` does not map one string vector to `classes` and `scores`, ValueError for metadata
        that gRPC does not send.
        """
        with self._hooks.call("classify") as caller:
            deadline = self._deadline(timeout_s)
            try:
                content = self._encode(image)
            except InvalidImageError as exc:
                self._placed(exc)
                raise
            prediction: Prediction = self._call(
                caller, self._classify_lane(metadata), content, deadline, size_bytes=len(content)
            )
            return prediction

    def classify_many(
        self,
        images: Iterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> list[Prediction | InvalidImageError]:
        """The answers for many images, in their order; a bad image is an InvalidImageError in its place.

        Images are taken from the iterable as they are sent, so paths may outnumber what memory holds.
        Raises any other ClientError for the call as a whole; ModelMismatchError as `classify` does.
        """
        lane = self._classify_lane(metadata)
        with (
            self._hooks.call("classify_many") as caller,
            closing(self._results(caller, lane, images, timeout_s)) as results,
        ):
            return self._in_order(results)

    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> Iterator[Prediction | InvalidImageError]:
        """As `classify_many` for any number of images, in constant memory: answers as soon as it is their
        turn.

        Images are taken from the iterable in the caller's thread, a bounded number ahead of the answers.
        timeout_s: the time of each image.
        """
        waiting: dict[int, Prediction | InvalidImageError] = {}
        turn = 0
        lane = self._classify_lane(metadata)
        with (
            self._hooks.call("stream") as caller,
            closing(self._results(caller, lane, images, timeout_s, for_each=True, held=waiting)) as results,
        ):
            for index, result in results:
                waiting[index] = result
                while turn in waiting:
                    yield waiting.pop(turn)
                    turn += 1

    def stream_as_completed(
        self,
        images: Iterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> Iterator[tuple[int, Prediction | InvalidImageError]]:
        """As `stream`, but (index, answer) as answers come, in any order."""
        lane = self._classify_lane(metadata)
        with (
            self._hooks.call("stream") as caller,
            closing(self._results(caller, lane, images, timeout_s, for_each=True)) as results,
        ):
            yield from results

    def embed(
        self,
        images: Iterable[ImageInput],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> "npt.NDArray[np.float32]":
        """The feature vectors of many images: float32 [N, D], in their order; [0, 0] for no images.

        Raises InvalidImageError naming every bad image (`indexes`), ModelMismatchError if the model has no
        signature `features` from one string vector to `features`.
        """
        lane = self._embed_lane(metadata)
        with (
            self._hooks.call("embed") as caller,
            closing(self._results(caller, lane, images, timeout_s)) as results,
        ):
            return self._stacked(results)

    def predict(
        self,
        inputs: "Mapping[str, npt.ArrayLike]",
        *,
        signature: str = SERVING_DEFAULT,
        outputs: Sequence[str] | None = None,
        merge_rows: bool = False,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> PredictResult:
        """Call any signature of any model: arrays in, arrays out, by name.

        inputs: in the dtypes that the signature has (`wire.tensors.to_proto` says what is taken; a list of
            Python numbers is int64 or float64).
        outputs: the names wanted; by default all.
        merge_rows: the first axis of every input and output is the batch and its rows do not depend on
            each other, so calls at the same time may share a request.
        Raises InvalidArgumentError for inputs that cannot be encoded or that the server refuses.
        """
        with self._hooks.call("predict") as caller:
            deadline = self._deadline(timeout_s)
            lane, content, rows, size_bytes = self._predict_lane(
                inputs, signature, outputs, metadata, merge_rows
            )
            result: PredictResult = self._call(
                caller, lane, content, deadline, rows=rows, size_bytes=size_bytes
            )
            return result

    def status(self, *, timeout_s: float | None = None) -> tuple[VersionStatus, ...]:
        """Every version of the model that the server knows, latest first; only `version` where one is given.

        Raises NotFoundError if the server knows none.
        """
        with self._hooks.call("status") as caller:
            return self._status(caller, self._deadline(timeout_s), retries=True)

    def metadata(self, *, timeout_s: float | None = None) -> ModelMetadata:
        """The version that answers this client and its signatures.

        Raises NotFoundError if there is none.
        """
        with self._hooks.call("metadata") as caller:
            return self._read_metadata(caller, self._deadline(timeout_s), retries=True)

    def wait_until_ready(self, timeout_s: float = 30.0) -> int:
        """Wait until the model can answer, also while the server cannot be reached; returns the version.

        That is the `version` or the version with the `version_label` of this client, or else the latest
        AVAILABLE one.
        Raises DeadlineExceededError, saying what was seen last.
        """
        with self._hooks.call("wait_until_ready") as caller:
            deadline = self._deadline(timeout_s)
            while True:
                poll_deadline = min(deadline, time.monotonic() + POLL_TIMEOUT_S)
                cause: ClientError | None = None
                try:
                    versions = self._status(caller, poll_deadline, retries=False)
                    version = self._ready_version(versions)
                    if version is not None and self._options.version_label is not None:
                        # A label has no state of its own; metadata resolves it as Predict does.
                        return self._read_metadata(caller, poll_deadline, retries=False).version
                    if version is not None:
                        return version
                    seen = self._seen(versions)
                except (RetryError, NotFoundError, InvalidArgumentError) as exc:
                    # A server that starts may not know the model or its label yet.
                    cause, seen = exc, str(exc)
                if time.monotonic() + POLL_S >= deadline:
                    raise self._not_ready(timeout_s, seen, cause)
                self._closed.wait(POLL_S)

    def _status(self, caller: Any, deadline: float, *, retries: bool) -> tuple[VersionStatus, ...]:
        result: tuple[VersionStatus, ...] = self._call(
            caller, self._status_lane(retries=retries), None, deadline
        )
        return result

    def _read_metadata(self, caller: Any, deadline: float, *, retries: bool) -> ModelMetadata:
        result: ModelMetadata = self._call(caller, self._metadata_lane(retries=retries), None, deadline)
        return result

    # One item, and many

    def _call(
        self, caller: Any, lane: Lane, content: Any, deadline: float, *, rows: int = 1, size_bytes: int = 0
    ) -> Any:
        """Wait for the result of one item; raises it if it is an error."""
        self._check_process()
        done = threading.Lock()
        done.acquire()
        item = Item(lane, content, rows, size_bytes, deadline, lambda _: done.release(), caller)
        try:
            self._submit_alone(item)
            while not done.acquire(timeout=min(max(0.0, deadline - time.monotonic()), _WAIT_S)):
                if time.monotonic() >= deadline:
                    self._tell(partial(self._engine.expire, item))
                    break
            if isinstance(item.result, ClientError):
                raise item.result
            return item.result
        finally:
            if not item.finished:
                self._tell(partial(self._engine.leave, item))

    def _results(
        self,
        caller: Any,
        lane: ClassifyLane | EmbedLane,
        images: Iterable[ImageInput],
        timeout_s: float | None,
        *,
        for_each: bool = False,
        held: Mapping[int, Any] | None = None,
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, result) as results come; a result is a value or an InvalidImageError.

        held: results that the caller keeps back; they count as under way.
        """
        self._check_process()
        self._messages.check_images(images)
        done: queue.SimpleQueue[Item] = queue.SimpleQueue()
        bulk = self._bulk(lane, done.put, timeout_s, caller, for_each=for_each)
        source: Iterator[Encoded] | None = encoded(images, self._encode, self._encoders)
        try:
            while source is not None or bulk.outstanding:
                while source is not None and bulk.wants(self._engine.window(), len(held or ())):
                    taken = next(source, None)
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
                # Where others fill the queue, what is under way makes room first.
                if not bulk.outstanding or self._engine.has_room(self._options.max_batch_images, 0):
                    self._tell(partial(self._engine.submit, bulk.chunk(time.monotonic())))
                more = source is not None and bulk.wants(self._engine.window(), len(held or ()))
                for item in self._back(bulk, done, wait=not more):
                    yield bulk.result(item)
        finally:
            for item in bulk.unfinished():
                self._tell(partial(self._engine.leave, item))

    def _back(self, bulk: Bulk, done: "queue.SimpleQueue[Item]", *, wait: bool) -> Iterator[Item]:
        """What is finished by now; at least one item if `wait`."""
        while bulk.outstanding:
            oldest = bulk.oldest()
            left_s = max(0.0, oldest.deadline - time.monotonic()) if wait and oldest is not None else 0.0
            try:
                item = done.get(timeout=min(left_s, _WAIT_S)) if left_s else done.get_nowait()
            except queue.Empty:
                if not wait or oldest is None:
                    return
                if not left_s:
                    self._tell(partial(self._engine.expire, oldest))
                continue
            yield item
            wait = False

    # Driving the engine

    def _submit_alone(self, item: Item) -> None:
        """Submit one item, and wait in gRPC itself if a request with nothing else in it can go at once.

        Not in the main thread: a KeyboardInterrupt in the midst of gRPC may leave its channel locked.
        """
        stall_s: float | None = None
        with Uninterrupted():
            with self._lock:
                now = time.monotonic()
                work = self._engine.submit([item], now)
                alone = len(work.sends) == 1 and work.sends[0].items == [item] and not work.finished
                if alone and not self._options.retry.hedge and not in_main_thread():
                    attempt = work.sends.pop()
                    stall_s = self._engine.take_over(attempt, now)
                wake_at = self._engine.wake_at(now)
            self._wake(wake_at)
            self._perform(work)
        if stall_s is not None:
            self._wait_in_grpc(attempt, stall_s)

    def _tell(self, event: Callable[[float], Work]) -> None:
        """Tell the engine what happened, and do what it says."""
        with Uninterrupted():
            with self._lock:
                now = time.monotonic()
                work = event(now)
                wake_at = self._engine.wake_at(now)
            self._wake(wake_at)
            self._perform(work)

    def _wake(self, at: float) -> None:
        if at < math.inf:
            self._ticker.by(at)

    def _perform(self, work: Work) -> None:
        # An attempt may end while it is being sent: then its work joins what this thread has to do.
        todo: deque[Work] | None = getattr(self._todo, "works", None)
        if todo is not None:
            todo.append(work)
            return
        todo = self._todo.works = deque([work])
        try:
            while todo:
                work = todo.popleft()
                for item in work.finished:
                    item.notify(item)
                for attempt in work.cancels:
                    if attempt.handle is not None:
                        attempt.handle.cancel()
                for attempt in work.sends:
                    self._send(attempt)
        finally:
            del self._todo.works

    def _send(self, attempt: Attempt) -> None:
        started = self._request_start(attempt)
        since = time.monotonic()
        try:
            metadata = self._request_metadata(attempt, started)
            request = attempt.lane.request([item.content for item in attempt.items])
            future = self._stubs[attempt.target][attempt.lane.method.path].future(
                request,
                timeout=attempt.timeout_s,
                metadata=metadata,
                wait_for_ready=self._options.wait_for_ready or None,
            )
        except Exception as exc:
            self._failed(attempt, started, since, exc)
            return
        attempt.handle = future
        if attempt.over:
            future.cancel()
        future.add_done_callback(partial(self._ended, attempt, started, since))

    def _ended(self, attempt: Attempt, started: tuple[RequestStart, ...], since: float, future: Any) -> None:
        attempt.handle = None
        if future.code() is grpc.StatusCode.OK:
            self._answered(attempt, started, since, future.result())
        else:
            self._failed(attempt, started, since, EndedCallError(future))

    def _wait_in_grpc(self, attempt: Attempt, stall_s: float) -> None:
        """Send with the calling thread, which costs no other one."""
        started = self._request_start(attempt)
        since = time.monotonic()
        try:
            metadata = self._request_metadata(attempt, started)
            response = self._stubs[attempt.target][attempt.lane.method.path](
                attempt.lane.request([item.content for item in attempt.items]),
                timeout=min(attempt.timeout_s, stall_s),
                metadata=metadata,
                wait_for_ready=self._options.wait_for_ready or None,
            )
        except Exception as exc:
            code = exc.code() if isinstance(exc, grpc.Call) else None
            if code is grpc.StatusCode.DEADLINE_EXCEEDED and stall_s < attempt.timeout_s:
                self._request_failed(started, since, Failure(code, f"no answer within {stall_s:.3g} s"))
                self._tell(partial(self._engine.stalled, attempt))
            else:
                self._failed(attempt, started, since, exc)
        else:
            self._answered(attempt, started, since, response)

    def _answered(
        self, attempt: Attempt, started: tuple[RequestStart, ...], since: float, response: Any
    ) -> None:
        try:
            results = attempt.lane.results(response, [item.content for item in attempt.items])
        except Exception as exc:
            self._failed(attempt, started, since, exc, response=response)
            return
        self._request_answered(started, since, response, results)
        self._tell(partial(self._engine.answered, attempt, results))

    def _failed(
        self,
        attempt: Attempt,
        started: tuple[RequestStart, ...],
        since: float,
        cause: Any,
        *,
        response: Any = None,
    ) -> None:
        failure = self._failure(cause)
        abandoned = attempt.over and failure.code is grpc.StatusCode.CANCELLED
        self._request_failed(started, since, failure, response=response, abandoned=abandoned)
        self._tell(partial(self._engine.failed, attempt, failure))
