"""Files of weights, in every layout that Keras has written and two more, as plain arrays by layer.

| file                      | written by                        | its layers are found by             |
|---------------------------|-----------------------------------|-------------------------------------|
| .weights.h5               | Keras 3                           | their names; in early ones by class |
| .keras                    | Keras 3, Keras 2 from 2.12 on     | their names                         |
| .h5                       | Keras 1 and 2; 3's model.save     | layer_names and weight_names        |
| .index, .data-...: prefix | tf.train.Checkpoint, Keras 2      | full names in the object graph      |
| .index, .data-...: prefix | tf.compat.v1.train.Saver, Slim    | the variables' names                |
| .pth                      | torch.save, legacy layout         | the keys of the state dict          |

A layer inside a nested model counts as a layer like any other; the weights of optimizers are left out. The
layout is told by content where it can be, not by the file's ending.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from .errors import WeightsError
from .torch_checkpoint import read_state_dict

__all__ = ["StoredLayer", "StoredWeights", "class_paths", "read_weights", "snake_case"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_MOVING_AVERAGE = "/ExponentialMovingAverage"
_SLOTS = {"Adam", "Adam_1", "Adagrad", "Adadelta", "Ftrl", "Ftrl_1", "Momentum", "RMSProp", "RMSProp_1"}
_CONTAINERS = {"layers", "_layer_checkpoint_dependencies"}  # of a model: Keras 3's name, and Keras 2's

Kernels = Literal["tensorflow", "theano", "torch", "unknown"]


@dataclass(frozen=True)
class StoredLayer:
    """One layer of a file. variables: (name, array), in the file's order; names such as "kernel:0" or "0"."""

    name: str
    variables: tuple[tuple[str, npt.NDArray[Any]], ...]


@dataclass(frozen=True)
class StoredWeights:
    """All that a file holds.

    kernels: how those of convolutions lie. "tensorflow" is [h, w, in, out]; "torch" is [out, in, h, w];
        "theano" convolves where the others correlate, so the kernels stand turned by 180 degrees, in either
        order; "unknown" is a file of Keras 1, which does not say.
    by_class: the file has no names; layers are called as `class_paths` calls them.
    in_order: the layers stand in their model's order.
    """

    source: str
    layers: tuple[StoredLayer, ...]
    kernels: Kernels = "tensorflow"
    by_class: bool = False
    in_order: bool = False


def read_weights(path: Path) -> StoredWeights:
    """Everything in a file, or in the checkpoint of which `path` is the prefix.

    Raises WeightsError if it is missing, damaged or in none of the layouts.
    """
    prefix = Path(str(path).removesuffix(".index"))
    if Path(f"{prefix}.index").is_file():
        return _guarded(_read_checkpoint, prefix)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such weights file. Expected imagenet, none, or a .weights.h5, .h5, .keras or .pth "
            "file, or the prefix of a TensorFlow checkpoint"
        )
    if path.suffix == ".pth":
        return _from_state_dict(str(path), read_state_dict(path))
    return _guarded(_read_file, path)


def _guarded(read: Callable[[Path], StoredWeights], path: Path) -> StoredWeights:
    try:
        stored = read(path)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or _first_line(error)})") from error
    except Exception as error:  # h5py, zipfile and TensorFlow raise whatever their parsers met
        raise WeightsError(f"{path}: damaged, or no file of weights ({_first_line(error)})") from error
    if not stored.layers:
        raise WeightsError(f"{path}: holds no weights")
    return stored


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_file(path: Path) -> StoredWeights:
    with path.open("rb") as file:
        head = file.read(len(_HDF5))
    if head == _HDF5:
        with h5py.File(path, "r") as content:
            return _from_hdf5(str(path), content)
    if head.startswith(_ZIP):
        with zipfile.ZipFile(path) as archive:
            names = class_paths(_config_tree(json.loads(archive.read("config.json"))))
            with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as content:
                return _from_keras_3(str(path), content, names)
    raise WeightsError(
        f"{path}: neither an HDF5 file (.weights.h5, .h5) nor a .keras archive; the file may be damaged"
    )


# HDF5


def _from_hdf5(source: str, file: h5py.File) -> StoredWeights:
    for group in (file, file.get("model_weights")):
        if group is not None and _has_names(group, "layer_names"):
            return _from_legacy(source, group)
    return _from_keras_3(source, file, {})


def _from_legacy(source: str, group: h5py.Group) -> StoredWeights:
    """Keras 1 and 2: the attributes layer_names and, in each layer's group, weight_names."""
    layers: list[StoredLayer] = []
    for name in _names(group, "layer_names"):
        by_owner: dict[str, list[tuple[str, npt.NDArray[Any]]]] = {}
        for path in _names(group[name], "weight_names"):
            owner, _, variable = path.rpartition("/")
            by_owner.setdefault(owner, []).append((variable, np.asarray(group[name][path])))
        nested = len(by_owner) > 1  # the weights of a nested model stand in one group
        for owner, variables in by_owner.items():
            layers.append(StoredLayer(owner.rpartition("/")[2] if nested else name, tuple(variables)))
    kernels: dict[str, Kernels] = {"theano": "theano", "unknown": "unknown"}
    return StoredWeights(source, tuple(layers), kernels.get(_backend(group), "tensorflow"), in_order=True)


def _backend(group: h5py.Group) -> str:
    backend = group.attrs.get("backend", "unknown")
    return backend.decode() if isinstance(backend, bytes) else str(backend)


