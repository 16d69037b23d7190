"""The client: calls to a model server from any number of threads."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

import grpc
import numpy as np
import numpy.typing as npt

from .batching import split
from .calls import Caller, checked_timeout_s
from .errors import (
    ClientError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidImageError,
    NotFoundError,
    RetryError,
)
from .images import ImageInput, encode_image
from .messages import Messages, version_line
from .results import (
    ModelMetadata,
    Prediction,
    PredictResult,
    VersionState,
    VersionStatus,
)
from .retry import RetryPolicy
from .wire import (
    PredictRequest,
    PredictResponse,
)
from .wire.contract import (
    CLASSIFY_OUTPUTS,
    EMBED_OUTPUTS,
    FEATURES,
    SERVING_DEFAULT,
)
from .wire.methods import (
    GET_MODEL_METADATA,
    GET_MODEL_STATUS,
    PREDICT,
)

__all__ = ["Client"]

_POLL_S: Final = 0.1
_POLL_TIMEOUT_S: Final = 2.0


class Client:
    """A client of one model on one server; a context manager, safe to use from many threads.

    target: a gRPC address: "host:port", "dns:///name:port", "unix:/path".
    model: the model's name.
    version: always ask this version; by default the server chooses, the latest as a rule.
    version_label: always ask the version with this label; excludes `version`.
    timeout_s: the time for a call, where the call itself gives none.
    max_batch_images, max_batch_bytes: the largest request that `classify_many` and `embed` send; a single
        image above `max_batch_bytes` travels alone.
    max_in_flight: how many requests one call of `classify_many` or `embed` keeps under way.
    max_attempts: how often a request is sent while the server is UNAVAILABLE; 1 means never again.
    credentials: grpc.ssl_channel_credentials() and the like; None means no encryption.
    metadata: sent with every request, names in lower case.

    Nothing is connected before the first call. Every `timeout_s` is the total for its call, waiting and
    retries included. Every failure is a ClientError (see `errors`).
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        target: str,
        model: str,
        *,
        version: int | None = None,
        version_label: str | None = None,
        timeout_s: float = 60.0,
        max_batch_images: int = 32,
        max_batch_bytes: int = 16 * 2**20,
        max_in_flight: int = 4,
        max_attempts: int = 5,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> None:
        if not target:
            raise ValueError("expected a target such as localhost:8500, got an empty one")
        if not model:
            raise ValueError("expected the model's name, got an empty one")
        if version is not None and version_label is not None:
            raise ValueError(f"expected version or version_label, got both: {version}, {version_label!r}")
        for name, value in (
            ("max_batch_images", max_batch_images),
            ("max_batch_bytes", max_batch_bytes),
            ("max_in_flight", max_in_flight),
        ):
            if value < 1:
                raise ValueError(f"expected {name} of 1 or more, got {value}")
        self._target = target
        self._model = model
        self._version = version
        self._version_label = version_label
        self._timeout_s = checked_timeout_s(timeout_s)
        self._max_batch_images = max_batch_images
        self._max_batch_bytes = max_batch_bytes
        self._max_in_flight = max_in_flight
        self._messages = Messages(target, model, version, version_label)
        self._calls = Caller(
            target,
            model,
            policy=replace(RetryPolicy(), max_attempts=max_attempts),
            credentials=credentials,
            metadata=metadata,
        )

    def __repr__(self) -> str:
        return f"Client({self._target!r}, {self._model!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way end with ClosedError. A second time does nothing."""
        self._calls.close()

    def classify(self, image: ImageInput, *, timeout_s: float | None = None) -> Prediction:
        """The model's answer for one image (see `images.encode_image` for what counts as one).

        Raises InvalidImageError if the image cannot be read or decoded, ModelMismatchError if the model's
        `serving_default` does not map `image_bytes` to `classes`, `scores` and `valid`.
        """
        deadline = self._deadline(timeout_s)
        request = self._messages.image_request(SERVING_DEFAULT, CLASSIFY_OUTPUTS, [encode_image(image)])
        try:
            response = self._calls.call(PREDICT, request, deadline)
        except (InvalidArgumentError, FailedPreconditionError) as exc:
            self._explain_mismatch(exc, SERVING_DEFAULT, CLASSIFY_OUTPUTS, deadline)
            raise
        row = self._messages.predictions(response, 1)[0]
        if row is None:
            raise self._messages.undecodable()
        return row

    def classify_many(
        self, images: Iterable[ImageInput], *, timeout_s: float | None = None
    ) -> list[Prediction | InvalidImageError]:
        """The answers for many images, in their order; a bad image is an InvalidImageError in its place.

        Images are taken from the iterable as they are sent, so paths may outnumber what memory holds.
        Raises any other ClientError for the call as a whole; ModelMismatchError as `classify` does.
        """
        results: list[Prediction | InvalidImageError | None] = []

        def bad(index: int, error: InvalidImageError) -> None:
            results[index] = error

        rows = self._image_calls(
            images, SERVING_DEFAULT, CLASSIFY_OUTPUTS, self._deadline(timeout_s), results, bad
        )
        with closing(rows):
            for indexes, response in rows:
                for index, row in zip(
                    indexes, self._messages.predictions(response, len(indexes)), strict=True
                ):
                    results[index] = self._messages.undecodable(index) if row is None else row
        return [result for result in results if result is not None]

    def embed(
        self, images: Iterable[ImageInput], *, timeout_s: float | None = None
    ) -> npt.NDArray[np.float32]:
        """The feature vectors of many images: float32 [N, D], in their order; [0, 0] for no images.

        Raises InvalidImageError naming every bad image (`indexes`), ModelMismatchError if the model has no
        signature `features` from `image_bytes` to `features` and `valid`.
        """
        results: list[npt.NDArray[np.float32] | None] = []
        errors: dict[int, InvalidImageError] = {}
        rows = self._image_calls(
            images,
            FEATURES,
            EMBED_OUTPUTS,
            self._deadline(timeout_s),
            results,
            errors.__setitem__,
        )
        with closing(rows):
            for indexes, response in rows:
                features, valid = self._messages.features(response, len(indexes))
                for row, index in enumerate(indexes):
                    if valid[row]:
                        results[index] = features[row]
                    else:
                        errors[index] = self._messages.undecodable(index)
        if errors:
            bad = tuple(sorted(errors))
            raise InvalidImageError(
                f"expected images that can be read and decoded, got {len(bad)} bad of {len(results)}, "
                f"counted from 0: {', '.join(map(str, bad[:20]))}{', ...' if len(bad) > 20 else ''}; "
                f"the first: {errors[bad[0]]}",
                target=self._target,
                model=self._model,
                indexes=bad,
            ) from errors[bad[0]]
        vectors = [vector for vector in results if vector is not None]
        return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def predict(
        self,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        signature: str = SERVING_DEFAULT,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> PredictResult:
        """Call any signature of any model: arrays in, arrays out, by name.

        inputs: in the dtypes that the signature has (`wire.tensors.to_proto` says what is taken; a list of
            Python numbers is int64 or float64).
        outputs: the names wanted; by default all.
        Raises InvalidArgumentError for inputs that cannot be encoded or that the server refuses.
        """
        deadline = self._deadline(timeout_s)
        request = self._messages.predict_request(inputs, signature, outputs)
        return self._messages.predict_result(self._calls.call(PREDICT, request, deadline))

    def status(self, *, timeout_s: float | None = None) -> tuple[VersionStatus, ...]:
        """Every version of the model that the server knows, latest first; only `version` where one is given.

        Raises NotFoundError if the server knows none.
        """
        return self._status(self._deadline(timeout_s), retry=True)

    def metadata(self, *, timeout_s: float | None = None) -> ModelMetadata:
        """The version that answers this client and its signatures.

        Raises NotFoundError if there is none.
        """
        return self._read_metadata(self._deadline(timeout_s), retry=True)

    def wait_until_ready(self, timeout_s: float = 30.0) -> int:
        """Wait until the model can answer, also while the server cannot be reached; returns the version.

        That is the `version` or the version with the `version_label` of this client, or else the latest
        AVAILABLE one.
        Raises DeadlineExceededError, saying what was seen last.
        """
        deadline = time.monotonic() + checked_timeout_s(timeout_s)
        while True:
            poll_deadline = min(deadline, time.monotonic() + _POLL_TIMEOUT_S)
            cause: ClientError | None = None
            try:
                versions = self._status(poll_deadline, retry=False)
                available = [item.version for item in versions if item.state is VersionState.AVAILABLE]
                if available and self._version_label is not None:
                    # A label has no state of its own; metadata resolves it as Predict does.
                    return self._read_metadata(poll_deadline, retry=False).version
                if available:
                    return max(available)
                seen = "; ".join(version_line(item) for item in versions) or "no versions"
            except (RetryError, NotFoundError, InvalidArgumentError) as exc:
                # A server that starts may not know the model or its label yet.
                cause, seen = exc, str(exc)
            if time.monotonic() + _POLL_S >= deadline:
                wanted = ""
                if self._version is not None:
                    wanted = f", version {self._version},"
                elif self._version_label is not None:
                    wanted = f", label {self._version_label!r},"
                raise DeadlineExceededError(
                    f"model {self._model!r}{wanted} at {self._target} was not ready within {timeout_s:g} s; "
                    f"last seen: {seen}",
                    code=cause.code if cause else None,
                    target=self._target,
                    model=self._model,
                    details=cause.details if cause else seen,
                ) from cause
            self._calls.pause(_POLL_S)

    def _image_calls(
        self,
        images: Iterable[ImageInput],
        signature: str,
        outputs: Sequence[str],
        deadline: float,
        results: list[Any],
        bad: Callable[[int, InvalidImageError], None],
    ) -> Generator[tuple[list[int], PredictResponse], None, None]:
        """Yield (indexes, answer) as answers come; appends a None to `results` for every image taken."""
        self._messages.check_images(images)

        def encoded() -> Iterator[tuple[int, bytes]]:
            for index, image in enumerate(images):
                results.append(None)
                try:
                    content = encode_image(image)
                except InvalidImageError as exc:
                    exc.target, exc.model, exc.indexes = self._target, self._model, (index,)
                    bad(index, exc)
                else:
                    yield index, content

        def requests() -> Iterator[tuple[list[int], PredictRequest]]:
            for batch in split(encoded(), self._max_batch_images, self._max_batch_bytes):
                contents = [content for _, content in batch]
                yield (
                    [index for index, _ in batch],
                    self._messages.image_request(signature, outputs, contents),
                )

        try:
            yield from self._calls.call_many(PREDICT, requests(), deadline, max_in_flight=self._max_in_flight)
        except (InvalidArgumentError, FailedPreconditionError) as exc:
            self._explain_mismatch(exc, signature, outputs, deadline)
            raise

    def _explain_mismatch(
        self, error: ClientError, signature: str, outputs: Sequence[str], deadline: float
    ) -> None:
        """Raise ModelMismatchError from `error` if the model's signatures say that it is one."""
        try:
            metadata = self._read_metadata(deadline, retry=False)
        except ClientError:
            return  # then the server's own words have to do
        if mismatch := self._messages.mismatch(metadata, error, signature, outputs):
            raise mismatch from error

    def _status(self, deadline: float, *, retry: bool) -> tuple[VersionStatus, ...]:
        request = self._messages.status_request()
        return self._messages.versions(self._calls.call(GET_MODEL_STATUS, request, deadline, retry=retry))

    def _read_metadata(self, deadline: float, *, retry: bool) -> ModelMetadata:
        request = self._messages.metadata_request()
        return self._messages.metadata(self._calls.call(GET_MODEL_METADATA, request, deadline, retry=retry))

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else checked_timeout_s(timeout_s))
