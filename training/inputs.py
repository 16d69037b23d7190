"""What a stage of fine-tuning learns from: rows of features, or pixels decoded as they are needed."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .images import ImageStore
from .preprocess import Preprocess, image_decoder

__all__ = ["FeatureInputs", "Inputs", "Order", "PixelInputs"]

_DECODERS = 8
_BATCHES_AHEAD = 2
_MEMORY_BYTES = 1 << 30


class Inputs(Protocol):
    """The inputs of images, by row: what the host hands over for a batch, and what the graph makes of it."""

    def ahead(self, batches: Iterable[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[Any]]:
        """What to hand over for each batch of rows [...] in turn, the next ones begun before they are asked
        for: [..., *shape]."""

    def lookup(self, handed: tf.Tensor) -> tf.Tensor:
        """The inputs themselves of what was handed over; runs in a graph and eagerly."""


class FeatureInputs:
    """Features float32 [m, D], in memory, where row 0 of these inputs is row `first` of the table.

    The graph looks rows up, since a step on features takes less time than copying them would. Several inputs
    may share a table: `after` makes those of the rows behind this one's.
    """

    def __init__(self, table: npt.NDArray[np.float32] | tf.Tensor, first: int = 0) -> None:
        with tf.device("/device:CPU:0"):
            self._table = tf.convert_to_tensor(table)
        self._first = first

    def after(self, count: int) -> "FeatureInputs":
        """The inputs that begin `count` rows behind these."""
        return FeatureInputs(self._table, self._first + count)

    def ahead(self, batches: Iterable[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[np.int64]]:
        """See `Inputs`."""
        return (rows + self._first for rows in batches)

    def lookup(self, handed: tf.Tensor) -> tf.Tensor:
        """See `Inputs`."""
        return tf.gather(self._table, handed)


class PixelInputs:
    """Pixels uint8 [n, side_px, side_px, 3], decoded when first asked for.

    They stay in memory if all of them fit in `memory_bytes`; else each is decoded again in every epoch.
    """

    def __init__(
        self,
        images: ImageStore,
        paths: Sequence[str],
        preprocess: Preprocess,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        side_px = preprocess.side_px
        self._images, self._paths = images, paths
        self._shape = (side_px, side_px, 3)
        fits = len(paths) * side_px * side_px * 3 <= memory_bytes
        self._kept = np.empty((len(paths), *self._shape), np.uint8) if fits else None
        self._is_kept = np.zeros(len(paths), bool)
        self._pool = ThreadPoolExecutor(_DECODERS)
        self._decode = image_decoder(preprocess)

    def lookup(self, handed: tf.Tensor) -> tf.Tensor:
        """See `Inputs`."""
        return handed

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pixels [..., side_px, side_px, 3] of rows [...]."""
        flat = rows.ravel()
        if self._kept is None:
            pixels = np.empty((len(flat), *self._shape), np.uint8)
            for position, decoded in enumerate(self._pool.map(self._load, flat)):
                pixels[position] = decoded
        else:
            missing = np.unique(flat[~self._is_kept[flat]])
            for row, decoded in zip(missing, self._pool.map(self._load, missing), strict=True):
                self._kept[row] = decoded
            self._is_kept[missing] = True
            pixels = self._kept[flat]
        return pixels.reshape(*rows.shape, *self._shape)

    def ahead(self, batches: Iterable[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[np.uint8]]:
        """See `Inputs`."""
        waiting: deque[Any] = deque()
        with ThreadPoolExecutor(1) as worker:
            try:
                for rows in batches:
                    waiting.append(worker.submit(self.gather, rows))
                    if len(waiting) > _BATCHES_AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _load(self, row: int) -> npt.NDArray[np.uint8]:
        content = tf.constant(self._images.read(self._paths[row]))
        decoded: npt.NDArray[np.uint8] = self._decode(content).numpy()
        return decoded


class Order:
    """The endless sequence of rows that training goes through: in each epoch a permutation of its own.

    It follows from count, seed and position alone, so a run goes on where it was with nothing but its step.
    """

    def __init__(self, count: int, *seed: int) -> None:
        self._count, self._seed = count, seed
        self._permutations: dict[int, npt.NDArray[np.int64]] = {}

    def rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows [...] at positions [...] of the sequence."""
        epochs, offsets = np.divmod(positions, self._count)
        rows = np.empty_like(positions)
        needed = np.unique(epochs).tolist()
        self._permutations = {epoch: self._permutation(epoch) for epoch in needed}
        for epoch in needed:
            within = epochs == epoch
            rows[within] = self._permutations[epoch][offsets[within]]
        return rows

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        known = self._permutations.get(epoch)
        if known is not None:
            return known
        return np.random.default_rng((*self._seed, epoch)).permutation(self._count)
