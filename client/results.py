"""What calls give back: frozen values, free of gRPC and protobuf."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "ModelMetadata",
    "PredictResult",
    "Prediction",
    "Signature",
    "TensorSpec",
    "VersionState",
    "VersionStatus",
]


@dataclass(frozen=True)
class Prediction:
    """What the model sees in one image.

    label, score: the best class and its probability, in [0, 1].
    top: the best classes with their scores, descending; as many as the model was exported to give.
    version: the model version that answered.
    """

    label: str
    score: float
    top: tuple[tuple[str, float], ...]
    version: int


@dataclass(frozen=True, eq=False)
class PredictResult(Mapping[str, "npt.NDArray[Any]"]):
    """The outputs of one Predict by name, and the version that gave them.

    outputs: arrays of the model's dtypes; strings are object arrays of bytes. Arrays of numbers may be
        read-only views of the message: `.copy()` to write.
    version: the model version that answered.
    """

    outputs: Mapping[str, "npt.NDArray[Any]"]
    version: int

    def __getitem__(self, name: str) -> "npt.NDArray[Any]":
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


class VersionState(StrEnum):
    """The life of a version, in order. Source: tensorflow_serving/apis/get_model_status.proto."""

    UNKNOWN = "UNKNOWN"
    START = "START"
    LOADING = "LOADING"
    AVAILABLE = "AVAILABLE"
    UNLOADING = "UNLOADING"
    END = "END"


@dataclass(frozen=True)
class VersionStatus:
    """One version as the server sees it.

    error_code: a gRPC status by name, "OK" if nothing went wrong.
    error_message: "" if nothing went wrong.
    """

    version: int
    state: VersionState
    error_code: str
    error_message: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    dtype: "float32", "uint8", "string", ...
    shape: None for a dimension of any size; None as a whole for any rank.
    """

    dtype: str
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Signature:
    """A function of the model: what goes in, what comes out."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class ModelMetadata:
    """A model version and its signatures by name."""

    model: str
    version: int
    signatures: Mapping[str, Signature]
