"""What is read out of a SavedModel: the order of its tensors, and which signatures run in the thread that
asks, those too small to be worth passing on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from graftserve.serving.loader import signatures_of, small_signatures


def meta_graph_of(path: Path) -> Any:
    return saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0]


def test_small_graphs_of_known_operations_without_loops(saved_models: Path) -> None:
    assert "serving_default" in small_signatures(meta_graph_of(saved_models / "half_plus_two"))
    many = small_signatures(meta_graph_of(saved_models / "many"))
    assert many >= {"serving_default", "text", "echo", "add", "divide", "fail"}
    assert "spin" not in many  # a loop


def chain(length: int) -> Any:
    """A signature through so many operations in a row."""
    meta_graph = meta_graph_pb2.MetaGraphDef()
    signature = meta_graph.signature_def["serving_default"]
    signature.inputs["x"].name = "node_0:0"
    signature.outputs["y"].name = f"node_{length}:0"
    meta_graph.graph_def.node.add(name="node_0", op="Placeholder", input=["far"])  # beyond the input: not run
    for number in range(1, length + 1):
        meta_graph.graph_def.node.add(
            name=f"node_{number}", op="Relu", input=[f"node_{number - 1}:0", "^node_0"]
        )
    return meta_graph


def mapped(meta_graph: Any) -> None:
    node = meta_graph.graph_def.node[1]
    node.op = "MapDataset"
    node.attr["f"].func.name = "decode"
    meta_graph.graph_def.library.function.add().signature.name = "decode"


def looped(meta_graph: Any) -> None:
    meta_graph.graph_def.node[1].op = "LoopCond"


def called(meta_graph: Any) -> None:
    node = meta_graph.graph_def.node[1]
    node.op = "StatefulPartitionedCall"
    node.attr["f"].func.name = "body"


def called_and_large(meta_graph: Any) -> None:
    called(meta_graph)
    function = meta_graph.graph_def.library.function.add()
    function.signature.name = "body"
    for number in range(100):
        function.node_def.add(name=f"inner_{number}", op="Relu")


def torn(meta_graph: Any) -> None:
    meta_graph.graph_def.node[1].input[0] = "missing:0"


@pytest.mark.parametrize("length", [1, 100])
def test_up_to_a_hundred_operations(length: int) -> None:
    assert small_signatures(chain(length)) == {"serving_default"}


@pytest.mark.parametrize("change", [mapped, looped, called, called_and_large, torn])
def test_what_is_not_known_to_be_small_is_not(change: Callable[[Any], None]) -> None:
    meta_graph = chain(3)
    change(meta_graph)
    assert small_signatures(meta_graph) == frozenset()
    assert small_signatures(chain(101)) == frozenset()


def test_tensors_are_in_the_order_of_their_names_whatever_the_process() -> None:
    meta_graph = meta_graph_pb2.MetaGraphDef()
    names = [f"{letter}{number}" for letter in "zya" for number in range(9)]
    for name in names:
        meta_graph.signature_def["s"].inputs[name].name = f"{name}:0"
        meta_graph.signature_def["s"].outputs[name].name = f"{name}:1"
    signature = signatures_of(meta_graph)["s"]
    assert list(signature.inputs) == list(signature.outputs) == sorted(names)
    assert signature.outputs["a0"].tensor_name == "a0:1"
