"""The kinds of calls: what each sends, how its answer is taken apart, what a refusal comes down to."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from .errors import ClientError
from .messages import Messages
from .results import ModelMetadata, PredictResult
from .wire import GetModelMetadataResponse, GetModelStatusResponse, PredictResponse
from .wire.contract import IMAGE_BYTES
from .wire.methods import GET_MODEL_METADATA, GET_MODEL_STATUS, PREDICT, Method

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "ClassifyLane",
    "EmbedLane",
    "Metadata",
    "MetadataLane",
    "PredictContent",
    "PredictLane",
    "RowsLane",
    "StatusLane",
]

VALID: Final = "valid"

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""gRPC metadata of a call: pairs, names in lower case."""


class _Lane:
    """What most of them share."""

    method: Method[Any, Any] = PREDICT
    merges = False
    urgent = False
    retries = True

    def __init__(self, messages: Messages, signature: str = "", metadata: Metadata = ()) -> None:
        self.messages = messages
        self.signature = signature
        self.metadata = metadata

    @property
    def key(self) -> Hashable:
        return (type(self), self.signature, self.metadata)

    def adapt(self, metadata: ModelMetadata) -> bool:
        return False

    def explain(
        self, metadata: ModelMetadata, error: ClientError, contents: Sequence[Any]
    ) -> ClientError | None:
        return None

    def blame(self, error: ClientError) -> ClientError:
        return error


class _ImageLane(_Lane):
    """Encoded images into one string vector."""

    merges = True
    needed: tuple[str, ...]
    """The outputs without which there is no answer; `valid` is asked for where the model has it."""

    def __init__(self, messages: Messages, signature: str, metadata: Metadata = ()) -> None:
        super().__init__(messages, signature, metadata)
        self._ask(IMAGE_BYTES, (*self.needed, VALID))

    def request(self, contents: Sequence[bytes]) -> bytes:
        header, input_name = self._form
        return self.messages.image_request(header, input_name, contents)

    def results(self, response: PredictResponse, contents: Sequence[bytes]) -> list[Any]:
        rows = self._rows(response, len(contents))
        return [self.messages.undecodable() if row is None else row for row in rows]

    def adapt(self, metadata: ModelMetadata) -> bool:
        # A model that is not of our export may call its input otherwise and know no `valid`.
        found = metadata.signatures.get(self.signature)
        if found is None or len(found.inputs) != 1 or not set(self.needed) <= set(found.outputs):
            return False
        ((name, spec),) = found.inputs.items()
        if spec.dtype != "string":
            return False
        outputs = (*self.needed, VALID) if VALID in found.outputs else self.needed
        changed = (name, outputs) != (self._input, self._outputs)
        self._ask(name, outputs)
        return changed

    def _ask(self, input_name: str, outputs: tuple[str, ...]) -> None:
        self._input, self._outputs = input_name, outputs
        # In one piece: other threads may be about to use it.
        self._form = self.messages.predict_header(self.signature, outputs), input_name

    def explain(
        self, metadata: ModelMetadata, error: ClientError, contents: Sequence[Any]
    ) -> ClientError | None:
        found = metadata.signatures.get(self.signature)
        if found is None:
            mismatch = self.messages.not_fitting(
                f"expected signature {self.signature}, got only "
                f"{', '.join(sorted(metadata.signatures)) or 'none'}"
            )
        elif set(found.inputs) != {self._input} or not set(self._outputs) <= set(found.outputs):
            mismatch = self.messages.not_fitting(
                f"expected signature {self.signature} with one string input such as {IMAGE_BYTES} and "
                f"outputs {', '.join(self.needed)}, got inputs {', '.join(sorted(found.inputs)) or 'none'} "
                f"and outputs {', '.join(sorted(found.outputs)) or 'none'}"
            )
        else:
            return None
        mismatch.code, mismatch.details = error.code, error.details
        return mismatch

    def blame(self, error: ClientError) -> ClientError:
        # A model that has `valid` answers for a bad image; it refuses for other reasons.
        return error if VALID in self._outputs else self.messages.bad_image(error)

    def _rows(self, response: PredictResponse, count: int) -> list[Any]:
        raise NotImplementedError


