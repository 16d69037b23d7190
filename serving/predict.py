"""One prediction on one servable: check the request against the signature, run, name the outputs.

Source of the checks and their messages: tensorflow_serving/servables/tensorflow/predict_util.cc and
tensorflow/cc/saved_model/util.cc (GetInputValues).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from .errors import Code, ServingError
from .servable import DEFAULT_SIGNATURE, Array, Servable, Signature

__all__ = ["InputReader", "SignatureNotFoundError", "predict"]

InputReader = Callable[[Signature], Mapping[str, Array]]
"""Gives a request's inputs, knowing the signature that will take them. Raises ServingError."""


class SignatureNotFoundError(ServingError):
    """The model has no signature of that name. Its own class, since the REST API words it differently."""

    def __init__(self, signature_name: str) -> None:
        super().__init__(Code.FAILED_PRECONDITION, f'Serving signature key "{signature_name}" not found.')
        self.signature_name = signature_name


def predict(
    servable: Servable,
    signature_name: str,
    read_inputs: InputReader,
    output_filter: Sequence[str] = (),
    timeout_s: float | None = None,
) -> tuple[str, dict[str, Array]]:
    """The name of the signature that answered, and its outputs by name.

    signature_name: empty means `serving_default`.
    output_filter: the outputs wanted; none means all.
    Raises ServingError.
    """
    name = signature_name or DEFAULT_SIGNATURE
    signature = servable.signatures.get(name)
    if signature is None:
        raise SignatureNotFoundError(name)
    inputs = _match_inputs(signature, read_inputs(signature))
    outputs = _choose_outputs(signature, output_filter)
    return name, dict(zip(outputs, servable.run(signature, inputs, outputs, timeout_s), strict=True))


def _match_inputs(signature: Signature, given: Mapping[str, Array]) -> dict[str, Array]:
    wanted = signature.inputs
    if len(given) > len(wanted) or (len(given) < len(wanted) and not signature.defaults):
        extra, missing = given.keys() - wanted.keys(), wanted.keys() - given.keys()
        raise ServingError(
            Code.INVALID_ARGUMENT,
            f"input size does not match signature: {len(given)}!={len(wanted)} len({_set(given)}) != "
            f"len({_set(wanted)}). Sent extra: {_set(extra)}. Missing but required: {_set(missing)}.",
        )
    inputs: dict[str, Array] = {}
    for name, spec in wanted.items():
        if name in given:
            inputs[name] = given[name]
        elif name in signature.defaults:
            inputs[name] = signature.defaults[name]
        else:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"Signature input alias: {name}(feed name: {spec.tensor_name}) not found in request and no "
                f"default value provided. Inputs expected to be in the request {_set(given)}, or default "
                f"input alias set: {','.join(sorted(signature.defaults))}",
            )
    return inputs


def _choose_outputs(signature: Signature, output_filter: Sequence[str]) -> Sequence[str]:
    if not output_filter:
        return tuple(signature.outputs)
    seen: set[str] = set()
    for name in output_filter:
        if name not in signature.outputs:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_set(signature.outputs)}.",
            )
        if name in seen:
            raise ServingError(Code.INVALID_ARGUMENT, f"duplicate output tensor alias: {name}")
        seen.add(name)
    return tuple(output_filter)


def _set(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"
