"""What the client costs beside its dependencies, and its codec against TensorFlow's, side by side in one run.

    python benchmarks/client_thin.py --output benchmarks/results

- import: `graftserve.client` after what it stands on (grpc, NumPy, and protobuf as any generated message
  loads it), in fresh processes with cached bytecode: time and memory on top; and against the import of
  tensorflow-serving-api with TensorFlow's make_tensor_proto, which it replaces, over the same base;
- disk: the client's own files;
- encode: 32 images of 100 KB into the bytes of a PredictRequest, in CPU time;
- parse: the bytes of an answer of 32 rows into lists of labels, scores and validity, in typed fields as
  TensorFlow Serving answers; and features [32, 1280] into an array.

The rounds take the ways in turn; what counts are the ratios within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from result import spread, write_result
from tensorflow_serving.apis import predict_pb2

import graftserve.client
from graftserve.client.wire import ModelSpec, PredictRequest, PredictResponse
from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, IMAGE_BYTES, SERVING_DEFAULT
from graftserve.client.wire.encoding import predict_request, string_parts
from graftserve.client.wire.tensors import to_array, to_proto, write_typed
from graftserve.client.wire.values import bools, floats, strings, write_strings

IMAGES = 32
IMAGE_BYTES_EACH = 100_000
CLASSES = 5
FEATURES = 1280

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
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each way in each round")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {
        "import": _imports(arguments.rounds),
        "disk_kib": round(_disk_bytes() / 1024),
        "encode": _compare(_encoders(), arguments),
        "parse": _compare(_parsers(), arguments),
        "features": _compare(_feature_parsers(), arguments),
    }
    print(json.dumps(result, indent=2))
    write_result(arguments.output, "client_thin", result)


def _imports(rounds: int) -> dict[str, Any]:
    taken: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for code in (OURS, THEIRS):
        _import(code)  # reads the files, writes the bytecode
    for _ in range(rounds):
        for way, code in (("ours", OURS), ("theirs", THEIRS)):
            taken[way].append(_import(code))
    pairs = list(zip(taken["ours"], taken["theirs"], strict=True))
    return {
        "ms": {way: _median([value[0] for value in values], 1000) for way, values in taken.items()},
        "mib": {way: _median([value[1] for value in values], 1) for way, values in taken.items()},
        "times_faster": spread([theirs[0] / ours[0] for ours, theirs in pairs]),
        "times_smaller": spread([theirs[1] / ours[1] for ours, theirs in pairs]),
    }


def _import(code: str) -> list[float]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(base=BASE, code=code)],
        env=environment | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    values: list[float] = json.loads(done.stdout)
    return values


def _disk_bytes() -> int:
    folder = Path(graftserve.client.__file__).parent
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def _encoders() -> dict[str, Callable[[], bytes]]:
    images = [os.urandom(IMAGE_BYTES_EACH - 1) + b"\xd9" for _ in range(IMAGES)]

    def theirs() -> bytes:
        request = predict_pb2.PredictRequest(output_filter=CLASSIFY_OUTPUTS)
        request.model_spec.name, request.model_spec.signature_name = "m", SERVING_DEFAULT
        request.inputs[IMAGE_BYTES].CopyFrom(tf.make_tensor_proto(images, shape=[len(images)]))
        serialized: bytes = request.SerializeToString()
        return serialized

    def message() -> bytes:
        request = _request()
        write_strings(images, request.inputs[IMAGE_BYTES])
        return request.SerializeToString()

    def ours() -> bytes:
        return predict_request(_request(), {IMAGE_BYTES: string_parts(images)})

    read = [PredictRequest.FromString(way()) for way in (theirs, message, ours)]
    if not read[0] == read[1] == read[2]:
        raise AssertionError("the ways write different requests")
    return {"theirs": theirs, "message": message, "ours": ours}


def _request() -> PredictRequest:
    return PredictRequest(
        model_spec=ModelSpec(name="m", signature_name=SERVING_DEFAULT), output_filter=CLASSIFY_OUTPUTS
    )


def _parsers() -> dict[str, Callable[[], object]]:
    random = np.random.default_rng(1)
    labels = [[f"label {random.integers(1000)}" for _ in range(CLASSES)] for _ in range(IMAGES)]
    answer = PredictResponse()
    answer.outputs["classes"].CopyFrom(to_proto(np.array(labels, object)))
    write_typed(random.random((IMAGES, CLASSES), np.float32), answer.outputs["scores"])
    write_typed(np.ones(IMAGES, np.bool_), answer.outputs["valid"])
    content = answer.SerializeToString()

    def theirs() -> object:
        outputs = predict_pb2.PredictResponse.FromString(content).outputs
        return [tf.make_ndarray(outputs[name]).ravel().tolist() for name in CLASSIFY_OUTPUTS]

    def arrays() -> object:
        outputs = PredictResponse.FromString(content).outputs
        return [to_array(outputs[name]).ravel().tolist() for name in CLASSIFY_OUTPUTS]

    def ours() -> object:
        outputs = PredictResponse.FromString(content).outputs
        return [
            strings(outputs["classes"]).values,
            floats(outputs["scores"]).values,
            bools(outputs["valid"]).values,
        ]

    if not theirs() == arrays() == ours():
        raise AssertionError("the ways read different answers")
    return {"theirs": theirs, "arrays": arrays, "ours": ours}


def _feature_parsers() -> dict[str, Callable[[], object]]:
    features = np.random.default_rng(2).random((IMAGES, FEATURES), np.float32)
    answer = PredictResponse()
    write_typed(features, answer.outputs["features"])
    content = answer.SerializeToString()

    def theirs() -> object:
        return tf.make_ndarray(predict_pb2.PredictResponse.FromString(content).outputs["features"])

    def ours() -> object:
        return to_array(PredictResponse.FromString(content).outputs["features"])

    np.testing.assert_array_equal(theirs(), ours())
    return {"theirs": theirs, "ours": ours}


def _compare(ways: dict[str, Callable[[], Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, call in ways.items():
            taken[way].append(_cpu_seconds(call, arguments.seconds))
    row: dict[str, Any] = {"cpu_ms": {way: _median(values, 1000) for way, values in taken.items()}}
    for way in ways:
        if way != "theirs":
            ratios = [theirs / ours for theirs, ours in zip(taken["theirs"], taken[way], strict=True)]
            row[f"times_faster_{way}"] = spread(ratios)
    return row


def _cpu_seconds(call: Callable[[], object], at_least_s: float) -> float:
    count, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < at_least_s:
        call()
        count += 1
    return (time.process_time() - cpu_started) / count


def _median(values: list[float], times: float) -> float:
    return round(statistics.median(values) * times, 3)


if __name__ == "__main__":
    main()
