"""A finished run as something to export."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from graftserve.training.calibration import apply_temperature
from graftserve.training.graft import logits_of, split_model
from graftserve.training.preprocess import decode_images
from graftserve.training.run import RunDirectory

from .errors import ExportError, SourceError
from .goldens import GoldenImage
from .network import FEATURES_OUTPUT, PROBABILITIES_OUTPUT, Network, freeze_network
from .source import Source

__all__ = ["open_run"]

_TOLERANCE = 1e-4


def open_run(path: Path) -> Source:
    """The run in `path`, its model at the temperature that its evaluation found.

    Raises RunError (not finished, or damaged), SourceError (the model does not fit the run's labels or
    preprocessing, or has weights that are no numbers), ExportError (it answers differently than when it was
    trained).
    """
    run = RunDirectory.open_finished(path)
    model = run.load_model()
    check_finite(model.variables, path / "model.keras")
    side_px, classes = run.preprocess.side_px, model.output[PROBABILITIES_OUTPUT].shape[-1]
    if tuple(model.input.shape[1:]) != (side_px, side_px, 3):
        raise SourceError(
            f"{path}: the model takes images of {list(model.input.shape[1:])}, but the run decodes to "
            f"{[side_px, side_px, 3]}; train again"
        )
    if classes != len(run.labels):
        raise SourceError(
            f"{path}: the head has {classes} classes, but labels.txt has {len(run.labels)} lines; train again"
        )
    if not run.goldens:
        raise SourceError(f"{path}: holds no golden images to check an export with; train again")
    trained = model(
        decode_images([golden.file.read_bytes() for golden in run.goldens], run.preprocess), training=False
    )
    probabilities = trained[PROBABILITIES_OUTPUT].numpy()
    recorded = np.array([golden.probabilities for golden in run.goldens])
    if recorded.shape != probabilities.shape or not np.allclose(recorded, probabilities, atol=_TOLERANCE):
        raise ExportError(
            f"{path}: model.keras answers differently from when it was trained (another TensorFlow, or a "
            "damaged file); train again"
        )
    expected = apply_temperature(probabilities, run.temperature)
    goldens = tuple(
        GoldenImage(golden.file.name, golden.file.read_bytes(), golden.label, tuple(row))
        for golden, row in zip(run.goldens, expected.tolist(), strict=True)
    )
    return Source(
        kind="run",
        name=run.recipe.backbone,
        network=_freeze(model, side_px, run.temperature),
        labels=run.labels,
        preprocess=run.preprocess,
        goldens=goldens,
        temperature=run.temperature,
        run=run,
    )


def _freeze(model: keras.Model, side_px: int, temperature: float) -> Network:
    """The logits themselves are divided by the temperature, not what is left of them in probabilities."""
    backbone, head = split_model(model)
    logits = logits_of(head)

    def call(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        features = backbone(pixels, training=False)
        probabilities = tf.nn.softmax(logits(features, training=False) / temperature)
        return {FEATURES_OUTPUT: features, PROBABILITIES_OUTPUT: probabilities}

    return freeze_network(call, side_px)


def check_finite(variables: Iterable[Any], where: Path) -> None:
    """Raise SourceError for weights that are not numbers, naming them."""
    broken = [
        getattr(variable, "path", variable.name)  # Keras's name alone does not say of which layer
        for variable in variables
        if not np.isfinite(np.asarray(variable)).all()
    ]
    if broken:
        raise SourceError(
            f"{where}: {len(broken)} weights are not finite numbers, the first: {broken[0]}; the training "
            "diverged: train again with a lower learning rate"
        )
