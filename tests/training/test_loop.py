"""The training loop by what it does to variables, on real digits and a small network."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from graftserve.training.checkpoint import Checkpoint
from graftserve.training.errors import FitError
from graftserve.training.graft import build_head
from graftserve.training.inputs import FeatureInputs
from graftserve.training.learner import Learner, StageData, Unlabeled
from graftserve.training.loop import run_stage, sweep_learning_rate
from graftserve.training.progress import Report
from graftserve.training.recipe import Augmentation, Head, PseudoLabels, Recipe, Stage

SIDE_PX = 16
LINEAR = Head()
FAST = Stage(name="fast", unfreeze="all", epochs=2, learning_rate=3e-3)


def backbone(seed: int = 0) -> keras.Model:
    """A small network in a backbone's shape, with BatchNorm: conv1, bn1, conv2, bn2."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = keras.layers.Rescaling(1 / 255)(image)
    for index, filters in enumerate((8, 16), start=1):
        x = keras.layers.Conv2D(filters, 3, strides=2, padding="same", name=f"conv{index}")(x)
        x = keras.layers.BatchNormalization(name=f"bn{index}")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
    network = keras.Model(image, keras.layers.Flatten()(x), name="network")
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3), dtype="uint8")
    return keras.Model(pixels, network(pixels), name="small")


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.kron(data.images[:400], np.ones((1, 2, 2)))[..., None] * (255 / 16)
    return np.repeat(grey, 3, axis=-1).astype(np.uint8), data.target[:400].astype(np.int64)


def learner(*, on_pixels: bool = True, head: Head = LINEAR, seed: int = 0) -> Learner:
    network = backbone(seed)
    return Learner(network, build_head(network.output_shape[-1], 10, head, seed), on_pixels, tuned=on_pixels)


def data(learner: Learner, train: int = 300, unlabeled: np.ndarray | None = None) -> StageData:
    """The first digits to learn from, the last to validate; unlabeled: inputs for pseudo-labels."""
    pixels, labels = digits()
    rows = pixels if learner.on_pixels else np.asarray(learner.backbone(pixels, training=False))
    more = rows[:0] if unlabeled is None else unlabeled
    inputs = FeatureInputs(np.concatenate([rows[:train], more]))
    return StageData(
        inputs,
        labels[:train],
        FeatureInputs(rows[300:]),
        labels[300:],
        unlabeled=Unlabeled(inputs.after(train), len(more)) if len(more) else None,
    )


def run(
    learner: Learner,
    stage: Stage = FAST,
    tmp_path: Path | None = None,
    recipe: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    wanted = Recipe("x", stages=(stage,), method="fine-tune", **(recipe or {}))
    checkpoint = Checkpoint((tmp_path or Path("/nonexistent")) / "checkpoint.npz")
    if tmp_path is None:
        checkpoint.save = lambda *_: None  # type: ignore[method-assign]
    return run_stage(wanted, 0, stage, learner, more.pop("data", None) or data(learner), checkpoint, **more)


def weights(learner: Learner) -> dict[str, np.ndarray]:
    network = next(layer for layer in learner.backbone.layers if isinstance(layer, keras.Model))
    return {
        f"{layer.name}/{variable.name}": np.array(variable)
        for layer in [*network.layers, *learner.head.layers]
        for variable in layer.weights
    }


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name in before if (before[name] != after[name]).any()}


BN_STATISTICS = {f"bn{index}/moving_{kind}" for index in (1, 2) for kind in ("mean", "variance")}
CONV = {f"conv{index}/{kind}" for index in (1, 2) for kind in ("kernel", "bias")}
BN_SCALES = {f"bn{index}/{kind}" for index in (1, 2) for kind in ("gamma", "beta")}
HEAD = {"logits/kernel", "logits/bias"}


