"""What a source says of its images, before anything is decided about them.

Folders, manifests and shards are read into a Listing each; `dataset` makes examples of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .images import ImageStore

__all__ = ["SPLITS", "SPLIT_NAMES", "Listed", "Listing", "Skipped", "Split"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SPLIT_NAMES: Mapping[str, Split] = MappingProxyType(
    {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
)
"""What folders, manifests and shards call the splits."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One labelled image.

    path: what the source's images are read by. split: None where the source leaves it to us.
    split_key: the text whose hash then decides, the same wherever the data lie.
    """

    path: str
    label: str
    split: Split | None
    split_key: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is no example, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """labels: every class in its order, those without a readable image, too."""

    labels: tuple[str, ...]
    listed: tuple[Listed, ...]
    skipped: tuple[Skipped, ...]
    images: ImageStore
