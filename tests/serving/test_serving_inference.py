"""Classify, Regress and MultiInference on real SavedModels, asked and answered in the real messages."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from graftserve.client import wire
from graftserve.client.wire import methods
from graftserve.serving import inference
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.inference import CLASSIFY_METHOD, REGRESS_METHOD, classify, multi_inference, regress
from graftserve.serving.predict import predict
from graftserve.serving.servable import Array, Servable, ServableId, Signature

PREDICT_METHOD = "tensorflow/serving/predict"
LABELS = ["low", "häufig", "日本"]


@pytest.fixture(scope="module")
def real() -> SimpleNamespace:
    """The messages of tensorflow-serving-api and TensorFlow by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorflow.core.example import example_pb2, feature_pb2
        from tensorflow_serving.apis import (
            classification_pb2,
            inference_pb2,
            input_pb2,
            prediction_log_pb2,
            regression_pb2,
        )
    modules = (
        example_pb2,
        feature_pb2,
        input_pb2,
        classification_pb2,
        regression_pb2,
        inference_pb2,
        prediction_log_pb2,
    )
    return SimpleNamespace(
        **{
            name: getattr(module, name)
            for module in modules
            for name in module.DESCRIPTOR.message_types_by_name
        }
    )


def build_tensorflow_1(folder: Path) -> None:
    """A model with one placeholder of tf.Examples and every signature that the tests want, right or wrong."""
    import tensorflow as tf

    v1 = tf.compat.v1
    signatures: dict[str, Any] = {}

    def add(name: str, method: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        signatures[name] = v1.saved_model.build_signature_def(
            {key: v1.saved_model.build_tensor_info(tensor) for key, tensor in inputs.items()},
            {key: v1.saved_model.build_tensor_info(tensor) for key, tensor in outputs.items()},
            method,
        )

    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None], name="tf_example")
        other = v1.placeholder(tf.string, [None], name="other_tf_example")
        number = v1.placeholder(tf.float32, [None], name="number")
        features = tf.io.parse_example(
            serialized,
            {
                "x": tf.io.FixedLenFeature([2], tf.float32),
                "scale": tf.io.FixedLenFeature([], tf.float32, 1.0),
                "name": tf.io.FixedLenFeature([], tf.string, "nobody"),
            },
        )
        x, scale = features["x"], features["scale"]
        scores = tf.stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1]], axis=1) * scale[:, None]
        classes = tf.tile(tf.constant([LABELS]), [tf.shape(x)[0], 1])
        total = tf.reduce_sum(x, axis=1) * scale
        examples = {"inputs": serialized}

        add("serving_default", CLASSIFY_METHOD, examples, {"classes": classes, "scores": scores})
        add("classes", CLASSIFY_METHOD, examples, {"classes": classes})
        add("scores", CLASSIFY_METHOD, examples, {"scores": scores, "extra": total})
        add("names", CLASSIFY_METHOD, examples, {"classes": features["name"][:, None]})
        add("regress", REGRESS_METHOD, examples, {"outputs": total})
        add("regress_column", REGRESS_METHOD, examples, {"outputs": total[:, None]})
        add("predict", PREDICT_METHOD, {"examples": serialized}, {"total": total})
        add("untold", PREDICT_METHOD, examples, {"classes": classes, "scores": scores})

        add("no_inputs_key", CLASSIFY_METHOD, {"examples": serialized}, {"scores": scores})
        add("two_inputs", CLASSIFY_METHOD, {"inputs": serialized, "n": number}, {"scores": scores})
        add("numbers", CLASSIFY_METHOD, {"inputs": number}, {"scores": number[:, None]})
        add("no_known_output", CLASSIFY_METHOD, examples, {"total": total})
        add("three", CLASSIFY_METHOD, examples, {"scores": scores, "classes": classes, "total": total})
        add("flat_scores", CLASSIFY_METHOD, examples, {"scores": total})
        add("flat_classes", CLASSIFY_METHOD, examples, {"classes": features["name"], "scores": scores})
        add("double_scores", CLASSIFY_METHOD, examples, {"scores": tf.cast(scores, tf.float64)})
        add("number_classes", CLASSIFY_METHOD, examples, {"classes": tf.cast(scores, tf.int64)})
        add("one_row", CLASSIFY_METHOD, examples, {"scores": scores[:1]})
        add("fewer_classes", CLASSIFY_METHOD, examples, {"scores": scores, "classes": classes[:, :2]})
        add("regress_wide", REGRESS_METHOD, examples, {"outputs": scores})
        add("regress_one", REGRESS_METHOD, examples, {"outputs": total[:1]})
        add("regress_integers", REGRESS_METHOD, examples, {"outputs": tf.cast(total, tf.int32)})
        add("regress_no_key", REGRESS_METHOD, examples, {"total": total})
        add(
            "regress_other",
            REGRESS_METHOD,
            {"inputs": other},
            {"outputs": tf.cast(tf.strings.length(other), tf.float32)},
        )

        builder = v1.saved_model.builder.SavedModelBuilder(str(folder))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()


