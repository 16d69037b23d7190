"""Rates, groups, optimizers and averages, compared with what a pencil gives."""

import math
import os
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest

from graftserve.training.errors import FitError, RecipeError
from graftserve.training.graft import build_head
from graftserve.training.optimization import (
    Group,
    GroupedOptimizer,
    MovingAverage,
    learning_rate,
    out_of_memory,
    parameter_groups,
    suggest_rate,
    trainable_layers,
)
from graftserve.training.recipe import Head, Stage


@pytest.fixture(scope="module")
def network() -> keras.Model:
    image = keras.Input((8, 8, 3), name="image")
    x = image
    for index in (1, 2, 3):
        x = keras.layers.Conv2D(4, 3, padding="same", name=f"conv{index}")(x)
        x = keras.layers.BatchNormalization(name=f"bn{index}")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
    return keras.Model(image, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="net")


@pytest.fixture(scope="module")
def head() -> keras.Model:
    return build_head(4, 3, Head((5,)))


def rates(steps: int, epoch_steps: float, **settings: Any) -> list[float]:
    rate = learning_rate(Stage(learning_rate=1.0, **settings), epoch_steps, steps)
    return [float(rate(step)) for step in range(steps)]


def test_schedules() -> None:
    assert rates(4, 2) == [1, 1, 1, 1]
    assert rates(6, 2, schedule="exponential", decay_rate=0.5, decay_epochs=1) == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates(6, 2, schedule="exponential", decay_rate=0.1, decay_epochs=1, end_learning_rate=0.05) == (
        pytest.approx([1, 1, 0.1, 0.1, 0.05, 0.05])
    )
    linear = rates(5, 2, schedule="polynomial", end_learning_rate=0.5)
    assert linear == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])
    cosine = rates(4, 2, schedule="cosine")
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    warm = rates(6, 2, schedule="polynomial", warmup_epochs=1)
    assert warm == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("unfreeze", "scopes", "expected"),
    [
        ("none", (), []),
        ("bn3", (), ["bn3", "relu3", "pool"]),
        ("7", (), ["conv3", "bn3", "relu3", "pool"]),
        ("all", ("conv",), ["conv1", "conv2", "conv3"]),
        ("conv2", ("bn", "head"), ["bn2", "bn3"]),
    ],
)
def test_which_layers_learn(network, unfreeze: str, scopes: tuple[str, ...], expected: list[str]) -> None:
    layers = trainable_layers(network, Stage(unfreeze=unfreeze, scopes=scopes))
    assert [layer.name for layer in layers] == expected
    assert len(trainable_layers(network, Stage(unfreeze="all"))) == len(network.layers)


def test_layers_that_there_are_none_of(network) -> None:
    with pytest.raises(RecipeError, match=r"net has no layer 'convv2'; did you mean conv2\?"):
        trainable_layers(network, Stage(unfreeze="convv2"))
    with pytest.raises(RecipeError, match="0 to 10, got 11"):
        trainable_layers(network, Stage(unfreeze="11"))


def scales(groups: list[Group]) -> dict[str, float]:
    return {variable.path: group.scale for group in groups for variable in group.variables}


def test_groups_have_the_rates_of_their_blocks(network, head) -> None:
    stage = Stage(unfreeze="all", backbone_rate=0.1, layer_decay=0.5)
    groups = parameter_groups(stage, network, head, ("relu1", "relu2", "relu3"))
    found = scales(groups)
    assert found["logits/kernel"] == found["hidden0/bias"] == 1
    for block, scale in ((3, 0.1), (2, 0.05), (1, 0.025)):
        assert found[f"conv{block}/kernel"] == found[f"bn{block}/gamma"] == pytest.approx(scale)
    assert not [path for path in found if "moving" in path]
    assert len(groups) == 4
    top = parameter_groups(Stage(unfreeze="conv3", backbone_rate=0.1), network, head)
    assert {path.partition("/")[0] for path in scales(top)} == {"conv3", "bn3", "hidden0", "logits"}
    alone = parameter_groups(Stage(unfreeze="all", layer_decay=0.5), network, head)
    assert scales(alone)["conv1/kernel"] == pytest.approx(0.5**5)


def test_a_frozen_everything_is_an_error(network, head) -> None:
    for stage in (Stage(scopes=("conv",)), Stage(unfreeze="all", scopes=("nothing",))):
        with pytest.raises(FitError, match="nothing is left to learn"):
            parameter_groups(stage, network, head)
    with pytest.raises(FitError, match="nothing is left to learn"):
        parameter_groups(Stage(unfreeze="all", scopes=("conv",), backbone_rate=0), network, head)


def trained(
    stage: Stage, gradients: list[float], scale: float = 1.0, name: str = "kernel", **apply: Any
) -> float:
    variable = keras.Variable(1.0, name=name)
    rate = learning_rate(stage, 10, 100)
    optimizer = GroupedOptimizer(stage, [Group(scale, (variable,))], rate)
    for gradient in gradients:
        optimizer.apply([np.float32(gradient)], **apply)
    return float(variable.numpy())


