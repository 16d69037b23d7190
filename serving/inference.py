"""Classify, Regress and MultiInference on one servable: tf.Examples in, labels, scores and values out.

    signature     input "inputs": string [N], one serialized tf.Example each
    Classify      outputs "classes" (string [N, K]), "scores" (float32 [N, K]), or one of them
    Regress       output "outputs" (float32 [N] or [N, 1])

Source of the checks and their messages: tensorflow_serving/servables/tensorflow/{classifier,regressor,
multi_inference,util}.cc; of the names: tensorflow/cc/saved_model/signature_constants.h.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat

import numpy as np

from graftserve.client import wire
from graftserve.client.wire.tensors import TensorError, dtype_name, to_proto

from .errors import Code, ServingError, invalid
from .servable import DEFAULT_SIGNATURE, Array, Servable, Signature

__all__ = ["CLASSIFY_METHOD", "REGRESS_METHOD", "classify", "multi_inference", "regress"]

CLASSIFY_METHOD = "tensorflow/serving/classify"
"""The method_name of signatures, and of MultiInference's tasks, that classify."""

REGRESS_METHOD = "tensorflow/serving/regress"
"""The method_name of signatures, and of MultiInference's tasks, that regress."""

_INPUTS = "inputs"
_CLASSES = "classes"
_SCORES = "scores"
_OUTPUTS = "outputs"


def classify(
    servable: Servable,
    signature_name: str,
    given: wire.Input,
    *,
    check_method_name: bool = False,
    timeout_s: float | None = None,
) -> tuple[str, wire.ClassificationResult]:
    """The name of the signature that answered, and the classes of each tf.Example.

    signature_name: empty means `serving_default`.
    check_method_name: whether the signature must have been exported for this API; else its inputs and outputs
        decide.
    timeout_s: as `Servable.run` takes it.
    A class has no label, or no score, where the signature gives none.
    Raises ServingError.
    """
    name = signature_name or DEFAULT_SIGNATURE
    signature = _find(servable, name, "No signature was found with the name")
    outputs = _classification_outputs(servable, signature, check_method_name)
    examples = _serialize(given)
    arrays = servable.run(signature, {_INPUTS: examples}, outputs, timeout_s)
    return name, _classification_result(dict(zip(outputs, arrays, strict=True)), len(examples))


def regress(
    servable: Servable,
    signature_name: str,
    given: wire.Input,
    *,
    check_method_name: bool = False,
    timeout_s: float | None = None,
) -> tuple[str, wire.RegressionResult]:
    """The name of the signature that answered, and the value of each tf.Example.

    The arguments and errors are those of `classify`.
    """
    name = signature_name or DEFAULT_SIGNATURE
    signature = _find(servable, name, "No signature was found with the name")
    outputs = _regression_outputs(servable, signature, check_method_name)
    examples = _serialize(given)
    (values,) = servable.run(signature, {_INPUTS: examples}, outputs, timeout_s)
    return name, _regression_result(values, len(examples))


def multi_inference(
    servable: Servable,
    tasks: Sequence[wire.InferenceTask],
    given: wire.Input,
    *,
    check_method_name: bool = False,
    timeout_s: float | None = None,
) -> list[wire.InferenceResult]:
    """The tasks' results, in their order, from a single run of the model.

    Each result's model_spec says the task's model and signature; the version is the caller's to fill in.
    Several tasks run as one `Signature` made of theirs, which is none of `servable.signatures`; so all of
    theirs must read the same tensor, as those of TensorFlow 1 do.
    The other arguments and the errors are those of `classify`.
    """
    if not tasks:
        raise invalid("Inference request has no tasks")
    parts: dict[str, tuple[Signature, list[str]]] = {}
    feed = ""
    for task in tasks:
        if not task.model_spec.name:
            raise invalid("Found ModelSpec with an empty model name.")
        if task.model_spec.name != tasks[0].model_spec.name:
            raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        name = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if name in parts:
            raise invalid(f"Duplicate evaluation of signature: {name}")
        signature = _find(servable, name, "Requested signature not found in model graph")
        if task.method_name == CLASSIFY_METHOD:
            outputs = _classification_outputs(servable, signature, check_method_name)
        elif task.method_name == REGRESS_METHOD:
            outputs = _regression_outputs(servable, signature, check_method_name)
        else:
            raise ServingError(Code.UNIMPLEMENTED, f"Unsupported signature method_name: {task.method_name}")
        feed = feed or signature.inputs[_INPUTS].tensor_name
        if signature.inputs[_INPUTS].tensor_name != feed:
            raise invalid("Input tensor must be the same for all Signatures.")
        parts[name] = (signature, outputs)

    examples = _serialize(given)
    merged, names = _merge(parts)
    arrays = iter(servable.run(merged, {_INPUTS: examples}, names, timeout_s))
    results = []
    for task, (name, (_, outputs)) in zip(tasks, parts.items(), strict=True):
        result = wire.InferenceResult()
        result.model_spec.name = task.model_spec.name
        result.model_spec.signature_name = name
        own = {output: next(arrays) for output in outputs}
        if task.method_name == CLASSIFY_METHOD:
            result.classification_result.CopyFrom(_classification_result(own, len(examples)))
        else:
            result.regression_result.CopyFrom(_regression_result(own[_OUTPUTS], len(examples)))
        results.append(result)
    return results


def _merge(parts: Mapping[str, tuple[Signature, list[str]]]) -> tuple[Signature, list[str]]:
    """One signature that gives the outputs of all, and their names in it, part by part."""
    if len(parts) == 1:
        ((signature, outputs),) = parts.values()
        return signature, outputs
    merged = {
        f"{name}/{output}": signature.outputs[output]
        for name, (signature, outputs) in parts.items()
        for output in outputs
    }
    inputs = next(iter(parts.values()))[0].inputs
    # Engines remember what they looked up by this name: the same for the same signatures, and nobody else's.
    return Signature("\n".join(sorted(parts)), inputs, merged, {}), list(merged)


