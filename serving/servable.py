"""What an engine is to the rest of the server: something that loads folders into callables.

The manager, the service and both APIs know models only through these few names; `loader` holds the engine
that runs them in TensorFlow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from graftserve.client.wire import SignatureDefMap

__all__ = ["DEFAULT_SIGNATURE", "Array", "Engine", "Servable", "ServableId", "Signature", "TensorSpec"]

Array = npt.NDArray[Any]

DEFAULT_SIGNATURE = "serving_default"
"""The signature of a request that names none. Source: tensorflow/cc/saved_model/signature_constants.h."""


@dataclass(frozen=True)
class ServableId:
    """One version of a servable. name: the model's."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a signature.

    tensor_name: the graph's own name of it, as in `serving_default_x:0`.
    data_type: a DataType number of client/wire/tensor.proto.
    """

    tensor_name: str
    data_type: int


@dataclass(frozen=True)
class Signature:
    """One way to call a servable.

    defaults: values of the inputs that may be left out.
    method_name: the API that it was exported for, such as "tensorflow/serving/predict"; may be empty.
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    defaults: Mapping[str, Array]
    method_name: str = ""


class Servable(Protocol):
    """A loaded version. Every method but `close` may be called from many threads at once."""

    @property
    def engine(self) -> str:
        """What runs it: "tensorflow", "litert" or "litert_int8"."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """By name."""

    @property
    def signature_def_map(self) -> SignatureDefMap:
        """The signatures as GetModelMetadata gives them. Not to be changed."""

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        """The named outputs, in that order. Strings are object arrays of bytes.

        inputs: an array for every input of the signature.
        timeout_s: give up after this many seconds; None waits for ever.
        Raises ServingError.
        """

    def close(self) -> None:
        """Free what the version holds. Nothing may be running, and nothing may be called after."""


class Engine(Protocol):
    """Loads versions. `load` is called from one thread at a time for each version."""

    def load(self, servable_id: ServableId, path: Path) -> Servable:
        """Load and warm up the version in `path`. Raises ServingError."""
