"""The two-stage recipe next to the fine-tuning script of Keras's tutorials, on the same images and backbone.

    python benchmarks/classic_keras.py --output benchmarks/results

The classic reads a folder of class folders with image_dataset_from_directory, puts a head on a frozen
backbone and fits it with RMSprop, which computes every image's features anew in each epoch, and then
unfreezes the top blocks and goes on with SGD at 1e-4 and momentum 0.9. Ours is the recipe two-stage, which
says the same, but fits the head on features that were computed once. Both have the same split, the same
backbone and head, as many epochs of the same batches, and no augmentation; neither stops early.

- phases: seconds, and training images a second (validation after each epoch included);
- total: from a folder of images to a model judged on the held-out images, with the weights loaded by each;
- equal accuracy: the lower one of the two best accuracies on validation, and the seconds of training after
  which each first had it. The accuracy at the end is on images that neither saw.

What is not fair: the classic resizes as Keras does, stretching the image, and ours cuts it as the backbone's
description says, so the pixels differ a little. Ours keeps the best epoch of each stage, the classic the last
one, as its scripts did. Ours is timed with its report, its goldens and its duplicates, which the classic does
not have, and with the conversion of the network for LiteRT, where that computes the features. With a few
images the first step, in which TensorFlow builds its graph, is a large part of a phase of the classic.
"""

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from curves import reached_at
from photos import write_few_digits
from result import write_result

from graftserve.training import Recipe, RunDirectory, load_recipe, train
from graftserve.training.backbones import BACKBONES, load_backbone, network_of

HIDDEN = 1024
BATCH = 32
HEAD_RATE, TUNING_RATE, MOMENTUM = 1e-3, 1e-4, 0.9

History = list[tuple[float, float]]
"""Seconds of training so far, and the accuracy on validation."""