def _find(servable: Servable, name: str, complaint: str) -> Signature:
    signature = servable.signatures.get(name)
    if signature is None:
        raise invalid(f"{complaint}: {name}")
    return signature


def _classification_outputs(servable: Servable, signature: Signature, check_method_name: bool) -> list[str]:
    if check_method_name:
        _check_method_name(signature, "classification", CLASSIFY_METHOD)
    _check_input_count(signature)
    if len(signature.outputs) not in (1, 2):
        raise invalid(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    _check_input(servable, signature, "classification")
    outputs = [name for name in (_CLASSES, _SCORES) if name in signature.outputs]
    if not outputs:
        raise invalid(
            "Expected classification signature outputs to contain at least one of "
            f'"{_CLASSES}" or "{_SCORES}". Signature was: {_show(servable, signature)}'
        )
    return outputs


def _regression_outputs(servable: Servable, signature: Signature, check_method_name: bool) -> list[str]:
    if check_method_name:
        _check_method_name(signature, "regression", REGRESS_METHOD)
    _check_input_count(signature)
    if len(signature.outputs) != 1:
        raise invalid("Expected one output Tensor.")
    _check_input(servable, signature, "regression")
    if _OUTPUTS not in signature.outputs:
        raise invalid(f"No regression outputs found in SignatureDef: {_show(servable, signature)}")
    return [_OUTPUTS]


def _check_method_name(signature: Signature, kind: str, expected: str) -> None:
    if signature.method_name != expected:
        raise invalid(f"Expected {kind} signature method_name to be {expected}. Was: {signature.method_name}")


def _check_input_count(signature: Signature) -> None:
    if len(signature.inputs) != 1:
        raise invalid("Expected one input Tensor.")


def _check_input(servable: Servable, signature: Signature, kind: str) -> None:
    spec = signature.inputs.get(_INPUTS)
    if spec is None:
        raise invalid(f"No {kind} inputs found in SignatureDef: {_show(servable, signature)}")
    # Here rather than in the model, where a batch may hold other requests, too.
    if spec.data_type != wire.DataType.DT_STRING:
        raise invalid(
            f"Expected the input {_INPUTS!r} of signature {signature.name!r} to take serialized tf.Examples, "
            f"DT_STRING. Got: {dtype_name(spec.data_type)}. Use Predict for it"
        )


def _show(servable: Servable, signature: Signature) -> str:
    signatures = servable.signature_def_map.signature_def
    return str(signatures[signature.name]) if signature.name in signatures else signature.name


def _serialize(given: wire.Input) -> Array:
    """One serialized tf.Example in each row, string [N].

    The context comes first in the bytes: where both name a feature, parsers take the last, the example's.
    """
    context = b""
    examples: Sequence[wire.Example] = given.example_list.examples
    if given.WhichOneof("kind") == "example_list_with_context":
        context = given.example_list_with_context.context.SerializeToString()
        examples = given.example_list_with_context.examples
    if not examples:
        raise invalid("Input is empty.")
    array = np.empty(len(examples), object)
    array[:] = [context + example.SerializeToString() for example in examples]
    return array


def _classification_result(arrays: Mapping[str, Array], count: int) -> wire.ClassificationResult:
    """arrays: "classes", "scores" or both, as the model gave them. count: the number of examples."""
    for name, array in arrays.items():
        if array.ndim != 2:
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got {_shape(array)}")
        expected, got = "DT_STRING" if name == _CLASSES else "DT_FLOAT", _data_type(array)
        if got != expected:
            raise invalid(f"Expected {name} Tensor of {expected}. Got: {got}")
        if len(array) != count:
            raise invalid(f"Expected {name} output batch size of {count}. Got: {len(array)}")
    classes, scores = arrays.get(_CLASSES), arrays.get(_SCORES)
    if classes is not None and scores is not None and classes.shape[1] != scores.shape[1]:
        raise invalid(
            "Tensors class and score should match in dim_size(1). "
            f"Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    absent = repeat(repeat(None))
    rows = zip(
        absent if classes is None else classes.tolist(),
        absent if scores is None else scores.tolist(),
        strict=False,  # what is absent has no end
    )
    result = wire.ClassificationResult()
    try:
        for labels, values in rows:
            add = result.classifications.add().classes.add
            for label, score in zip(labels, values, strict=False):
                add(label=label, score=score)
    except UnicodeDecodeError as exc:
        raise invalid(
            f"Expected labels in UTF-8, as Classify's answers hold text. Got: {exc.object[:100]!r}. "
            "Use Predict for other bytes"
        ) from exc
    return result


def _regression_result(values: Array, count: int) -> wire.RegressionResult:
    if not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)):
        raise invalid(
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
            f"{_shape(values)}"
        )
    if len(values) != count:
        raise invalid(f"Input batch size did not match output batch size: {count} vs. {len(values)}")
    if values.dtype != np.float32:
        raise invalid(f"Expected output Tensor of DT_FLOAT.  Got: {_data_type(values)}")
    return wire.RegressionResult(
        regressions=[wire.Regression(value=value) for value in values.ravel().tolist()]
    )


def _data_type(array: Array) -> str:
    try:
        return wire.DataType.Name(to_proto(np.empty(0, array.dtype)).dtype)
    except TensorError:
        return array.dtype.name


def _shape(array: Array) -> str:
    return f"[{','.join(map(str, array.shape))}]"
