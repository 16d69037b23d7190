"""The TensorFlow engine: SavedModels, loaded and run as TensorFlow Serving does.

A version is loaded through a Session, which takes the
SavedModels of TensorFlow 1 and 2 alike and fails where the real server fails, with its messages.
Source: tensorflow_serving/servables/tensorflow/saved_model_bundle_factory.cc and predict_util.cc.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.client import pywrap_tf_session
from tensorflow.python.util import deprecation

from graftserve.client.wire import SignatureDefMap

from .config import read_text_proto
from .errors import Code, ServingError
from .flags import Options
from .memory import release
from .servable import Array, ServableId, Signature, TensorSpec

__all__ = [
    "TensorFlowEngine",
    "TensorFlowServable",
    "has_gpu",
    "read_records",
    "session_config",
    "signature_def_map_of",
    "signatures_of",
    "small_signatures",
]

_MAX_TIMEOUT_S = (2**31 - 1) / 1000  # what RunOptions' milliseconds hold without trouble anywhere

# Passing a run to TensorFlow's threads and back costs some 150 us of CPU, and more of latency. A graph of so
# few operations has nothing to do side by side, and without loops no time limit has to end it.
_SMALL_GRAPH = 100  # operations
_IN_THIS_THREAD = config_pb2.RunOptions(inter_op_thread_pool=-1).SerializeToString()
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_LOOPS = frozenset({"LoopCond", "While", "StatelessWhile"})


@dataclass(frozen=True)
class TensorFlowEngine:
    """Loads SavedModels into TensorFlow.

    tags: the MetaGraph to load.
    session_config: how the Sessions are made; see `session_config`.
    """

    tags: tuple[str, ...] = ("serve",)
    session_config: config_pb2.ConfigProto = field(default_factory=config_pb2.ConfigProto)

    def load(self, servable_id: ServableId, path: Path) -> "TensorFlowServable":
        """Load the SavedModel in `path`.

        Raises ServingError: NOT_FOUND (no SavedModel, or none with these tags), DATA_LOSS (a corrupt file),
        or what TensorFlow says.
        """
        graph = tf.Graph()
        session = tf.compat.v1.Session(graph=graph, config=self.session_config)
        try:
            meta_graph = self._load_meta_graph(session, path)
            return TensorFlowServable(session, meta_graph)
        except BaseException:
            session.close()
            raise

    def _load_meta_graph(self, session: Any, path: Path) -> Any:
        try:
            with session.graph.as_default(), deprecation.silence():
                return tf.compat.v1.saved_model.load(session, list(self.tags), str(path))
        except tf.errors.OpError as exc:
            _raise(exc)
        except OSError as exc:
            # A missing or unparsable saved_model.pb; TensorFlow's message says which.
            code = Code.DATA_LOSS if (path / "saved_model.pb").exists() else Code.NOT_FOUND
            raise ServingError(code, str(exc)) from exc
        except RuntimeError as exc:
            raise ServingError(Code.NOT_FOUND, str(exc)) from exc
        except Exception as exc:
            raise ServingError(Code.INTERNAL, f"{type(exc).__name__}: {exc}") from exc


class TensorFlowServable:
    """A SavedModel in a Session. `run` may be called from many threads at once.

    meta_graph: the MetaGraphDef that the session holds.
    """

    engine = "tensorflow"

    def __init__(self, session: Any, meta_graph: Any) -> None:
        self.signatures = signatures_of(meta_graph)
        self.signature_def_map = signature_def_map_of(meta_graph)
        self._small = small_signatures(meta_graph)
        self._session = session
        self._feeds: dict[str, dict[str, Any]] = {}
        self._fetches: dict[tuple[str, Sequence[str]], list[Any]] = {}
        # What Session.run checks at every call; the graph does not change after this.
        session._extend_graph()

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        """See `servable.Servable.run`. Input arrays are read while it runs, and not changed."""
        feeds = self._feeds.get(signature.name)
        if feeds is None:
            feeds = {name: self._tensor(spec) for name, spec in signature.inputs.items()}
            self._feeds[signature.name] = feeds
        key = (signature.name, tuple(outputs))
        fetches = self._fetches.get(key)
        if fetches is None:
            fetches = [self._tensor(signature.outputs[name]) for name in outputs]
            self._fetches[key] = fetches
        feed = {feeds[name]: array for name, array in inputs.items()}
        values = self._call(feed, fetches, timeout_s, is_small=signature.name in self._small)
        return [value if isinstance(value, np.ndarray) else _to_array(value) for value in values]

    def close(self) -> None:
        """Free the graph and the variables."""
        self._feeds.clear()
        self._fetches.clear()
        self._session.close()
        # The variables go with the Session object, which graph and tensors refer to in cycles.
        del self._session
        release()

    def _call(
        self, feed: dict[Any, Array], fetches: list[Any], timeout_s: float | None, *, is_small: bool
    ) -> list[Any]:
        # Session.run and what make_callable gives for feeds both spend 0.4 ms in Python on each call to
        # look up names and structure that are known here; this is the call that they end in.
        options = None
        if is_small:
            options = pywrap_tf_session.TF_NewBufferFromString(_IN_THIS_THREAD)
        elif timeout_s is not None and timeout_s < _MAX_TIMEOUT_S:
            timeout_ms = max(1, math.ceil(timeout_s * 1000))
            options = pywrap_tf_session.TF_NewBufferFromString(
                config_pb2.RunOptions(timeout_in_ms=timeout_ms).SerializeToString()
            )
        try:
            values: list[Any] = self._session._call_tf_sessionrun(options, feed, fetches, [], None)
        except tf.errors.OpError as exc:
            _raise(exc)
        except (TypeError, ValueError) as exc:
            raise ServingError(Code.INVALID_ARGUMENT, str(exc)) from exc
        finally:
            if options is not None:
                pywrap_tf_session.TF_DeleteBuffer(options)
        return values

    def _tensor(self, spec: TensorSpec) -> Any:
        try:
            return self._session.graph.get_tensor_by_name(spec.tensor_name)._as_tf_output()
        except (KeyError, ValueError) as exc:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"The signature's tensor {spec.tensor_name!r} is not in the graph: {exc}",
            ) from exc


def small_signatures(meta_graph: Any) -> frozenset[str]:
    """The signatures of a MetaGraphDef that are made of at most 100 operations, with no loop in them and no
    operation that calls functions in a way of its own."""
    nodes = {node.name: node for node in meta_graph.graph_def.node}
    functions = {entry.signature.name: entry.node_def for entry in meta_graph.graph_def.library.function}
    return frozenset(
        name for name, signature in meta_graph.signature_def.items() if _is_small(signature, nodes, functions)
    )


def _is_small(signature: Any, nodes: Mapping[str, Any], functions: Mapping[str, Any]) -> bool:
    stop = {_node_name(info.name) for info in signature.inputs.values()}
    seen = {_node_name(info.name) for info in signature.outputs.values()} - stop
    rest = list(seen)
    bodies: list[Any] = []
    while rest:
        node = nodes.get(rest.pop())
        if node is None or len(seen) > _SMALL_GRAPH:
            return False
        bodies.append(node)
        new = {_node_name(name) for name in node.input} - seen - stop
        seen |= new
        rest += new
    count = 0
    while bodies:
        node = bodies.pop()
        count += 1
        called = [value.func.name for value in node.attr.values() if value.HasField("func")]
        if count > _SMALL_GRAPH or node.op in _LOOPS or (called and node.op not in _CALLS):
            return False
        for name in called:
            if name not in functions:
                return False
            bodies += functions[name]
    return True


def _node_name(tensor_name: str) -> str:
    """Of "name:0", "^name" or "name"."""
    return tensor_name.removeprefix("^").partition(":")[0]


def _to_array(value: Any) -> Array:
    """A scalar output, which TensorFlow gives as bytes or a NumPy scalar."""
    if isinstance(value, bytes):
        array = np.empty((), object)
        array[()] = value
        return array
    return np.asarray(value)


def session_config(options: Options) -> config_pb2.ConfigProto:
    """What the flags say about TensorFlow's Sessions.

    The first model loaded in a process sets the threads for all. Raises ServingError (INVALID_ARGUMENT) if
    --tensorflow_session_config_file cannot be read.
    """
    config = config_pb2.ConfigProto(allow_soft_placement=True)
    if options.tensorflow_session_config_file:
        file = Path(options.tensorflow_session_config_file)
        return read_text_proto(file, config, "--tensorflow_session_config_file")
    both = options.tensorflow_session_parallelism
    config.intra_op_parallelism_threads = options.tensorflow_intra_op_parallelism or both
    config.inter_op_parallelism_threads = options.tensorflow_inter_op_parallelism or both
    config.gpu_options.per_process_gpu_memory_fraction = options.per_process_gpu_memory_fraction
    return config


def has_gpu() -> bool:
    """Whether TensorFlow can use a GPU here."""
    return bool(tf.config.list_physical_devices("GPU"))


def signatures_of(meta_graph: Any) -> dict[str, Signature]:
    """The signatures of a MetaGraphDef by name, each one's inputs and outputs in the order of theirs."""
    return {
        name: Signature(
            name,
            _specs(signature.inputs),
            _specs(signature.outputs),
            {key: tf.make_ndarray(value) for key, value in signature.defaults.items()},
            signature.method_name,
        )
        for name, signature in meta_graph.signature_def.items()
    }