def test_each_optimizer_takes_the_step_it_should() -> None:
    plain = Stage(optimizer="sgd", learning_rate=0.1, momentum=0.0)
    assert trained(plain, [2.0]) == pytest.approx(0.8)
    assert trained(plain, [2.0], scale=0.5) == pytest.approx(0.9)
    heavy = Stage(optimizer="sgd", learning_rate=0.1, momentum=0.9)
    assert trained(heavy, [1.0, 1.0]) == pytest.approx(1 - 0.1 - 0.19)
    square = 0.1 * 4.0
    root = Stage(optimizer="rmsprop", learning_rate=0.1, momentum=0.0, rho=0.9, epsilon=1.0)
    assert trained(root, [2.0]) == pytest.approx(1 - 0.1 * 2 / math.sqrt(square + 1))
    assert trained(Stage(optimizer="adam", learning_rate=0.1), [5.0]) == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam", "adamw"])
def test_weight_decay_is_of_kernels_only(optimizer: Any) -> None:
    stage = Stage(optimizer=optimizer, learning_rate=0.1, momentum=0.0, weight_decay=0.5)
    assert trained(stage, [0.0]) == pytest.approx(1 - 0.1 * 0.5)
    assert trained(stage, [0.0], scale=0.1) == pytest.approx(1 - 0.01 * 0.5)
    assert trained(stage, [0.0], name="gamma") == 1.0


def test_clipping_is_by_the_norm_of_all_groups() -> None:
    stage = Stage(optimizer="sgd", learning_rate=1.0, momentum=0.0)
    variables = [keras.Variable([0.0, 0.0]), keras.Variable([0.0])]
    groups = [Group(1.0, (variables[0],)), Group(0.5, (variables[1],))]
    optimizer = GroupedOptimizer(stage, groups, learning_rate(stage, 10, 100))
    optimizer.apply([np.array([3.0, 0.0], "f4"), np.array([4.0], "f4")], clip_norm=1.0)
    assert variables[0].numpy().tolist() == pytest.approx([-0.6, 0])
    assert variables[1].numpy().tolist() == pytest.approx([-0.4])


REPLICAS = """
import tensorflow as tf, keras
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from graftserve.training.optimization import Group, GroupedOptimizer, learning_rate
from graftserve.training.recipe import Stage
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
stage = Stage(optimizer="sgd", learning_rate=1.0, momentum=0.0)
for clip_norm in (0.0, 1.0):
    with strategy.scope():
        variable = keras.Variable([0.0, 0.0])
        optimizer = GroupedOptimizer(stage, [Group(1.0, (variable,))], learning_rate(stage, 10, 100))
    @tf.function
    def step():
        def one():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradient = tf.where(replica == 0, [6.0, 0.0], [0.0, 8.0])
            optimizer.apply([gradient], clip_norm=clip_norm)
        strategy.run(one)
    step()
    print([round(float(value), 4) for value in variable.numpy()])
"""


def test_replicas_sum_their_gradients_and_clip_the_sum() -> None:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    line = [sys.executable, "-c", REPLICAS]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[-6.0, -8.0]", "[-0.6, -0.8]"], done.stderr


def test_the_moving_average_follows_with_a_rising_decay() -> None:
    variable = keras.Variable(0.0)
    average = MovingAverage([variable], 0.9)
    expected = 0.0
    for count in range(30):
        variable.assign(float(count))
        average.update()
        decay = min(0.9, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * count
    with average.applied():
        assert float(variable.numpy()) == pytest.approx(expected, rel=1e-5)
    assert float(variable.numpy()) == 29
    average.assign()
    assert float(variable.numpy()) == pytest.approx(expected, rel=1e-5)
    assert [value.numpy() for value in average.variables][1] == 30


def test_a_rate_is_suggested_where_the_loss_falls() -> None:
    rates = np.geomspace(1e-6, 1.0, 100)
    falls_at = 1e-3
    losses = 2 - 1.5 / (1 + (falls_at / rates) ** 2) + np.where(rates > 0.1, rates * 20, 0)
    assert 3e-4 < suggest_rate(rates.tolist(), losses.tolist()) < 1e-2
    exploded = [*losses[:70].tolist(), math.nan]
    assert 3e-4 < suggest_rate(rates.tolist(), exploded) < 1e-2
    assert suggest_rate([1e-3, 1e-2], [1.0, math.nan]) == pytest.approx(1e-4)
    rising = np.linspace(1, 2, 100)
    assert suggest_rate(rates.tolist(), rising.tolist()) < 1e-5


def test_too_little_memory_is_met_with_half_the_batch() -> None:
    error = out_of_memory(MemoryError("cannot allocate 5 GiB\nmore"), 64)
    assert "a batch of 64 images needs more memory" in str(error)
    assert "--batch-size 32 (cannot allocate 5 GiB)" in str(error)
    assert "smaller backbone" in str(out_of_memory(MemoryError("x"), 1))
