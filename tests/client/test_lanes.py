"""How each kind of call takes answers apart, fits itself to a model, and judges refusals."""

import numpy as np
import pytest

from graftserve.client.errors import (
    ClientError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
)
from graftserve.client.lanes import (
    ClassifyLane,
    EmbedLane,
    MetadataLane,
    PredictContent,
    PredictLane,
    RowsLane,
    StatusLane,
)
from graftserve.client.messages import Messages
from graftserve.client.results import ModelMetadata, Signature, TensorSpec
from graftserve.client.wire import PredictRequest, PredictResponse
from graftserve.client.wire.tensors import to_proto

MESSAGES = Messages("host:1", "flowers", None, None)
REFUSAL = InvalidArgumentError("refused", details="not like this")


def response(**outputs):
    message = PredictResponse()
    message.model_spec.version.value = 7
    for name, value in outputs.items():
        message.outputs[name].CopyFrom(to_proto(value))
    return message


def answer(rows, **changes):
    """A ClassifyLane's for so many images, the second of which did not decode."""
    outputs = {
        "classes": np.array([[b"daisy", b"rose"]] * rows, object),
        "scores": np.array([[0.75, 0.25]] * rows, np.float32),
        "valid": np.arange(rows) != 1,
    }
    return response(**{**outputs, **changes})


def metadata(inputs, outputs, signature="serving_default"):
    spec = TensorSpec("float32", (None, None))
    return ModelMetadata("flowers", 7, {signature: Signature(inputs, dict.fromkeys(outputs, spec))})


STRING = TensorSpec("string", (None,))


def classify():
    return ClassifyLane(MESSAGES, "serving_default", ())


def test_a_row_for_every_image():
    first, bad, third = classify().results(answer(3), [b"a", b"b", b"c"])
    assert (first.label, first.score, first.version) == ("daisy", 0.75, 7)
    assert first.top == (("daisy", 0.75), ("rose", 0.25))
    assert isinstance(bad, InvalidImageError)
    assert third == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid": np.ones((3, 2), bool)}, r"expected one valid per image, \[3\], got shape \[3, 2\]"),
        ({"valid": np.ones((2,), bool)}, "expected one row per image, 3, got valid"),
        ({"scores": np.zeros((2, 2), np.float32)}, "expected one row per image, 3, got scores"),
        ({"scores": np.zeros((3, 1), np.float32)}, "of one shape"),
        ({"scores": np.zeros((3, 2), np.int32)}, "scores of float32"),
        ({"classes": np.zeros((3, 0), object), "scores": np.zeros((3, 0), np.float32)}, "of one shape"),
    ],
)
def test_an_answer_of_another_shape_is_a_mismatch(changes, message):
    with pytest.raises(ModelMismatchError, match=message):
        classify().results(answer(3, **changes), [b"a", b"b", b"c"])


def test_an_answer_without_an_output_is_a_mismatch():
    message = answer(3)
    del message.outputs["scores"]
    with pytest.raises(
        ModelMismatchError, match="expected outputs classes, scores, valid, got classes, valid"
    ):
        classify().results(message, [b"a", b"b", b"c"])


def test_valid_of_another_type_cannot_be_read():
    with pytest.raises(InternalError, match="output 'valid'"):
        classify().results(answer(3, valid=np.ones(3, np.int64)), [b"a", b"b", b"c"])


def test_features():
    lane = EmbedLane(MESSAGES, "features", ())
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    first, bad, third = lane.results(response(features=features, valid=np.arange(3) != 1), [b""] * 3)
    np.testing.assert_array_equal(first, [0, 1])
    assert isinstance(bad, InvalidImageError)
    np.testing.assert_array_equal(third, [4, 5])
    with pytest.raises(ModelMismatchError, match="features of float32"):
        lane.results(response(features=features[..., None], valid=np.ones(3, bool)), [b""] * 3)


@pytest.mark.parametrize(
    ("inputs", "outputs", "changes", "asks"),
    [
        ({"image_bytes": STRING}, ("classes", "scores", "valid"), False, ("image_bytes", 3)),
        ({"b64": STRING}, ("classes", "scores", "valid"), True, ("b64", 3)),
        ({"b64": STRING}, ("classes", "scores"), True, ("b64", 2)),
        ({"b64": STRING}, ("classes",), False, ("image_bytes", 3)),  # not enough to answer with
        ({"b64": TensorSpec("float32", (None,))}, ("classes", "scores"), False, ("image_bytes", 3)),
        ({"a": STRING, "b": STRING}, ("classes", "scores"), False, ("image_bytes", 3)),
    ],
)
def test_a_lane_fits_itself_to_the_model(inputs, outputs, changes, asks):
    lane = classify()
    assert lane.adapt(metadata(inputs, outputs)) == changes
    assert not lane.adapt(metadata(inputs, outputs))  # the same again changes nothing
    request = PredictRequest.FromString(lane.request([b"a"]))
    assert (next(iter(request.inputs)), len(request.output_filter)) == asks