def _specs(infos: Mapping[str, Any]) -> dict[str, TensorSpec]:
    # A proto's map has another order in each process, which answers would show.
    return {name: TensorSpec(infos[name].name, infos[name].dtype) for name in sorted(infos)}


def signature_def_map_of(meta_graph: Any) -> SignatureDefMap:
    """The signatures of a MetaGraphDef as GetModelMetadata gives them."""
    # Through bytes: fields that our own messages do not name travel on as unknown fields.
    signatures = SignatureDefMap()
    for name, signature in meta_graph.signature_def.items():
        signatures.signature_def[name].MergeFromString(signature.SerializeToString())
    return signatures


def read_records(file: Path) -> Iterator[bytes]:
    """The records of a TFRecord file. Raises ServingError (DATA_LOSS where it is corrupt)."""
    try:
        with deprecation.silence():
            yield from tf.compat.v1.io.tf_record_iterator(str(file))
    except tf.errors.DataLossError as exc:
        raise ServingError(
            Code.DATA_LOSS, f"{exc.message}. Please verify your warmup data is in TFRecord format."
        ) from exc
    except tf.errors.OpError as exc:
        _raise(exc)


def _raise(error: tf.errors.OpError) -> NoReturn:
    raise ServingError(Code(error.error_code), error.message) from error
