"""The settings of a client, checked once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .retry import RetryPolicy

__all__ = ["Options", "checked_timeout_s"]


def checked_timeout_s(timeout_s: float) -> float:
    """`timeout_s` itself; raises ValueError unless it is above zero and finite."""
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"expected timeout_s above 0 and finite, got {timeout_s}")
    return timeout_s


@dataclass(frozen=True)
class Options:
    """What `Client` and `AsyncClient` are made with; `Client` says what each means.

    Raises ValueError for values out of range.
    """

    targets: tuple[str, ...]
    model: str
    version: int | None = None
    version_label: str | None = None
    timeout_s: float = 60.0
    max_batch_images: int = 32
    max_batch_bytes: int = 16 * 2**20
    max_in_flight: int = 16
    max_delay_s: float = 0.0
    target_latency_s: float | None = None
    max_queued_images: int = 4096
    max_queued_bytes: int = 256 * 2**20
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    wait_for_ready: bool = False
    health_check: str | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    channel_options: Mapping[str, str | int] | None = None

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ValueError("expected a target such as localhost:8500, got an empty one")
        if not self.model:
            raise ValueError("expected the model's name, got an empty one")
        if self.version is not None and self.version_label is not None:
            raise ValueError(
                f"expected version or version_label, got both: {self.version}, {self.version_label!r}"
            )
        checked_timeout_s(self.timeout_s)
        for name in (
            "max_batch_images",
            "max_batch_bytes",
            "max_in_flight",
            "max_queued_images",
            "max_queued_bytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of 1 or more, got {getattr(self, name)}")
        if not 0 <= self.max_delay_s < math.inf:
            raise ValueError(f"expected max_delay_s of 0 or more, got {self.max_delay_s}")
        if self.target_latency_s is not None and not 0 < self.target_latency_s < math.inf:
            raise ValueError(f"expected target_latency_s above 0 and finite, got {self.target_latency_s}")

    @property
    def target(self) -> str:
        """All targets, for messages."""
        return ", ".join(self.targets)
