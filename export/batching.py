"""How the exported network gathers the images of concurrent requests."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import tensorflow as tf

__all__ = ["QUEUE", "Batching", "batch_network"]

QUEUE = "network"
"""Name of the queue in a graph: how its BatchFunction nodes are known."""


@dataclass(frozen=True)
class Batching:
    """Parameters of the scheduler inside the graph (TensorFlow's BatchFunction, batch_ops.cc).

    threads: batches that run at the same time.
    sizes: the batch sizes that are executed, ascending; a batch is padded to the next of them, and a larger
        request is split by the last. On a CPU 4 to 8 images at once are the fastest, and padding is work.
    timeout_us: how long an incomplete batch waits while a thread is free; 0 gathers only what arrives while
        all threads are busy, so a lone request never waits.
    max_request_images: larger requests are refused with INVALID_ARGUMENT.
    max_queued_batches: beyond it requests are refused with UNAVAILABLE.
    Raises ValueError if a value is out of its range.
    """

    threads: int = 2
    sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    timeout_us: int = 0
    max_request_images: int = 1024
    max_queued_batches: int = 4096

    def __post_init__(self) -> None:
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes: expected ascending positive numbers, got {self.sizes}")
        if self.threads < 1 or self.timeout_us < 0:
            raise ValueError(
                f"threads: expected at least 1, got {self.threads}; "
                f"timeout_us: expected at least 0, got {self.timeout_us}"
            )
        needed = -(-self.max_request_images // self.sizes[-1])
        if self.max_request_images < self.sizes[-1] or self.max_queued_batches < needed:
            raise ValueError(
                f"max_request_images: expected at least {self.sizes[-1]}, got {self.max_request_images}; "
                f"max_queued_batches: expected at least {needed}, got {self.max_queued_batches}"
            )

    def to_text(self) -> str:
        """The same for a server that is run with --enable_batching, as its --batching_parameters_file.

        There the largest request is the largest batch, so larger ones are refused.
        Source: tensorflow_serving/servables/tensorflow/session_bundle_config.proto, BatchingParameters.
        """
        values = {
            "max_batch_size": self.sizes[-1],
            "batch_timeout_micros": self.timeout_us,
            "max_enqueued_batches": self.max_queued_batches,
            "num_batch_threads": self.threads,
        }
        lines = [f"{name} {{ value: {value} }}" for name, value in values.items()]
        lines += [f"allowed_batch_sizes: {size}" for size in self.sizes]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def batch_network(function: Any, batching: Batching | None) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """`function` with its rows gathered from concurrent calls; each call gets its own rows back.

    function: a ConcreteFunction of one tensor [N, ...] to a list of them. None as batching calls it directly.
    All calls in a graph share one queue, whichever signature they come from.
    """
    if batching is None:
        return lambda rows: list(function(rows))

    def batched(rows: tf.Tensor) -> list[tf.Tensor]:
        outputs: list[tf.Tensor] = tf.raw_ops.BatchFunction(
            in_tensors=[rows],
            captured_tensors=function.captured_inputs,
            f=function,
            Tout=[output.dtype for output in function.outputs],
            num_batch_threads=batching.threads,
            max_batch_size=batching.max_request_images,
            batch_timeout_micros=batching.timeout_us,
            allowed_batch_sizes=list(batching.sizes),
            max_enqueued_batches=batching.max_queued_batches,
            enable_large_batch_splitting=True,
            shared_name=QUEUE,
        )
        return outputs

    return batched