def build_tensorflow_2(folder: Path) -> None:
    """What tf.saved_model.save writes: every signature is one of Predict, with an input tensor of its own."""
    import tensorflow as tf

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
        def classify(self, inputs: Any) -> dict[str, Any]:
            x = tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([2], tf.float32)})["x"]
            return {"classes": tf.tile([["a", "b"]], [tf.shape(x)[0], 1]), "scores": x}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
        def regress(self, inputs: Any) -> dict[str, Any]:
            return {"outputs": tf.cast(tf.strings.length(inputs), tf.float32)}

    model = Model()
    signatures = {"serving_default": model.classify, "regress": model.regress}
    tf.saved_model.save(model, str(folder), signatures=signatures)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Callable[[Path], None]], Servable]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from graftserve.serving.loader import TensorFlowEngine

    loaded: list[Servable] = []

    def load(build: Callable[[Path], None]) -> Servable:
        folder = tmp_path_factory.mktemp("base") / "1"
        build(folder)
        loaded.append(TensorFlowEngine().load(ServableId("m", 1), folder))
        return loaded[-1]

    yield load
    for servable in loaded:
        servable.close()


@pytest.fixture(scope="module")
def model(load: Callable[[Callable[[Path], None]], Servable]) -> Servable:
    return load(build_tensorflow_1)


@pytest.fixture(scope="module")
def model_2(load: Callable[[Callable[[Path], None]], Servable]) -> Servable:
    return load(build_tensorflow_2)


X = np.array([[1, 2], [0.5, -4], [1e30, 0.1]], np.float32)
SCORES = np.stack([X[:, 0], X[:, 1], X[:, 0] + X[:, 1]], axis=1)


def example(x: Sequence[float] | None, scale: float | None = None, name: str | bytes = "") -> wire.Example:
    made = wire.Example()
    feature = made.features.feature
    if x is not None:
        feature["x"].float_list.value.extend(x)
    if scale is not None:
        feature["scale"].float_list.value.append(scale)
    if name:
        feature["name"].bytes_list.value.append(name.encode() if isinstance(name, str) else name)
    return made


def examples(*given: wire.Example) -> wire.Input:
    return wire.Input(example_list=wire.ExampleList(examples=given or map(example, X)))


def error(call: Callable[[], object]) -> ServingError:
    with pytest.raises(ServingError) as caught:
        call()
    return caught.value


# The messages


