"""The loss scale: down at once when gradients overflow, up when they have not for long."""

import os
import subprocess
import sys

import numpy as np
import tensorflow as tf

from graftserve.training.precision import LossScale


def scale_of(scale: LossScale) -> float:
    return float(scale.up(tf.constant(1.0)))


def test_gradients_come_back_as_those_of_the_loss() -> None:
    scale = LossScale()
    assert scale_of(scale) == 2**15
    gradient = tf.constant([1.0, -2.0]) * scale_of(scale)
    np.testing.assert_allclose(scale.down([gradient])[0], [1, -2])
    assert scale_of(scale) == 2**15


def test_an_overflow_gives_zeros_and_half_the_scale() -> None:
    scale = LossScale()
    one, other = scale.down([tf.constant([np.inf, 1.0]), tf.constant([3.0])])
    assert np.asarray(one).tolist() == [0, 0]
    assert np.asarray(other).tolist() == [0]
    assert scale_of(scale) == 2**14
    for _ in range(30):
        scale.down([tf.constant([np.nan])])
    assert scale_of(scale) == 1


def test_the_scale_doubles_after_2000_good_steps() -> None:
    scale = LossScale()

    @tf.function
    def steps(count: tf.Tensor) -> None:
        for _ in tf.range(count):
            scale.down([tf.constant([1.0])])

    steps(1999)
    assert scale_of(scale) == 2**15
    steps(1)
    assert scale_of(scale) == 2**16
    steps(1999)
    assert scale_of(scale) == 2**16


REPLICAS = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from graftserve.training.precision import LossScale
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    scale = LossScale()
@tf.function
def step(second):
    def one():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return scale.down([tf.where(replica == 0, 32768.0, second)])[0]
    return strategy.run(one)
for second in (65536.0, float("inf")):
    values = strategy.experimental_local_results(step(tf.constant(second)))
    print([float(value) for value in values], float(scale.variables[0].numpy()))
"""


def test_an_overflow_on_one_replica_is_one_on_all() -> None:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    line = [sys.executable, "-c", REPLICAS]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[1.0, 2.0] 32768.0", "[0.0, 0.0] 16384.0"], done.stderr
