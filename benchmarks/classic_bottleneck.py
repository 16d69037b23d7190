"""The `bottleneck` recipe next to the script that everybody copied, on the same images and backbone.

    python benchmarks/classic_bottleneck.py --output benchmarks/results

The classic is TensorFlow's retrain.py as it was: one image at a time through the backbone, one text file of
comma-separated numbers for each image, and in each of 4,000 steps a hundred images drawn by chance, whose
files are opened, split and parsed; every tenth step judges a training and a validation batch, drawn and read
alike. Both use the same split, the same decoding, gradient descent at 0.01 and batches of 100.
What is compared are the ratios within the run; the seconds are this machine's.
"""

import argparse
import csv
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from photos import write_few_digits
from result import write_result

from graftserve.training import RunDirectory, train
from graftserve.training.backbones import BACKBONES, load_backbone
from graftserve.training.network import freeze
from graftserve.training.preprocess import decode_image
from graftserve.training.recipe_files import load_recipe

BATCH, STEPS, RATE, JUDGE_EVERY = 100, 4000, 0.01, 10


def main() -> None:
    """Run the recipe cold and warm, then the classic; print both by phase and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--data", type=Path, help="folder of class folders  [default: handwritten digits]")
    parser.add_argument("--images", type=int, default=1250, help="of the digits")
    parser.add_argument("--backbone", default="efficientnet-lite0")
    parser.add_argument("--weights", default="imagenet")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        data = arguments.data or write_few_digits(work_dir / "digits", arguments.images)
        recipe = load_recipe(
            "bottleneck",
            str(data),
            flags={"backbone": arguments.backbone, "weights": arguments.weights, "test_percent": 30.0},
        )
        ours = {}
        for name in ("cold", "warm"):
            started = time.monotonic()
            run = train(recipe, work_dir / name, cache_dir=work_dir / "cache")
            ours[name] = _ours(run, time.monotonic() - started)
            print(f"graftserve, {name}: {ours[name]}", flush=True)
        classic = _classic(run, data, work_dir / "bottlenecks")
        print(f"classic: {classic}", flush=True)

    ratios = {
        "steps": classic["steps_s"] / ours["cold"]["steps_s"],
        "total cold": classic["total_s"] / ours["cold"]["total_s"],
        "total warm": classic["total_s"] / ours["warm"]["total_s"],
    }
    print("times faster: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()))
    result = {
        "backbone": arguments.backbone,
        "images": run.metrics["images"],
        "ours": ours,
        "classic": classic,
        "times_faster": {name: round(ratio, 1) for name, ratio in ratios.items()},
    }
    write_result(arguments.output, "classic_bottleneck", result, rounds=1)


def _ours(run: RunDirectory, total_s: float) -> dict[str, Any]:
    metrics = run.metrics
    (stage,) = metrics["stages"]
    evaluation = run.evaluation("test")
    return {
        "features_s": metrics["seconds"]["features"],
        "steps_s": stage["history"][-1]["seconds"],
        "total_s": round(total_s, 3),
        "accuracy": evaluation.accuracy if evaluation else None,
        "engine": metrics["features"]["engine"],
    }


def _classic(run: RunDirectory, data: Path, folder: Path) -> dict[str, Any]:
    """The classic on the same split; the phases as its users knew them."""
    started = time.monotonic()
    preprocess = BACKBONES[run.recipe.backbone].preprocess
    backbone = freeze(load_backbone(run.recipe.backbone, run.recipe.weights))
    with (run.path / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lists: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        lists.setdefault(row["split"], {}).setdefault(row["label"], []).append(row["path"])

    features_started = time.monotonic()
    for row in rows:
        target = folder / f"{row['path']}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = decode_image(tf.constant((data / row["path"]).read_bytes()), preprocess)
        values = backbone(pixels[None])[0].numpy()[0]
        target.write_text(",".join(str(value) for value in values))
    features_s = time.monotonic() - features_started

    labels = run.labels
    head = keras.Sequential([keras.Input((_width(folder),)), keras.layers.Dense(len(labels))])
    kernel, bias = (variable.value for variable in head.trainable_variables)

    @tf.function
    def step(inputs: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(truth, inputs @ kernel + bias)
            loss = tf.reduce_mean(losses)
        for variable, gradient in zip((kernel, bias), tape.gradient(loss, (kernel, bias)), strict=True):
            variable.assign_sub(RATE * gradient)
        return loss

    @tf.function
    def share_right(inputs: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.cast(tf.argmax(inputs @ kernel + bias, axis=1) == truth, tf.float32))

    draw = random.Random(0)
    steps_started = time.monotonic()
    for number in range(STEPS):
        step(*_draw(draw, lists["train"], labels, folder))
        if number % JUDGE_EVERY == 0 or number == STEPS - 1:
            share_right(*_draw(draw, lists["train"], labels, folder)).numpy()
            share_right(*_draw(draw, lists["validation"], labels, folder)).numpy()
    steps_s = time.monotonic() - steps_started

    test = [(path, label) for label, paths in lists["test"].items() for path in paths]
    inputs = tf.constant([_read(folder, path) for path, _ in test], tf.float32)
    accuracy = float(share_right(inputs, tf.constant([labels.index(label) for _, label in test], tf.int64)))
    return {
        "features_s": round(features_s, 3),
        "steps_s": round(steps_s, 3),
        "total_s": round(time.monotonic() - started, 3),
        "accuracy": accuracy,
    }


def _width(folder: Path) -> int:
    """How many numbers a text file holds."""
    return len(next(folder.rglob("*.txt")).read_text().split(","))


def _draw(
    draw: random.Random, split: dict[str, list[str]], labels: tuple[str, ...], folder: Path
) -> tuple[tf.Tensor, tf.Tensor]:
    """A batch as the classic draws it: a random class, then a random image of it, then its file."""
    inputs, truth = [], []
    for _ in range(BATCH):
        index = draw.randrange(len(labels))
        paths = split.get(labels[index]) or next(iter(split.values()))
        inputs.append(_read(folder, paths[draw.randrange(2**27) % len(paths)]))
        truth.append(index)
    return tf.constant(inputs, tf.float32), tf.constant(truth, tf.int64)


def _read(folder: Path, path: str) -> list[float]:
    return [float(value) for value in (folder / f"{path}.txt").read_text().split(",")]


if __name__ == "__main__":
    main()
