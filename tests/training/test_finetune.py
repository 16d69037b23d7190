"""Every recipe as a user runs it, on real digits: what learns, what does not, and what the run says of it."""

import csv
import dataclasses
import json
import runpy
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from graftserve.training import RunDirectory, train
from graftserve.training.backbones import BACKBONES, load_backbone, network_of
from graftserve.training.errors import DataError, FitError
from graftserve.training.progress import Report
from graftserve.training.recipe import Recipe
from graftserve.training.recipe_files import load_recipe

FLAGS = {"backbone": "small", "weights": "none"}


@pytest.fixture(scope="module", autouse=True)
def small_backbone() -> Iterator[None]:
    """The backbone "small", for as long as these tests run."""
    path = Path(__file__).with_name("small_backbone.py")
    runpy.run_path(str(path))["register"]()
    yield
    del BACKBONES["small"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def recipe(name: str, digits_dir: Path, *settings: str) -> Recipe:
    return load_recipe(name, str(digits_dir), settings, FLAGS)


def layers_of(run: RunDirectory) -> dict[str, list[np.ndarray]]:
    model = run.load_model()
    network = network_of(model)
    return {layer.name: layer.get_weights() for layer in [*network.layers, *model.get_layer("head").layers]}


def moved_layers(run: RunDirectory) -> set[str]:
    """The layers of the backbone that are no longer what they were, by value."""
    before = {layer.name: layer.get_weights() for layer in network_of(load_backbone("small", "none")).layers}
    after = layers_of(run)
    return {
        name
        for name, values in before.items()
        if any((old != new).any() for old, new in zip(values, after[name], strict=True))
    }


def statistics_moved(run: RunDirectory) -> bool:
    return any((np.asarray(value) != 0).any() for value in (layers_of(run)[f"bn{i}"][2] for i in (1, 2)))


SHORT = {
    # recipe: (settings that make it short, layers that learn)
    "bottleneck": (["stages.steps=300", "batch_size=50"], set()),
    "frozen-lower": (
        ["stages.epochs=4", "stages.learning_rate=3e-3", "head.hidden=[32]"],
        {"bn2", "conv3"},  # layers 0 to 4: the input, conv1, bn1, relu1 and conv2
    ),
    "two-stage": (["stages.epochs=4", "stages.1.learning_rate=1e-2", "head.hidden=[32]"], {"conv3"}),
    "slim": (
        ["stages.0.steps=60", "stages.1.steps=20", "stages.1.learning_rate=0.01", "ema_decay=0.9"],
        {"conv1", "bn1", "conv2", "bn2", "conv3"},
    ),
    "discriminative": (["stages.epochs=4"], {"conv1", "bn1", "conv2", "bn2", "conv3"}),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_trains_what_it_says(name: str, digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    settings, learns = SHORT[name]
    run = train(recipe(name, digits_dir, *settings), tmp_path / "run", cache_dir=cache)
    assert moved_layers(run) == learns
    assert not statistics_moved(run)
    stages = run.metrics["stages"]
    for stage in stages:
        history = stage["history"]
        losses = [epoch["loss"] for epoch in history if epoch["loss"] is not None]
        assert losses[-1] < losses[0], stage["name"]
    first, last = stages[0]["history"][0], stages[-1]["history"][-1]
    assert last["validation_loss"] < first["validation_loss"]
    assert set(stages[-1]["layers"]) >= learns
    assert stages[-1]["trainable_parameters"] <= stages[-1]["parameters"]
    assert not (run.path / "checkpoint.npz").exists()


def test_the_saved_model_is_what_was_evaluated(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    wanted = recipe("discriminative", digits_dir, "stages.epochs=2")
    run = train(wanted, tmp_path / "run", cache_dir=cache)
    model = run.load_model()
    from graftserve.training.preprocess import decode_images

    with (run.path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"validation", "test"}
    pixels = decode_images([(digits_dir / row["path"]).read_bytes() for row in rows], run.preprocess)
    probabilities = np.asarray(model(pixels, training=False)["probabilities"])
    np.testing.assert_allclose(probabilities.max(axis=1), [float(row["score"]) for row in rows], atol=1e-4)
    assert [run.labels[index] for index in probabilities.argmax(axis=1)] == [row["predicted"] for row in rows]


class KilledError(Exception):
    pass


@pytest.mark.parametrize(("stage", "step"), [("head", 12), ("all layers", 11)])
def test_a_killed_run_is_resumed_exactly(
    stage: str, step: int, digits_dir: Path, cache: Path, tmp_path: Path
) -> None:
    wanted = recipe("discriminative", digits_dir, "stages.epochs=4", "ema_decay=0.5")
    whole = train(wanted, tmp_path / "whole", cache_dir=cache)

    def kill(report: Report) -> None:
        if report.stage == f"training: {stage}" and report.done >= step:
            raise KilledError

    with pytest.raises(KilledError):
        train(wanted, tmp_path / "run", cache_dir=cache, listener=kill)
    stages: list[str] = []
    resumed = train(
        wanted,
        tmp_path / "run",
        cache_dir=cache,
        resume=True,
        listener=lambda report: stages.append(report.stage),
    )
    assert ("training: head" in stages) == (stage == "head")
    for name, values in layers_of(whole).items():
        for value, other in zip(values, layers_of(resumed)[name], strict=True):
            np.testing.assert_allclose(other, value, rtol=1e-3, atol=1e-5, err_msg=name)
    histories = [
        [epoch["validation_loss"] for stage in run.metrics["stages"] for epoch in stage["history"]]
        for run in (whole, resumed)
    ]
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4)


def test_the_same_seed_gives_the_same_model(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    losses = []
    for index, seed in enumerate((5, 5, 6)):
        wanted = recipe("frozen-lower", digits_dir, "stages.epochs=1", "head.hidden=[8]", f"seed={seed}")
        run = train(wanted, tmp_path / str(index), cache_dir=cache)
        losses.append(run.metrics["stages"][0]["history"][-1]["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def test_pseudo_labels_are_counted_by_class(digits_dir: Path, cache: Path, tmp_path: Path, caplog) -> None:
    wanted = recipe(
        "two-stage",
        digits_dir,
        f"pseudo_labels.unlabeled_dir={str(digits_dir)!r}",
        "pseudo_labels.confidence=0.4",
        "stages=[{name='head', epochs=20, learning_rate=1e-2}]",
    )
    caplog.set_level("INFO")
    run = train(wanted, tmp_path / "run", cache_dir=cache)
    (stage,) = run.metrics["stages"]
    assert sum(stage["pseudo_labels"].values()) > 20
    assert "pseudo-labels: 0 " in caplog.text


def test_a_folder_without_images_gives_no_pseudo_labels(
    digits_dir: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    wanted = recipe("two-stage", digits_dir, f"pseudo_labels.unlabeled_dir={str(tmp_path / 'empty')!r}")
    with pytest.raises(DataError, match="empty"):
        train(wanted, tmp_path / "run", cache_dir=cache)


def test_a_found_learning_rate_is_used_and_shown(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    wanted = recipe(
        "bottleneck", digits_dir, "stages.steps=100", "batch_size=20", "stages.find_learning_rate=true"
    )
    run = train(wanted, tmp_path / "run", cache_dir=cache)
    sweep = run.metrics["sweeps"]["softmax layer"]
    assert run.metrics["stages"][0]["learning_rate"] == sweep["suggested"] != 0.01
    assert len(sweep["rates"]) == len(sweep["losses"])
    page = (run.path / "report.html").read_text()
    assert f"Learning rate of softmax layer: {sweep['suggested']:.2g}" in page


def test_mirror_images_are_a_second_view_of_cached_features(
    digits_dir: Path, cache: Path, tmp_path: Path
) -> None:
    plain = recipe("bottleneck", digits_dir, "stages.steps=50", "batch_size=20")
    flipped = dataclasses.replace(
        plain, augmentation=dataclasses.replace(plain.augmentation, horizontal_flip=True)
    )
    losses = []
    for index, wanted in enumerate((plain, flipped)):
        run = train(wanted, tmp_path / str(index), cache_dir=cache)
        losses.append(run.metrics["stages"][0]["history"][-1]["loss"])
        assert moved_layers(run) == set()
    assert losses[1] > losses[0]  # mirrored digits are harder to learn


def test_mixed_precision_leaves_a_model_in_float32(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    run = train(
        recipe("two-stage", digits_dir, "stages.epochs=1", "mixed_precision=true"),
        tmp_path / "run",
        cache_dir=cache,
    )
    model = run.load_model()
    assert {variable.dtype for variable in model.variables if "seed" not in variable.path} == {"float32"}
    assert {layer.compute_dtype for layer in network_of(model).layers} == {"float32"}
    assert run.metrics["stages"][1]["history"][-1]["loss"] > 0


def test_tensorboard_gets_the_numbers(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wanted = recipe("bottleneck", digits_dir, "stages.steps=60", "batch_size=20")
    run = train(wanted, tmp_path / "run", cache_dir=cache, tensorboard=True)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    tag = "softmax layer/loss/validation"
    values = [tensor.tensor_proto for tensor in events.Tensors(tag)]
    assert len(values) == len(run.metrics["stages"][0]["history"])


def test_errors_of_a_recipe_come_before_any_training(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    for settings, kind, message in [
        (["batch_size=100000"], FitError, "batch_size: expected at most the"),
        (["stages.unfreeze=conv9"], ValueError, "conv3"),
        (["stages.unfreeze=all", "stages.scopes=['nothing']"], FitError, "nothing"),
    ]:
        with pytest.raises(kind, match=message):
            train(
                recipe("frozen-lower", digits_dir, *settings),
                tmp_path / "run",
                cache_dir=cache,
                overwrite=True,
            )


def test_the_report_tells_what_was_frozen_when(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    run = train(recipe("two-stage", digits_dir, "stages.epochs=1"), tmp_path / "run", cache_dir=cache)
    page = (run.path / "report.html").read_text()
    HTMLParser().feed(page)
    for stage in run.metrics["stages"]:
        assert stage["name"] in page
        assert f"{stage['trainable_parameters']:,}" in page
    assert "<svg" in page
    assert json.loads((run.path / "recipe.json").read_text())["recipe"]["stages"][1]["unfreeze"] == "boundary"


def auto(digits_dir: Path, *settings: str) -> Any:
    return recipe("auto", digits_dir, *settings)


@pytest.mark.parametrize(
    ("situation", "trains"),
    [
        ("small-similar", []),
        ("small-different", []),
        ("large-similar", ["head", "top blocks"]),
        ("large-different", ["head", "all layers"]),
    ],
)
def test_auto_does_what_suits_the_situation_and_is_never_worse(
    situation: str, trains: list[str], digits_dir: Path, cache: Path, tmp_path: Path
) -> None:
    probe = train(recipe("probe", digits_dir), tmp_path / "probe", cache_dir=cache)
    run = train(auto(digits_dir, f"situation={situation}"), tmp_path / "run", cache_dir=cache)
    saw = run.metrics["auto"]
    assert saw["situation"] == situation
    assert f"{situation}, because the recipe says so" in saw["reasons"]
    assert list(saw["accuracy_by_layer"]) == ["relu1", "relu2", "features"]
    assert [stage["name"] for stage in run.metrics["stages"]] == trains
    assert run.evaluation("validation").accuracy >= probe.evaluation("validation").accuracy  # type: ignore[union-attr]
    if saw["kept"] == "probe":
        assert moved_layers(run) == set()
    assert situation in (run.path / "report.html").read_text()


def test_auto_measures_the_situation(digits_dir: Path, cache: Path, tmp_path: Path) -> None:
    run = train(auto(digits_dir), tmp_path / "run", cache_dir=cache)
    saw = run.metrics["auto"]
    assert saw["situation"].startswith("small-")
    assert saw["images_per_class"] == pytest.approx(16, abs=2)
    assert saw["reasons"][0].startswith("small data: ")
    best = max(saw["accuracy_by_layer"].values())
    assert f"{best:.3f}" in saw["reasons"][1]
    assert (saw["situation"] == "small-different") == bool(saw["layer"])


REAL = {  # few images and few epochs want bolder steps than the recipes take
    "bottleneck": [],
    "frozen-lower": [
        "stages.epochs=3",
        "stages.optimizer=adam",
        "stages.learning_rate=1e-4",
        "head.hidden=[256]",
    ],
    "two-stage": ["stages.0.epochs=20", "stages.1.epochs=2", "stages.1.learning_rate=1e-3"],
    "slim": ["stages.0.steps=400", "stages.1.steps=10", "stages.1.learning_rate=1e-3", "ema_decay=0.9"],
    "discriminative": ["stages.0.epochs=20", "stages.1.epochs=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_recipe_on_a_pretrained_backbone(
    name: str, digits_dir: Path, feature_cache: Path, trained: RunDirectory, tmp_path: Path
) -> None:
    """EfficientNet-Lite0 with its ImageNet weights: learnt from 166 images, far above chance on others."""
    settings = [*REAL[name], "stages.keep=last"]
    run = train(load_recipe(name, str(digits_dir), settings), tmp_path / "run", cache_dir=feature_cache)
    before = network_of(trained.load_model())
    after = network_of(run.load_model())
    moved = {
        layer.name
        for layer in before.layers
        for old, new in zip(layer.get_weights(), after.get_layer(layer.name).get_weights(), strict=True)
        if (old != new).any()
    }
    learns = {layer for stage in run.metrics["stages"] for layer in stage["layers"]}
    with_weights = {layer.name for layer in before.layers if layer.weights}
    assert moved == learns & with_weights
    assert bool(moved) == (name != "bottleneck")
    for layer in before.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            same = after.get_layer(layer.name)
            np.testing.assert_array_equal(same.moving_mean, layer.moving_mean)
            np.testing.assert_array_equal(same.moving_variance, layer.moving_variance)
    held_out = [run.evaluation(split) for split in ("validation", "test")]
    right = sum(result.accuracy * result.images for result in held_out if result)
    assert right / sum(result.images for result in held_out if result) > 0.3  # chance is 0.1