EXAMPLE = {
    "features": {
        "feature": {
            "b": {"bytesList": {"value": ["AP8=", ""]}},
            "f": {"floatList": {"value": [0.5, "NaN", "-Infinity"]}},
            "i": {"int64List": {"value": ["-9223372036854775808", "7"]}},
            "empty": {},
        }
    }
}
SPEC = {"name": "m", "version": "7", "signatureName": "s"}
LIST = {"exampleList": {"examples": [EXAMPLE, {}]}}
CONTEXT = {"exampleListWithContext": {"examples": [EXAMPLE], "context": EXAMPLE}}
CLASSES = {"classifications": [{"classes": [{"label": "日本", "score": 0.5}, {}]}, {}]}
VALUES = {"regressions": [{"value": 0.5}, {}]}
CLASSIFICATION = ({"modelSpec": SPEC, "input": LIST}, {"modelSpec": SPEC, "result": CLASSES})
REGRESSION = ({"modelSpec": SPEC, "input": CONTEXT}, {"modelSpec": SPEC, "result": VALUES})
TASKS = [{"modelSpec": SPEC, "methodName": CLASSIFY_METHOD}, {"methodName": REGRESS_METHOD}]
RESULTS = [{"modelSpec": SPEC, "classificationResult": CLASSES}, {"regressionResult": VALUES}]
MULTIPLE = ({"tasks": TASKS, "input": LIST}, {"results": RESULTS})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Example", EXAMPLE),
        ("Input", LIST),
        ("Input", CONTEXT),
        ("ClassificationRequest", CLASSIFICATION[0]),
        ("ClassificationResponse", CLASSIFICATION[1]),
        ("RegressionRequest", REGRESSION[0]),
        ("RegressionResponse", REGRESSION[1]),
        ("MultiInferenceRequest", MULTIPLE[0]),
        ("MultiInferenceResponse", MULTIPLE[1]),
        *(
            ("PredictionLog", {name: {"request": request, "response": response}})
            for name, (request, response) in {
                "classifyLog": CLASSIFICATION,
                "regressLog": REGRESSION,
                "multiInferenceLog": MULTIPLE,
            }.items()
        ),
    ],
)
def test_messages_agree_both_ways(name: str, fields: dict[str, Any], real: SimpleNamespace) -> None:
    theirs = json_format.ParseDict(fields, getattr(real, name)())
    ours = getattr(wire, name).FromString(theirs.SerializeToString())
    # NaN differs from itself, so the texts are compared.
    texts = [json_format.MessageToJson(message, sort_keys=True) for message in (ours, theirs)]
    assert texts[0] == texts[1]
    again = getattr(real, name).FromString(ours.SerializeToString(deterministic=True))
    assert again.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)
    assert again.SerializeToString()


def test_every_field_has_their_number_type_and_oneof(real: SimpleNamespace) -> None:
    compared = 0
    for name in wire.__all__:
        theirs = getattr(real, name, None)
        if theirs is None:
            continue
        for field in getattr(wire, name).DESCRIPTOR.fields:
            twin = theirs.DESCRIPTOR.fields_by_name[field.name]
            oneofs = [one and one.name for one in (field.containing_oneof, twin.containing_oneof)]
            assert (field.number, field.type) == (twin.number, twin.type), f"{name}.{field.name}"
            assert oneofs[0] == oneofs[1], f"{name}.{field.name}"
            compared += 1
    assert compared > 40


def test_names_are_tensorflows() -> None:
    from tensorflow.compat.v1.saved_model import signature_constants as constants

    assert constants.CLASSIFY_METHOD_NAME == CLASSIFY_METHOD
    assert constants.REGRESS_METHOD_NAME == REGRESS_METHOD
    assert inference._INPUTS == constants.CLASSIFY_INPUTS == constants.REGRESS_INPUTS
    assert inference._CLASSES == constants.CLASSIFY_OUTPUT_CLASSES
    assert inference._SCORES == constants.CLASSIFY_OUTPUT_SCORES
    assert inference._OUTPUTS == constants.REGRESS_OUTPUTS


def test_methods_are_the_real_services() -> None:
    from tensorflow_serving.apis import prediction_service_pb2

    service = prediction_service_pb2.DESCRIPTOR.services_by_name["PredictionService"]
    for method in (methods.CLASSIFY, methods.REGRESS, methods.MULTI_INFERENCE):
        assert method in methods.METHODS
        assert method.service == service.full_name
        theirs = service.methods_by_name[method.name]
        assert theirs.input_type.name == method.request.DESCRIPTOR.name
        assert theirs.output_type.name == method.response.DESCRIPTOR.name


# Classify and Regress


def test_a_real_request_gets_a_real_answer(model: Servable, real: SimpleNamespace) -> None:
    theirs = real.ClassificationRequest()
    for row in X:
        theirs.input.example_list.examples.add().features.feature["x"].float_list.value.extend(row)
    request = wire.ClassificationRequest.FromString(theirs.SerializeToString())
    name, result = classify(model, "", request.input)
    assert name == "serving_default"
    answer = real.ClassificationResult.FromString(result.SerializeToString())
    got = [[(entry.label, entry.score) for entry in row.classes] for row in answer.classifications]
    assert got == [list(zip(LABELS, map(float, row), strict=True)) for row in SCORES]