@pytest.mark.parametrize(
    ("unfreeze", "scopes", "expected"),
    [
        ("all", (), CONV | BN_SCALES | HEAD),
        ("conv2", (), {name for name in CONV | BN_SCALES if "2/" in name} | HEAD),
        ("all", ("conv1",), {"conv1/kernel", "conv1/bias"}),
        ("all", ("bn2", "head"), {"bn2/gamma", "bn2/beta"} | HEAD),
    ],
)
def test_what_is_unfrozen_moves_and_nothing_else(
    unfreeze: str, scopes: tuple[str, ...], expected: set[str]
) -> None:
    subject = learner()
    before = weights(subject)
    result = run(subject, dataclasses.replace(FAST, unfreeze=unfreeze, scopes=scopes, keep="last"))
    assert moved(before, weights(subject)) == expected
    assert result.trainable_parameters == sum(before[name].size for name in expected)


def test_the_loss_falls_and_the_best_epoch_is_kept() -> None:
    subject = learner()
    result = run(subject, dataclasses.replace(FAST, epochs=8))
    losses = [epoch.loss for epoch in result.history[1:]]
    assert losses[-1] < losses[0] / 2
    best = max(result.history, key=lambda epoch: (epoch.validation_accuracy, -epoch.validation_loss))
    assert result.best_epoch == best.epoch
    assert best.validation_accuracy > 0.8
    given = data(subject)
    probabilities = subject.predict(given.validation, len(given.validation_labels))
    accuracy = (probabilities.argmax(axis=1) == given.validation_labels).mean()
    assert accuracy == pytest.approx(best.validation_accuracy)


def test_features_are_learnt_from_without_the_backbone() -> None:
    subject = learner(on_pixels=False)
    before = weights(subject)
    result = run(subject, Stage(name="head", epochs=20, learning_rate=3e-3))
    assert moved(before, weights(subject)) == HEAD
    assert result.history[-1].validation_accuracy > 0.7


def test_batch_norm_keeps_its_statistics_unless_asked() -> None:
    subject = learner()
    before = weights(subject)
    run(subject, dataclasses.replace(FAST, keep="last"))
    assert not moved(before, weights(subject)) & BN_STATISTICS
    subject = learner()
    run(subject, dataclasses.replace(FAST, keep="last"), recipe={"batch_norm": "train"})
    assert moved(before, weights(subject)) >= BN_STATISTICS
    subject = learner()
    run(subject, dataclasses.replace(FAST, unfreeze="conv2", keep="last"), recipe={"batch_norm": "train"})
    assert moved(before, weights(subject)) & BN_STATISTICS == {"bn2/moving_mean", "bn2/moving_variance"}


class KilledError(Exception):
    pass


def killing(step: int) -> Any:
    def listener(report: Report) -> None:
        if report.stage.startswith("training") and report.done >= step:
            raise KilledError

    return listener


