"""What one client of TensorFlow Serving, or of a server like it, does with 32 images, in its own environment.

    build/peers/ovmsclient/bin/python benchmarks/peers/client_codec.py ovmsclient encode folder

`folder` holds answer.bin, a PredictResponse as TensorFlow Serving sends it, and answer.json, what it says.
Prints JSON: the CPU seconds of one call, and whether what came of it was right; the request goes to
folder/request.bin. Run by `benchmarks/client_peers.py`; needs nothing but the client.
"""

import argparse
import json
import random
import time
from collections import deque
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

IMAGES = 32
IMAGE_BYTES_EACH = 100_000
BATCHES = 10  # other images each time, and
HELD = 8  # requests that wait: caches and allocators would flatter one made again and again
OUTPUTS = ("classes", "scores", "valid")

Encode = Callable[[list[bytes]], bytes]
Decode = Callable[[bytes], list[list[object]]]


def graftserve() -> tuple[Encode, Decode]:
    from graftserve.client.wire import ModelSpec, PredictRequest, PredictResponse
    from graftserve.client.wire.encoding import predict_request, string_parts
    from graftserve.client.wire.values import bools, floats, strings

    def encode(images: list[bytes]) -> bytes:
        return predict_request(
            PredictRequest(model_spec=ModelSpec(name="m")), {"image_bytes": string_parts(images)}
        )

    def decode(content: bytes) -> list[list[object]]:
        outputs = PredictResponse.FromString(content).outputs
        readers = (strings, floats, bools)
        return [list(read(outputs[name]).values) for read, name in zip(readers, OUTPUTS, strict=True)]

    return encode, decode


def raw_stubs() -> tuple[Encode, Decode]:
    """Generated messages, filled and read by hand."""
    from stubs import prediction_pb2, tensor_pb2

    def encode(images: list[bytes]) -> bytes:
        request = prediction_pb2.PredictRequest()
        request.model_spec.name = "m"
        tensor = request.inputs["image_bytes"]
        tensor.dtype = tensor_pb2.DT_STRING
        tensor.tensor_shape.dim.add(size=len(images))
        tensor.string_val.extend(images)
        return request.SerializeToString()

    def decode(content: bytes) -> list[list[object]]:
        outputs = prediction_pb2.PredictResponse.FromString(content).outputs
        fields = ("string_val", "float_val", "bool_val")
        return [list(getattr(outputs[name], field)) for name, field in zip(OUTPUTS, fields, strict=True)]

    return encode, decode


def tensorflow_serving_api() -> tuple[Encode, Decode]:
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    def encode(images: list[bytes]) -> bytes:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "m"
        request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, shape=[len(images)]))
        return request.SerializeToString()

    def decode(content: bytes) -> list[list[object]]:
        outputs = predict_pb2.PredictResponse.FromString(content).outputs
        return [tf.make_ndarray(outputs[name]).ravel().tolist() for name in OUTPUTS]

    return encode, decode


def min_tfs_client() -> tuple[Encode, Decode]:
    import numpy as np
    from min_tfs_client.tensors import ndarray_to_tensor_proto, tensor_proto_to_ndarray
    from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

    def encode(images: list[bytes]) -> bytes:
        request = PredictRequest()
        request.model_spec.name = "m"
        request.inputs["image_bytes"].CopyFrom(ndarray_to_tensor_proto(np.array(images)))
        return request.SerializeToString()

    def decode(content: bytes) -> list[list[object]]:
        outputs = PredictResponse.FromString(content).outputs
        return [tensor_proto_to_ndarray(outputs[name]).ravel().tolist() for name in OUTPUTS]

    return encode, decode


