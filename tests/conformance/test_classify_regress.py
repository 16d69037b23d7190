"""Classify, Regress and MultiInference of a model from TensorFlow 1, over gRPC and REST."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Ask = Callable[..., tuple[int, Any]]

X = np.array([[1, 2], [0.5, -4], [1e30, 0.1]], np.float32)
SCORES = np.stack([X[:, 0], X[:, 1], X[:, 0] + X[:, 1]], axis=1)
CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"


@pytest.fixture
def input_of(api: Any) -> Callable[..., Any]:
    """input_of(*features, context=...): tf.Examples from dicts of lists of numbers or bytes."""

    def example(features: dict[str, list[Any]], made: Any) -> None:
        for name, values in features.items():
            kind = made.features.feature[name]
            (kind.bytes_list if isinstance(values[0], bytes) else kind.float_list).value.extend(values)

    def make(*rows: dict[str, list[Any]], context: dict[str, list[Any]] | None = None) -> Any:
        given = api.Input()
        target = given.example_list
        if context is not None:
            target = given.example_list_with_context
            example(context, target.context)
        for row in rows:
            example(row, target.examples.add())
        return given

    return make


@pytest.fixture
def rows(input_of: Callable[..., Any]) -> Any:
    """The examples of X."""
    return input_of(*({"x": row.tolist()} for row in X))


@pytest.fixture
def classify(api: Any, prediction: Any) -> Callable[..., Any]:
    def classify(given: Any, signature: str = "", name: str = "examples") -> Any:
        request = api.ClassificationRequest(input=given)
        request.model_spec.name, request.model_spec.signature_name = name, signature
        return prediction.Classify(request, timeout=30)

    return classify


@pytest.fixture
def regress(api: Any, prediction: Any) -> Callable[..., Any]:
    def regress(given: Any, signature: str = "regress", name: str = "examples") -> Any:
        request = api.RegressionRequest(input=given)
        request.model_spec.name, request.model_spec.signature_name = name, signature
        return prediction.Regress(request, timeout=30)

    return regress


@pytest.fixture
def infer(api: Any, prediction: Any) -> Callable[..., Any]:
    """infer(input, (signature, method), ...) is MultiInference."""

    def infer(given: Any, *tasks: tuple[str, str], name: str = "examples") -> Any:
        request = api.MultiInferenceRequest(input=given)
        for signature, method in tasks:
            task = request.tasks.add(method_name=method)
            task.model_spec.name, task.model_spec.signature_name = name, signature
        return prediction.MultiInference(request, timeout=30)

    return infer


def test_classes_and_scores_of_each_example(
    classify: Callable[..., Any], rows: Any, labels: list[str]
) -> None:
    response = classify(rows)
    assert (response.model_spec.name, response.model_spec.version.value) == ("examples", 4)
    assert response.model_spec.signature_name == "serving_default"
    got = [[(entry.label, entry.score) for entry in row.classes] for row in response.result.classifications]
    assert got == [list(zip(labels, map(float, row), strict=True)) for row in SCORES]


def test_labels_or_scores_may_be_absent(classify: Callable[..., Any], rows: Any, labels: list[str]) -> None:
    only_labels = classify(rows, "classes").result.classifications
    assert [[(entry.label, entry.score) for entry in row.classes] for row in only_labels] == [
        [(label, 0) for label in labels]
    ] * 3
    only_scores = classify(rows, "scores").result.classifications
    assert [[entry.score for entry in row.classes] for row in only_scores] == SCORES.tolist()
    assert {entry.label for row in only_scores for entry in row.classes} == {""}


@pytest.mark.parametrize("signature", ["regress", "column"])
def test_a_value_for_each_example(regress: Callable[..., Any], rows: Any, signature: str) -> None:
    response = regress(rows, signature)
    assert (response.model_spec.version.value, response.model_spec.signature_name) == (4, signature)
    assert [entry.value for entry in response.result.regressions] == X.sum(axis=1).tolist()


def test_the_context_is_for_examples_that_say_nothing_themselves(
    classify: Callable[..., Any], regress: Callable[..., Any], input_of: Callable[..., Any]
) -> None:
    given = input_of(
        {"x": [1, 2]},
        {"x": [1, 2], "name": [b"me"]},
        context={"scale": [10], "name": [b"context"]},
    )
    assert [entry.value for entry in regress(given).result.regressions] == [30, 30]
    names = classify(given, "names").result.classifications
    assert [row.classes[0].label for row in names] == ["context", "me"]


def test_many_tasks_in_one_request(
    classify: Callable[..., Any], regress: Callable[..., Any], infer: Callable[..., Any], rows: Any
) -> None:
    tasks = [("regress", REGRESS), ("serving_default", CLASSIFY), ("scores", CLASSIFY)]
    results = infer(rows, *tasks).results
    assert [result.model_spec.version.value for result in results] == [4, 4, 4]
    assert [result.model_spec.signature_name for result in results] == [name for name, _ in tasks]
    assert results[0].regression_result == regress(rows).result
    assert results[1].classification_result == classify(rows).result
    assert results[2].classification_result == classify(rows, "scores").result


def test_predict_takes_the_same_examples_serialized(
    api: Any, prediction: Any, request_of: Any, rows: Any
) -> None:
    serialized = [example.SerializeToString() for example in rows.example_list.examples]
    response = prediction.Predict(request_of("examples", "predict", examples=serialized))
    np.testing.assert_array_equal(api.tf.make_ndarray(response.outputs["y"]), X.sum(axis=1))


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("nowhere", "No signature was found with the name: nowhere"),
        ("flat", "Expected Tensor shape: [batch_size num_classes] but got [3]"),
        ("predict", "No classification inputs found in SignatureDef: "),
    ],
)
def test_what_cannot_be_classified(
    classify: Callable[..., Any], rows: Any, failure: Any, signature: str, message: str
) -> None:
    code, got = failure(lambda: classify(rows, signature))
    assert code == "INVALID_ARGUMENT"
    assert got.startswith(message)


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("nowhere", "No signature was found with the name: nowhere"),
        ("serving_default", "Expected one output Tensor."),
        ("wide", "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got [3,3]"),
        ("predict", "No regression inputs found in SignatureDef: "),
    ],
)
def test_what_cannot_be_regressed(
    regress: Callable[..., Any], rows: Any, failure: Any, signature: str, message: str
) -> None:
    code, got = failure(lambda: regress(rows, signature))
    assert code == "INVALID_ARGUMENT"
    assert got.startswith(message)


def test_requests_without_examples_models_or_tasks(
    api: Any,
    prediction: Any,
    classify: Callable[..., Any],
    regress: Callable[..., Any],
    infer: Callable[..., Any],
    rows: Any,
    failure: Any,
) -> None:
    for call in (
        lambda: classify(api.Input()),
        lambda: regress(api.Input()),
        lambda: infer(api.Input(), ("", CLASSIFY)),
    ):
        assert failure(call) == ("INVALID_ARGUMENT", "Input is empty.")
    missing = ("NOT_FOUND", "Servable not found for request: Latest(nope)")
    assert failure(lambda: classify(rows, name="nope")) == missing
    assert failure(lambda: regress(rows, name="nope")) == missing
    assert failure(lambda: infer(rows, ("", CLASSIFY), name="nope")) == missing
    assert failure(lambda: prediction.Classify(api.ClassificationRequest(input=rows))) == (
        "INVALID_ARGUMENT",
        "Missing ModelSpec",
    )
    assert failure(lambda: infer(rows)) == ("INVALID_ARGUMENT", "Inference request has no tasks")
    code, message = failure(lambda: infer(rows, ("predict", "tensorflow/serving/predict")))
    assert (code, message) == (
        "UNIMPLEMENTED",
        "Unsupported signature method_name: tensorflow/serving/predict",
    )
    assert failure(lambda: infer(rows, ("", CLASSIFY), ("serving_default", CLASSIFY))) == (
        "INVALID_ARGUMENT",
        "Duplicate evaluation of signature: serving_default",
    )


def test_an_example_that_the_model_cannot_use(
    classify: Callable[..., Any], input_of: Callable[..., Any], failure: Any
) -> None:
    code, message = failure(lambda: classify(input_of({"scale": [2]})))
    assert code == "INVALID_ARGUMENT"
    assert "Feature: x (data type: float) is required but could not be found" in message


@pytest.mark.better("any request")
def test_a_label_that_is_not_text(
    classify: Callable[..., Any], input_of: Callable[..., Any], failure: Any
) -> None:
    code, message = failure(lambda: classify(input_of({"x": [1, 2], "name": [b"\xff"]}), "names"))
    assert code == "INVALID_ARGUMENT"
    assert message.startswith("Expected labels in UTF-8")


def test_classify_and_regress_over_rest(ask: Ask, labels: list[str]) -> None:
    examples = [{"x": row.tolist()} for row in X[:2]]
    path = "/v1/models/examples"
    scored = [
        [[label, score] for label, score in zip(labels, row, strict=True)] for row in SCORES[:2].tolist()
    ]
    assert ask(f"{path}:classify", {"examples": examples}) == (200, {"results": scored})
    assert ask(f"{path}/versions/4:CLASSIFY", {"examples": examples}) == (200, {"results": scored})
    body = {"signature_name": "regress", "examples": examples}
    assert ask(f"{path}:regress", body) == (200, {"results": [3.0, -3.5]})
    body = {"signature_name": "regress", "context": {"scale": 10.0}, "examples": examples}
    assert ask(f"{path}:regress", body) == (200, {"results": [30.0, -35.0]})
    named = [{"x": [1.0, 2.0], "name": {"b64": "w7xiZXI="}}, {"x": [1.0, 2.0]}]
    assert ask(f"{path}:classify", {"signature_name": "names", "examples": named}) == (
        200,
        {"results": [[["über", 0.0]], [["nobody", 0.0]]]},
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"instances": [1]}, " When method is classify, key 'examples' is expected and was not found"),
        ({"examples": {}}, " Expecting 'examples' value to be an list/array"),
        ({"examples": []}, " 'examples' value is an empty array"),
        ({"examples": [7]}, "Example must be JSON object but got JSON Number"),
        ({"examples": [True]}, "Example must be JSON object but got JSON True"),
        ({"examples": [{"x": None}]}, "Feature: x has element with unexpected JSON type: Null"),
        ({"examples": [{"x": [[1]]}]}, "Feature: x has element with unexpected JSON type: Array"),
        ({"examples": [{"x": [1, 1.5]}]}, "Unexpected element type in feature: x expecting type: int64"),
        ({"examples": [{"x": [1.5, "a"]}]}, "Unexpected element type in feature: x expecting type: float"),
        ({"examples": [{"x": 2**63}]}, "Feature: x has uint64 element. Only int64 is supported."),
        ({"examples": [{"x": {"b64": "*"}}]}, "Unable to base64 decode"),
        (
            {"signature_name": "nowhere", "examples": [{"x": [1.0, 2.0]}]},
            "No signature was found with the name: nowhere",
        ),
    ],
)
def test_bodies_that_are_refused(ask: Ask, body: Any, message: str) -> None:
    status, answer = ask("/v1/models/examples:classify", body)
    assert status == 400
    assert message in answer["error"]