@pytest.mark.parametrize(
    ("on_pixels", "recipe"),
    [
        (False, {"head": Head((12,), 0.5)}),
        (
            True,
            {"head": Head((12,), 0.5), "augmentation": Augmentation(True, 0.1, 0.1, 10.0), "ema_decay": 0.9},
        ),
        (True, {"augmentation": Augmentation(mixup=0.4), "batch_norm": "train", "clip_norm": 0.5}),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, on_pixels: bool, recipe: dict[str, Any]
) -> None:
    stage = dataclasses.replace(FAST, unfreeze="all" if on_pixels else "none", epochs=4, schedule="cosine")
    head = recipe.get("head", Head())
    whole = learner(on_pixels=on_pixels, head=head)
    expected = run(whole, stage, recipe=recipe)

    with pytest.raises(KilledError):
        run(learner(on_pixels=on_pixels, head=head), stage, tmp_path, recipe, listener=killing(25))
    resumed = learner(on_pixels=on_pixels, head=head, seed=7)  # whatever it begins with is replaced
    resumed.backbone.set_weights(learner(on_pixels=on_pixels, head=head).backbone.get_weights())
    seen: list[int] = []
    result = run(resumed, stage, tmp_path, recipe, on_epoch=lambda epoch: seen.append(epoch.step))
    assert seen[0] > 10  # it did go on, and not begin again
    assert [epoch.step for epoch in result.history] == [epoch.step for epoch in expected.history]
    for name in ("loss", "validation_loss"):
        values = [[getattr(epoch, name) for epoch in each.history[1:]] for each in (result, expected)]
        np.testing.assert_allclose(*values, rtol=1e-4)
    for name, value in weights(resumed).items():
        np.testing.assert_allclose(value, weights(whole)[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    from graftserve.training.errors import RunError

    with pytest.raises(KilledError):
        run(learner(), dataclasses.replace(FAST, epochs=3), tmp_path, listener=killing(20))
    with pytest.raises(RunError, match="of another network"):
        run(learner(head=Head((5,))), dataclasses.replace(FAST, epochs=3), tmp_path)


def test_early_stopping_waits_as_long_as_it_was_told() -> None:
    stage = Stage(name="still", epochs=50, learning_rate=1e-12, patience=3)
    result = run(learner(on_pixels=False), stage)
    assert result.stopped == "no better on validation for 3 epochs"
    assert result.epochs == pytest.approx(3, abs=0.4)


def test_label_smoothing_keeps_the_model_modest() -> None:
    confidences = []
    for smoothing in (0.0, 0.3):
        subject = learner(on_pixels=False)
        run(
            subject, Stage(epochs=100, learning_rate=1e-2, keep="last"), recipe={"label_smoothing": smoothing}
        )
        given = data(subject)
        confidences.append(subject.predict(given.train, 300).max(axis=1).mean())
    assert confidences[0] > 0.95
    assert confidences[1] < 0.85


def test_class_weights_make_up_for_a_rare_class() -> None:
    pixels, labels = digits()
    rare = np.flatnonzero(labels[:300] == 8)[2:]
    rows = np.setdiff1d(np.arange(300), rare)
    shares = []
    for kind in ("none", "balanced"):
        subject = learner(on_pixels=False)
        features = np.asarray(subject.backbone(pixels, training=False))
        given = StageData(
            FeatureInputs(features[rows]), labels[rows], FeatureInputs(features[:0]), labels[:0]
        )
        run(subject, Stage(epochs=3, learning_rate=3e-3), recipe={"class_weights": kind}, data=given)
        shares.append(subject.predict(FeatureInputs(features), 400)[:, 8].mean())
    assert shares[1] > 1.5 * shares[0]


def test_the_moving_average_is_what_is_kept() -> None:
    plain, averaged = learner(on_pixels=False), learner(on_pixels=False)
    stage = Stage(epochs=2, learning_rate=1e-2, keep="last")
    run(plain, stage)
    run(averaged, stage, recipe={"ema_decay": 0.99})
    start = weights(learner(on_pixels=False))["logits/kernel"]
    ways = [np.abs(weights(each)["logits/kernel"] - start).sum() for each in (averaged, plain)]
    assert 0.05 < ways[0] / ways[1] < 0.95


def test_clipping_bounds_the_step() -> None:
    subject = learner(on_pixels=False)
    before = weights(subject)
    stage = Stage(steps=1, optimizer="sgd", momentum=0.0, learning_rate=1.0, keep="last")
    run(subject, stage, recipe={"clip_norm": 0.01})
    after = weights(subject)
    norm = np.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in HEAD))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_each_layer_learns_at_its_own_rate() -> None:
    """One step of plain descent: what a layer moves by is its gradient times its rate."""
    ways = []
    for stage in (Stage(), Stage(backbone_rate=0.1), Stage(backbone_rate=0.1, layer_decay=0.5)):
        subject = learner()
        before = weights(subject)
        settings = {"unfreeze": "all", "steps": 1, "optimizer": "sgd", "momentum": 0.0, "keep": "last"}
        run(subject, dataclasses.replace(stage, **settings, learning_rate=1e-2))
        ways.append({name: np.abs(value - before[name]).max() for name, value in weights(subject).items()})
    assert ways[1]["logits/kernel"] == pytest.approx(ways[0]["logits/kernel"], rel=1e-3)
    assert ways[1]["conv1/kernel"] == pytest.approx(0.1 * ways[0]["conv1/kernel"], rel=1e-2)
    assert ways[2]["bn2/gamma"] == pytest.approx(0.1 * ways[0]["bn2/gamma"], rel=1e-2)
    assert ways[2]["conv1/kernel"] < ways[1]["conv1/kernel"] / 3


def test_mixed_precision_learns_too() -> None:
    usual = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        network = backbone()
    finally:
        keras.config.set_dtype_policy(usual)
    head = build_head(network.output_shape[-1], 10, Head())
    subject = Learner(network, head, on_pixels=True, tuned=True)
    result = run(subject, dataclasses.replace(FAST, epochs=4), recipe={"mixed_precision": True})
    assert result.history[-1].loss < result.history[1].loss / 1.5
    assert {variable.dtype for variable in subject.backbone.trainable_variables} == {"float32"}


def test_pseudo_labels_come_from_what_the_model_is_sure_of() -> None:
    pixels, _ = digits()
    subject = learner(on_pixels=False)
    features = np.asarray(subject.backbone(pixels, training=False))
    recipe = {"pseudo_labels": PseudoLabels("somewhere", 0.5, 0.25, start_epoch=30), "batch_size": 20}
    stage = Stage(epochs=60, learning_rate=3e-3)
    result = run(subject, stage, recipe=recipe, data=data(subject, train=100, unlabeled=features[100:300]))
    assert 20 < sum(result.pseudo_labels.values()) <= 200
    assert len(result.pseudo_labels) > 5
    off = run(learner(on_pixels=False), dataclasses.replace(stage, epochs=20), recipe=recipe,
              data=data(subject, train=100, unlabeled=features[100:300]))  # fmt: skip
    assert off.pseudo_labels == {}


def test_wrong_pseudo_labels_are_learnt_which_shows_that_they_are() -> None:
    """Images without labels that all look like one class pull the model to it."""
    pixels, labels = digits()
    subject = learner(on_pixels=False)
    features = np.asarray(subject.backbone(pixels, training=False))
    zeros = features[np.flatnonzero(labels == 0)]
    noise = zeros.mean(axis=0) + np.random.default_rng(0).normal(0, 1e-3, (50, zeros.shape[1])).astype(
        np.float32
    )
    shares = {}
    for share in (0.05, 0.9):
        subject = learner(on_pixels=False)
        settings = PseudoLabels("somewhere", 0.1, share, start_epoch=0)
        run(
            subject,
            Stage(epochs=10, learning_rate=3e-3, keep="last"),
            recipe={"pseudo_labels": settings, "batch_size": 20},
            data=data(subject, train=100, unlabeled=noise),
        )
        answers = subject.predict(FeatureInputs(features), 400).argmax(axis=1)
        shares[share] = np.bincount(answers).max() / len(answers)
    assert shares[0.9] > 1.5 * shares[0.05]


def test_the_sweep_finds_a_rate_that_learns_and_changes_nothing() -> None:
    subject = learner()
    before = weights(subject)
    stage = dataclasses.replace(FAST, optimizer="sgd")
    sweep = sweep_learning_rate(Recipe("x"), 0, stage, subject, data(subject))
    assert not moved(before, weights(subject))
    assert list(sweep.rates) == sorted(sweep.rates)
    assert sweep.rates[0] == pytest.approx(1e-6)
    assert len(sweep.losses) == len(sweep.rates) > 20
    result = run(subject, dataclasses.replace(stage, learning_rate=sweep.suggested))
    assert result.history[-1].loss < 0.9 * result.history[1].loss


def test_what_cannot_go_on_says_why() -> None:
    with pytest.raises(
        FitError, match=r"batch_size: expected at most the 300 training images there are, got 301"
    ):
        run(learner(), recipe={"batch_size": 301})
    with pytest.raises(FitError, match="nothing"):
        run(learner(), dataclasses.replace(FAST, scopes=("no_such_layer",)))
    stage = Stage(name="wild", unfreeze="all", steps=60, optimizer="sgd", learning_rate=1e20)
    with pytest.raises(
        FitError, match=r"stage 'wild': the loss is no longer a number after \d+ steps.*lower"
    ):
        run(learner(), stage)


def test_too_little_memory_names_the_batch_to_try() -> None:
    class Full(FeatureInputs):
        def ahead(self, batches: Any) -> Any:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    subject = learner()
    given = dataclasses.replace(data(subject), train=Full(np.zeros((300, 1), np.float32)))
    with pytest.raises(FitError, match=r"memory.*--batch-size 16"):
        run(subject, data=given)
