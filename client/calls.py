"""Calls over one channel: each inside one deadline, retried where that is safe."""

import heapq
import math
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

from .errors import ClientError, ClosedError, from_status
from .retry import RetryPolicy, retry_wait_s
from .wire.methods import METHODS, Method

__all__ = ["Caller", "checked_timeout_s"]

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
KeyT = TypeVar("KeyT")

_CHANNEL_OPTIONS: Final = (
    # The default of 4 MB for received messages is a few hundred rows of features.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Retries are made here, inside the call's one deadline.
    ("grpc.enable_retries", 0),
    # A restarted server is found within a second; gRPC's own ceiling is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection whose other end has vanished is noticed during a call. Idle connections are not
    # pinged: servers close those that ping without calls.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Two clients in one process get a connection each, with their own backoff.
    ("grpc.use_local_subchannel_pool", 1),
)


def checked_timeout_s(timeout_s: float) -> float:
    """`timeout_s` itself; raises ValueError unless it is above zero and finite."""
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"expected timeout_s above 0 and finite, got {timeout_s}")
    return timeout_s


@dataclass
class _Job(Generic[KeyT, RequestT]):
    key: KeyT
    request: RequestT
    attempts: int = 0


class Caller:
    """A channel to `target`, for calls about `model`; safe to use from many threads.

    Deadlines are moments of time.monotonic(). Every failure is a ClientError.
    """

    def __init__(
        self,
        target: str,
        model: str,
        *,
        policy: RetryPolicy,
        credentials: grpc.ChannelCredentials | None,
        metadata: Mapping[str, str | bytes] | None,
    ) -> None:
        self._target = target
        self._model = model
        self._policy = policy
        self._metadata = tuple(metadata.items()) if metadata else None
        self._closed = threading.Event()
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)
        self._stubs: dict[str, Any] = {
            method.path: self._channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            for method in METHODS
        }

    def close(self) -> None:
        """End calls under way with ClosedError, and refuse new ones. A second time does nothing."""
        self._closed.set()
        self._channel.close()

    def pause(self, wait_s: float) -> None:
        """Sleep, but no longer than until `close`."""
        self._closed.wait(wait_s)

    def call(
        self, method: Method[RequestT, ResponseT], request: RequestT, deadline: float, *, retry: bool = True
    ) -> ResponseT:
        """One request, sent again as the retry policy says unless `retry` is false."""
        attempts = 0
        while True:
            left_s = self._left_s(deadline)
            attempts += 1
            try:
                return cast(
                    ResponseT,
                    self._stubs[method.path](request, timeout=left_s, metadata=self._metadata),
                )
            except grpc.RpcError as exc:
                wait_s = self._wait_or_raise(exc, attempts, deadline, retry=retry)
            except ValueError as exc:
                # What gRPC raises for a call on a closed channel.
                if self._closed.is_set():
                    raise self._closed_error() from exc
                raise
            self.pause(wait_s)

    def call_many(
        self,
        method: Method[RequestT, ResponseT],
        requests: Iterator[tuple[KeyT, RequestT]],
        deadline: float,
        *,
        max_in_flight: int,
    ) -> Iterator[tuple[KeyT, ResponseT]]:
        """Send (key, request) pairs as slots come free; yield (key, answer) as they come, in any order.

        Requests are taken from the iterator only when they can be sent. The first failure that is not retried
        ends it all, as does closing the generator; requests under way are cancelled then.
        """
        stub = self._stubs[method.path]
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        jobs: dict[int, _Job[KeyT, RequestT]] = {}  # by number: sent, or waiting to be sent again
        futures: dict[int, Any] = {}  # of those that are sent
        waiting: list[tuple[float, int]] = []  # a heap of the others: when to send, number

        def send(number: int) -> None:
            left_s = self._left_s(deadline)
            jobs[number].attempts += 1
            try:
                future = stub.future(jobs[number].request, timeout=left_s, metadata=self._metadata)
            except ValueError as exc:
                if self._closed.is_set():
                    raise self._closed_error() from exc
                raise
            futures[number] = future
            future.add_done_callback(lambda _: finished.put(number))

        taken = 0
        exhausted = False
        try:
            while True:
                while waiting and waiting[0][0] <= time.monotonic():
                    send(heapq.heappop(waiting)[1])
                if not exhausted and len(jobs) < max_in_flight:
                    item = next(requests, None)
                    if item is None:
                        exhausted = True
                    else:
                        jobs[taken] = _Job(*item)
                        send(taken)
                        taken += 1
                    # Answers that came meanwhile wait until every slot is in use.
                    continue
                if not jobs:
                    return
                try:
                    # Every request under way ends by its deadline, so this ends too.
                    pause_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
                    number = finished.get(timeout=pause_s)
                except queue.Empty:
                    continue
                try:
                    response = cast(ResponseT, futures.pop(number).result())
                except grpc.FutureCancelledError as exc:
                    raise self._failure(grpc.StatusCode.CANCELLED, "", jobs[number].attempts) from exc
                except grpc.RpcError as exc:
                    wait_s = self._wait_or_raise(exc, jobs[number].attempts, deadline, retry=True)
                    heapq.heappush(waiting, (time.monotonic() + wait_s, number))
                else:
                    yield jobs.pop(number).key, response
        finally:
            for future in futures.values():
                future.cancel()

    def _left_s(self, deadline: float) -> float:
        """Seconds until the deadline; raises if none are left or the client was closed."""
        if self._closed.is_set():
            raise self._closed_error()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise self._failure(
                grpc.StatusCode.DEADLINE_EXCEEDED, "the time was over before the request was sent", 1
            )
        return left_s

    def _wait_or_raise(self, error: grpc.RpcError, attempts: int, deadline: float, *, retry: bool) -> float:
        """Seconds until the next attempt; raises what `error` means if there shall be none."""
        # What a stub raises is a grpc.Call too, though its type does not say so.
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        wait_s = None
        if retry and not self._closed.is_set():
            left_s = deadline - time.monotonic()
            wait_s = retry_wait_s(self._policy, code, attempts, left_s, random.random())
        if wait_s is None:
            raise self._failure(code, details or "", attempts) from error
        return wait_s

    def _failure(self, code: grpc.StatusCode, details: str, attempts: int) -> ClientError:
        if self._closed.is_set():
            return self._closed_error()
        return from_status(code, details, target=self._target, model=self._model, attempts=attempts)

    def _closed_error(self) -> ClosedError:
        return ClosedError(
            f"the client of model {self._model!r} at {self._target} is closed: make a new one",
            target=self._target,
            model=self._model,
        )