class ClassifyLane(_ImageLane):
    """Images to Predictions."""

    needed = ("classes", "scores")

    def _rows(self, response: PredictResponse, count: int) -> list[Any]:
        return self.messages.predictions(response, count, self._outputs)


class EmbedLane(_ImageLane):
    """Images to feature vectors, float32 [D]."""

    needed = ("features",)

    def _rows(self, response: PredictResponse, count: int) -> list[Any]:
        return self.messages.features(response, count, self._outputs)


@dataclass(frozen=True)
class PredictContent:
    """One Predict: its inputs, and its request unless its rows share one with others'."""

    inputs: "Mapping[str, npt.ArrayLike]"
    rows: int = 1
    request: bytes = b""


class PredictLane(_Lane):
    """Predicts of any model, each as it is."""

    def __init__(
        self, messages: Messages, signature: str, metadata: Metadata, outputs: Sequence[str]
    ) -> None:
        super().__init__(messages, signature, metadata)
        self._outputs = tuple(outputs)

    @property
    def key(self) -> Hashable:
        return (PredictLane, self.signature, self.metadata, self._outputs)

    def request(self, contents: Sequence[PredictContent]) -> bytes:
        return contents[0].request

    def results(self, response: PredictResponse, contents: Sequence[PredictContent]) -> list[Any]:
        return [self.messages.predict_result(response)]

    def explain(
        self, metadata: ModelMetadata, error: ClientError, contents: Sequence[PredictContent]
    ) -> ClientError | None:
        return self.messages.wrong_inputs(metadata, error, self.signature, contents[0].inputs, self._outputs)


class RowsLane(PredictLane):
    """The rows of several Predicts as one."""

    merges = True

    def __init__(
        self,
        messages: Messages,
        signature: str,
        metadata: Metadata,
        outputs: Sequence[str],
        inputs: "Mapping[str, npt.NDArray[Any]]",
    ) -> None:
        super().__init__(messages, signature, metadata, outputs)
        self._alike = tuple(
            sorted((name, array.dtype.str, array.shape[1:]) for name, array in inputs.items())
        )

    @property
    def key(self) -> Hashable:
        return (RowsLane, self.signature, self.metadata, self._outputs, self._alike)

    def request(self, contents: Sequence[PredictContent]) -> bytes:
        import numpy as np

        joined = {
            name: np.concatenate([content.inputs[name] for content in contents])
            if len(contents) > 1
            else array
            for name, array in contents[0].inputs.items()
        }
        return self.messages.predict_request(joined, self.signature, self._outputs)

    def results(self, response: PredictResponse, contents: Sequence[PredictContent]) -> list[Any]:
        whole = self.messages.predict_result(response)
        ends = list(accumulate(content.rows for content in contents))
        for name, array in whole.items():
            if array.ndim < 1 or len(array) != ends[-1]:
                raise self.messages.not_fitting(
                    f"expected one row of {name} for each of {ends[-1]} input rows, got shape "
                    f"{list(array.shape)}: call predict without merge_rows"
                )
        return [
            PredictResult({name: array[begin:end] for name, array in whole.items()}, whole.version)
            for begin, end in zip([0, *ends], ends, strict=False)
        ]


class _ServerLane(_Lane):
    """Questions about the model, not work for it."""

    urgent = True

    def __init__(self, messages: Messages, metadata: Metadata = (), *, retries: bool = True) -> None:
        super().__init__(messages, "", metadata)
        self.retries = retries

    @property
    def key(self) -> Hashable:
        return (type(self), self.retries, self.metadata)


class StatusLane(_ServerLane):
    """The states of the model's versions."""

    method = GET_MODEL_STATUS

    def request(self, contents: Sequence[Any]) -> bytes:
        return self.messages.status_request()

    def results(self, response: GetModelStatusResponse, contents: Sequence[Any]) -> list[Any]:
        return [self.messages.versions(response)]


class MetadataLane(_ServerLane):
    """The signatures of the version that answers."""

    method = GET_MODEL_METADATA

    def request(self, contents: Sequence[Any]) -> bytes:
        return self.messages.metadata_request()

    def results(self, response: GetModelMetadataResponse, contents: Sequence[Any]) -> list[Any]:
        return [self.messages.metadata(response)]
