"""Random histories of writes end alike on the fake API server and a real one, managedFields included."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kubernetes.dynamic.exceptions import DynamicApiError

from tests.k8s.api_client import Api, Thing, config_map, deployment, route
from tests.k8s.envtest import EnvTest
from tests.k8s.fake_api import FakeApi

STRATEGIC = "application/strategic-merge-patch+json"
# What differs from server to server, or is a matter of time.
VOLATILE = ("uid", "resourceVersion", "creationTimestamp", "selfLink", "namespace")


def _some(dice: random.Random, of: str, most: int) -> list[str]:
    return dice.sample(of, dice.randint(1, most))


def _container(dice: random.Random, name: str) -> Thing:
    made: Thing = {"name": name, "image": f"{name}:{dice.randint(1, 2)}"}
    if dice.random() < 0.5:
        made["args"] = _some(dice, "abc", 2)
    if dice.random() < 0.5:
        made["env"] = [{"name": each, "value": str(dice.randint(1, 2))} for each in _some(dice, "ABC", 2)]
    if dice.random() < 0.4:
        made["ports"] = [
            {"containerPort": int(each), "name": f"p{each}{dice.randint(1, 2)}"}
            for each in _some(dice, "123", 2)
        ]
    if dice.random() < 0.3:
        made["resources"] = {"limits": {"memory": dice.choice(["1Gi", "2Gi"])}}
    return made


def _deployment(dice: random.Random) -> Thing:
    names = dice.sample(["server", "proxy", "log"], dice.choice([1, 1, 2, 3]))
    spec: Thing = {}
    if dice.random() < 0.5:
        spec["replicas"] = dice.randint(1, 3)
    if dice.random() < 0.3:
        spec["minReadySeconds"] = dice.randint(1, 3)
    if dice.random() < 0.3:
        bounds = {name: dice.choice([1, "25%"]) for name in ("maxSurge", "maxUnavailable")}
        spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": bounds}
    pod = {"terminationGracePeriodSeconds": dice.choice([5, 30])} if dice.random() < 0.3 else {}
    made = json.loads(json.dumps(deployment([_container(dice, name) for name in names], pod=pod, **spec)))
    if dice.random() < 0.4:
        made["spec"]["template"]["metadata"]["labels"]["version"] = str(dice.randint(1, 2))
    if dice.random() < 0.3:
        made["metadata"]["annotations"] = {"note": str(dice.randint(1, 2))}
    return made


def _config_map(dice: random.Random) -> Thing:
    return config_map(**{key: str(dice.randint(1, 2)) for key in _some(dice, "abcd", 3)})


def _route(dice: random.Random) -> Thing:
    spec: Thing = {"rules": [{"weight": dice.randint(1, 2)}]}
    return route(**spec, **({"hostnames": _some(dice, "ab", 2)} if dice.random() < 0.6 else {}))


def _patch(dice: random.Random, thing: Thing) -> Thing:
    patch = {key: thing[key] for key in ("spec", "data") if key in thing}
    if thing["kind"] == "Deployment":
        template = {"spec": {"containers": [_container(dice, dice.choice(["server", "proxy"]))]}}
        patch["spec"] = {
            key: value for key, value in thing["spec"].items() if key not in ("selector", "template")
        }
        patch["spec"] |= {"template": template} if dice.random() < 0.5 else {}
    return patch


def _write(dice: random.Random, thing: Thing) -> Callable[[Api], Thing]:
    """One write, to be made on each server."""
    kind, name = thing["kind"], thing["metadata"]["name"]
    what = dice.choices(["apply", "patch", "create", "replace", "delete"], [60, 15, 10, 12, 3])[0]
    manager = dice.choice(["argo", "edit", "graftserve-rollout"])
    if what == "apply":
        options: Thing = {"force_conflicts": True} if dice.random() < 0.3 else {}
        options |= {"dry_run": "All"} if dice.random() < 0.1 else {}
        return lambda api: api.apply(thing, manager, **options)
    if what == "patch":
        patch = _patch(dice, thing)
        is_strategic = kind != "GRPCRoute" and dice.random() < 0.6
        options = {"content_type": STRATEGIC} if is_strategic else {}
        return lambda api: api.patch(kind, name, patch, manager, **options)
    if what == "create":
        return lambda api: api.create(thing, manager)
    if what == "replace":

        def replace(api: Api) -> Thing:
            version = api.get(kind, name)["metadata"]["resourceVersion"]
            return api.replace(
                thing | {"metadata": thing["metadata"] | {"resourceVersion": version}}, manager
            )

        return replace
    return lambda api: api.delete(kind, name)


def _outcome(api: Api, write: Callable[[Api], Thing]) -> Any:
    """What both servers should agree on."""
    try:
        answer = write(api)
    except DynamicApiError as error:
        status = json.loads(error.body)
        message = re.sub(r" at \d{4}-\S+Z", "", status["message"])
        if status["code"] == 422:
            return "Invalid"  # the fake looks for little, and says it in its own words
        # Servers before 1.22 name the wrong field in some conflicts.
        lines = [line for line in message.split("\n") if not line.startswith("- ")]
        return status["code"], status.get("reason"), lines
    if answer["kind"] == "Status":
        return answer["status"]
    metadata = {key: value for key, value in answer["metadata"].items() if key not in VOLATILE}
    metadata["managedFields"] = {
        (entry["manager"], entry["operation"]): _atomic_selectors(entry["fieldsV1"])
        for entry in metadata["managedFields"]
    }
    return _without_nulls({"metadata": metadata, **{key: answer.get(key) for key in ("spec", "data")}})


def _atomic_selectors(fields: Any) -> Any:
    """Servers before 1.21 look into selectors."""
    return {key: {} if key == "f:selector" else _atomic_selectors(below) for key, below in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("make", [_deployment, _config_map, _route])
def test_the_servers_agree(
    real_api: EnvTest,
    fake_api: FakeApi,
    tmp_path: Path,
    make: Callable[[random.Random], Thing],
    seed: int,
) -> None:
    dice = random.Random(seed)
    fake = Api(fake_api.kubeconfig(tmp_path / "fake"), tmp_path / "discovery-of-fake")
    real = Api(real_api.config_path, tmp_path / "discovery-of-real")
    for step in range(15):
        write = _write(dice, make(dice))
        outcomes = _outcome(fake, write), _outcome(real, write)
        if outcomes[1] == "Invalid" and outcomes[0] != "Invalid":
            break  # from here on they differ
        assert outcomes[0] == outcomes[1], step
    fake.close()
    real.close()
