"""The TensorProto map of a request as arrays."""

from collections.abc import Iterator, Mapping

from graftserve.client.wire import TensorProto
from graftserve.client.wire.tensors import TensorError, to_array

from .errors import Code, ServingError
from .servable import Array

__all__ = ["ProtoInputs"]


class ProtoInputs(Mapping[str, Array]):
    """Arrays by input name, each decoded when it is asked for.

    So a request that names the wrong signature or inputs costs no decoding and gets the error that
    TensorFlow Serving, which decodes last, would give. A tensor that cannot be decoded raises ServingError.
    """

    def __init__(self, protos: Mapping[str, TensorProto]) -> None:
        self._protos = protos

    def __getitem__(self, name: str) -> Array:
        try:
            return to_array(self._protos[name])
        except TensorError as exc:
            raise ServingError(Code.INVALID_ARGUMENT, f"tensor parsing error: {name}") from exc

    def __contains__(self, name: object) -> bool:
        return name in self._protos

    def __iter__(self) -> Iterator[str]:
        return iter(self._protos)

    def __len__(self) -> int:
        return len(self._protos)
