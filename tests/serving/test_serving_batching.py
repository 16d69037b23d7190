"""--enable_batching: requests that run together, and each gets what it would have got alone."""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from graftserve.serving.app import Server
from graftserve.serving.batching import BatchingServable
from graftserve.serving.batching_options import VERSION_FILE, read_batching
from graftserve.serving.errors import ServingError
from graftserve.serving.flags import Options
from graftserve.serving.metrics import Metrics
from graftserve.serving.servable import ServableId

# A timeout that never passes: these batches run when they are full.
TOGETHER = "max_batch_size { value: 4 } batch_timeout_micros { value: 600000000 }"
MODELS = {
    "together": ("lab", TOGETHER),
    "sizes": ("lab", "max_batch_size { value: 8 } allowed_batch_sizes: 4 allowed_batch_sizes: 8"),
    "padding": ("lab", "max_batch_size { value: 2 } batch_timeout_micros { value: 600000000 } "
                       "pad_variable_length_inputs: true"),
    "alone": ("lab", None),
    "v1": ("v1", "max_batch_size { value: 3 } batch_timeout_micros { value: 600000000 }"),
}  # fmt: skip


def save_lab(path: Path) -> None:
    import tensorflow as tf

    class LabModule(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(["a", "b"], tf.constant([1, 2], tf.int64)), -1
            )
            self.two = tf.Variable(2.0)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def double(self, x: Any) -> dict[str, Any]:
            return {"y": x * self.two}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def number(self, text: Any) -> dict[str, Any]:
            return {
                "y": tf.strings.to_number(text),
                "again": tf.identity(text),
                "id": self.table.lookup(text),
            }

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, 2], tf.int64, name="a"),
                tf.TensorSpec([None, 2], tf.float64, name="b"),
                tf.TensorSpec([None], tf.bool, name="flag"),
                tf.TensorSpec([None], tf.bfloat16, name="c"),
            ]
        )
        def types(self, a: Any, b: Any, flag: Any, c: Any) -> dict[str, Any]:
            total = tf.cast(a, tf.float64) + b
            return {"sum": total, "not": ~flag, "c": c * 2}

        @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32, name="x")])
        def rows(self, x: Any) -> dict[str, Any]:
            return {"sum": tf.reduce_sum(x, 1), "same": tf.identity(x)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def rowless(self, x: Any) -> dict[str, Any]:
            return {"count": tf.size(x), "first": x[:1], "same": tf.identity(x)}

    module = LabModule()
    names = ("double", "number", "types", "rows", "rowless")
    tf.saved_model.save(module, str(path), signatures={name: getattr(module, name) for name in names})


def save_v1(path: Path) -> None:
    """As TensorFlow 1 did: variables of the graph, parsed tf.Examples, a Classify signature."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        examples = v1.placeholder(tf.string, [None], name="examples")
        x = v1.parse_example(examples, {"x": v1.FixedLenFeature([1], tf.float32)})["x"]
        weight = v1.get_variable("weight", initializer=[[3.0]], use_resource=False)
        scores = tf.matmul(x, weight)
        session.run(v1.global_variables_initializer())
        signature = v1.saved_model.classification_signature_def(examples, None, scores)
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature})
        builder.save()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base_options: Mapping[str, Any]) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("batching")
    save_lab(root / "lab")
    save_v1(root / "v1")
    config = ""
    for name, (source, parameters) in MODELS.items():
        version = Path(shutil.copytree(root / source, root / "models" / name / "1"))
        if parameters is not None:
            (version / VERSION_FILE).write_text(parameters)
        config += f'config {{ name: "{name}" base_path: "{version.parent}" }}\n'
    (root / "models.config").write_text(f"model_config_list {{ {config} }}")
    (root / "batching.config").write_text('num_batch_threads { value: 2 } thread_pool_name { value: "bt" }')
    server = Server(
        Options(
            **base_options,
            model_config_file=str(root / "models.config"),
            enable_batching=True,
            enable_per_model_batching_parameters=True,
            batching_parameters_file=str(root / "batching.config"),
            grpc_max_threads=16,
        )
    )
    server.start()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("bt_")]
    yield server
    server.stop(5)
    # Longer than `stop` waits: on a busy machine five models take their time to go.
    for thread in threading.enumerate():
        if thread.name.startswith("bt_"):
            thread.join(30)
            assert not thread.is_alive()


@dataclass
class Caller:
    server: Server
    stub: Any
    apis: Any

    def start(self, model: str, signature: str, only: Sequence[str] = (), **inputs: Any) -> Any:
        """A call under way. only: the outputs wanted; none means all."""
        request = self.apis.PredictRequest()
        request.model_spec.name = model
        request.model_spec.signature_name = signature
        request.output_filter.extend(only)
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(self.apis.make_tensor_proto(value))
        return self.stub.Predict.future(request, timeout=30)

    def outputs(self, call: Any) -> dict[str, Any]:
        return {name: self.apis.make_ndarray(proto).tolist() for name, proto in call.result().outputs.items()}

    def error(
        self, model: str, signature: str, only: Sequence[str] = (), **inputs: Any
    ) -> tuple[grpc.StatusCode, str]:
        call = self.start(model, signature, only, **inputs)
        return call.code(), call.details()

    def rows_run(self, model: str) -> tuple[float, float]:
        """Batches so far, and the rows in them."""
        value = self.server.metrics.registry.get_sample_value
        count, rows = (
            value(f"graftserve_batch_rows_{part}", {"model_name": model}) or 0 for part in ("count", "sum")
        )
        return count, rows


@pytest.fixture(scope="module")
def caller(server: Server) -> Iterator[Caller]:
    from types import SimpleNamespace

    import tensorflow as tf
    from tensorflow_serving.apis import classification_pb2, predict_pb2, prediction_service_pb2_grpc

    apis = SimpleNamespace(
        PredictRequest=predict_pb2.PredictRequest,
        ClassificationRequest=classification_pb2.ClassificationRequest,
        make_tensor_proto=tf.make_tensor_proto,
        make_ndarray=tf.make_ndarray,
    )
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield Caller(server, prediction_service_pb2_grpc.PredictionServiceStub(channel), apis)


def test_what_tune_writes_is_taken(tmp_path: Path) -> None:
    from graftserve.export import Batching

    file = tmp_path / "batching.config"
    file.write_text(Batching(threads=3, sizes=(1, 2, 16), timeout_us=500).to_text())
    options = read_batching(
        Options(model_base_path="m", enable_batching=True, batching_parameters_file=str(file))
    )
    assert options is not None
    assert (options.num_batch_threads, options.batch_timeout_s) == (3, 0.0005)
    assert (options.run_rows, options.allowed_batch_sizes) == (16, (1, 2, 16))


def test_requests_run_together_and_each_gets_its_rows(caller: Caller) -> None:
    before = caller.rows_run("together")
    calls = [caller.start("together", "double", x=np.float32(rows)) for rows in ([1], [2, 3], [4])]
    assert [caller.outputs(call) for call in calls] == [{"y": [2]}, {"y": [4, 6]}, {"y": [8]}]
    after = caller.rows_run("together")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 4)


def test_strings_tables_and_all_kinds_of_numbers(caller: Caller) -> None:
    calls = [caller.start("together", "number", text=[text]) for text in (b"1", b"2.5", b"3", b"4")]
    assert [caller.outputs(call) for call in calls] == [
        {"y": [float(text)], "again": [text], "id": [-1]} for text in (b"1", b"2.5", b"3", b"4")
    ]
    import ml_dtypes

    def start(value: int) -> Any:
        return caller.start(
            *("together", "types"),
            a=np.int64([[value, 0]] * 2),
            b=np.float64([[0.5, 0.25]] * 2),
            flag=np.array([True, False]),
            c=np.array([value, 1], ml_dtypes.bfloat16),
        )

    calls = [start(1), start(2)]
    assert [caller.outputs(call) for call in calls] == [
        {"sum": [[value + 0.5, 0.25]] * 2, "not": [False, True], "c": [2 * value, 2]} for value in (1, 2)
    ]


def test_one_bad_request_fails_alone_with_the_models_own_message(caller: Caller) -> None:
    calls = [caller.start("together", "number", text=[text]) for text in (b"1", b"x", b"3", b"4")]
    assert [call.code() for call in calls] == [
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OK,
        grpc.StatusCode.OK,
    ]
    alone = caller.error("alone", "number", text=[b"x"])
    assert (calls[1].code(), calls[1].details()) == alone
    assert "could not correctly convert string: x" in alone[1]


def test_batches_are_padded_to_an_allowed_size(caller: Caller) -> None:
    before = caller.rows_run("sizes")
    assert caller.outputs(caller.start("sizes", "double", x=np.float32([1, 2, 3]))) == {"y": [2, 4, 6]}
    after = caller.rows_run("sizes")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 4)
    text = caller.server.metrics.render().decode()
    session = ":tensorflow:serving:batching_session:"
    assert f'{session}padding_size_sum{{execution_batch_size="4"}}' in text
    for name in ("queuing_latency", "input_batch_size", "processed_batch_size"):
        assert f'{session}{name}_count{{thread_pool_name="bt"}}' in text
    assert f"# TYPE {session}wrapped_run_count counter" in text
    assert 'graftserve_queue_seconds_count{model_name="sizes",queue="batch"}' in text


def test_what_cannot_be_batched(caller: Caller) -> None:
    invalid, precondition = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    assert caller.error("sizes", "double", x=np.float32(1)) == (
        invalid,
        "Batching Run() input tensors must have at least one dimension",
    )
    assert caller.error("sizes", "double", x=np.zeros(9, np.float32)) == (
        invalid,
        "Task size 9 is larger than maximum input batch size 8",
    )
    uneven = {"a": np.zeros((1, 2), np.int64), "b": np.zeros((2, 2)), "flag": [True], "c": np.zeros(1)}
    assert caller.error("sizes", "types", **uneven) == (
        invalid,
        "Batching Run() input tensors must have equal 0th-dimension size",
    )
    assert caller.error("sizes", "double", x=[b"text"]) == caller.error("alone", "double", x=[b"text"])
    assert caller.error("sizes", "rowless", ["count"], x=np.float32([1, 2])) == (
        precondition,
        "Batched output tensor has 0 dimensions",
    )
    assert caller.error("sizes", "rowless", ["same", "first"], x=np.float32([1, 2])) == (
        precondition,
        "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of the "
        "input tensors",
    )
    # Without its batching the model takes all of them.
    assert caller.outputs(caller.start("alone", "double", x=np.float32(1))) == {"y": 2}


def test_a_request_without_rows_is_answered(caller: Caller) -> None:
    assert caller.outputs(caller.start("together", "double", x=np.zeros(0, np.float32))) == {"y": []}


def test_different_shapes_wait_for_their_like(caller: Caller) -> None:
    shapes = [(2, 3), (2, 5), (2, 3), (2, 5)]
    calls = [caller.start("together", "rows", x=np.ones(shape, np.float32)) for shape in shapes]
    assert [caller.outputs(call)["sum"] for call in calls] == [[3, 3], [5, 5], [3, 3], [5, 5]]


def test_variable_lengths_are_padded_and_come_back_padded(caller: Caller) -> None:
    calls = [caller.start("padding", "rows", x=np.float32([row])) for row in ([1, 2], [3, 4, 5])]
    assert [caller.outputs(call) for call in calls] == [
        {"same": [[1, 2, 1]], "sum": [4]},
        {"same": [[3, 4, 5]], "sum": [12]},
    ]


def test_a_model_of_tensorflow_1(caller: Caller) -> None:
    from graftserve.client.wire import Example

    request = caller.apis.ClassificationRequest()
    request.model_spec.name = "v1"
    for value in (1.0, 2.0):
        example = Example()
        example.features.feature["x"].float_list.value.append(value)
        request.input.example_list.examples.add().MergeFromString(example.SerializeToString())
    two = caller.stub.Classify.future(request, timeout=30)
    one = caller.start("v1", "serving_default", inputs=[example.SerializeToString()])
    scores = [row.classes[0].score for row in two.result().result.classifications]
    assert scores == [3, 6]
    assert caller.outputs(one) == {"scores": [[6]]}
    assert caller.rows_run("v1") == (1, 3)


# --- start, load and unload


def test_a_server_with_bad_parameters_does_not_start(
    tmp_path: Path, start_server: Callable[..., Server], publish: Callable[[str, Path], Path]
) -> None:
    publish("half_plus_two", tmp_path / "model" / "1")
    file = tmp_path / "batching.config"
    file.write_text("num_batch_threads { value: 0 }")
    with pytest.raises(ServingError, match=f"{file}: num_batch_threads must be positive; was 0"):
        start_server(tmp_path / "model", enable_batching=True, batching_parameters_file=str(file))
    with pytest.raises(ServingError, match=f"cannot read {tmp_path}/gone"):
        start_server(
            tmp_path / "model", enable_batching=True, batching_parameters_file=str(tmp_path / "gone")
        )


def test_a_version_with_bad_parameters_is_not_loaded(
    tmp_path: Path, start_server: Callable[..., Server], publish: Callable[[str, Path], Path]
) -> None:
    version = publish("half_plus_two", tmp_path / "1")
    (version / VERSION_FILE).write_text("max_batch_size { value: 8 } allowed_batch_sizes: 4")
    with pytest.raises(ServingError, match=rf"{version / VERSION_FILE}: Last entry in allowed_batch_sizes"):
        start_server(
            tmp_path, enable_batching=True, enable_per_model_batching_parameters=True, max_num_load_retries=0
        )


def test_what_gathers_by_itself_is_not_batched_again(
    tmp_path: Path, publish: Callable[[str, Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    from graftserve.serving.engines import ModelEngine

    version = publish("half_plus_two", tmp_path / "1")
    engine = ModelEngine(Options(model_base_path="m", enable_batching=True), Metrics())
    caplog.set_level(logging.INFO)
    for batching, is_batched in (({"sizes": [1, 2]}, False), (None, True)):
        (version / "assets.extra").mkdir(exist_ok=True)
        (version / "assets.extra" / "contract.json").write_text(json.dumps({"batching": batching}))
        servable = engine.load(ServableId("m", 1), version)
        try:
            assert isinstance(servable, BatchingServable) is is_batched
        finally:
            servable.close()
    assert [text for text in caplog.messages if "not batched again" in text] == [
        "model m version 1 is not batched again: it gathers images in its graph"
    ]


@pytest.mark.slow
def test_ten_versions_come_and_go_without_leaving_anything(tmp_path: Path) -> None:
    import tensorflow as tf

    from graftserve.serving.engines import ModelEngine

    class Large(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = tf.Variable(tf.zeros([4096, 2048]))  # 32 MiB

        @tf.function(input_signature=[tf.TensorSpec([None, 4096], tf.float32, name="x")])
        def serve(self, x: Any) -> dict[str, Any]:
            return {"y": x @ self.weights}

    module = Large()
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.serve})
    engine = ModelEngine(Options(model_base_path="m", enable_batching=True), Metrics())

    def swap() -> None:
        servable = engine.load(ServableId("m", 1), tmp_path)
        signature = servable.signatures["serving_default"]
        servable.run(signature, {"x": np.zeros((8, 4096), np.float32)}, ("y",), 30)
        servable.close()

    for _ in range(3):
        swap()
    before = resident_bytes()
    for _ in range(10):
        swap()
    assert resident_bytes() - before < 96 * 2**20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("model_server_batch")]


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError
