"""Several devices and several machines: two worker processes on loopback, two virtual devices in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftserve.training.distribution import start_workers
from graftserve.training.errors import RecipeError

GATHER = """
import numpy as np
from graftserve.training.distribution import start_workers
workers = start_workers()
rows = np.full((workers.index * 2 + 1, 3), workers.index, np.float32)
keys = np.frombuffer(bytes([workers.index] * 16), np.uint8)[None]
print(workers.index, workers.count, workers.replicas, workers.is_chief)
print(workers.all_gather(rows)[:, 0].tolist(), workers.all_gather(keys)[:, 0].tolist())
print(workers.all_gather(rows[:0]).shape, len(workers.all_gather(rows[: workers.index])))
workers.barrier()
batch = np.arange(8).reshape(1, 8)
(part,) = workers.share((batch,), axis=1)
print(workers.strategy.experimental_local_results(part)[0].numpy().tolist())
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_workers(code: str, *arguments: str) -> list[str]:
    """Run the code in two workers of one cluster; their standard outputs."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = os.environ | {"TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "3"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [out for out, _ in outputs]


@pytest.mark.slow
def test_workers_share_a_batch_and_gather_rows() -> None:
    first, second = (out.splitlines() for out in run_workers(GATHER))
    assert (first[0], second[0]) == ("0 2 2 True", "1 2 2 False")
    assert first[1] == second[1] == "[0.0, 1.0, 1.0, 1.0] [0, 1]"
    assert first[2] == second[2] == "(0, 3) 1"
    assert (first[3], second[3]) == ("[[0, 1, 2, 3]]", "[[4, 5, 6, 7]]")


TRAIN = """
import sys
from pathlib import Path
from graftserve.training import Recipe, train
from graftserve.training.recipe import Augmentation, Head, Stage
import small_backbone
small_backbone.register()
data, output, cache = sys.argv[1:]
stages = (
    Stage(name="head", epochs=2, learning_rate=1e-3, keep="last"),
    Stage(name="all", unfreeze="all", epochs=2, optimizer="sgd", learning_rate=1e-3, keep="last"),
)
recipe = Recipe(
    data, method="fine-tune", backbone="small", weights="none", batch_size=20, stages=stages,
    augmentation=Augmentation(horizontal_flip=True), clip_norm=1.0, ema_decay=0.9,
)
train(recipe, Path(output), cache_dir=Path(cache))
"""


@pytest.mark.slow
def test_two_workers_learn_what_one_does(digits_dir: Path, tmp_path: Path) -> None:
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{TRAIN}"
    one = tmp_path / "one"
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    line = [sys.executable, "-c", code, str(digits_dir), str(one), str(tmp_path / "cache1")]
    subprocess.run(line, check=True, env=environment, timeout=240)
    two = tmp_path / "two"
    run_workers(code, str(digits_dir), str(two), str(tmp_path / "cache2"))

    metrics: list[Any] = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    for first, second in zip(metrics[0]["stages"], metrics[1]["stages"], strict=True):
        losses = [[epoch["validation_loss"] for epoch in stage["history"]] for stage in (first, second)]
        assert losses[0][-1] < losses[0][0]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    goldens = [json.loads((folder / "goldens/goldens.json").read_text())["goldens"] for folder in (one, two)]
    for first, second in zip(*goldens, strict=True):
        np.testing.assert_allclose(second["probabilities"], first["probabilities"], atol=1e-3)


def test_without_a_cluster_one_process_does_it_all() -> None:
    workers = start_workers()
    assert (workers.index, workers.count, workers.replicas, workers.is_chief) == (0, 1, 1, True)
    rows = np.arange(3)
    assert workers.all_gather(rows) is rows
    workers.barrier()
    assert workers.share((rows,))[0].numpy().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "config",
    [
        "nonsense",
        "{}",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "ps", "index": 0}}',
    ],
)
def test_a_cluster_that_cannot_be_used_is_an_error(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(RecipeError, match=r'TF_CONFIG: expected \{"cluster": \{"worker"'):
        start_workers()


def test_a_cluster_of_one_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert start_workers().strategy is None
