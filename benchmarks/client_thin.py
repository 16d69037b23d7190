"""What the client costs beside its dependencies, and its codec against TensorFlow's, in the same run.

    python benchmarks/client_thin.py --output benchmarks/results

- import: `graftserve.client` after what it stands on (grpc, NumPy, and protobuf as any generated message
  loads it), with cached bytecode: time and memory on top; and against the import of tensorflow-serving-api
  with TensorFlow's make_tensor_proto, which it replaces, over the same base;
- disk: the client's own files;
- encode: 32 images of 100 KB into the bytes of a PredictRequest, in CPU time: with TensorFlow's messages and
  make_tensor_proto, with our messages, and as bytes with one copy. Other images each time and eight requests
  held, as when they wait to be sent: caches and allocators would flatter a request made again and again;
- parse: the bytes of an answer of 32 rows into lists of labels, scores and validity, in typed fields as
  TensorFlow Serving answers; and features [32, 1280] into an array.

Every measurement has a process of its own: in one that has TensorFlow our messages, too, took ten times as
long, and users of the client have none. The rounds take the ways in turn; what counts are the ratios within a
round.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from result import ratios, write_result

import graftserve.client
from graftserve.client.wire import ModelSpec, PredictRequest, PredictResponse
from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, IMAGE_BYTES, SERVING_DEFAULT
from graftserve.client.wire.encoding import predict_request, string_parts
from graftserve.client.wire.tensors import to_array, to_proto, write_typed
from graftserve.client.wire.values import bools, floats, strings, write_strings

IMAGES = 32
IMAGE_BYTES_EACH = 100_000
BATCHES = 10
HELD = 8
CLASSES = 5
FEATURES = 1280
WAYS = {
    "encode": ("theirs", "message", "ours"),
    "parse": ("theirs", "arrays", "ours"),
    "features": ("theirs", "ours"),
}

BASE = "import grpc, numpy\nfrom google.protobuf import any_pb2, wrappers_pb2"
OURS = "import graftserve.client"
THEIRS = """
import warnings; warnings.simplefilter("ignore")
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc
from tensorflow import make_ndarray, make_tensor_proto
"""
IMPORT = """
import json, re, time
def held_mib():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\\s+(\\d+) kB", file.read())[1]) / 1024
{base}
held, started = held_mib(), time.perf_counter()
{code}
print(json.dumps([time.perf_counter() - started, held_mib() - held]))
"""


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each way in each round")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # what this runs in other processes
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(_measure(*arguments.measure, arguments.seconds)))
        return
    if arguments.output is None:
        parser.error("expected --output")
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {
        "import": _imports(arguments.rounds),
        "disk_kib": round(_disk_bytes() / 1024),
    }
    for what, ways in WAYS.items():
        result[what] = _compare(what, ways, arguments)
    print(json.dumps(result, indent=2))
    write_result(arguments.output, "client_thin", result, rounds=arguments.rounds)


def _imports(rounds: int) -> dict[str, Any]:
    taken: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for code in (OURS, THEIRS):
        _import(code)  # reads the files, writes the bytecode
    for _ in range(rounds):
        for way, code in (("ours", OURS), ("theirs", THEIRS)):
            taken[way].append(_import(code))
    return {
        "ms": {way: _median([value[0] for value in values], 1000) for way, values in taken.items()},
        "mib": {way: _median([value[1] for value in values], 1) for way, values in taken.items()},
        "times_faster": ratios(*([values[0] for values in taken[way]] for way in ("theirs", "ours"))),
        "times_smaller": ratios(*([values[1] for values in taken[way]] for way in ("theirs", "ours"))),
    }


def _import(code: str) -> list[float]:
    values: list[float] = _run("-c", IMPORT.format(base=BASE, code=code))
    return values


def _run(*command: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return json.loads(done.stdout)


def _disk_bytes() -> int:
    folder = Path(graftserve.client.__file__).parent
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def _compare(what: str, ways: tuple[str, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    results = set()
    for _ in range(arguments.rounds):
        for way in ways:
            cpu_s, digest = _run(__file__, "--measure", what, way, "--seconds", str(arguments.seconds))
            taken[way].append(cpu_s)
            results.add(digest)
    if len(results) != 1:
        raise AssertionError(f"{what}: the ways come to different results")
    row: dict[str, Any] = {"cpu_ms": {way: _median(values, 1000) for way, values in taken.items()}}
    for way in ways:
        if way != "theirs":
            row[f"times_faster_{way}"] = ratios(taken["theirs"], taken[way])
    return row


def _measure(what: str, way: str, seconds: float) -> tuple[float, str]:
    """The CPU time of one call, and a digest of what it came to."""
    call, digest = {"encode": _encoder, "parse": _parser, "features": _feature_parser}[what](way)
    held: deque[object] = deque(maxlen=HELD)
    for _ in range(2 * HELD):
        held.append(call())
    count, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        held.append(call())
        count += 1
    return (time.process_time() - cpu_started) / count, digest


def _theirs() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2
    return tf, predict_pb2


def _encoder(way: str) -> tuple[Callable[[], object], str]:
    source = random.Random(1)
    batches = [[source.randbytes(IMAGE_BYTES_EACH) for _ in range(IMAGES)] for _ in range(BATCHES)]
    if way == "theirs":
        tf, predict_pb2 = _theirs()

        def encode(images: list[bytes]) -> bytes:
            request = predict_pb2.PredictRequest(output_filter=CLASSIFY_OUTPUTS)
            request.model_spec.name, request.model_spec.signature_name = "m", SERVING_DEFAULT
            request.inputs[IMAGE_BYTES].CopyFrom(tf.make_tensor_proto(images, shape=[len(images)]))
            serialized: bytes = request.SerializeToString()
            return serialized

    elif way == "message":

        def encode(images: list[bytes]) -> bytes:
            request = _request()
            write_strings(images, request.inputs[IMAGE_BYTES])
            return request.SerializeToString()

    else:

        def encode(images: list[bytes]) -> bytes:
            return predict_request(_request(), {IMAGE_BYTES: string_parts(images)})

    read = PredictRequest.FromString(encode(batches[0]))
    turns = cycle(batches)
    return lambda: encode(next(turns)), _digest(read.SerializeToString(deterministic=True))


def _request() -> PredictRequest:
    return PredictRequest(
        model_spec=ModelSpec(name="m", signature_name=SERVING_DEFAULT), output_filter=CLASSIFY_OUTPUTS
    )


def _parser(way: str) -> tuple[Callable[[], object], str]:
    source = np.random.default_rng(1)
    labels = [[f"label {source.integers(1000)}" for _ in range(CLASSES)] for _ in range(IMAGES)]
    answer = PredictResponse()
    answer.outputs["classes"].CopyFrom(to_proto(np.array(labels, object)))
    write_typed(source.random((IMAGES, CLASSES), np.float32), answer.outputs["scores"])
    write_typed(np.ones(IMAGES, np.bool_), answer.outputs["valid"])
    content = answer.SerializeToString()
    if way == "theirs":
        tf, predict_pb2 = _theirs()

        def parse() -> object:
            outputs = predict_pb2.PredictResponse.FromString(content).outputs
            return [tf.make_ndarray(outputs[name]).ravel().tolist() for name in CLASSIFY_OUTPUTS]

    elif way == "arrays":

        def parse() -> object:
            outputs = PredictResponse.FromString(content).outputs
            return [to_array(outputs[name]).ravel().tolist() for name in CLASSIFY_OUTPUTS]

    else:

        def parse() -> object:
            outputs = PredictResponse.FromString(content).outputs
            return [
                strings(outputs["classes"]).values,
                floats(outputs["scores"]).values,
                bools(outputs["valid"]).values,
            ]

    return parse, _digest(repr(parse()).encode())


def _feature_parser(way: str) -> tuple[Callable[[], object], str]:
    answer = PredictResponse()
    features = np.random.default_rng(2).random((IMAGES, FEATURES), np.float32)
    write_typed(features, answer.outputs["features"])
    content = answer.SerializeToString()
    if way == "theirs":
        tf, predict_pb2 = _theirs()

        def parse() -> Any:
            return tf.make_ndarray(predict_pb2.PredictResponse.FromString(content).outputs["features"])

    else:

        def parse() -> Any:
            return to_array(PredictResponse.FromString(content).outputs["features"])

    return parse, _digest(parse().tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _median(values: list[float], times: float) -> float:
    return round(statistics.median(values) * times, 3)


if __name__ == "__main__":
    main()
