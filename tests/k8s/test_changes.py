"""A change of an overlay's files reaches what it is meant for, restarts what it must, and nothing else."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml", reason="needs PyYAML")

from google.protobuf import text_format

from graftserve.client.wire import ModelServerConfig
from graftserve.k8s.manifests import copy_manifests
from graftserve.k8s.render import KubectlError, find_kubectl, render_folder
from tests.k8s.mixes import Object, parse

Objects = Mapping[tuple[str, str], Object]
Change = Callable[[Path], None]


@pytest.fixture(scope="session", autouse=True)
def _kubectl() -> None:
    try:
        find_kubectl()
    except KubectlError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Production in a folder of its own, which `render_with` changes and changes back."""
    return copy_manifests("production", tmp_path_factory.mktemp("copy") / "k8s")


@pytest.fixture(scope="module")
def before(copied: Path) -> Objects:
    return _render(copied)


def _render(folder: Path) -> Objects:
    return {(item["kind"], item["metadata"]["name"]): item for item in parse(render_folder(folder))}


def _render_with(folder: Path, file: str, old: str, new: str) -> Objects:
    path = folder / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    try:
        return _render(folder)
    finally:
        path.write_text(text)


def _template(objects: Objects, track: str) -> Any:
    return objects["Deployment", f"graftserve-{track}"]["spec"]["template"]


def _config_name(objects: Objects, track: str) -> str:
    (volume,) = (item for item in _template(objects, track)["spec"]["volumes"] if item["name"] == "config")
    name: str = volume["configMap"]["name"]
    return name


def _changed(before: Objects, after: Objects) -> set[tuple[str, str]]:
    """Kind and name, without its hash, of the objects that are new, gone or different."""

    def without_hash(key: tuple[str, str]) -> tuple[str, str]:
        return key[0], re.sub(r"-[a-z0-9]{10}$", "", key[1])

    keys = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    return {without_hash(key) for key in keys}


def test_the_same_files_are_the_same_manifests(copied: Path, before: Objects) -> None:
    assert _render(copied) == before


def test_a_new_version_is_one_line_and_replaces_the_pods_of_its_track(copied: Path, before: Objects) -> None:
    after = _render_with(copied, "stable.env", "MODEL_VERSION=1", "MODEL_VERSION=4")
    assert _changed(before, after) == {
        ("Deployment", "graftserve-stable"),
        ("ConfigMap", "graftserve-config-stable"),
    }
    assert _config_name(before, "stable") != _config_name(after, "stable")
    template = _template(after, "stable")
    assert template["metadata"]["labels"]["graftserve.dev/version"] == "4"
    for container in [*template["spec"]["initContainers"], *template["spec"]["containers"]]:
        assert {"name": "MODEL_VERSION", "value": "4"} in container["env"]
    config = after["ConfigMap", _config_name(after, "stable")]["data"]["models.config"]
    (model,) = text_format.Parse(config, ModelServerConfig()).model_config_list.config
    assert list(model.model_version_policy.specific.versions) == [4]


def test_going_back_to_a_version_is_its_old_configuration_by_name(copied: Path, before: Objects) -> None:
    _render_with(copied, "stable.env", "MODEL_VERSION=1", "MODEL_VERSION=4")
    assert _config_name(_render(copied), "stable") == _config_name(before, "stable")


def test_a_canary_is_pods_and_a_weight_and_leaves_stable_alone(copied: Path, before: Objects) -> None:
    path = copied / "canary.env"
    text = path.read_text()
    path.write_text("MODEL_VERSION=4\nREPLICAS=1\nSTABLE_WEIGHT=95\nWEIGHT=5\n")
    try:
        after = _render(copied)
        # Its weight is no matter of its pods: they stay when it changes.
        path.write_text("MODEL_VERSION=4\nREPLICAS=3\nSTABLE_WEIGHT=50\nWEIGHT=50\n")
        heavier = _render(copied)
    finally:
        path.write_text(text)
    assert _changed(before, after) == {
        ("Deployment", "graftserve-canary"),
        ("ConfigMap", "graftserve-config-canary"),
        ("GRPCRoute", "graftserve"),
    }
    assert after["Deployment", "graftserve-canary"]["spec"]["replicas"] == 1
    config = after["ConfigMap", _config_name(after, "canary")]["data"]["models.config"]
    (model,) = text_format.Parse(config, ModelServerConfig()).model_config_list.config
    assert model.name == "flowers"
    assert list(model.model_version_policy.specific.versions) == [4]
    assert _weights(after) == {"graftserve": 95, "graftserve-canary": 5}

    assert _changed(after, heavier) == {("Deployment", "graftserve-canary"), ("GRPCRoute", "graftserve")}
    assert _template(after, "canary") == _template(heavier, "canary")
    assert heavier["Deployment", "graftserve-canary"]["spec"]["replicas"] == 3
    assert _weights(heavier) == {"graftserve": 50, "graftserve-canary": 50}