def _has_names(group: h5py.Group, attribute: str) -> bool:
    return attribute in group.attrs or f"{attribute}0" in group.attrs


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names; one that is too long for an attribute stands in parts, with a number behind each."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    found = [name for part in parts for name in group.attrs[part]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in found]


def _from_keras_3(source: str, file: h5py.File, names: Mapping[str, str]) -> StoredWeights:
    """Keras 3: layers/<class>_<number>/vars/<number>, in later versions with the layer's name beside it.

    names: by path, for files without; without any of either, layers are called by their paths.
    """
    found = [(path, _layer_name(variables), variables) for path, variables in _variable_groups(file)]
    by_class = not names and not all(name for _, name, _ in found)
    root = _fullest_model([path for path, _, _ in found]) if by_class else ""
    layers = []
    for path, name, variables in found:
        arrays = tuple((key, np.asarray(variables[key])) for key in sorted(variables, key=_number))
        known = path.removeprefix(root) if by_class else name or names.get(path, path)
        layers.append(StoredLayer(known, arrays))
    return StoredWeights(source, tuple(layers), by_class=by_class)


def _variable_groups(group: h5py.Group, path: str = "") -> Iterator[tuple[str, h5py.Group]]:
    """The groups of variables that are not empty, with their layers' paths, as `class_paths` has them."""
    for key, child in group.items():
        if not isinstance(child, h5py.Group) or key == "optimizer":
            continue
        if key == "vars":
            if len(child):
                yield path, child
        elif key in _CONTAINERS:
            yield from _variable_groups(child, path)
        else:
            yield from _variable_groups(child, f"{path}/{key}" if path else key)


def _layer_name(variables: h5py.Group) -> str:
    return str(variables.attrs.get("name", ""))


def _number(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdecimal() else (1 << 30, key)


def _fullest_model(paths: Sequence[str]) -> str:
    """The path, with a slash behind it, of the model with the most layers: "", or that of a nested one."""
    parents = [path[: path.rfind("/") + 1] for path in paths]
    return max(sorted(set(parents)), key=parents.count, default="")


# Names by class

_Tree = Iterable[tuple[str, str, "_Tree"]]


def class_paths(layers: _Tree) -> dict[str, str]:
    """Names of layers, by the paths that Keras 3 gives them in its files.

    layers: (class, name, the layers inside) of each, in the model's order. The path of the sixth Conv2D is
    "conv2d_5"; that of one in a nested model is "functional/conv2d_5".
    """
    paths: dict[str, str] = {}
    counts: dict[str, int] = {}
    for class_name, name, inside in layers:
        key = snake_case(class_name)
        number = counts.get(key, 0)
        counts[key] = number + 1
        path = f"{key}_{number}" if number else key
        paths[path] = name
        paths.update({f"{path}/{inner}": known for inner, known in class_paths(inside).items()})
    return paths


def _config_tree(config: Mapping[str, Any]) -> _Tree:
    return [
        (layer["class_name"], layer["config"].get("name", ""), _config_tree(layer))
        for layer in config["config"].get("layers", ())
    ]


def snake_case(class_name: str) -> str:
    """The name that Keras gives a class's first unnamed layer: BatchNormalization is batch_normalization."""
    parted = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", class_name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", parted).lower()


# TensorFlow's checkpoints


def _read_checkpoint(prefix: Path) -> StoredWeights:
    """A variable "a/b/kernel" is of layer "a/b". Its name stands in the object graph, or else is its key.

    Where a variable has a moving average beside it, that is taken: it is what evaluation used.
    """
    reader = tf.train.load_checkpoint(str(prefix))
    keys = reader.get_variable_to_shape_map()
    if _OBJECT_GRAPH in keys:
        graph = TrackableObjectGraph.FromString(reader.get_tensor(_OBJECT_GRAPH))
        key_of = {
            attribute.full_name: attribute.checkpoint_key
            for node in graph.nodes
            for attribute in node.attributes
            if attribute.checkpoint_key in keys and not _is_slot(attribute.checkpoint_key)
        }
    else:
        key_of = {key: key for key in keys if not _is_slot(key) and not key.endswith(_MOVING_AVERAGE)}
        averaged = {name: name + _MOVING_AVERAGE for name in key_of}
        key_of |= {name: key for name, key in averaged.items() if key in keys}
    by_owner: dict[str, list[tuple[str, npt.NDArray[Any]]]] = {}
    for name in sorted(key_of):
        owner, _, variable = name.rpartition("/")
        if owner:  # a bare name is a counter, such as global_step
            by_owner.setdefault(owner, []).append((variable, np.asarray(reader.get_tensor(key_of[name]))))
    layers = tuple(StoredLayer(owner, tuple(variables)) for owner, variables in by_owner.items())
    return StoredWeights(str(prefix), layers)


def _is_slot(key: str) -> bool:
    """Whether a variable belongs to an optimizer; Keras 3's lists the network's own among its attributes."""
    parts = key.split("/")
    own = "optimizer" in parts and "_trainable_variables" not in parts
    return own or ".OPTIMIZER_SLOT" in parts or parts[-1] in _SLOTS


# PyTorch


def _from_state_dict(source: str, state: Mapping[str, npt.NDArray[Any]]) -> StoredWeights:
    by_owner: dict[str, list[tuple[str, npt.NDArray[Any]]]] = {}
    for name, tensor in state.items():
        owner, _, variable = name.rpartition(".")
        if variable != "num_batches_tracked":  # a counter of BatchNorm that Keras has no use for
            by_owner.setdefault(owner, []).append((variable, tensor))
    layers = tuple(StoredLayer(owner, tuple(variables)) for owner, variables in by_owner.items())
    return StoredWeights(source, layers, "torch")
