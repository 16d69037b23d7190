"""What importing the client brings along, seen in processes of their own."""

import subprocess
import sys

HEAVY = [
    *("numpy", "tensorflow", "tensorflow_serving", "keras", "scipy", "PIL", "ml_dtypes", "pandas", "click"),
    *("prometheus_client", "opentelemetry"),
]


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
    (tmp_path / "rose.jpg").write_bytes(b"abc")
    code = f"""
import sys
sys.modules["numpy"] = sys.modules["PIL"] = None  # to import them is an error
import asyncio, io, pathlib
from graftserve.client import AsyncClient, Client
path = {str(tmp_path / "rose.jpg")!r}
images = [b"abc", bytearray(b"abc"), path, pathlib.Path(path), io.BytesIO(b"abc")]
with Client({server.target!r}, "flowers") as client:
    client.wait_until_ready(20)
    print(client.classify(b"abc").label, [result.label for result in client.classify_many(images)])

async def main():
    async with AsyncClient({server.target!r}, "flowers") as client:
        print((await client.classify(b"abc")).label)

asyncio.run(main())
"""
    assert run(code) == f"c3 {['c3'] * 5}\nc3\n"


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