def _weights(objects: Objects) -> dict[str, int]:
    (rule,) = objects["GRPCRoute", "graftserve"]["spec"]["rules"]
    return {item["name"]: item["weight"] for item in rule["backendRefs"]}


def test_another_model_reaches_both_tracks(copied: Path) -> None:
    after = _render_with(copied, "stable.env", "MODEL_NAME=flowers", "MODEL_NAME=birds")
    for track in ("stable", "canary"):
        assert 'name: "birds"' in after["ConfigMap", _config_name(after, track)]["data"]["models.config"]
        (server,) = _template(after, track)["spec"]["containers"]
        assert {"name": "MODEL_NAME", "value": "birds"} in server["env"]


@pytest.mark.parametrize(
    ("file", "old", "new", "restarts"),
    [
        ("../../base/pod/monitoring.config", "enable: true", "enable: false", True),
        (
            "../../base/pod/batching.config",
            "num_batch_threads { value: 4 }",
            "num_batch_threads { value: 8 }",
            True,
        ),
        ("../../base/services.yaml", "  clusterIP: None\n", "  clusterIP: None # by name\n", False),
        ("../../components/monitoring/alerts.yaml", "> 0.02", "> 0.05", False),
        ("kustomization.yaml", "namespace: graftserve\n", "namespace: graftserve # ours\n", False),
    ],
)
def test_pods_are_replaced_when_their_configuration_changes_and_only_then(
    copied: Path, before: Objects, file: str, old: str, new: str, restarts: bool
) -> None:
    after = _render_with(copied, file, old, new)
    for track in ("stable", "canary"):
        assert (_template(before, track) != _template(after, track)) == restarts
        assert (_config_name(before, track) != _config_name(after, track)) == restarts


def test_the_model_of_the_embedded_server_is_what_health_is_asked_for(tmp_path: Path) -> None:
    folder = copy_manifests("laptop", tmp_path / "k8s")
    after = _render_with(folder, "stable.env", "MODEL_NAME=flowers", "MODEL_NAME=birds")
    for track in ("stable", "canary"):
        (server,) = _template(after, track)["spec"]["containers"]
        assert server["readinessProbe"]["grpc"] == {"port": 8500, "service": "birds"}
        assert server["startupProbe"]["grpc"] == {"port": 8500, "service": "birds"}


def test_argos_comparison_and_kserves_service_follow_the_overlay(tmp_path: Path) -> None:
    folder = copy_manifests("production", tmp_path / "argo", add=["progressive"])
    (folder / "stable.env").write_text("MODEL_NAME=birds\nMODEL_SOURCE=gs://zoo/birds\nMODEL_VERSION=12\n")
    metric = _render(folder)["AnalysisTemplate", "graftserve-agreement"]["spec"]["metrics"][0]
    pod = metric["provider"]["job"]["spec"]["template"]["spec"]
    values = {
        entry["name"]: entry["value"]
        for container in [*pod["initContainers"], *pod["containers"]]
        for entry in container["env"]
    }
    assert {
        "MODEL_NAME": "birds",
        "MODEL_SOURCE": "gs://zoo/birds",
        "MODEL_VERSION": "12",
    }.items() <= values.items()

    folder = copy_manifests("laptop", tmp_path / "kserve", add=["kserve"])
    (folder / "stable.env").write_text("MODEL_NAME=birds\nMODEL_SOURCE=/source/birds\nMODEL_VERSION=12\n")
    service = _render(folder)["InferenceService", "graftserve-model"]
    assert service["metadata"]["labels"]["graftserve.dev/version"] == "12"
    (server,) = service["spec"]["predictor"]["containers"]
    assert {"name": "MODEL_VERSION", "value": "12"} in server["env"]
    assert server["readinessProbe"]["grpc"]["service"] == "birds"