def main() -> None:
    """Train in both ways, print both by phase, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--data", type=Path, help="folder of class folders  [default: digits]")
    parser.add_argument("--images", type=int, default=1200, help="of the digits")
    parser.add_argument("--head-epochs", type=int, default=8)
    parser.add_argument("--tuning-epochs", type=int, default=4)
    parser.add_argument("--backbone", default="efficientnet-lite0")
    parser.add_argument("--weights", default="imagenet")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        data = arguments.data or write_few_digits(work_dir / "digits", arguments.images)
        recipe = _recipe(data, arguments)
        started_s = time.monotonic()
        run = train(recipe, work_dir / "run", cache_dir=work_dir / "cache")
        ours, our_history = _ours(run, time.monotonic() - started_s)
        print(f"graftserve: {ours}", flush=True)
        classic, classic_history = _classic(run, data, work_dir / "split")
        print(f"classic: {classic}", flush=True)

    accuracy = min(max(value for _, value in history) for history in (our_history, classic_history))
    reached_s = {
        "ours": reached_at(our_history, accuracy),
        "classic": reached_at(classic_history, accuracy),
    }
    times = {
        f"{name}_s": classic[f"{name}_s"] / ours[f"{name}_s"] for name in ("head", "tuning", "total")
    } | {"to_equal_accuracy": reached_s["classic"] / reached_s["ours"]}
    print("times faster: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in times.items()))
    result = {
        "backbone": arguments.backbone,
        "images": run.metrics["images"],
        "epochs": {"head": arguments.head_epochs, "tuning": arguments.tuning_epochs},
        "times_faster": {name: round(ratio, 2) for name, ratio in times.items()},
        "accuracy_classic_minus_ours": round(classic["accuracy"] - ours["accuracy"], 4),
        "equal_accuracy": {
            "validation_accuracy": round(accuracy, 4),
            "seconds_until_then": {name: round(seconds, 2) for name, seconds in reached_s.items()},
        },
        "ours": ours,
        "classic": classic,
    }
    write_result(arguments.output, "classic_keras", result, rounds=1)


def _recipe(data: Path, arguments: argparse.Namespace) -> Recipe:
    flags = {
        "backbone": arguments.backbone,
        "weights": arguments.weights,
        "batch_size": BATCH,
        "validation_percent": 15.0,
        "test_percent": 25.0,
        "head.hidden": [HIDDEN],
        "stages.0.epochs": float(arguments.head_epochs),
        "stages.1.epochs": float(arguments.tuning_epochs),
        "stages.0.patience": 0,
        "stages.1.patience": 0,
    }
    return load_recipe("two-stage", str(data), flags=flags)


def _ours(run: RunDirectory, total_s: float) -> tuple[dict[str, Any], History]:
    metrics = run.metrics
    head, tuning = metrics["stages"]
    features_s = metrics["seconds"]["features"]
    head_s = features_s + head["history"][-1]["seconds"]
    tuning_s = tuning["history"][-1]["seconds"]
    trained = sum(counts["train"] for counts in metrics["images"].values())
    history = [(features_s + epoch["seconds"], epoch["validation_accuracy"]) for epoch in head["history"]]
    history += [(head_s + epoch["seconds"], epoch["validation_accuracy"]) for epoch in tuning["history"]]
    evaluation = run.evaluation("test")
    if evaluation is None:
        raise SystemExit("expected images that are held out for a test; give more of them")
    phases = {
        "features_s": features_s,  # of the head's
        "head_s": round(head_s, 2),
        "tuning_s": round(tuning_s, 2),
        "total_s": round(total_s, 2),
        "accuracy": evaluation.accuracy,
        "engine_of_features": metrics["features"]["engine"],
    }
    return phases | _images_per_s(trained, head["epochs"], head_s, tuning["epochs"], tuning_s), history


def _classic(run: RunDirectory, data: Path, folder: Path) -> tuple[dict[str, Any], History]:
    """The classic on the same split."""
    started_s = time.monotonic()
    row = BACKBONES[run.recipe.backbone]
    with (run.path / "split.csv").open(newline="") as file:
        _lay_out(list(csv.DictReader(file)), data, folder)
    keras.utils.set_random_seed(0)

    def images_of(split: str) -> tf.data.Dataset:
        dataset = keras.utils.image_dataset_from_directory(
            *(folder / split, "inferred", "int", run.labels, "rgb"),
            batch_size=BATCH,
            image_size=(row.side_px, row.side_px),
            shuffle=split == "train",
            seed=0,
        )
        return dataset.prefetch(tf.data.AUTOTUNE)

    splits = {split: images_of(split) for split in ("train", "validation", "test")}
    backbone = load_backbone(run.recipe.backbone, run.recipe.weights)
    backbone.trainable = False
    pixels = keras.Input((row.side_px, row.side_px, 3))
    features = backbone(keras.ops.cast(pixels, "uint8"), training=False)
    hidden = keras.layers.Dense(HIDDEN, activation="relu")(features)
    model = keras.Model(pixels, keras.layers.Dense(len(run.labels), activation="softmax")(hidden))

    clock = _Clock()
    head, tuning = run.recipe.stages
    _fit(model, keras.optimizers.RMSprop(HEAD_RATE), splits, int(head.epochs), clock)
    head_s = clock.seconds
    backbone.trainable = True
    layers = network_of(backbone).layers
    first = [layer.name for layer in layers].index(row.boundary)
    for layer in layers[:first]:
        layer.trainable = False
    _fit(model, keras.optimizers.SGD(TUNING_RATE, MOMENTUM), splits, int(tuning.epochs), clock)
    tuning_s = clock.seconds - head_s
    _, accuracy = model.evaluate(splits["test"], verbose=0)
    trained = sum(counts["train"] for counts in run.metrics["images"].values())
    phases = {
        "head_s": round(head_s, 2),
        "tuning_s": round(tuning_s, 2),
        "total_s": round(time.monotonic() - started_s, 2),
        "accuracy": float(accuracy),
    }
    return phases | _images_per_s(trained, head.epochs, head_s, tuning.epochs, tuning_s), clock.history


def _lay_out(rows: Sequence[dict[str, str]], data: Path, folder: Path) -> None:
    """The split as folders of folders; every split has every class' folder, as Keras takes them."""
    for row in rows:
        for split in ("train", "validation", "test"):
            (folder / split / row["label"]).mkdir(parents=True, exist_ok=True)
        image = (data / row["path"]).resolve()
        os.symlink(image, folder / row["split"] / row["label"] / image.name)


class _Clock(keras.callbacks.Callback):
    """Seconds of training, over several fits; history: as of `History`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.history: History = []
        self._began_s = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self._began_s = time.monotonic() - self.seconds

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.monotonic() - self._began_s
        self.history.append((self.seconds, logs["val_accuracy"]))


def _fit(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    splits: dict[str, tf.data.Dataset],
    epochs: int,
    clock: _Clock,
) -> None:
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        splits["train"],
        validation_data=splits["validation"],
        epochs=epochs,
        callbacks=[clock],
        shuffle=False,  # the folder's images are shuffled where they are read
        verbose=0,
    )


def _images_per_s(
    images: int, head_epochs: float, head_s: float, tuning_epochs: float, tuning_s: float
) -> dict[str, Any]:
    """As often as they were learnt from."""
    head, tuning = images * head_epochs / head_s, images * tuning_epochs / tuning_s
    return {"images_per_s": {"head": round(head, 1), "tuning": round(tuning, 1)}}


if __name__ == "__main__":
    main()
