"""What importing the client brings along, seen in processes of their own."""

import subprocess
import sys

HEAVY = ["tensorflow", "tensorflow_serving", "keras", "scipy", "PIL", "ml_dtypes", "pandas", "click"]


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_client_imports_nothing_heavy():
    assert run(f"import sys, graftserve.client\nprint([m for m in {HEAVY} if m in sys.modules])") == "[]\n"


def test_classifying_bytes_imports_nothing_heavy(server):
    code = f"""
import sys
from graftserve.client import Client
with Client({server.target!r}, "flowers") as client:
    print(client.classify(b"abc").label, [m for m in {HEAVY} if m in sys.modules])
"""
    assert run(code) == "c3 []\n"


def test_jpeg_bytes_need_neither_numpy_nor_pillow(tmp_path, server):
    # Both blocked. The package itself is passed over, since not all of it is in question here.
    (tmp_path / "rose.jpg").write_bytes(b"abc")
    code = f"""
import sys, types
sys.modules["numpy"] = sys.modules["PIL"] = None
from importlib.util import find_spec
package = sys.modules["graftserve.client"] = types.ModuleType("graftserve.client")
package.__path__ = [f"{{folder}}/client" for folder in find_spec("graftserve").submodule_search_locations]

import io, pathlib, grpc
from graftserve.client.images import encode_image
from graftserve.client.results import Prediction, PredictResult
from graftserve.client.wire import ModelSpec, PredictRequest
from graftserve.client.wire.encoding import predict_request, string_parts
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.values import bools, floats, strings

path = {str(tmp_path / "rose.jpg")!r}
forms = [b"abc", bytearray(b"abc"), path, pathlib.Path(path), io.BytesIO(b"abc")]
images = [encode_image(form) for form in forms]
spec = ModelSpec(name="flowers", signature_name="serving_default")
serialized = predict_request(PredictRequest(model_spec=spec), {{"image_bytes": string_parts(images)}})
with grpc.insecure_channel({server.target!r}) as channel:
    call = channel.unary_unary(PREDICT.path, response_deserializer=PREDICT.response.FromString)
    outputs = call(serialized, timeout=30).outputs
print(strings(outputs["classes"]).values[::2], floats(outputs["scores"]).shape)
print(bools(outputs["valid"]).values)
"""
    assert run(code) == f"{[b'c3'] * 5} (5, 2)\n{[True] * 5}\n"


def test_the_client_works_after_tensorflow(server, serving_apis):
    # The other order is this very process: conftest imports the client, then serving_apis TensorFlow.
    code = f"""
import warnings; warnings.simplefilter("ignore")
import tensorflow as tf; from tensorflow_serving.apis import predict_pb2
from graftserve.client import Client
with Client({server.target!r}, "flowers") as client:
    x = tf.constant([1.0, 2.0]).numpy()
    print(client.predict({{"x": x}}, signature="half_plus_two")["y"], client.classify(b"abc").label)
"""
    assert run(code) == "[2.5 3. ] c3\n"
