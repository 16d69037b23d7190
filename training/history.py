"""What a stage of fine-tuning did, in plain values: for the checkpoint, the metrics and the report."""

from dataclasses import dataclass, field

__all__ = ["Epoch", "StageResult", "Sweep"]


@dataclass(frozen=True)
class Epoch:
    """One evaluation. epoch: 0 before the first step, then up to the stage's epochs; loss: mean over the
    steps since the last one (None at epoch 0); validation values are None without validation images."""

    stage: str
    epoch: float
    step: int
    loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class StageResult:
    """stopped: "done", or why it ended early. pseudo_labels: by class, at the last time they were drawn."""

    name: str
    unfreeze: str
    trainable_parameters: int
    parameters: int
    layers: tuple[str, ...]
    steps: int
    epochs: float
    best_epoch: float | None
    stopped: str
    learning_rate: float
    history: tuple[Epoch, ...]
    pseudo_labels: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A learning-rate sweep: the loss after a step at each of the rising rates, and the rate it suggests."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float
