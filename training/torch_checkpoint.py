"""Read the tensors of a `torch.save` file in the legacy layout, without PyTorch.

Layout (PyTorch's torch/serialization.py, `_legacy_save`): a pickled magic number, a pickled protocol
version, a pickled dict describing the writing machine, the pickled object whose tensors refer to storages
by persistent id, the pickled list of storage keys, then for each key an int64 element count and the raw
little-endian values.

A pickle can name any function of any module; the unpickler here resolves only the three names that a state
dict of float and integer tensors needs and refuses everything else, so an untrusted file cannot run code.
"""

import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import WeightsError

__all__ = ["read_state_dict"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001

_STORAGE_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _StorageRef:
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class _TensorRef:
    storage: _StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(
    storage: _StorageRef, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> _TensorRef:
    return _TensorRef(storage, offset, tuple(shape), tuple(strides))


class _StateDictUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(np.dtype(_STORAGE_DTYPES[name]))
        raise WeightsError(
            f"the checkpoint's pickle asks for {module}.{name}; only plain tensors in a state dict are read. "
            "Save the model's state_dict() and give that file"
        )

    def persistent_load(self, pid: Any) -> _StorageRef:
        match pid:
            case ("storage", _StorageType() as kind, str(key), str(), int(count), None):
                return _StorageRef(key, kind.dtype, count)
        raise WeightsError(f"the checkpoint refers to a storage in a way that is not read: {pid!r}")


def read_state_dict(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The state dict of `path` as arrays in the tensors' own dtypes and shapes, row-major.

    Raises WeightsError if the file is missing, truncated, in another layout (such as the zip layout that
    `torch.save` writes since PyTorch 1.6), or asks the unpickler for anything but tensors.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error.__cause__
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
    ) as error:
        raise WeightsError(f"{path}: truncated or not a legacy torch.save file ({error})") from error


def _read(file: BinaryIO, path: Path) -> dict[str, npt.NDArray[Any]]:
    if file.read(4) == b"PK\x03\x04":
        raise WeightsError(
            "a zip archive; only the legacy layout of torch.save is read. In PyTorch: "
            "torch.save(state_dict, file, _use_new_zipfile_serialization=False)"
        )
    file.seek(0)
    if _StateDictUnpickler(file).load() != _MAGIC or _StateDictUnpickler(file).load() != _PROTOCOL_VERSION:
        raise WeightsError("not a torch.save file: its magic number is another")
    _StateDictUnpickler(file).load()  # the writing machine's sizes: the values below have fixed sizes
    state = _StateDictUnpickler(file).load()
    keys = _StateDictUnpickler(file).load()
    if not isinstance(state, Mapping) or not all(isinstance(ref, _TensorRef) for ref in state.values()):
        raise WeightsError("holds something else than a state dict of tensors")

    storage_refs = {ref.storage.key: ref.storage for ref in state.values()}
    end = path.stat().st_size
    storages: dict[str, npt.NDArray[Any]] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little", signed=True)
        ref = storage_refs.get(key)
        if ref is None:
            raise WeightsError(f"storage {key} belongs to no tensor")
        size_bytes = count * ref.dtype.itemsize
        if count != ref.count or not 0 <= size_bytes <= end - file.tell():
            raise WeightsError(f"truncated or damaged: storage {key} should hold {ref.count} values")
        storages[key] = np.frombuffer(file.read(size_bytes), ref.dtype)
    if missing := storage_refs.keys() - storages.keys():
        raise WeightsError(f"truncated or damaged: {len(missing)} storages are missing")
    return {name: _materialise(ref, storages[ref.storage.key]) for name, ref in state.items()}


def _materialise(ref: _TensorRef, storage: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if len(ref.shape) != len(ref.strides) or min((ref.offset, *ref.shape, *ref.strides), default=0) < 0:
        raise WeightsError("a tensor has a negative offset, size or stride")
    if 0 in ref.shape:
        return np.empty(ref.shape, storage.dtype)
    last = ref.offset + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
    # A stride of 0 repeats values, so a small storage could stand for an enormous tensor.
    if last >= storage.size or math.prod(ref.shape) > storage.size:
        raise WeightsError("a tensor reaches beyond its storage")
    view = np.lib.stride_tricks.as_strided(
        storage[ref.offset :],
        ref.shape,
        tuple(stride * storage.itemsize for stride in ref.strides),
        writeable=False,
    )
    return np.ascontiguousarray(view).reshape(ref.shape)