def test_whom_a_lone_refusal_blames_depends_on_the_model():
    lane = classify()
    assert lane.blame(REFUSAL) is REFUSAL  # one that has `valid` answers for bad images
    lane.adapt(metadata({"image_bytes": STRING}, ("classes", "scores")))
    blamed = lane.blame(REFUSAL)
    assert isinstance(blamed, InvalidImageError)
    assert "not like this" in str(blamed)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (metadata({"image_bytes": STRING}, ("classes", "scores", "valid")), None),
        (metadata({"x": STRING}, ("y",), "other"), "expected signature serving_default, got only other"),
        (metadata({"x": STRING}, ("y",)), "got inputs x and outputs y"),
    ],
)
def test_a_refusal_of_images_is_explained(model, message):
    explained = classify().explain(model, REFUSAL, [b"a"])
    if message is None:
        assert explained is None
    else:
        assert isinstance(explained, ModelMismatchError)
        assert message in str(explained)
        assert explained.details == "not like this"


@pytest.mark.parametrize(
    ("signature", "inputs", "outputs", "kind", "message"),
    [
        ("serving_default", {"x": np.zeros((1, 2), np.float32)}, ("y",), None, ""),
        ("absent", {}, (), FailedPreconditionError, "has no signature 'absent': it has serving_default"),
        ("serving_default", {}, (), InvalidArgumentError, "got inputs none"),
        ("serving_default", {"x": np.zeros(2, np.float32)}, (), InvalidArgumentError, "got x as float32 [2]"),
        ("serving_default", {"x": np.zeros((1, 2))}, (), InvalidArgumentError, "got x as float64 [1, 2]"),
        (
            "serving_default",
            {"x": np.zeros((1, 2), np.float32)},
            ("z",),
            InvalidArgumentError,
            "got no outputs z",
        ),
    ],
)
def test_a_refused_predict_is_explained(signature, inputs, outputs, kind, message):
    lane = PredictLane(MESSAGES, signature, (), outputs)
    model = metadata({"x": TensorSpec("float32", (None, 2))}, ("y",))
    explained = lane.explain(model, REFUSAL, [PredictContent(inputs)])
    assert (kind is None) == (explained is None)
    if kind is not None:
        assert type(explained) is kind
        assert isinstance(explained, ClientError)
        assert message in str(explained)


def rows(count, first=0):
    return PredictContent({"x": np.arange(first, first + count, dtype=np.float32)[:, None]}, count)


def test_rows_are_joined_and_given_back():
    contents = [rows(2), rows(1, 2), rows(3, 3)]
    lane = RowsLane(MESSAGES, "serving_default", (), (), contents[0].inputs)
    request = PredictRequest.FromString(lane.request(contents))
    assert [dim.size for dim in request.inputs["x"].tensor_shape.dim] == [6, 1]
    parts = lane.results(response(y=np.arange(6, dtype=np.float32)), contents)
    assert [part["y"].tolist() for part in parts] == [[0, 1], [2], [3, 4, 5]]
    with pytest.raises(ModelMismatchError, match="call predict without merge_rows"):
        lane.results(response(y=np.arange(5, dtype=np.float32)), contents)


def test_only_what_may_share_a_request_has_the_same_key():
    one, two = rows(1).inputs, rows(5).inputs
    wide = {"x": np.zeros((1, 2), np.float32)}
    double = {"x": np.zeros((1, 1))}

    def lane(inputs, signature="serving_default", metadata=(), outputs=()):
        return RowsLane(MESSAGES, signature, metadata, outputs, inputs).key

    assert lane(one) == lane(two)
    others = [
        lane(wide),
        lane(double),
        lane(one, signature="other"),
        lane(one, metadata=(("tenant", "a"),)),
        lane(one, outputs=("y",)),
        PredictLane(MESSAGES, "serving_default", (), ()).key,
        classify().key,
        ClassifyLane(MESSAGES, "serving_default", (("tenant", "a"),)).key,
        EmbedLane(MESSAGES, "serving_default", ()).key,
        StatusLane(MESSAGES).key,
        StatusLane(MESSAGES, retries=False).key,
        MetadataLane(MESSAGES).key,
    ]
    assert len({lane(one), *others}) == len(others) + 1
