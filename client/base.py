"""What both clients are made of: settings, the kinds of calls, and what becomes of results. No waiting."""

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import grpc

from .attempts import Attempt, Failure
from .batching import Item
from .bulk import Bulk
from .channel import EndedCallError, pushback_s
from .engine import Engine
from .errors import (
    ClientError,
    ClosedError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
)
from .hooks import Hooks, RequestEnd, RequestStart, Watched
from .images import ImageInput, encode_image
from .lanes import (
    ClassifyLane,
    EmbedLane,
    Metadata,
    MetadataLane,
    PredictContent,
    PredictLane,
    RowsLane,
    StatusLane,
)
from .messages import Messages, version_line
from .metadata import checked_metadata
from .options import Options, checked_timeout_s
from .results import Prediction, VersionState, VersionStatus
from .retry import RetryPolicy
from .stats import Stats
from .wire.contract import FEATURES, SERVING_DEFAULT

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BaseClient"]

POLL_S: Final = 0.1
POLL_TIMEOUT_S: Final = 2.0
_MAX_ENCODERS: Final = 4


class BaseClient:
    """Settings and bookkeeping of a client.

    target: a gRPC address: "host:port" or "dns:///name:port" (all addresses of the name are used),
        "unix:/path", "ipv4:10.0.0.1:8500,10.0.0.2:8500"; or several of them, each with its own circuit
        breaker, of which the one with the fewest requests under way is asked.
    model: the model's name.
    version: always ask this version; by default the server chooses, the latest as a rule.
    version_label: always ask the version with this label; excludes `version`.
    timeout_s: the time for a call, where the call itself gives none.
    max_batch_images, max_batch_bytes: the largest request; a single image above `max_batch_bytes` travels
        alone.
    max_in_flight: the most requests under way; how many are is found out (see `limits`).
    max_delay_s: how long an image waits for others to share its request with, though a request could be
        sent. 0: not at all; then only what comes while requests are under way is gathered.
    target_latency_s: how long a request should take; batches are kept small enough for that.
    max_queued_images, max_queued_bytes: what may wait to be sent; beyond that calls fail with
        OverloadedError at once.
    retry: how often lost requests are sent again, and whether slow ones are sent twice.
    wait_for_ready: calls wait for a server that cannot be reached until their time is over, instead of
        failing.
    health_check: leave addresses alone whose server says that this service is NOT_SERVING (grpc.health.v1;
        "" is the server as a whole, a model's name that model at our server). By default none is asked: gRPC
        complains on stderr about those that have no health service.
    credentials: grpc.ssl_channel_credentials(...), with root certificates and for mutual TLS a key and
        certificate; None means no encryption.
    metadata: sent with every request, names in lower case.
    prepare: makes the bytes to send of an image, such as `Prepare(max_side_px=512)`; by default images
        are sent as they are.
    hooks: told of every call and request; several of them are told in their order (see `hooks`).
    interceptors: grpc.UnaryUnaryClientInterceptor, or that of grpc.aio for an AsyncClient.
    channel_options: gRPC's channel arguments, which replace those of the client.

    Nothing is connected before the first call. Every `timeout_s` is the total for its call, waiting and
    retries included. Every failure is a ClientError (see `errors`).
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        model: str,
        *,
        version: int | None = None,
        version_label: str | None = None,
        timeout_s: float = 60.0,
        max_batch_images: int = 32,
        max_batch_bytes: int = 16 * 2**20,
        max_in_flight: int = 16,
        max_delay_s: float = 0.0,
        target_latency_s: float | None = None,
        max_queued_images: int = 4096,
        max_queued_bytes: int = 256 * 2**20,
        retry: RetryPolicy | None = None,
        wait_for_ready: bool = False,
        health_check: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        prepare: Callable[[ImageInput], bytes] | None = None,
        hooks: Hooks | Sequence[Hooks] | None = None,
        interceptors: Sequence[Any] = (),
        channel_options: Mapping[str, str | int] | None = None,
    ) -> None:
        self._options = Options(
            targets=(target,) if isinstance(target, str) else tuple(target),
            model=model,
            version=version,
            version_label=version_label,
            timeout_s=timeout_s,
            max_batch_images=max_batch_images,
            max_batch_bytes=max_batch_bytes,
            max_in_flight=max_in_flight,
            max_delay_s=max_delay_s,
            target_latency_s=target_latency_s,
            max_queued_images=max_queued_images,
            max_queued_bytes=max_queued_bytes,
            retry=retry or RetryPolicy(),
            wait_for_ready=wait_for_ready,
            health_check=health_check,
            metadata=checked_metadata(metadata),
            channel_options=channel_options,
        )
        self._encode = prepare or encode_image
        # To read bytes and files takes no time worth a thread; to prepare photographs does.
        self._encoders = min(_MAX_ENCODERS, os.cpu_count() or 1) if prepare else 0
        self._hooks = Watched(hooks, model)
        self._process = os.getpid()
        self._messages = Messages(self._options.target, model, version, version_label)
        self._plain_classify_lane = ClassifyLane(self._messages, SERVING_DEFAULT)
        self._plain_embed_lane = EmbedLane(self._messages, FEATURES)
        self._engine = Engine(self._options, MetadataLane(self._messages), time.monotonic(), random.random)
        self._open(credentials, interceptors)

    def _open(
        self,
        credentials: grpc.ChannelCredentials | None,
        interceptors: Sequence[Any],
    ) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._options.target!r}, {self._options.model!r})"

    @property
    def model(self) -> str:
        """The model's name."""
        return self._options.model

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine.closed

    def stats(self) -> Stats:
        """What this client has done and is doing."""
        return self._engine.stats()

    # Calls

    def _check_process(self) -> None:
        # The child of a fork has the memory of its parent's connections and threads, but neither of them.
        if os.getpid() != self._process:
            raise ClosedError(
                f"the client of model {self._options.model!r} at {self._options.target} was made in process "
                f"{self._process} and cannot be used in its fork {os.getpid()}: make one there",
                target=self._options.target,
                model=self._options.model,
            )

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + self._timeout_s(timeout_s)

    def _timeout_s(self, timeout_s: float | None) -> float:
        return self._options.timeout_s if timeout_s is None else checked_timeout_s(timeout_s)

    def _classify_lane(self, metadata: Mapping[str, str | bytes] | None) -> ClassifyLane:
        if not metadata:
            return self._plain_classify_lane
        return ClassifyLane(self._messages, SERVING_DEFAULT, checked_metadata(metadata))

    def _embed_lane(self, metadata: Mapping[str, str | bytes] | None) -> EmbedLane:
        if not metadata:
            return self._plain_embed_lane
        return EmbedLane(self._messages, FEATURES, checked_metadata(metadata))

    def _status_lane(self, *, retries: bool = True) -> StatusLane:
        return StatusLane(self._messages, retries=retries)

    def _metadata_lane(self, *, retries: bool = True) -> MetadataLane:
        return MetadataLane(self._messages, retries=retries)

    def _predict_lane(
        self,
        inputs: "Mapping[str, npt.ArrayLike]",
        signature: str,
        outputs: Sequence[str] | None,
        metadata: Mapping[str, str | bytes] | None,
        merge_rows: bool,
    ) -> tuple[PredictLane, PredictContent, int, int]:
        """The lane of a Predict, its content, and how many rows and bytes that is."""
        pairs = checked_metadata(metadata)
        if not merge_rows:
            request = self._messages.predict_request(inputs, signature, outputs or ())
            lane = PredictLane(self._messages, signature, pairs, outputs or ())
            return lane, PredictContent(inputs, request=request), 1, len(request)
        arrays = self._messages.arrays(inputs)
        counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
        if len(counts) != 1 or 0 in counts:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise InvalidArgumentError(
                f"expected inputs with one and the same number of rows to merge, got {shapes or 'none'}",
                target=self._options.target,
                model=self._options.model,
            )
        lane = RowsLane(self._messages, signature, pairs, outputs or (), arrays)
        rows = counts.pop()
        return lane, PredictContent(arrays, rows), rows, sum(array.nbytes for array in arrays.values())

    def _bulk(
        self,
        lane: ClassifyLane | EmbedLane,
        notify: Callable[[Item], None],
        timeout_s: float | None,
        caller: object,
        *,
        for_each: bool = False,
    ) -> Bulk:
        """for_each: the time is that of each image, not of all."""
        each_s = self._timeout_s(timeout_s)
        deadline = None if for_each else time.monotonic() + each_s
        return Bulk(lane, notify, deadline=deadline, timeout_s=each_s, caller=caller)

    def _placed(self, error: InvalidImageError, index: int | None = None) -> InvalidImageError:
        """The error of an image that could not be read, with what it knows nothing of."""
        error.target, error.model = self._options.target, self._options.model
        error.indexes = () if index is None else (index,)
        return error

    # Results

    def _in_order(
        self, results: Iterable[tuple[int, Prediction | InvalidImageError]]
    ) -> list[Prediction | InvalidImageError]:
        return [result for _, result in sorted(results, key=lambda pair: pair[0])]

    def _stacked(
        self, results: "Iterable[tuple[int, npt.NDArray[np.float32] | InvalidImageError]]"
    ) -> "npt.NDArray[np.float32]":
        import numpy as np

        ordered = sorted(results, key=lambda pair: pair[0])
        errors = {index: result for index, result in ordered if isinstance(result, InvalidImageError)}
        if errors:
            bad = tuple(errors)
            raise InvalidImageError(
                f"expected images that can be read and decoded, got {len(bad)} bad of {len(ordered)}, "
                f"counted from 0: {', '.join(map(str, bad[:20]))}{', ...' if len(bad) > 20 else ''}; "
                f"the first: {errors[bad[0]]}",
                target=self._options.target,
                model=self._options.model,
                indexes=bad,
            ) from errors[bad[0]]
        vectors = [vector for _, vector in ordered if not isinstance(vector, InvalidImageError)]
        return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def _ready_version(self, versions: Sequence[VersionStatus]) -> int | None:
        """The latest AVAILABLE version, or None."""
        available = [item.version for item in versions if item.state is VersionState.AVAILABLE]
        return max(available, default=None)

    def _seen(self, versions: Sequence[VersionStatus]) -> str:
        return "; ".join(version_line(item) for item in versions) or "no versions"

    def _not_ready(self, timeout_s: float, seen: str, cause: ClientError | None) -> DeadlineExceededError:
        wanted = ""
        if self._options.version is not None:
            wanted = f", version {self._options.version},"
        elif self._options.version_label is not None:
            wanted = f", label {self._options.version_label!r},"
        error = DeadlineExceededError(
            f"model {self._options.model!r}{wanted} at {self._options.target} was not ready within "
            f"{timeout_s:g} s; last seen: {seen}",
            code=cause.code if cause else None,
            target=self._options.target,
            model=self._options.model,
            details=cause.details if cause else seen,
        )
        error.__cause__ = cause
        return error

    # Requests

    def _request_start(self, attempt: Attempt) -> tuple[RequestStart, ...]:
        """What each of the hooks is told; empty if there is none."""
        callers = {id(item.caller): item.caller for item in attempt.items if item.caller is not None}
        return tuple(
            RequestStart(
                target=self._options.targets[attempt.target],
                model=self._options.model,
                method=attempt.lane.method.path,
                signature=attempt.lane.signature,
                rows=attempt.rows,
                size_bytes=attempt.size_bytes,
                attempt=attempt.number,
                hedge=attempt.hedge,
                explains=attempt.explains,
                queue_s=attempt.queue_s,
                callers=own,
            )
            for own in zip(*callers.values(), strict=True)
        )

    def _request_metadata(self, attempt: Attempt, started: tuple[RequestStart, ...]) -> Metadata:
        own = self._hooks.request_started(started) if started else ()
        # An explanation is asked for with the credentials of the call.
        return self._options.metadata + attempt.batch.lane.metadata + own

    def _failure(self, cause: Any) -> Failure:
        """What an exception of gRPC's, or of this side, comes down to."""
        if isinstance(cause, ClientError):
            return Failure(error=cause)
        if isinstance(cause, (grpc.Call, grpc.aio.AioRpcError, EndedCallError)):
            exception = cause if isinstance(cause, BaseException) else None
            return Failure(
                cause.code(), cause.details() or "", pushback_s(cause.trailing_metadata()), cause=exception
            )
        error = InternalError(
            f"the request to {self._options.target}, model {self._options.model!r}, failed on this side: "
            f"{type(cause).__name__}: {cause}",
            target=self._options.target,
            model=self._options.model,
        )
        error.__cause__ = cause
        return Failure(error=error)

    def _request_answered(
        self, started: tuple[RequestStart, ...], since: float, response: Any, results: Sequence[Any]
    ) -> None:
        if started:
            invalid_rows = sum(isinstance(result, ClientError) for result in results)
            network_s = time.monotonic() - since
            end = RequestEnd("OK", network_s, _version(response), invalid_rows=invalid_rows)
            self._hooks.request_ended(started, end)

    def _request_failed(
        self,
        started: tuple[RequestStart, ...],
        since: float,
        failure: Failure,
        *,
        response: Any = None,
        abandoned: bool = False,
    ) -> None:
        """response: an answer that makes no sense."""
        if not started:
            return
        if failure.code is not None:
            code = error = failure.code.name
        else:
            code = "INTERNAL" if response is None else "OK"
            error = type(failure.error).__name__
        details = failure.details if failure.error is None else str(failure.error)
        network_s = time.monotonic() - since
        end = RequestEnd(code, network_s, _version(response), error, details, abandoned=abandoned)
        self._hooks.request_ended(started, end)

    def _request_abandoned(self, started: tuple[RequestStart, ...], since: float) -> None:
        self._request_failed(started, since, Failure(grpc.StatusCode.CANCELLED), abandoned=True)


def _version(response: Any) -> int | None:
    spec = getattr(response, "model_spec", None)
    return spec.version.value if spec is not None and spec.HasField("version") else None
