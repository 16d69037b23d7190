"""Stored weights into a network, layer by layer and by name, with a table of what became of each layer.

Layers that nobody named are matched by their order among their class: Keras numbers them on for every network
that a process builds, so that the first convolution may be conv2d in one file and conv2d_94 in another.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from .errors import WeightsError
from .weight_files import Kernels, StoredLayer, StoredWeights, class_paths, snake_case

__all__ = [
    "WeightRow",
    "WeightTable",
    "describe_weights",
    "load_weights",
    "nearest_layers",
    "number_from_zero",
    "weights_of",
]

Status = Literal["loaded", "skipped", "random"]

_LISTED = 3
_NUMBERED = re.compile(r"(.*?)(?:_(\d+))?")

# What files call a variable, by what Keras 3 calls it: Keras 1's letters, Slim's words, PyTorch's.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "kernel": ("depthwise_kernel", "weights", "depthwise_weights", "weight", "W"),
    "bias": ("biases", "b"),
    "gamma": ("weight",),
    "beta": ("bias",),
    "moving_mean": ("running_mean",),
    "moving_variance": ("running_var", "running_std"),
    "depthwise_kernel": ("depthwise_weights",),
    "pointwise_kernel": ("pointwise_weights",),
}


@dataclass(frozen=True)
class WeightRow:
    """What became of one layer. shapes: of its variables, in the network or, if skipped, in the file."""

    layer: str
    status: Status
    shapes: tuple[tuple[int, ...], ...]
    reason: str

    @property
    def parameters(self) -> int:
        """How many numbers the variables hold."""
        return sum(int(np.prod(shape)) for shape in self.shapes)


@dataclass(frozen=True)
class WeightTable:
    """What became of each layer with weights: those of the network in its order, then the file's others.

    loaded: from the source. random: as it was initialised. skipped: not in the network, or above where it is
    truncated.
    """

    network: str
    source: str
    rows: tuple[WeightRow, ...]

    def of(self, status: Status) -> tuple[WeightRow, ...]:
        """The rows of one status."""
        return tuple(row for row in self.rows if row.status == status)

    def summary(self) -> str:
        """One line: how many layers and parameters were loaded, and how many layers were not."""
        loaded = self.of("loaded")
        return (
            f"{self.network} from {self.source}: {len(loaded)} layers loaded "
            f"({sum(row.parameters for row in loaded):,} parameters), {len(self.of('random'))} random, "
            f"{len(self.of('skipped'))} skipped"
        )

    def render(self) -> str:
        """The summary and the table, as text of fixed columns; ends with a newline."""
        lines = [("layer", "status", "parameters", "shapes", "")]
        for row in self.rows:
            shapes = ", ".join("x".join(map(str, shape)) or "1" for shape in row.shapes)
            lines.append((row.layer, row.status, f"{row.parameters:,}", shapes, row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.rjust(width) if column == 2 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.summary(), "", *text]) + "\n"


def weights_of(network: keras.Model, source: str) -> StoredWeights:
    """What a network holds, as if it had been read from a file."""
    layers = [
        StoredLayer(layer.name, tuple((weight.name, weight.numpy()) for weight in layer.weights))
        for layer in _layers(network)
    ]
    return StoredWeights(source, tuple(layers))


def describe_weights(
    network: keras.Model, source: str, status: Status, *, kept: Collection[str] | None = None
) -> WeightTable:
    """The table of a network whose layers all have one status, but for those that are not `kept`."""
    rows = [
        WeightRow(layer.name, status, _shapes(layer), "")
        if kept is None or layer.name in kept
        else WeightRow(layer.name, "skipped", _shapes(layer), _TRUNCATED)
        for layer in _layers(network)
    ]
    return WeightTable(network.name, source, tuple(rows))


_TRUNCATED = "above truncate_at"


def load_weights(
    network: keras.Model,
    stored: StoredWeights,
    *,
    until: str = "",
    exclude: Sequence[str] = (),
    kept: Collection[str] | None = None,
    layer_name: Callable[[str], str] = str,
) -> WeightTable:
    """Set the network's weights from a file's, all of them or none.

    until: the last layer to load, in the order of `network.layers`, with weights or without.
    exclude: layers not to load, by name, by the beginning of it ("block1" is not the beginning of
        block10_conv) or by a pattern with * ? [].
    kept: the layers that will be used, None for all; no others are loaded.
    layer_name: from the file's name of a layer to the network's.
    Raises WeightsError if a layer to be loaded is missing, or has another shape or numbers that are not
    finite; if nothing in the file is of this network; or for an unknown name in until or exclude.
    """
    wanted = _Choice(network, stored, until, exclude, kept)
    found = _match(network, stored, layer_name)
    if not found:
        raise WeightsError(_foreign(network, stored))

    rows: list[WeightRow] = []
    fits: list[tuple[keras.layers.Layer, list[npt.NDArray[Any]]]] = []
    problems: list[str] = []
    for layer in _layers(network):
        status, reason = wanted.of(layer.name)
        if status == "loaded":
            try:
                fits.append((layer, _fit(layer, found.get(layer.name), stored.kernels)))
            except _ProblemError as problem:
                problems.append(f"{layer.name}: {problem}")
            else:
                stored_name = found[layer.name].name
                reason = "" if stored_name == layer.name else f"as {stored_name}"
        rows.append(WeightRow(layer.name, status, _shapes(layer), reason))
    if problems:
        raise WeightsError(_unfit(network, stored, problems))
    if not fits:
        raise WeightsError(
            f"{stored.source}: until, exclude and truncate_at leave no layer of {network.name} to load"
        )
    for layer, values in fits:
        for weight, value in zip(layer.weights, values, strict=True):
            weight.assign(value)
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with copies of its weights

    matched = {id(layer) for layer in found.values()}
    for other in stored.layers:
        if id(other) not in matched:
            shapes = tuple(np.shape(array) for _, array in other.variables)
            rows.append(WeightRow(other.name, "skipped", shapes, "not in this network"))
    return WeightTable(network.name, stored.source, tuple(rows))


class _Choice:
    """Which layers to load."""

    def __init__(
        self,
        network: keras.Model,
        stored: StoredWeights,
        until: str,
        exclude: Sequence[str],
        kept: Collection[str] | None,
    ) -> None:
        order = [layer.name for layer in network.layers]
        if until and until not in order:
            raise WeightsError(
                f"until: {network.name} has no layer {until!r}; {nearest_layers(until, order)}"
            )
        known = order + [layer.name for layer in stored.layers]
        for pattern in exclude:
            if not any(_excludes(pattern, name) for name in known):
                raise WeightsError(
                    f"exclude: {network.name} has no layer {pattern!r}; {nearest_layers(pattern, order)}"
                )
        self._after = set(order[order.index(until) + 1 :]) if until else set()
        self._until, self._exclude, self._kept = until, exclude, kept

    def of(self, name: str) -> tuple[Status, str]:
        """What is to become of a layer, and why."""
        if self._kept is not None and name not in self._kept:
            return "skipped", _TRUNCATED
        if name in self._after:
            return "random", f"after {self._until}"
        if any(_excludes(pattern, name) for pattern in self._exclude):
            return "random", "excluded"
        return "loaded", ""


def _excludes(pattern: str, name: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern)
    within_number = pattern[-1:].isdecimal() and name[len(pattern) : len(pattern) + 1].isdecimal()
    return bool(pattern) and name.startswith(pattern) and not within_number


def nearest_layers(name: str, known: Iterable[str]) -> str:
    """What to add to an error about an unknown layer; a network has too many to list them all."""
    return f"the nearest are {', '.join(difflib.get_close_matches(name, list(known), _LISTED, cutoff=0.0))}"


def _foreign(network: keras.Model, stored: StoredWeights) -> str:
    names = [layer.name for layer in stored.layers]
    some = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    return (
        f"{stored.source}: does not hold the weights of {network.name}: none of its {len(names)} layers "
        f"({some}) is one of that network's"
    )


def _unfit(network: keras.Model, stored: StoredWeights, problems: Sequence[str]) -> str:
    some = "; ".join(problems[:_LISTED]) + ("; ..." if len(problems) > _LISTED else "")
    return (
        f"{stored.source}: does not hold the weights of {network.name}: "
        f"{len(problems)} {'layer does' if len(problems) == 1 else 'layers do'} not fit ({some}). To load "
        "the others, name the last layer to load or the layers not to (--weights-until, --weights-exclude)"
    )


# Layers


def _layers(network: keras.Model) -> list[keras.layers.Layer]:
    """The layers with weights, those inside nested models in the place of the model."""
    found: list[keras.layers.Layer] = []
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            found += _layers(layer)
        elif layer.weights:
            found.append(layer)
    return found


def _shapes(layer: keras.layers.Layer) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(weight.shape) for weight in layer.weights)


def number_from_zero(network: keras.Model) -> None:
    """Give unnamed layers the names that they have in a process that built no network before."""
    numbered: dict[str, list[tuple[int, Any]]] = {}
    for operation in network.operations:
        base, number = _numbered(operation.name)
        if base == snake_case(type(operation).__name__):
            numbered.setdefault(base, []).append((number, operation))
    for base, found in numbered.items():
        for rank, (_, operation) in enumerate(sorted(found, key=lambda pair: pair[0])):
            operation.name = f"{base}_{rank}" if rank else base


def _numbered(name: str) -> tuple[str, int]:
    """A name and the number at its end, 0 for none."""
    match = _NUMBERED.fullmatch(name)
    return (match[1], int(match[2] or 0)) if match else (name, 0)


def _match(
    network: keras.Model, stored: StoredWeights, layer_name: Callable[[str], str]
) -> dict[str, StoredLayer]:
    """The file's layer for each of the network's that it has, by the network's names.

    Where names do not lead to all of them, a file in the network's order is taken in that order if the shapes
    agree: Keras has renamed the layers of some of its networks since it published their weights.
    """
    layers = _layers(network)
    if stored.by_class:
        names = class_paths(_tree(network))
        by_path = {names[layer.name]: layer for layer in stored.layers if layer.name in names}
        return {layer.name: by_path[layer.name] for layer in layers if layer.name in by_path}
    found = _match_names(layers, stored, layer_name)
    below = stored.layers[: len(layers)]  # a classifier's other layers come last
    in_order = stored.in_order and len(found) < len(layers)
    if in_order and _sizes_of_layers(layers) == _sizes_of_stored(below):
        return {layer.name: other for layer, other in zip(layers, below, strict=True)}
    return found


def _match_names(
    layers: Sequence[keras.layers.Layer], stored: StoredWeights, layer_name: Callable[[str], str]
) -> dict[str, StoredLayer]:
    named: dict[str, keras.layers.Layer] = {}
    unnamed: dict[str, list[keras.layers.Layer]] = {}
    for layer in layers:
        base = _numbered(layer.name)[0]
        if base == snake_case(type(layer).__name__):
            unnamed.setdefault(_plain(base), []).append(layer)
        else:
            named[layer.name] = layer

    found: dict[str, StoredLayer] = {}
    by_last: dict[str, list[StoredLayer]] = {}
    for other in stored.layers:
        name = layer_name(other.name)
        if name in named:
            found[name] = other
        else:
            by_last.setdefault(name.rpartition("/")[2], []).append(other)  # it may stand in a scope
    candidates: dict[str, list[StoredLayer]] = {}
    for name, others in by_last.items():
        if name not in named:
            candidates.setdefault(_plain(_numbered(name)[0]), []).extend(others)
        elif name not in found and len(others) == 1:
            found[name] = others[0]
    for base, of_class in unnamed.items():
        of_class.sort(key=lambda layer: _numbered(layer.name)[1])
        others = sorted(candidates.get(base, ()), key=lambda other: _numbered(other.name)[1])
        found.update(zip((layer.name for layer in of_class), _aligned(of_class, others), strict=False))
    return found


def _tree(network: keras.Model) -> list[tuple[str, str, Any]]:
    return [
        (type(layer).__name__, layer.name, _tree(layer) if isinstance(layer, keras.Model) else ())
        for layer in network.layers
    ]


def _plain(base: str) -> str:
    """A class in the spelling that all versions of Keras share: Keras 1 has convolution2d_1."""
    return base.replace("_", "").replace("convolution", "conv")


def _aligned(layers: Sequence[keras.layers.Layer], others: Sequence[StoredLayer]) -> Sequence[StoredLayer]:
    """The part of a file's unnamed layers of a class that has the shapes of the network's.

    A file of a larger model has more of them, before the network's or after; all of them if no part fits.
    """

    wanted, given = _sizes_of_layers(layers), _sizes_of_stored(others)
    for start in range(len(given) - len(wanted) + 1):
        if given[start : start + len(wanted)] == wanted:
            return others[start:]
    return others


def _sizes_of_layers(layers: Iterable[keras.layers.Layer]) -> list[list[int]]:
    """The numbers in each layer's variables: what stays of a shape in every layout of kernels."""
    return [sorted(int(np.prod(weight.shape)) for weight in layer.weights) for layer in layers]


