"""The reader of legacy torch.save files, against files written here byte by byte."""

import io
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftserve.training import WeightsError
from graftserve.training.backbones import load_backbone, network_of
from graftserve.training.torch_checkpoint import read_state_dict

MAGIC = 0x1950A86A20F9469CFC6C


class Global:
    """Pickles as a reference to module.name, which need not exist."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Tensor:
    def __init__(self, key: str, dtype: str, count: int, offset: int, shape: Any, strides: Any) -> None:
        self.storage = ("storage", Global("torch", dtype), key, "cpu", count, None)
        self.arguments = (offset, shape, strides, False, OrderedDict())


class Pickler(pickle._Pickler):  # the Python one: its `save` can be overridden
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Tensor):
            self.save(Global("torch._utils", "_rebuild_tensor_v2"))
            self.write(pickle.MARK)
            self.save(obj.storage)
            self.write(pickle.BINPERSID)
            for argument in obj.arguments:
                self.save(argument)
            self.write(pickle.TUPLE + pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def checkpoint(state: Any, storages: dict[str, np.ndarray]) -> bytes:
    parts = [dump(MAGIC), dump(1001), dump({"little_endian": True}), dump(state), dump(list(storages))]
    for values in storages.values():
        parts += [struct.pack("<q", values.size), values.tobytes()]
    return b"".join(parts)


@pytest.fixture
def write(tmp_path: Path):
    def write(content: bytes) -> Path:
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return path

    return write


def test_reads_views_of_a_shared_storage(write) -> None:
    values = np.arange(12, dtype="<f4")
    state = OrderedDict(
        plain=Tensor("a", "FloatStorage", 12, 0, (3, 4), (4, 1)),
        transposed=Tensor("a", "FloatStorage", 12, 0, (4, 3), (1, 4)),
        offset=Tensor("a", "FloatStorage", 12, 5, (2, 2), (4, 1)),
        scalar=Tensor("b", "LongStorage", 1, 0, (), ()),
        empty=Tensor("a", "FloatStorage", 12, 0, (0, 4), (4, 1)),
    )
    read = read_state_dict(write(checkpoint(state, {"a": values, "b": np.array([7], "<i8")})))
    np.testing.assert_array_equal(read["plain"], values.reshape(3, 4))
    np.testing.assert_array_equal(read["transposed"], values.reshape(3, 4).T)
    np.testing.assert_array_equal(read["offset"], [[5, 6], [9, 10]])
    assert read["scalar"] == 7
    assert read["scalar"].shape == ()
    assert read["empty"].shape == (0, 4)
    assert all(array.flags.c_contiguous for array in read.values())


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch._utils", "_rebuild_parameter")],
)
def test_refuses_every_other_name(write, module: str, name: str) -> None:
    with pytest.raises(WeightsError, match=rf"asks for {module}\.{name}"):
        read_state_dict(write(checkpoint(OrderedDict(x=Global(module, name)), {})))


def test_a_refused_pickle_runs_nothing(write, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> Any:
            return open, (str(trap), "w")

    hostile = dump(MAGIC) + dump(1001) + dump({}) + pickle.dumps(Trap(), protocol=2)
    with pytest.raises(WeightsError, match="asks for"):
        read_state_dict(write(hostile))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor("a", "FloatStorage", 4, 0, (5,), (1,)), "beyond its storage"),
        (Tensor("a", "FloatStorage", 4, 3, (2,), (1,)), "beyond its storage"),
        (Tensor("a", "FloatStorage", 4, 0, (2**40,), (0,)), "beyond its storage"),
        (Tensor("a", "FloatStorage", 4, -1, (2,), (1,)), "negative"),
        (Tensor("a", "FloatStorage", 9, 0, (2,), (1,)), "truncated or damaged"),
        (Tensor("other", "FloatStorage", 4, 0, (2,), (1,)), "storage a belongs to no tensor"),
    ],
)
def test_refuses_tensors_that_lie(write, tensor: Tensor, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_state_dict(write(checkpoint(OrderedDict(x=tensor), {"a": np.zeros(4, "<f4")})))


@pytest.mark.parametrize("size", ["efficientnet-lite1", "efficientnet-lite2"])
def test_a_state_dict_of_the_port_loads_into_the_larger_sizes(write, size: str) -> None:
    """In PyTorch's layout [out, in, h, w], with the port's names, its counters and its last layer."""
    network = network_of(load_backbone(size, "none"))
    names = {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }
    state: OrderedDict[str, Tensor] = OrderedDict()
    storages: dict[str, np.ndarray] = {}

    def put(name: str, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, "<f4")
        strides = [stride // values.itemsize for stride in values.strides]
        state[name] = Tensor(name, "FloatStorage", values.size, 0, values.shape, tuple(strides))
        storages[name] = values

    expected: dict[str, np.ndarray] = {}
    values = np.random.default_rng(0)
    for layer in network.layers:
        for weight in layer.weights:
            array = values.uniform(size=weight.shape).astype(np.float32)
            expected[weight.path] = array
            if weight.name == "kernel":
                order = (2, 3, 0, 1) if "depthwise" in layer.name else (3, 2, 0, 1)
                put(f"{port_name(layer.name)}.weight", array.transpose(order))
            else:
                put(f"{port_name(layer.name)}.{names[weight.name]}", array)
        if layer.name.endswith("_bn"):
            put(f"{port_name(layer.name)}.num_batches_tracked", np.ones(1))
    put("_fc.weight", np.zeros((10, 1280)))
    loaded = network_of(load_backbone(size, str(write(checkpoint(state, storages)))))
    for weight in loaded.weights:
        np.testing.assert_array_equal(weight.numpy(), expected[weight.path], err_msg=weight.path)


def port_name(layer: str) -> str:
    """What the port for PyTorch calls a layer of ours."""
    outside = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "head_conv": "_conv_head", "head_bn": "_bn1"}
    if layer in outside:
        return outside[layer]
    block, _, name = layer.removeprefix("block").partition("_")
    norms = {"expand_bn": "_bn0", "depthwise_bn": "_bn1", "project_bn": "_bn2"}
    return f"_blocks.{block}.{norms.get(name, f'_{name}')}"


def test_every_truncation_is_an_error(write) -> None:
    content = checkpoint(
        OrderedDict(x=Tensor("a", "FloatStorage", 4, 0, (4,), (1,))), {"a": np.zeros(4, "<f4")}
    )
    for length in range(0, len(content), 7):
        with pytest.raises(WeightsError):
            read_state_dict(write(content[:length]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest of a zip", "zip archive"),
        (b"not a checkpoint at all", "truncated or not a legacy torch.save file"),
        (dump(42) + dump(1001), "magic number"),
    ],
)
def test_other_files_are_named(write, content: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_state_dict(write(content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth: cannot be read: No such file"):
        read_state_dict(tmp_path / "none.pth")
