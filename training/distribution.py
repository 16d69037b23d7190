"""Several GPUs or several machines, by what TensorFlow has for them.

One process with several GPUs mirrors the variables; `TF_CONFIG` names the workers of several machines
(tensorflow.org/guide/distributed_training). Every worker runs the same command on the same data; the first
one writes the run directory.
"""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .errors import RecipeError

__all__ = ["Workers", "start_workers"]


@dataclass(frozen=True)
class Workers:
    """index, count: which of the workers this process is. strategy: None where one device does it all."""

    index: int = 0
    count: int = 1
    strategy: tf.distribute.Strategy | None = None
    _local_replicas: int = field(default=1, repr=False)

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that writes the run directory."""
        return self.index == 0

    @property
    def replicas(self) -> int:
        """Devices that share each batch, over all workers."""
        return self.count * self._local_replicas

    def scope(self) -> Any:
        """Where variables are to be made so that every replica has them."""
        return self.strategy.scope() if self.strategy else nullcontext()

    def share(self, batch: Sequence[npt.NDArray[Any]], axis: int = 0) -> tuple[Any, ...]:
        """This process's part of a batch's arrays, one equal slice along `axis` for each of its replicas.

        Without several replicas the arrays are given back as tensors. The size of the axis is a multiple of
        `replicas`.
        """
        strategy = self.strategy
        if strategy is None:
            return tuple(tf.convert_to_tensor(array) for array in batch)
        size = batch[0].shape[axis] // self.replicas
        first = self.index * self._local_replicas

        def of(array: npt.NDArray[Any]) -> Any:
            def part(context: Any) -> tf.Tensor:
                start = (first + context.replica_id_in_sync_group % self._local_replicas) * size
                return tf.convert_to_tensor(array.take(range(start, start + size), axis))

            return strategy.experimental_distribute_values_from_function(part)

        return tuple(of(array) for array in batch)

    def all_gather(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows of every worker, one after the other in the workers' order; their numbers may differ."""
        if self.count == 1:
            return rows
        counts = self._gather(np.array([len(rows)], np.int64)).tolist()
        most = max(counts)
        if not most:
            return rows  # TensorFlow's collective crashes on tensors without elements
        padded = np.zeros((most, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        gathered = self._gather(padded).reshape(self.count, most, *rows.shape[1:])
        return np.concatenate([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def _gather(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows [n, ...], as many on every worker, one after the other."""
        # Collectives carry no bytes, and every replica takes part: the first of each worker is heard.
        sent = np.repeat((rows.astype(np.int32) if rows.dtype == np.uint8 else rows)[None], self.replicas, 0)
        strategy: Any = self.strategy
        gathered: npt.NDArray[Any] = np.asarray(strategy.gather(self.share((sent,))[0], axis=0))
        heard = gathered[:: self._local_replicas].astype(rows.dtype)
        return heard.reshape(-1, *rows.shape[1:])

    def barrier(self) -> None:
        """Wait until every worker is here."""
        self.all_gather(np.zeros((1,), np.int32))


def start_workers() -> Workers:
    """What `TF_CONFIG` and the visible GPUs say. To be called before anything else runs in TensorFlow.

    Raises RecipeError for a TF_CONFIG that cannot be used.
    """
    config = os.environ.get("TF_CONFIG")
    if config:
        try:
            values = json.loads(config)
            workers, task = values["cluster"]["worker"], values["task"]
            index = int(task["index"])
            usable = task["type"] == "worker" and 0 <= index < len(workers)
        except (ValueError, KeyError, TypeError):
            usable = False
        if not usable:
            raise RecipeError(
                'TF_CONFIG: expected {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", '
                f'"index": 0}}}} with an index below the number of workers, got {config}'
            )
        if len(workers) > 1:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
            return Workers(index, len(workers), strategy, strategy.num_replicas_in_sync // len(workers))
    gpus = len(tf.config.list_logical_devices("GPU"))
    if gpus > 1:
        return Workers(0, 1, tf.distribute.MirroredStrategy(), gpus)
    return Workers()
