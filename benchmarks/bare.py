"""What a server does with an image, without the server: decoding, the network, and how often each can be
done."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from tensorflow.core.protobuf import config_pb2

from graftserve.client.wire.contract import SERVING_DEFAULT

__all__ = ["Measured", "Pixels", "cpu_count", "decode_graph", "litert", "measure"]

Pixels = npt.NDArray[np.uint8]
_WARM_UP_CALLS = 3


def cpu_count() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Measured:
    """per_s: calls a second, of all threads together. cpu_s: of one call, of all that this process did."""

    per_s: float
    cpu_s: float


def measure(call: Callable[[int], object], threads: int, seconds: float) -> Measured:
    """The call, again and again, from so many threads at once; it is given 0, 1, 2, ...

    Each thread calls a few times before the time begins, and counts until its last call has ended.
    """
    numbers = itertools.count()
    ready = threading.Barrier(threads)

    def run(_: int) -> float:
        for _ in range(_WARM_UP_CALLS):
            call(next(numbers))
        ready.wait()
        began_s = time.perf_counter()
        for done in itertools.count(1):
            call(next(numbers))
            taken_s = time.perf_counter() - began_s
            if taken_s >= seconds:
                return done / taken_s
        raise AssertionError

    began_cpu_s = time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        per_s = sum(pool.map(run, range(threads)))
    return Measured(per_s, (time.process_time() - began_cpu_s) / next(numbers))


def decode_graph(version: Path) -> Callable[[bytes], Pixels]:
    """A version's own decode.pb, in the calling thread alone: from an encoded image to [side, side, 3].

    That it is one thread takes TF_OVERRIDE_GLOBAL_THREADPOOL=1 in the environment before the first Session.
    """
    graph = tf.Graph()
    with graph.as_default():
        decoding = (version / "assets.extra" / "decode.pb").read_bytes()
        tf.graph_util.import_graph_def(tf.compat.v1.GraphDef.FromString(decoding), name="")
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1)
    session = tf.compat.v1.Session(graph=graph, config=config)
    options = config_pb2.CallableOptions(feed=["image_bytes:0"], fetch=["pixels:0"])
    options.run_options.inter_op_thread_pool = -1
    call = session._make_callable_from_options(options)
    return lambda content: call(np.array(content, object))[0]


def litert(network: Path, threads: int = 1) -> Callable[[Pixels], object]:
    """A .tflite file in an interpreter for each thread that calls; takes [1, side, side, 3].

    threads: of each interpreter.
    """
    local = threading.local()

    def run(pixels: Pixels) -> object:
        if not hasattr(local, "run"):
            local.interpreter = Interpreter(str(network), num_threads=threads)  # its runner does not keep it
            local.run = local.interpreter.get_signature_runner(SERVING_DEFAULT)
        return local.run(pixels=pixels)

    return run
