"""The network that is exported: pixels to features and probabilities, its weights frozen and folded.

A server optimises a graph anew for each set of outputs that it is asked for, and then holds the graph's
constants several times over. So the arithmetic on weights is done here, once, and what comes out of it goes
into variables, which all those graphs share. With EfficientNet-Lite0 (13.5 MB) a set of outputs took 1 s and
35 to 85 MB with the weights as constants; as variables of the folded graph it takes 0.3 s and 1 MB, and runs
at 0.95 of the speed in batches of 8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, rewriter_config_pb2
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.util import deprecation

from graftserve.training.network import freeze_call

__all__ = [
    "FEATURES_OUTPUT",
    "PROBABILITIES_OUTPUT",
    "Network",
    "SharedNetwork",
    "at_temperature",
    "freeze_network",
]

FEATURES_OUTPUT = "features"
PROBABILITIES_OUTPUT = "probabilities"

_SHARED_FROM = 4096  # values: smaller constants (biases, as a rule) let TensorFlow fuse operations
_BATCH = 8


@dataclass(frozen=True)
class Network:
    """function: a frozen ConcreteFunction from pixels uint8 [N, side_px, side_px, 3] to float32 outputs.

    widths: for each of its outputs, in their order, the name and the length of a row; "probabilities" is
        always among them, "features" where the model has them.
    """

    function: Any
    widths: Mapping[str, int]

    @property
    def side_px(self) -> int:
        """Side of the square that goes in."""
        return int(self.function.inputs[0].shape[1])

    @property
    def classes(self) -> int:
        """Columns of the probabilities."""
        return self.widths[PROBABILITIES_OUTPUT]

    def run(self, pixels: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """The outputs by name, float32 [N, width], for pixels uint8 [N, side_px, side_px, 3]."""
        batches = [
            [
                np.asarray(output)
                for output in tf.nest.flatten(self.function(tf.constant(pixels[i : i + _BATCH])))
            ]
            for i in range(0, len(pixels), _BATCH)
        ]
        columns = zip(*batches, strict=True)
        return {name: np.concatenate(column) for name, column in zip(self.widths, columns, strict=True)}


def freeze_network(
    call: Callable[[tf.Tensor], Mapping[str, tf.Tensor]], side_px: int, temperature: float = 1.0
) -> Network:
    """Freeze `call`, from pixels uint8 [N, side_px, side_px, 3] to "probabilities" and maybe "features".

    temperature: what the logits are divided by; see `training.calibration`.
    """
    spec = tf.TensorSpec((None, side_px, side_px, 3), tf.uint8, name="pixels")
    names: list[str] = []

    def by_name(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = dict(call(pixels))
        if temperature != 1:
            outputs[PROBABILITIES_OUTPUT] = at_temperature(outputs[PROBABILITIES_OUTPUT], temperature)
        names[:] = sorted(outputs)  # the order in which TensorFlow flattens a dictionary
        return {name: tf.cast(output, tf.float32) for name, output in outputs.items()}

    function = freeze_call(by_name, spec)
    outputs = zip(names, function.outputs, strict=True)
    return Network(function, {name: int(output.shape[-1]) for name, output in outputs})


def at_temperature(probabilities: tf.Tensor, temperature: float) -> tf.Tensor:
    """`training.calibration.apply_temperature` in a graph: float32 [N, C] to the same."""
    logits = tf.math.log(tf.maximum(probabilities, np.finfo(np.float32).tiny))
    return tf.nn.softmax(logits / temperature)


class SharedNetwork(tf.Module):  # type: ignore[misc]
    """A network in a graph to be saved: constants folded, the large ones in variables.

    function: a ConcreteFunction of pixels uint8 [N, side_px, side_px, 3] that gives the list of the network's
        outputs, in their order.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(name="network")
        graph = network.function.graph
        outputs = [output.op.name for output in graph.outputs]
        folded = _fold(graph, outputs)
        self._input = f"{graph.inputs[0].op.name}:0"
        self._outputs = [f"{name}:0" for name in outputs]
        weights = {
            node.name: tf.make_ndarray(node.attr["value"].tensor) for node in folded.node if _is_large(node)
        }
        self.weights = [tf.Variable(weight, trainable=False) for weight in weights.values()]
        self._weight_names = tuple(f"{name}:0" for name in weights)
        self._graph_def = tf.compat.v1.GraphDef()
        self._graph_def.node.extend(node for node in folded.node if node.name not in weights)
        self._graph_def.versions.CopyFrom(folded.versions)
        spec = tf.TensorSpec(graph.inputs[0].shape, graph.inputs[0].dtype, name="pixels")
        self.function = tf.function(self._call, autograph=False).get_concrete_function(spec)

    def _call(self, pixels: tf.Tensor) -> list[tf.Tensor]:
        reads = dict(zip(self._weight_names, (weight.read_value() for weight in self.weights), strict=True))
        sources = {self._input: pixels, **reads}
        outputs: list[tf.Tensor] = tf.graph_util.import_graph_def(
            self._graph_def, sources, self._outputs, name="network"
        )
        return outputs


def _is_large(node: Any) -> bool:
    if node.op != "Const" or tf.as_dtype(node.attr["dtype"].type) != tf.float32:
        return False
    shape = tf.TensorShape(node.attr["value"].tensor.tensor_shape)
    return int(shape.num_elements()) >= _SHARED_FROM


def _fold(graph: tf.Graph, outputs: Sequence[str]) -> Any:
    """The graph's definition with constant expressions computed and nothing left that `outputs` do not need.

    Control inputs go: those of a frozen inference graph only say when a constant may be read.
    """
    definition = graph.as_graph_def()
    meta_graph = tf.compat.v1.train.export_meta_graph(graph_def=definition, graph=graph)
    kept = meta_graph_pb2.CollectionDef()
    kept.node_list.value.extend(outputs)
    meta_graph.collection_def["train_op"].CopyFrom(kept)  # where the optimiser looks for what to keep
    config = config_pb2.ConfigProto()
    rewriting = config.graph_options.rewrite_options
    rewriting.optimizers.append("constfold")
    rewriting.min_graph_nodes = -1
    rewriting.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.TWO
    folded = tf_optimizer.OptimizeGraph(config, meta_graph)
    for node in folded.node:
        node.input[:] = [source for source in node.input if not source.startswith("^")]
    with deprecation.silence():
        return tf.compat.v1.graph_util.extract_sub_graph(folded, list(outputs))
