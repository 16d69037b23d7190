"""The batching of a written SavedModel, read and changed without tracing anything anew.

The network is called by BatchFunction nodes, whose attributes are the batching's parameters; `batching` names
their queue, so they are found wherever TensorFlow has put them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from graftserve.training.files import write_atomically, write_json

from .batching import QUEUE, Batching
from .errors import VerificationError
from .goldens import EXTRA

__all__ = ["read_batching", "write_batching"]


def read_batching(folder: Path) -> Batching | None:
    """The batching in the graph of the SavedModel in `folder`; None if it has none of ours.

    Raises VerificationError if there is no SavedModel.
    """
    for node in _batch_nodes(_read(folder)):
        attributes = node.attr
        return Batching(
            threads=attributes["num_batch_threads"].i,
            sizes=tuple(attributes["allowed_batch_sizes"].list.i),
            timeout_us=attributes["batch_timeout_micros"].i,
            max_request_images=attributes["max_batch_size"].i,
            max_queued_batches=attributes["max_enqueued_batches"].i,
        )
    return None


def write_batching(folder: Path, batching: Batching) -> None:
    """Give the SavedModel in `folder`, and its contract, another batching.

    Only for a version that is not published yet. Raises VerificationError if there is no SavedModel, or its
    network is not batched in the graph.
    """
    model = _read(folder)
    nodes = list(_batch_nodes(model))
    if not nodes:
        raise VerificationError(f"{folder}: its network is not batched in the graph; export it with batching")
    for node in nodes:
        node.attr["num_batch_threads"].i = batching.threads
        node.attr["batch_timeout_micros"].i = batching.timeout_us
        node.attr["max_batch_size"].i = batching.max_request_images
        node.attr["max_enqueued_batches"].i = batching.max_queued_batches
        node.attr["allowed_batch_sizes"].list.i[:] = batching.sizes
    with write_atomically(folder / "saved_model.pb", "wb") as file:
        file.write(model.SerializeToString(deterministic=True))
    contract = folder / EXTRA / "contract.json"
    document = json.loads(contract.read_text(encoding="utf-8"))
    write_json(contract, document | {"batching": batching.to_dict()})


def _read(folder: Path) -> Any:
    model = saved_model_pb2.SavedModel()
    try:
        model.ParseFromString((folder / "saved_model.pb").read_bytes())
    except (OSError, DecodeError) as error:
        raise VerificationError(f"{folder}: no SavedModel: {error}") from error
    return model


def _batch_nodes(model: Any) -> Iterator[Any]:
    for meta_graph in model.meta_graphs:
        graph = meta_graph.graph_def
        bodies = [graph.node, *(function.node_def for function in graph.library.function)]
        for body in bodies:
            for node in body:
                if node.op == "BatchFunction" and node.attr["shared_name"].s == QUEUE.encode():
                    yield node
