"""A real server with models that classify images by their size, and what a rollout on it needs."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from graftserve.client import VersionState
from graftserve.client.testing import FakeServer
from graftserve.k8s.rollout import (
    Driver,
    Gate,
    Journal,
    Limits,
    ModelConfigFile,
    ModelServer,
    Observed,
    Placement,
    Report,
    Rollout,
    begin,
    compare,
)
from graftserve.serving.app import Server
from graftserve.serving.flags import Options
from tests.k8s.envtest import ASSETS, EnvTest, find_assets
from tests.k8s.fake_api import FakeApi
from tests.k8s.tracks import good, permuted, serve

# Time is not what these tests are about, and this machine may be busy.
LENIENT = Gate(max_latency_ratio=1000)
MODEL = "flowers"
CONFIG = """\
# the flower shop
model_config_list {{
  config {{ name: "birds" base_path: "{root}/birds" }}
  config {{
    name: "flowers"
    base_path: "{root}/flowers"
    model_version_policy {{ specific {{ versions: 3 }} }}
    version_labels {{ key: "stable" value: 3 }}
  }}
}}
"""


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SavedModels to copy: good, close (other scores), permuted (other labels), broken (no SavedModel)."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("classifiers")

    class Classifier(tf.Module):
        def __init__(self, labels: list[str], scores: list[float]) -> None:
            super().__init__()
            self.labels = tf.constant(labels)
            self.scores = tf.constant(scores)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
        def serve(self, image_bytes: Any) -> dict[str, Any]:
            length = tf.strings.length(image_bytes)
            order = (length[:, None] + tf.range(3)[None, :]) % 3
            return {
                "classes": tf.gather(self.labels, order),
                "scores": tf.tile(self.scores[None, :], [tf.shape(length)[0], 1]),
                "valid": length > 0,
            }

    labels = ["daisy", "rose", "tulip"]
    for name, own, scores in (
        ("good", labels, [0.7, 0.2, 0.1]),
        ("close", labels, [0.65, 0.25, 0.1]),
        ("permuted", labels[1:] + labels[:1], [0.7, 0.2, 0.1]),
    ):
        model = Classifier(own, scores)
        tf.saved_model.save(model, str(root / name), signatures={"serving_default": model.serve})
    (root / "broken").mkdir()
    (root / "broken" / "saved_model.pb").write_bytes(b"no model")
    return root


@dataclass
class Shop:
    """A server that has flowers 3, labelled stable, and birds 1; the folder of flowers has a good 4, too.

    Its rollouts poll quickly and drain for `drain_s`.
    """

    root: Path
    server: Server
    images: list[Path]
    drain_s: float = 0.0
    port: int = 0

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port or self.server.grpc_port}"

    @property
    def config_path(self) -> Path:
        return self.root / "models.config"

    @property
    def journal(self) -> Journal:
        return Journal(self.root / "journal.json", self.target, MODEL)

    def stage(self) -> ModelServer:
        return ModelServer(self.target, MODEL, ModelConfigFile(self.config_path, MODEL), timeout_s=20)

    def observe(self) -> Observed:
        with self.stage() as stage:
            return stage.observe()

    def placement(self) -> Placement:
        """What is served now, by the server's own word."""
        seen = self.observe()
        return Placement(seen.present, seen.stable, seen.canary)

    def wait_for(self, condition: Callable[[Observed], bool]) -> Observed:
        deadline = time.monotonic() + 30
        while not condition(seen := self.observe()):
            assert time.monotonic() < deadline, seen
            time.sleep(0.05)
        return seen

    def run(
        self, begin_it: Callable[[Any, Any], Any] | None = None, stage: Any = None, **options: Any
    ) -> Rollout:
        """What begin_it(stage, writer) writes down, driven as far as it goes."""
        with self.stage() as own, self.journal.writing("the test", {}) as writer:
            stage = stage or own
            if begin_it is not None:
                begin_it(stage, writer)

            def shadow(canary: int, stable: int) -> Report:
                with stage.client(stable, 20) as old, stage.client(canary, 20) as new:
                    return compare(old, new, self.images, seed=0, max_errors=0)

            settings = {
                "check": lambda version: "looked at",
                "shadow": shadow,
                "limits": Limits(load_timeout_s=30, drain_s=self.drain_s, stale_s=2),
                "poll_s": 0.02,
                "patience_s": 20,
            }
            return Driver(stage, writer, **(settings | options)).run()

    def start(
        self, version: int, *, auto: bool = True, gate: Gate | None = LENIENT, **options: Any
    ) -> Rollout:
        return self.run(
            lambda stage, writer: begin(stage, writer, version=version, gate=gate, auto=auto), **options
        )

    def reset(self) -> None:
        """As it was at first, with no journal."""
        with self.stage() as stage:
            stage.apply(Placement(frozenset({3, 4}), stage.observe().stable), None)
            self.wait_for(lambda seen: 3 in seen.available)
            stage.apply(Placement(frozenset({3}), 3), None)
        self.wait_for(lambda seen: seen.versions[4].state is VersionState.END)
        self.journal.path.unlink(missing_ok=True)

    def stop_server(self) -> None:
        self.port = self.server.grpc_port
        assert self.server.stop(10)

    def start_server(self) -> None:
        self.server = Server(replace(self.server.options, port=self.port))
        self.server.start()