@pytest.mark.parametrize("name", ["regress", "regress_column"])
def test_a_value_for_each_example(model: Servable, name: str) -> None:
    answered, result = regress(model, name, examples())
    assert answered == name
    assert [entry.value for entry in result.regressions] == X.sum(axis=1).tolist()


def test_labels_or_scores_may_be_absent(model: Servable) -> None:
    _, labels = classify(model, "classes", examples())
    assert [[entry.label for entry in row.classes] for row in labels.classifications] == [LABELS] * 3
    assert all(entry.score == 0 for row in labels.classifications for entry in row.classes)
    _, scores = classify(model, "scores", examples())
    assert [[entry.score for entry in row.classes] for row in scores.classifications] == SCORES.tolist()
    assert all(entry.label == "" for row in scores.classifications for entry in row.classes)


def test_the_context_is_for_examples_that_say_nothing_themselves(model: Servable) -> None:
    given = wire.Input()
    given.example_list_with_context.context.CopyFrom(example(None, 10, "context"))
    given.example_list_with_context.examples.extend(
        [example([1, 2]), example([1, 2], 100), example([3, 4], name="me")]
    )
    assert [entry.value for entry in regress(model, "regress", given)[1].regressions] == [30, 300, 70]
    _, result = classify(model, "names", given)
    assert [row.classes[0].label for row in result.classifications] == ["context", "context", "me"]


def test_a_signature_of_tensorflow_2_will_do_unless_method_names_are_checked(
    model: Servable, model_2: Servable
) -> None:
    _, result = classify(model_2, "", examples())
    assert [[entry.score for entry in row.classes] for row in result.classifications] == X.tolist()
    assert [entry.value for entry in regress(model_2, "regress", examples())[1].regressions] == [
        len(example(row).SerializeToString()) for row in X
    ]
    for call, servable, name, kind, wanted, was in [
        (classify, model_2, "", "classification", CLASSIFY_METHOD, PREDICT_METHOD),
        (classify, model, "regress", "classification", CLASSIFY_METHOD, REGRESS_METHOD),
        (regress, model_2, "regress", "regression", REGRESS_METHOD, PREDICT_METHOD),
        (regress, model, "", "regression", REGRESS_METHOD, CLASSIFY_METHOD),
    ]:
        raised = error(lambda: call(servable, name, examples(), check_method_name=True))  # noqa: B023
        assert raised.code == Code.INVALID_ARGUMENT
        assert raised.message == f"Expected {kind} signature method_name to be {wanted}. Was: {was}"
    assert classify(model, "", examples(), check_method_name=True)[0] == "serving_default"
    assert regress(model, "regress", examples(), check_method_name=True)[0] == "regress"


@pytest.mark.parametrize(
    ("call", "name", "message"),
    [
        (classify, "nowhere", "No signature was found with the name: nowhere"),
        (classify, "two_inputs", "Expected one input Tensor."),
        (classify, "no_inputs_key", "No classification inputs found in SignatureDef: inputs {"),
        (classify, "predict", "No classification inputs found in SignatureDef: inputs {"),
        (classify, "three", "Expected one or two output Tensors, found 3"),
        (
            classify,
            "no_known_output",
            'Expected classification signature outputs to contain at least one of "classes" or "scores". '
            "Signature was: inputs {",
        ),
        (
            classify,
            "numbers",
            "Expected the input 'inputs' of signature 'numbers' to take serialized tf.Examples, DT_STRING. "
            "Got: float32. Use Predict for it",
        ),
        (classify, "flat_scores", "Expected Tensor shape: [batch_size num_classes] but got [3]"),
        (classify, "flat_classes", "Expected Tensor shape: [batch_size num_classes] but got [3]"),
        (classify, "double_scores", "Expected scores Tensor of DT_FLOAT. Got: DT_DOUBLE"),
        (classify, "number_classes", "Expected classes Tensor of DT_STRING. Got: DT_INT64"),
        (classify, "one_row", "Expected scores output batch size of 3. Got: 1"),
        (classify, "fewer_classes", "Tensors class and score should match in dim_size(1). Got 2 vs. 3"),
        (regress, "nowhere", "No signature was found with the name: nowhere"),
        (regress, "two_inputs", "Expected one input Tensor."),
        (regress, "serving_default", "Expected one output Tensor."),
        (regress, "predict", "No regression inputs found in SignatureDef: inputs {"),
        (regress, "regress_no_key", "No regression outputs found in SignatureDef: inputs {"),
        (
            regress,
            "regress_wide",
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got [3,3]",
        ),
        (regress, "regress_one", "Input batch size did not match output batch size: 3 vs. 1"),
        (regress, "regress_integers", "Expected output Tensor of DT_FLOAT.  Got: DT_INT32"),
    ],
)
def test_what_does_not_fit_the_api_is_told(
    model: Servable, call: Callable[..., object], name: str, message: str
) -> None:
    raised = error(lambda: call(model, name, examples(*map(example, X * [[1], [1], [0]]))))
    assert raised.code == Code.INVALID_ARGUMENT
    assert raised.message.startswith(message)


