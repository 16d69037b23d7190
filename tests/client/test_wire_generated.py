"""The generated files are what the .proto files give, and the messages are what the stubs promise."""

import ast
import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import any_pb2, descriptor_pool, text_format

from graftserve.client import wire
from graftserve.client.wire.descriptors import AnyMessage
from graftserve.client.wire.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
WIRE = ROOT / "client" / "wire"
STUBS = sorted(WIRE.glob("*_pb2.pyi"))


def test_regenerating_changes_nothing(tmp_path):
    pytest.importorskip("grpc_tools")
    subprocess.run(
        [ROOT / "scripts" / "generate-wire", tmp_path],
        check=True,
        env={**os.environ, "PYTHON": sys.executable},
        timeout=120,
    )
    committed = {path.name: path.read_bytes() for path in WIRE.iterdir() if path.suffix in (".binpb", ".pyi")}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed
    assert len(committed) == 1 + len(list(WIRE.glob("*.proto")))


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_modules_hold_what_their_stubs_promise(stub):
    module = importlib.import_module(f"graftserve.client.wire.{stub.stem}")
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.AnnAssign):
            value = getattr(module, node.target.id)
            assert isinstance(value, int) or node.target.id == "DESCRIPTOR"
        elif isinstance(node, ast.ClassDef):
            check_class(node, getattr(module, node.name), module.__name__, node.name)


def check_class(node, ours, module, qualname):
    if any(keyword.arg == "metaclass" for keyword in node.keywords):  # an enum
        promised = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        assert set(ours.keys()) == promised
        return
    assert f"{ours.__module__}.{ours.__qualname__}" == f"{module}.{qualname}"
    for item in node.body:
        if isinstance(item, ast.ClassDef) and not item.name.endswith("Entry"):
            check_class(item, getattr(ours, item.name), module, f"{qualname}.{item.name}")
        elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
            fields = {argument.arg for argument in item.args.args} - {"self"}
            assert set(ours.DESCRIPTOR.fields_by_name) == fields


def test_messages_are_in_a_pool_of_their_own():
    for method in METHODS:
        for message in (method.request, method.response):
            assert message.DESCRIPTOR.file.pool is AnyMessage.DESCRIPTOR.file.pool
            with pytest.raises(KeyError):
                descriptor_pool.Default().FindMessageTypeByName(message.DESCRIPTOR.full_name)


def test_messages_can_be_copied_and_pickled():
    request = wire.PredictRequest(model_spec=wire.ModelSpec(name="m"), output_filter=["y"])
    request.inputs["x"].tensor_shape.dim.add(size=3)
    for message in (request, request.inputs["x"], request.model_spec):
        assert copy.deepcopy(message) == message
        back = pickle.loads(pickle.dumps(message))
        assert back == message
        assert type(back) is type(message)


def test_any_is_googles_in_all_but_identity():
    packed = AnyMessage()
    packed.Pack(wire.ModelSpec(name="m"))
    theirs = any_pb2.Any.FromString(packed.SerializeToString())
    assert theirs.type_url == packed.type_url == "type.googleapis.com/graftserve.wire.ModelSpec"
    spec = wire.ModelSpec()
    assert theirs.Unpack(spec)
    assert spec.name == "m"
    assert packed.Is(wire.ModelSpec.DESCRIPTOR)
    with pytest.raises(TypeError, match="same class"):
        packed.CopyFrom(theirs)
    shown = text_format.MessageToString(packed, descriptor_pool=AnyMessage.DESCRIPTOR.file.pool)
    assert shown == '[type.googleapis.com/graftserve.wire.ModelSpec] {\n  name: "m"\n}\n'


@pytest.mark.parametrize("first", ["graftserve", "tensorflow"])
def test_no_clash_with_tensorflows_messages_in_either_order(first, serving_apis):
    ours = "from graftserve.client.wire import PredictRequest"
    theirs = "from tensorflow_serving.apis.predict_pb2 import PredictRequest as Theirs"
    lines = [ours, theirs] if first == "graftserve" else [theirs, ours]
    code = "\n".join(
        [
            "import warnings; warnings.simplefilter('ignore')",
            *lines,
            "request = PredictRequest(output_filter=['y'])",
            "request.inputs['x'].float_val.append(1)",
            "theirs = Theirs.FromString(request.SerializeToString())",
            "print(theirs.inputs['x'].float_val, theirs.output_filter)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "[1.0] ['y']\n", done.stderr
