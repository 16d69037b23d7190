"""What a run is asked to do, complete enough to do it again.

A recipe is plain data: a TOML file in `recipes/`, or the user's own, over which flags and `--set` win. It
nests three deep at most (`stages.0.learning_rate`), and every value is checked when it is built.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from .errors import RecipeError

__all__ = [
    "DEFAULT_BACKBONE",
    "DEFAULT_RECIPE",
    "Augmentation",
    "Head",
    "PseudoLabels",
    "Recipe",
    "Stage",
]

DEFAULT_BACKBONE = "efficientnet-lite0"
DEFAULT_RECIPE = "probe"

Method = Literal["probe", "fine-tune", "auto"]
Optimizer = Literal["sgd", "rmsprop", "adam", "adamw"]
Schedule = Literal["constant", "exponential", "polynomial", "cosine"]
Fill = Literal["nearest", "reflect", "constant"]
Situation = Literal["measure", "small-similar", "small-different", "large-similar", "large-different"]

_ONLY_FINE_TUNING = (
    *("batch_size", "label_smoothing", "class_weights", "clip_norm", "ema_decay", "batch_norm"),
    *("mixed_precision", "head", "augmentation", "pseudo_labels", "stages"),
)


@dataclass(frozen=True)
class Head:
    """What is grafted on the features: dense layers of `hidden` units with ReLU, `dropout` after each but
    the last, then one softmax layer. Without hidden layers, `dropout` is on the features."""

    hidden: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(all(units >= 1 for units in self.hidden), "head.hidden", "units of at least 1", self.hidden)
        _check(0 <= self.dropout < 1, "head.dropout", "a number in [0, 1)", self.dropout)


@dataclass(frozen=True)
class Augmentation:
    """How training images vary; each image draws its own numbers at each step.

    horizontal_flip: with probability 1/2. zoom: 0.3 scales by 0.7 to 1.3. shift: a share of the side, both
    axes. rotation_degrees: up to that, both ways. fill: what stands outside the image.
    rand_augment_count: operations of RandAugment for each image (0: none), of strength
    rand_augment_strength (0 to 1). mixup, cutmix: the beta distribution's parameter (0: off); with both, each
    batch takes one of the two.
    """

    horizontal_flip: bool = False
    zoom: float = 0.0
    shift: float = 0.0
    rotation_degrees: float = 0.0
    fill: Fill = "nearest"
    rand_augment_count: int = 0
    rand_augment_strength: float = 0.5
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        _check(0 <= self.zoom < 1, "augmentation.zoom", "a number in [0, 1)", self.zoom)
        _check(0 <= self.shift < 1, "augmentation.shift", "a number in [0, 1)", self.shift)
        degrees = self.rotation_degrees
        _check(0 <= degrees <= 180, "augmentation.rotation_degrees", "0 to 180", degrees)
        count, strength = self.rand_augment_count, self.rand_augment_strength
        _check(count >= 0, "augmentation.rand_augment_count", "at least 0", count)
        _check(0 <= strength <= 1, "augmentation.rand_augment_strength", "0 to 1", strength)
        _check(self.mixup >= 0, "augmentation.mixup", "at least 0", self.mixup)
        _check(self.cutmix >= 0, "augmentation.cutmix", "at least 0", self.cutmix)

    @property
    def changes_pixels(self) -> bool:
        """Whether an image differs from step to step beyond being flipped: its features cannot be cached."""
        geometry = self.zoom or self.shift or self.rotation_degrees
        return bool(geometry or self.rand_augment_count or self.mixup or self.cutmix)


@dataclass(frozen=True)
class PseudoLabels:
    """Training on images without labels, by what the model itself is sure of.

    unlabeled_dir: a folder of images ("": off). confidence: the least probability of a label to be believed.
    share: of each batch, 0 to 1. start_epoch: the first epoch that uses them, once the model has settled.
    Source: Lee 2013, "Pseudo-Label"; the share of a quarter to a third is the custom of its users.
    """

    unlabeled_dir: str = ""
    confidence: float = 0.95
    share: float = 0.25
    start_epoch: int = 2

    def __post_init__(self) -> None:
        _check(0 < self.confidence <= 1, "pseudo_labels.confidence", "a number in (0, 1]", self.confidence)
        _check(0 < self.share < 1, "pseudo_labels.share", "a number in (0, 1)", self.share)
        _check(self.start_epoch >= 0, "pseudo_labels.start_epoch", "at least 0", self.start_epoch)


@dataclass(frozen=True)
class Stage:
    """One part of fine-tuning: what learns, for how long, and how fast.

    name: in progress, messages and the report.
    unfreeze: the backbone's layers that learn beside the head: "none", "all", "boundary" (the backbone
        table's), or a layer's name or index, from which on they do.
    augment: false learns from the images as they are: with nothing unfrozen, from cached features.
    scopes: with any, only layers whose names begin with one of them learn ("head" is the head's).
    epochs: passes over the training images; steps: with a number above 0, that many batches instead.
    optimizer: of all that learns.
    learning_rate: the head's. backbone_rate: the backbone's, as a share of it. layer_decay: each block of the
        backbone below its top one learns by this factor slower than the one above it (1: all alike).
    schedule: after `warmup_epochs` of linear warmup: "constant"; "exponential", by decay_rate every
        decay_epochs, in steps; "polynomial" (linear) or "cosine", down to end_learning_rate at the end.
    momentum: of sgd and rmsprop. rho, epsilon: of rmsprop; epsilon also of adam. weight_decay: decoupled,
        on kernels only.
    find_learning_rate: sweep the rate first, and take what the sweep suggests for learning_rate.
    patience: epochs without a better validation result before the stage ends (0: never early).
    keep: "best" goes on with the weights of the best epoch on validation, "last" with the last.
    """

    name: str = "fine-tune"
    unfreeze: str = "none"
    augment: bool = True
    scopes: tuple[str, ...] = ()
    epochs: float = 10.0
    steps: int = 0
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-3
    backbone_rate: float = 1.0
    layer_decay: float = 1.0
    schedule: Schedule = "constant"
    warmup_epochs: float = 0.0
    decay_rate: float = 0.94
    decay_epochs: float = 2.0
    end_learning_rate: float = 0.0
    momentum: float = 0.9
    rho: float = 0.9
    epsilon: float = 1e-7
    weight_decay: float = 0.0
    find_learning_rate: bool = False
    patience: int = 0
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        _check(self.epochs > 0, "stages.epochs", "a number above 0", self.epochs)
        _check(self.steps >= 0, "stages.steps", "at least 0", self.steps)
        _check(self.learning_rate > 0, "stages.learning_rate", "a number above 0", self.learning_rate)
        _check(self.backbone_rate >= 0, "stages.backbone_rate", "at least 0", self.backbone_rate)
        _check(0 < self.layer_decay <= 1, "stages.layer_decay", "a number in (0, 1]", self.layer_decay)
        _check(self.warmup_epochs >= 0, "stages.warmup_epochs", "at least 0", self.warmup_epochs)
        _check(0 < self.decay_rate <= 1, "stages.decay_rate", "a number in (0, 1]", self.decay_rate)
        _check(self.decay_epochs > 0, "stages.decay_epochs", "a number above 0", self.decay_epochs)
        _check(self.end_learning_rate >= 0, "stages.end_learning_rate", "at least 0", self.end_learning_rate)
        _check(0 <= self.momentum < 1, "stages.momentum", "a number in [0, 1)", self.momentum)
        _check(0 <= self.rho < 1, "stages.rho", "a number in [0, 1)", self.rho)
        _check(self.epsilon > 0, "stages.epsilon", "a number above 0", self.epsilon)
        _check(self.weight_decay >= 0, "stages.weight_decay", "at least 0", self.weight_decay)
        _check(self.patience >= 0, "stages.patience", "at least 0", self.patience)


@dataclass(frozen=True)
class Recipe:
    """The settings of a run; saved with it.

    data_dir: a folder of class folders, a .csv or .jsonl manifest, or TFRecord shards.
    recipe: the name of the file it began as. method: "probe" (regularised linear head on cached features),
        "fine-tune" (the stages), or "auto" (looks at the data and picks; `situation` overrules what it sees).
    backbone: a name of the backbone table. weights: "imagenet", "none" or a file; weights_until: the last
        layer to load; weights_exclude: layers not to load; truncate_at: the layer whose pooled output is the
        features ("": the network's own).
    validation_percent, test_percent: together below 100, the rest is trained on. batch_size: of every stage.
    label_smoothing: share of the target spread over all classes. class_weights: "balanced" weighs each
        class by the inverse of its images. clip_norm: largest global norm of the gradients (0: any).
    ema_decay: with a number above 0, the moving average of the weights is what is evaluated and kept.
    batch_norm: "inference" keeps the statistics of unfrozen BatchNorm layers as they are; "train" lets them
        move. mixed_precision: compute in float16 on GPUs. seed: of everything random.
    Raises RecipeError for a value out of its range.
    """

    data_dir: str
    recipe: str = DEFAULT_RECIPE
    method: Method = "probe"
    situation: Situation = "measure"
    backbone: str = DEFAULT_BACKBONE
    weights: str = "imagenet"
    weights_until: str = ""
    weights_exclude: tuple[str, ...] = ()
    truncate_at: str = ""
    validation_percent: float = 10.0
    test_percent: float = 10.0
    batch_size: int = 32
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    batch_norm: Literal["inference", "train"] = "inference"
    mixed_precision: bool = False
    seed: int = 0
    head: Head = field(default_factory=Head)
    augmentation: Augmentation = field(default_factory=Augmentation)
    pseudo_labels: PseudoLabels = field(default_factory=PseudoLabels)
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        held_out = self.validation_percent, self.test_percent
        if min(held_out) < 0 or sum(held_out) >= 100:
            raise RecipeError(
                "validation_percent and test_percent: expected both at least 0 and together below 100, "
                f"got {held_out[0]:g} and {held_out[1]:g}"
            )
        _check(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _check(0 <= self.label_smoothing < 1, "label_smoothing", "a number in [0, 1)", self.label_smoothing)
        _check(self.clip_norm >= 0, "clip_norm", "at least 0", self.clip_norm)
        _check(0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)", self.ema_decay)
        _check(0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1", self.seed)
        if self.method == "fine-tune" and not self.stages:
            raise RecipeError('stages: expected at least one for the method "fine-tune", got none')
        if self.method == "probe":
            self._check_unused(
                _ONLY_FINE_TUNING, "the probe does not use it; choose a recipe that fine-tunes"
            )
        if self.method != "auto":
            self._check_unused(("situation",), "only the recipe auto uses it")

    def _check_unused(self, names: Sequence[str], reason: str) -> None:
        """What would be passed over in silence is an error."""
        for field_ in fields(self):
            factory = field_.default_factory
            default = field_.default if factory is dataclasses.MISSING else factory()
            if field_.name in names and getattr(self, field_.name) != default:
                raise RecipeError(f"{field_.name}: {reason}")

    def augmentation_of(self, stage: Stage) -> Augmentation:
        """The augmentation that a stage uses."""
        return self.augmentation if stage.augment else Augmentation()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`. Raises RecipeError for a key that there is none of, with the nearest name
        there is, for a value of another type, or out of its range."""
        recipe: Recipe = _build(cls, values, "")
        return recipe


def _check(holds: bool, key: str, expected: str, got: Any) -> None:
    if not holds:
        raise RecipeError(f"{key}: expected {expected}, got {got}")


def _build(kind: type[Any], values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{prefix.rstrip('.')}: expected a table, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    for key in values:
        if key not in known:
            raise RecipeError(f"{prefix}{key}: there is no such setting{nearest(key, known)}")
    try:
        return kind(**{key: _value(hints[key], value, prefix + key) for key, value in values.items()})
    except TypeError as error:
        missing = [f.name for f in fields(kind) if f.default is f.default_factory and f.name not in values]
        raise RecipeError(f"{prefix}{', '.join(missing)}: expected a value, got none") from error


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """What to add to an error about an unknown name: the nearest one there is, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"


def _value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type that the field declares; TOML and JSON have no tuples and write 1 for 1.0."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, f"{key}.")
    if get_origin(hint) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise RecipeError(f"{key}: expected a list, got {value!r}")
        item = get_args(hint)[0]
        return tuple(_value(item, element, f"{key}.{index}") for index, element in enumerate(value))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RecipeError(f"{key}: expected one of {', '.join(get_args(hint))}, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a layer's index
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{key}: expected {_NAMES[hint]}, got {value!r}")
    return value


_NAMES: Mapping[type[Any], str] = types.MappingProxyType(
    {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
)