@pytest.fixture
def shop(classifiers: Path, photos: Any, encode: Any, tmp_path: Path) -> Iterator[Shop]:
    for version in (3, 4):
        shutil.copytree(classifiers / "good", tmp_path / "flowers" / str(version))
    shutil.copytree(classifiers / "good", tmp_path / "birds" / "1")
    (tmp_path / "models.config").write_text(CONFIG.format(root=tmp_path))
    (tmp_path / "images").mkdir()
    images = []
    for name, photo in photos.items():
        for number in range(4):
            images.append(tmp_path / "images" / f"{name}{number}.jpg")
            images[-1].write_bytes(encode(photo[: 100 + 3 * number, :100]))
    server = Server(
        Options(
            model_config_file=str(tmp_path / "models.config"),
            allow_version_labels_for_unavailable_models=True,
            max_num_load_retries=0,
            host="127.0.0.1",
            port=0,
            shutdown_grace_seconds=10.0,
        )
    )
    server.start()
    shop = Shop(tmp_path, server, images)
    shop.wait_for(lambda seen: seen.stable == 3)
    yield shop
    shop.server.stop(0)


@pytest.fixture
def publish(classifiers: Path, shop: Shop) -> Callable[[str, int], None]:
    """publish(name, version) puts a classifier into the folder of flowers."""

    def publish(name: str, version: int) -> None:
        temporary = shop.root / "flowers" / f"temp-{version}"
        shutil.copytree(classifiers / name, temporary)
        shutil.rmtree(shop.root / "flowers" / str(version), ignore_errors=True)
        temporary.rename(shop.root / "flowers" / str(version))

    return publish


@pytest.fixture
def fake_api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


@pytest.fixture(scope="session")
def real_api() -> Iterator[EnvTest]:
    """A real API server, where the environment says what to start."""
    assets = find_assets()
    if assets is None:
        pytest.skip(f"{ASSETS} names no folder with etcd and kube-apiserver")
    with EnvTest(assets) as api:
        yield api


@pytest.fixture(params=["fake", "real"])
def api_config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The kubeconfig of the fake API server and, in turn, of a real one."""
    if request.param == "real":
        return request.getfixturevalue("real_api").config_path
    return request.getfixturevalue("fake_api").kubeconfig(tmp_path / "fake.kubeconfig")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photos: Any, encode: Any) -> Path:
    """Eight pieces of photographs."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        piece = photos[sorted(photos)[number % 3]][: 100 + number, :100]
        (folder / f"{number}.jpg").write_bytes(encode(piece))
    return folder


@pytest.fixture
def servers() -> Iterator[dict[str, FakeServer]]:
    """Version 3; a good version 4; a version 4 with permuted labels."""
    with serve(3, good) as stable, serve(4, good) as same, serve(4, permuted) as other:
        yield {"stable": stable, "good": same, "permuted": other}