@pytest.mark.parametrize(
    "given",
    [
        wire.Input(),
        wire.Input(example_list=wire.ExampleList()),
        wire.Input(example_list_with_context=wire.ExampleListWithContext(context=example([1, 2]))),
    ],
)
def test_no_examples_are_refused(model: Servable, given: wire.Input) -> None:
    task = [wire.InferenceTask(model_spec=wire.ModelSpec(name="m"), method_name=CLASSIFY_METHOD)]
    for call in (
        lambda: classify(model, "", given),
        lambda: regress(model, "regress", given),
        lambda: multi_inference(model, task, given),
    ):
        raised = error(call)
        assert (raised.code, raised.message) == (Code.INVALID_ARGUMENT, "Input is empty.")


def test_an_example_that_the_model_cannot_use_is_the_callers_fault(model: Servable) -> None:
    raised = error(lambda: classify(model, "", examples(example(None, 2))))
    assert raised.code == Code.INVALID_ARGUMENT
    assert "Feature: x (data type: float) is required but could not be found" in raised.message


def test_labels_that_are_not_text_are_told(model: Servable) -> None:
    raised = error(lambda: classify(model, "names", examples(example([1, 2], name=b"ok\xff"))))
    assert raised.code == Code.INVALID_ARGUMENT
    assert raised.message.startswith(
        "Expected labels in UTF-8, as Classify's answers hold text. Got: b'ok\\xff'"
    )


def test_predict_gives_the_same_numbers(model: Servable) -> None:
    rows = np.array([example(row).SerializeToString() for row in X], object)
    _, outputs = predict(model, "untold", lambda _: {"inputs": rows})
    _, result = classify(model, "untold", examples())
    assert [[entry.score for entry in row.classes] for row in result.classifications] == outputs[
        "scores"
    ].tolist()


def test_a_time_limit_reaches_the_model(model: Servable) -> None:
    limits: list[float | None] = []

    class Watched(Counted):
        def run(self, *args: Any) -> list[Array]:
            limits.append(args[-1])
            return super().run(*args)

    watched = Watched(model)
    classify(watched, "", examples(), timeout_s=30)
    regress(watched, "regress", examples())
    assert limits == [30, None]


# MultiInference


class Counted:
    """Counts the runs of a real servable."""

    def __init__(self, servable: Servable) -> None:
        self._servable = servable
        self.engine = servable.engine
        self.signatures = servable.signatures
        self.signature_def_map = servable.signature_def_map
        self.runs = 0

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        self.runs += 1
        return self._servable.run(signature, inputs, outputs, timeout_s)

    def close(self) -> None:
        raise AssertionError("only the servable's owner closes it")


def task(signature_name: str, method_name: str, model_name: str = "m") -> wire.InferenceTask:
    spec = wire.ModelSpec(name=model_name, signature_name=signature_name)
    return wire.InferenceTask(model_spec=spec, method_name=method_name)


CLASSIFY_TASK = task("", CLASSIFY_METHOD)
REGRESS_TASK = task("regress", REGRESS_METHOD)