def _sizes_of_stored(layers: Iterable[StoredLayer]) -> list[list[int]]:
    return [sorted(int(np.size(array)) for _, array in layer.variables) for layer in layers]


# Variables


class _ProblemError(Exception):
    """Why a layer cannot be loaded."""


def _fit(layer: keras.layers.Layer, stored: StoredLayer | None, kernels: Kernels) -> list[npt.NDArray[Any]]:
    """The stored arrays in the order, the layout and the dtypes of the layer's weights."""
    if stored is None:
        raise _ProblemError("not in the file")
    arrays = _ordered(layer, stored)
    values = []
    for weight, array in zip(layer.weights, arrays, strict=True):
        if not np.issubdtype(array.dtype, np.number):
            raise _ProblemError(f"{weight.name} holds {array.dtype}, no numbers")
        value = _laid_out(layer, weight.name, tuple(weight.shape), array, kernels)
        if value.shape != tuple(weight.shape):
            raise _ProblemError(f"{weight.name} should be {_text(weight.shape)}, is {_text(array.shape)}")
        if not np.isfinite(value).all():
            raise _ProblemError(f"{weight.name} holds numbers that are not finite")
        values.append(value)
    return values


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _ordered(layer: keras.layers.Layer, stored: StoredLayer) -> list[npt.NDArray[Any]]:
    """By what the variables are called; by their order where the names say nothing."""
    arrays = {_role(name): array for name, array in stored.variables}
    own = [weight.name for weight in layer.weights]
    picked = [
        next((arrays[name] for name in (wanted, *_OTHER_NAMES.get(wanted, ())) if name in arrays), None)
        for wanted in own
    ]
    if all(array is not None for array in picked):
        return [array for array in picked if array is not None]
    if len(stored.variables) != len(own):
        raise _ProblemError(f"expected {len(own)} variables, found {len(stored.variables)}")
    return [array for _, array in stored.variables]


def _role(name: str) -> str:
    """ "kernel:0" is kernel; Keras 1's "conv1_W_1:0" is W, whatever stands around it."""
    name = name.partition(":")[0]
    match = re.fullmatch(r".*_(W|b|gamma|beta|running_mean|running_std)(?:_\d+)?", name)
    return match[1] if match else name


def _laid_out(
    layer: keras.layers.Layer, name: str, shape: tuple[int, ...], array: npt.NDArray[Any], kernels: Kernels
) -> npt.NDArray[Any]:
    """Turn a kernel as TensorFlow has it: [h, w, in, out], or [h, w, in, multiplier] where that is depthwise.

    Source for Theano: Keras 2, saving.preprocess_weights_for_loading and conv_utils.convert_kernel.
    """
    if kernels == "torch" and array.ndim == 2:
        return array.T
    if array.ndim != 4 or "kernel" not in name:
        return array
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D) or name == "depthwise_kernel"
    channels_last = array.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
    channels_first = kernels == "torch" or (array.shape != shape and channels_last.shape == shape)
    if channels_first:
        array = channels_last
    turned = kernels == "theano" or (kernels == "unknown" and channels_first)
    return array[::-1, ::-1] if turned and not depthwise else array
