"""What test_matrix.py runs on other releases: a server, a client, and what came of it as JSON.

python -S matrix_program.py, with nothing but the base install on PYTHONPATH.
"""

import copy
import json
import pickle
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import google.protobuf
import grpc
import numpy as np
import PIL
from google.protobuf import json_format, text_format
from google.protobuf.internal import api_implementation
from PIL import Image

from graftserve.client import Client, ClientError
from graftserve.client.wire import (
    DataType,
    GetModelMetadataResponse,
    GetModelStatusResponse,
    ModelServerConfig,
    ModelVersionStatus,
    PredictRequest,
    PredictResponse,
    SignatureDefMap,
    TensorInfo,
    TensorProto,
)
from graftserve.client.wire.encoding import predict_request
from graftserve.client.wire.methods import (
    GET_MODEL_METADATA,
    GET_MODEL_STATUS,
    PREDICT,
    SIGNATURE_DEF_FIELD,
    pack_signature_def_map,
)
from graftserve.client.wire.tensors import tensor_parts, to_array, to_proto, write_typed
from graftserve.client.wire.values import bools, floats, strings

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16"]


def predict(request, context):
    if request.model_spec.signature_name == "no_such":
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, 'Serving signature key "no_such" not found.')
    response = PredictResponse(model_spec=request.model_spec)
    response.model_spec.version.value = 3
    if "x" in request.inputs:
        # In the typed field, as TensorFlow Serving answers.
        write_typed(to_array(request.inputs["x"]) / np.float32(2) + np.float32(2), response.outputs["y"])
        return response
    images = strings(request.inputs["image_bytes"]).values
    classes = np.array([[f"{len(image)} bytes", "other"] for image in images], object)
    response.outputs["classes"].CopyFrom(to_proto(classes))
    write_typed(np.float32([[0.75, 0.25]] * len(images)), response.outputs["scores"])
    write_typed(np.array([image != b"bad" for image in images]), response.outputs["valid"])
    return response


def metadata(request, context):
    signatures = SignatureDefMap()
    info = TensorInfo(dtype=DataType.DT_FLOAT)
    info.tensor_shape.dim.add(size=-1)
    signatures.signature_def["half_plus_two"].inputs["x"].CopyFrom(info)
    response = GetModelMetadataResponse(model_spec=request.model_spec)
    response.model_spec.version.value = 3
    response.metadata[SIGNATURE_DEF_FIELD].CopyFrom(pack_signature_def_map(signatures))
    return response


def status(request, context):
    if request.model_spec.name != "flowers":
        context.abort(
            grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {request.model_spec.name}"
        )
    response = GetModelStatusResponse()
    response.model_version_status.add(version=3, state=ModelVersionStatus.AVAILABLE)
    return response


def error_of(call):
    try:
        call()
    except ClientError as exc:
        return type(exc).__name__
    return None


def codec():
    """The dtypes that come back unchanged in every form."""
    kept = []
    for code in DTYPES:
        array = np.array([[0, 1, 1], [1, 0, 0]]).astype(code)
        typed = TensorProto()
        write_typed(array, typed)
        serialized = predict_request(PredictRequest(), {"x": tensor_parts(array)})
        forms = (to_proto(array), typed, PredictRequest.FromString(serialized).inputs["x"])
        if all(to_array(form).tobytes() == array.tobytes() for form in forms):
            kept.append(code)
    return kept


def main():
    answers = {PREDICT: predict, GET_MODEL_METADATA: metadata, GET_MODEL_STATUS: status}
    server = grpc.server(ThreadPoolExecutor(4))
    for method, answer in answers.items():
        handler = grpc.unary_unary_rpc_method_handler(
            answer, method.request.FromString, method.response.SerializeToString
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(method.service, {method.name: handler})]
        )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found = {
        "versions": {
            "protobuf": google.protobuf.__version__,
            "grpcio": grpc.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "files": [module.__file__ for module in (google.protobuf, grpc, np, PIL)],
        "implementation": api_implementation.Type(),
        "codec": codec(),
        "bools": bools(to_proto(np.array([True, False]))),
        "floats": floats(to_proto(np.float16([0.5]))),
    }
    request = PredictRequest(output_filter=["y"])
    request.inputs["x"].float_val.append(1)
    found["copies"] = [copy.deepcopy(request) == request, pickle.loads(pickle.dumps(request)) == request]
    text = 'model_config_list { config { name: "m" model_version_policy { latest { num_versions: 2 } } } }'
    found["config"] = json_format.MessageToDict(text_format.Parse(text, ModelServerConfig()))
    with Client(f"127.0.0.1:{port}", "flowers") as client:
        client.wait_until_ready(timeout_s=30)
        found["label"] = client.classify(b"\xff\xd8abc").label
        found["score"] = client.classify(Image.new("L", (8, 8))).score
        found["many"] = [
            item.label for item in client.classify_many([np.zeros((1, 1, 3), np.uint8), b"abc"])
        ][1:]
        found["y"] = client.predict({"x": np.float32([1, 2])}, signature="half_plus_two")["y"].tolist()
        spec = client.metadata().signatures["half_plus_two"].inputs["x"]
        found["metadata"] = [spec.dtype, spec.shape]
        found["bad image"] = error_of(lambda: client.classify(b"bad"))
        found["no signature"] = error_of(lambda: client.predict({"x": [1.0]}, signature="no_such"))
    with Client(f"127.0.0.1:{port}", "other") as client:
        found["no model"] = error_of(client.status)
    server.stop(None).wait()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