def ovmsclient() -> tuple[Encode, Decode]:
    from ovmsclient.tfs_compat.grpc.requests import make_predict_request
    from ovmsclient.tfs_compat.grpc.responses import GrpcPredictResponse
    from ovmsclient.tfs_compat.protos.tensorflow_serving.apis.predict_pb2 import PredictResponse

    def encode(images: list[bytes]) -> bytes:
        return make_predict_request({"image_bytes": images}, "m").raw_request.SerializeToString()

    def decode(content: bytes) -> list[list[object]]:
        outputs = GrpcPredictResponse(PredictResponse.FromString(content)).to_dict()["outputs"]
        return [outputs[name].ravel().tolist() for name in OUTPUTS]

    return encode, decode


def tritonclient() -> tuple[Encode, Decode]:
    """In its own protocol, KServe's; the answer is made over into it."""
    import numpy as np
    from tritonclient.grpc import InferInput, InferResult, service_pb2
    from tritonclient.grpc._utils import _get_inference_request

    def encode(images: list[bytes]) -> bytes:
        tensor = InferInput("image_bytes", [len(images)], "BYTES")
        tensor.set_data_from_numpy(np.array(images, object))
        request = _get_inference_request(
            inputs=[tensor],
            model_name="m",
            model_version="",
            request_id="",
            outputs=None,
            sequence_id=0,
            sequence_start=False,
            sequence_end=False,
            priority=0,
            timeout=None,
            parameters=None,
        )
        return request.SerializeToString()

    def decode(content: bytes) -> list[list[object]]:
        result = InferResult(service_pb2.ModelInferResponse.FromString(content))
        return [result.as_numpy(name).ravel().tolist() for name in OUTPUTS]

    return encode, decode


def to_triton(values: list[list[object]]) -> bytes:
    import numpy as np
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import serialize_byte_tensor

    classes, scores, valid = values
    answer = service_pb2.ModelInferResponse()
    contents = (
        serialize_byte_tensor(np.array([str(label).encode() for label in classes], object)).item(),
        np.array(scores, np.float32).tobytes(),
        np.array(valid, bool).tobytes(),
    )
    for name, kind, column, content in zip(OUTPUTS, ("BYTES", "FP32", "BOOL"), values, contents, strict=True):
        answer.outputs.add(name=name, datatype=kind, shape=[len(column)])
        answer.raw_output_contents.append(content)
    return answer.SerializeToString()


CLIENTS = {
    "graftserve.client": graftserve,
    "raw stubs": raw_stubs,
    "tensorflow-serving-api": tensorflow_serving_api,
    "min-tfs-client": min_tfs_client,
    "ovmsclient": ovmsclient,
    "tritonclient": tritonclient,
}


def jpegs() -> list[list[bytes]]:
    """Batches of what looks like JPEG files from outside."""
    source = random.Random(1)
    return [
        [b"\xff\xd8\xff" + source.randbytes(IMAGE_BYTES_EACH - 5) + b"\xff\xd9" for _ in range(IMAGES)]
        for _ in range(BATCHES)
    ]


def measure(call: Callable[[], object], seconds: float) -> float:
    """CPU seconds of one call."""
    held: deque[object] = deque(maxlen=HELD)
    for _ in range(2 * HELD):
        held.append(call())
    count, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds or not count:
        held.append(call())
        count += 1
    return (time.process_time() - cpu_started) / count


def main() -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("what", choices=("encode", "decode"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    encode, decode = CLIENTS[arguments.client]()
    if arguments.what == "encode":
        batches = jpegs()
        (arguments.folder / "request.bin").write_bytes(encode(batches[0]))
        turns = cycle(batches)
        print(json.dumps({"cpu_s": measure(lambda: encode(next(turns)), arguments.seconds)}))
        return
    expected = json.loads((arguments.folder / "answer.json").read_text())
    content = (arguments.folder / "answer.bin").read_bytes()
    if arguments.client == "tritonclient":
        content = to_triton(expected)
    answer = [
        [value.decode() if isinstance(value, bytes) else value for value in column]
        for column in decode(content)
    ]
    cpu_s = measure(lambda: decode(content), arguments.seconds)
    print(json.dumps({"cpu_s": cpu_s, "right": answer == expected}))


if __name__ == "__main__":
    main()
