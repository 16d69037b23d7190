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