@pytest.mark.parametrize(
    "tasks",
    [
        [CLASSIFY_TASK, REGRESS_TASK],
        [REGRESS_TASK, CLASSIFY_TASK],
        [REGRESS_TASK],
        [task("scores", CLASSIFY_METHOD), task("classes", CLASSIFY_METHOD), REGRESS_TASK, CLASSIFY_TASK],
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_many_tasks_take_one_run(model: Servable, tasks: list[wire.InferenceTask], check: bool) -> None:
    counted = Counted(model)
    results = multi_inference(counted, tasks, examples(), check_method_name=check)
    assert counted.runs == 1
    assert len(results) == len(tasks)
    for asked, result in zip(tasks, results, strict=True):
        name = asked.model_spec.signature_name or "serving_default"
        assert result.model_spec == wire.ModelSpec(name="m", signature_name=name)
        if asked.method_name == CLASSIFY_METHOD:
            assert result.classification_result == classify(model, name, examples())[1]
        else:
            assert result.regression_result == regress(model, name, examples())[1]


def test_one_task_runs_the_signature_itself(model_2: Servable) -> None:
    (result,) = multi_inference(model_2, [task("regress", REGRESS_METHOD)], examples())
    assert result.regression_result == regress(model_2, "regress", examples())[1]


@pytest.mark.parametrize(
    ("tasks", "code", "message"),
    [
        ([], Code.INVALID_ARGUMENT, "Inference request has no tasks"),
        (
            [task("", CLASSIFY_METHOD, "")],
            Code.INVALID_ARGUMENT,
            "Found ModelSpec with an empty model name.",
        ),
        (
            [CLASSIFY_TASK, task("regress", REGRESS_METHOD, "n")],
            Code.INVALID_ARGUMENT,
            "All ModelSpecs in a MultiInferenceRequest must access the same model name.",
        ),
        (
            [CLASSIFY_TASK, task("serving_default", CLASSIFY_METHOD)],
            Code.INVALID_ARGUMENT,
            "Duplicate evaluation of signature: serving_default",
        ),
        (
            [CLASSIFY_TASK, task("nowhere", REGRESS_METHOD)],
            Code.INVALID_ARGUMENT,
            "Requested signature not found in model graph: nowhere",
        ),
        (
            [task("predict", PREDICT_METHOD)],
            Code.UNIMPLEMENTED,
            "Unsupported signature method_name: tensorflow/serving/predict",
        ),
        ([task("regress", "")], Code.UNIMPLEMENTED, "Unsupported signature method_name: "),
        (
            [task("regress_no_key", CLASSIFY_METHOD)],
            Code.INVALID_ARGUMENT,
            "Expected classification signature",
        ),
        (
            [CLASSIFY_TASK, task("regress_other", REGRESS_METHOD)],
            Code.INVALID_ARGUMENT,
            "Input tensor must be the same for all Signatures.",
        ),
        (
            [REGRESS_TASK, task("one_row", CLASSIFY_METHOD)],
            Code.INVALID_ARGUMENT,
            "Expected scores output batch size of 3. Got: 1",
        ),
    ],
)
def test_what_multi_inference_refuses(
    model: Servable, tasks: list[wire.InferenceTask], code: Code, message: str
) -> None:
    raised = error(lambda: multi_inference(model, tasks, examples()))
    assert raised.code == code
    assert raised.message.startswith(message)


def test_multi_inference_checks_method_names_where_asked(model: Servable) -> None:
    tasks = [task("untold", CLASSIFY_METHOD), REGRESS_TASK]
    assert len(multi_inference(model, tasks, examples())) == 2
    raised = error(lambda: multi_inference(model, tasks, examples(), check_method_name=True))
    assert raised.message.endswith(f"to be {CLASSIFY_METHOD}. Was: {PREDICT_METHOD}")


def test_a_method_name_that_is_not_known_is_not_invented(model: Servable) -> None:
    """Signatures of engines that keep no method names pass only where they are not checked."""
    counted = Counted(model)
    counted.signatures = {"serving_default": replace(model.signatures["serving_default"], method_name="")}
    assert classify(counted, "", examples())[0] == "serving_default"
    raised = error(lambda: classify(counted, "", examples(), check_method_name=True))
    assert raised.message.endswith("Was: ")
