"""What every mix of overlay and components must be: valid, restricted, probed, drained, wired up."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml", reason="needs PyYAML")

from google.protobuf import text_format

from graftserve.cli.pull import command as pull_command
from graftserve.cli.train import command as train_command
from graftserve.client.wire import ModelServerConfig
from graftserve.k8s.manifests import ORDER, components, overlays
from graftserve.k8s.render import KubectlError, find_kubectl, render_folder
from graftserve.serving import app
from graftserve.serving.flags import Options
from tests.k8s.mixes import MIXES, Mix, Object, mix, parse, pod_labels, pod_specs
from tests.serving.containers import DOCKERFILES, METRICS, Dockerfile

_ROOT = Path(__file__).parents[2]

# The oldest with native sleep on by default, two in between, the newest that kubernetes-validate 1.37 has.
_VERSIONS = ("1.30", "1.32", "1.34", "1.37")

# Of custom resources: the version, and what their definitions, or a working one, cannot do without; [] is
# every item. Sources: the references of Prometheus Operator, KEDA, Gateway API, Argo Rollouts and KServe.
_CUSTOM: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "PodMonitor": ("monitoring.coreos.com/v1", ("spec.selector", "spec.podMetricsEndpoints[].port")),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        ("spec.groups[].name", "spec.groups[].rules[].expr"),
    ),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        (
            "spec.scaleTargetRef.name",
            "spec.triggers[].type",
            "spec.triggers[].metadata.serverAddress",
            "spec.triggers[].metadata.query",
            "spec.triggers[].metadata.threshold",
        ),
    ),
    "GRPCRoute": (
        "gateway.networking.k8s.io/v1",
        ("spec.parentRefs[].name", "spec.rules[].backendRefs[].name", "spec.rules[].backendRefs[].port"),
    ),
    "Rollout": (
        "argoproj.io/v1alpha1",
        (
            "spec.selector.matchLabels",
            "spec.workloadRef.name",
            "spec.workloadRef.kind",
            "spec.workloadRef.apiVersion",
            "spec.strategy.canary.stableService",
            "spec.strategy.canary.canaryService",
        ),
    ),
    "AnalysisTemplate": ("argoproj.io/v1alpha1", ("spec.metrics[].name", "spec.metrics[].provider")),
    "InferenceService": ("serving.kserve.io/v1beta1", ("spec.predictor.containers[].image",)),
}

# What proxies and clients take to hear that a pod is on its way out.
_ENDPOINTS_S = 5
_JITTER = 1.1  # gRPC lets a connection live up to a tenth longer; core's max_age_filter


@pytest.fixture(scope="session", autouse=True)
def _kubectl() -> None:
    try:
        find_kubectl()
    except KubectlError as error:
        pytest.skip(str(error))


@pytest.fixture(params=MIXES, ids=str)
def any_mix(request: pytest.FixtureRequest) -> Mix:
    return request.param


def _servers(some: Mix) -> Iterator[tuple[str, Mapping[str, str], Mapping[str, Any], Mapping[str, Any]]]:
    """Place, labels, pod and container of every model server."""
    for place, labels, pod in pod_labels(some.objects):
        for container in pod["containers"]:
            if container["name"] in ("server", "kserve-container"):
                yield place, labels, pod, container


def _expanded(container: Mapping[str, Any], **more: str) -> list[str]:
    """Its arguments as the kubelet makes them: $(NAME) replaced from env."""
    limit = str(container["resources"]["limits"]["cpu"])
    values = dict(more)
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {})
        if "resourceFieldRef" in source:
            assert source["resourceFieldRef"] == {"resource": "limits.cpu"}
            values[entry["name"]] = limit
        elif "value" in entry:
            values[entry["name"]] = entry["value"]
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], arg) for arg in container["args"]]


def _image(container: Mapping[str, Any]) -> Dockerfile:
    name = container["image"].rpartition("/")[2].partition(":")[0]
    return Dockerfile(DOCKERFILES[{"graftserve": "embedded", "graftserve-gpu": "gpu"}[name]])


def _options(container: Mapping[str, Any]) -> Options:
    """What the server is told, by its image's entry point and by the manifest."""
    image = _image(container)
    flags = image.flags[: -len(image.command("CMD"))]
    return Options.from_args([*flags, *_expanded(container)])


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


# The list of what there is


def test_every_folder_is_a_component_or_an_overlay_and_says_what_it_is() -> None:
    folder = _ROOT / "k8s/components"
    found = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("kustomization.yaml")}
    assert found - {"kserve/copy"} == set(ORDER) == set(components())
    assert {path.name for path in (_ROOT / "k8s/overlays").iterdir()} == set(overlays())
    for name, summary in (components() | overlays()).items():
        assert summary.endswith("."), name
        assert len(summary) < 110, name


def test_the_documentation_has_every_component_and_version_of_kubernetes() -> None:
    text = (_ROOT / "docs/kubernetes.md").read_text()
    for name in ORDER:
        assert f"\n| `{name}` |" in text, name
    assert f"Kubernetes {', '.join(_VERSIONS[:-1])} and {_VERSIONS[-1]}" in text.replace("\n", " ")


def test_every_component_is_in_some_mix() -> None:
    assert set().union(*(some.components for some in MIXES)) == set(ORDER)


# The API would take them


def test_the_schemas_of_kubernetes_are_kept(any_mix: Mix, valid: "_Valid") -> None:
    native = [item for item in any_mix.objects if item["kind"] not in _CUSTOM]
    assert native
    for item in native:
        valid.check(item)


class _Valid:
    """Validates each object once, however many mixes have it."""

    def __init__(self) -> None:
        self._validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
        self._seen: set[str] = set()

    def check(self, item: Object) -> None:
        text = json.dumps(item, sort_keys=True)
        if text in self._seen:
            return
        for version in _VERSIONS:
            used = self._validate.validate(item, version, strict=True)
            assert used.startswith(version)
        self._seen.add(text)


@pytest.fixture(scope="session")
def valid() -> _Valid:
    return _Valid()


def test_the_schemas_are_kept_by_what_a_deployer_is_given(valid: "_Valid") -> None:
    objects = parse(render_folder(_ROOT / "k8s/deployer"))
    assert [item["kind"] for item in objects] == ["Role", "RoleBinding"]
    for item in objects:
        valid.check(item)
        assert "namespace" not in item["metadata"]  # kubectl's --namespace would be refused


def test_the_schemas_are_strict(valid: _Valid) -> None:
    """So that a misspelt field in a manifest would be seen."""
    item = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}, "automountToken": False}
    with pytest.raises(Exception, match="automountToken"):
        valid.check(item)


def _missing(node: Any, path: str) -> bool:
    head, _, rest = path.partition(".")
    name = head.removesuffix("[]")
    if not isinstance(node, Mapping) or name not in node:
        return True
    items = node[name] if head.endswith("[]") else [node[name]]
    return not items or (bool(rest) and any(_missing(item, rest) for item in items))


def test_custom_resources_have_what_they_need(any_mix: Mix) -> None:
    for item in any_mix.objects:
        if item["kind"] in _CUSTOM:
            version, paths = _CUSTOM[item["kind"]]
            assert item["apiVersion"] == version
            assert [path for path in paths if _missing(item, path)] == []


def test_names_are_unique_and_everything_is_in_the_namespace(any_mix: Mix) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in any_mix.objects]
    assert len(names) == len(set(names))
    (namespace,) = any_mix.of("Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for item in any_mix.objects:
        if item["kind"] not in ("Namespace", "PersistentVolume"):
            assert item["metadata"]["namespace"] == namespace["metadata"]["name"]


# Every pod


def test_every_container_leaves_its_last_words(any_mix: Mix) -> None:
    """`graftserve rollout` tells them where a pod does not become ready."""
    for place, pod in pod_specs(any_mix.objects):
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", (
                place,
                container["name"],
            )


def test_every_pod_is_restricted(any_mix: Mix) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, restricted, and a bit more."""
    for place, pod in pod_specs(any_mix.objects):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, place
        assert security["runAsUser"] > 0, place
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), place
        assert pod["automountServiceAccountToken"] is False, place
        assert pod["enableServiceLinks"] is False, place
        assert any_mix.one("ServiceAccount", pod["serviceAccountName"]), place
        for volume in pod["volumes"]:
            (kind,) = volume.keys() - {"name"}
            assert kind in ("configMap", "emptyDir", "persistentVolumeClaim", "secret"), place
            assert kind != "emptyDir" or "sizeLimit" in volume["emptyDir"], place
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False, place
            assert inner["readOnlyRootFilesystem"] is True, place
            assert inner["capabilities"] == {"drop": ["ALL"]}, place
            assert not {"privileged", "runAsUser"} & inner.keys(), place


def test_every_container_asks_for_what_it_needs_and_is_limited(any_mix: Mix) -> None:
    for place, pod in pod_specs(any_mix.objects):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            resources = container["resources"]
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= resources[kind].keys(), (place, container["name"])
            extended = {name: value for name, value in resources["limits"].items() if "/" in name}
            assert extended.items() <= resources["requests"].items(), place


def test_every_image_is_of_this_release(any_mix: Mix) -> None:
    version = (_ROOT / "VERSION").read_text().strip()
    for place, pod in pod_specs(any_mix.objects):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            name, _, tag = container["image"].rpartition(":")
            assert tag == version, (place, container["name"])
            assert name.rpartition("/")[2] in ("graftserve", "graftserve-gpu", "graftserve-training")
            registry = any_mix.overlay != "laptop"
            assert name.startswith("registry.example.com/") == registry, (place, container["name"])


def test_every_volume_is_mounted_and_every_mount_has_its_volume(any_mix: Mix) -> None:
    for place, pod in pod_specs(any_mix.objects):
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(volumes) == len(set(volumes)), place
        mounted = set()
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            mounts = container.get("volumeMounts", [])
            paths = [mount["mountPath"] for mount in mounts]
            assert len(paths) == len(set(paths)), place
            mounted |= {mount["name"] for mount in mounts}
        assert mounted == set(volumes), place


def test_servers_are_probed_by_what_means_something(any_mix: Mix) -> None:
    for place, _, _, container in _servers(any_mix):
        startup, ready, alive = (container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 600, place
        assert {key: ready[key] for key in ("grpc", "exec") if key in ready} == {
            key: startup[key] for key in ("grpc", "exec") if key in startup
        }, place
        # Busy is not dead: a minute of silence before a restart.
        assert alive["periodSeconds"] * alive["failureThreshold"] >= 60, place
        assert alive.keys() & {"grpc", "httpGet"}, place
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        if "grpc" in ready:
            # The empty service is the server's, which follows no model.
            expected = {"port": _options(container).port, "service": environment["MODEL_NAME"]}
            assert ready["grpc"] == expected, place
            assert container["image"].rpartition("/")[2].startswith("graftserve:"), place
        else:
            # tests/serving/test_serving_probes.py runs it.
            assert "AVAILABLE" in " ".join(ready["exec"]["command"]), place
        tls = "tls" in any_mix.components
        assert tls == bool(_options(container).ssl_config_file), place
        if tls:  # the kubelet's gRPC probes have no TLS
            assert not any("grpc" in probe for probe in (startup, ready, alive)), place


def test_servers_are_drained_before_they_get_their_signal(any_mix: Mix) -> None:
    for place, _, pod, container in _servers(any_mix):
        options = _options(container)
        age = {name: int(value) / 1e3 for name, value in options.channel_arguments}
        oldest_s = _ENDPOINTS_S + _JITTER * age["grpc.max_connection_age_ms"]
        sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace_s = pod["terminationGracePeriodSeconds"]
        if "graftserve-gpu" in container["image"]:
            # tensorflow_model_server drops what is under way.
            assert sleep_s >= oldest_s + age["grpc.max_connection_age_grace_ms"], place
            assert age["grpc.max_connection_age_grace_ms"] >= options.rest_timeout_s, place
            assert grace_s > sleep_s, place
        else:
            assert sleep_s >= oldest_s, place
            own_s = options.shutdown_grace_seconds + 2 * app._CUT_OFF_TIMEOUT_S + app._UNLOAD_TIMEOUT_S
            assert grace_s > sleep_s + own_s, place


def test_servers_are_spread_replaced_one_by_one_and_guarded(any_mix: Mix) -> None:
    guarded = any_mix.one("PodDisruptionBudget", "graftserve")["spec"]
    assert guarded["maxUnavailable"] == 1
    servers = list(_servers(any_mix))
    assert servers
    for place, labels, pod, _ in servers:
        spread = {item["topologyKey"]: item for item in pod["topologySpreadConstraints"]}
        assert spread.keys() == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}, place
        for item in spread.values():
            assert _selects(item["labelSelector"]["matchLabels"], labels), place
        stable = labels["graftserve.dev/track"] == "stable"
        assert _selects(guarded["selector"]["matchLabels"], labels) == stable, place
    for item in any_mix.of("Deployment", "Rollout"):
        strategy = item["spec"]["strategy"]
        values = strategy.get("rollingUpdate") or strategy["canary"]
        assert (values["maxSurge"], values["maxUnavailable"]) == (1, 0)


# Pods, Services, ports, configuration: everything finds what it names


def test_every_selector_selects_and_none_selects_too_much(any_mix: Mix) -> None:
    workloads = pod_labels(any_mix.objects)
    for item in any_mix.of("Service"):
        selected = [place for place, labels, _ in workloads if _selects(item["spec"]["selector"], labels)]
        # Two workloads behind one Service would share its traffic by accident.
        assert len(selected) == 1, item["metadata"]["name"]
    for kind, path in (("PodMonitor", "selector"), ("NetworkPolicy", "podSelector")):
        for item in any_mix.of(kind):
            wanted = item["spec"][path]["matchLabels"]
            selected = {place for place, labels, _ in workloads if _selects(wanted, labels)}
            assert selected == {place for place, *_ in _servers(any_mix)}, kind
    for item in any_mix.of("Deployment", "Job", "Rollout"):
        selector = item["spec"].get("selector", {}).get("matchLabels", {})
        mine = [labels for place, labels, _ in workloads if _selects(selector, labels)]
        assert mine or item["kind"] == "Job"
        if item["kind"] == "Deployment":
            assert _selects(selector, item["spec"]["template"]["metadata"]["labels"])
            assert len(mine) == 1
    tracks = {item["spec"]["selector"]["graftserve.dev/track"] for item in _model_services(any_mix)}
    assert "stable" in tracks


def _model_services(some: Mix) -> list[Object]:
    return [item for item in some.of("Service") if item["metadata"]["name"] != "graftserve-training"]


def test_every_port_that_is_named_is_there_and_every_one_there_is_used(any_mix: Mix) -> None:
    for place, labels, pod in pod_labels(any_mix.objects):
        there = {port["name"]: port["containerPort"] for item in pod["containers"] for port in item["ports"]}
        used = set()
        for service in any_mix.of("Service"):
            if _selects(service["spec"]["selector"], labels):
                for port in service["spec"]["ports"]:
                    assert port["targetPort"] in there, place
                    # A headless Service has no port of its own: the pod's is the one that is called.
                    assert port["port"] == there[port["targetPort"]], place
                    used.add(port["targetPort"])
        if labels["app.kubernetes.io/name"] == "graftserve":
            for monitor in any_mix.of("PodMonitor"):
                assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= there.keys()
            for policy in any_mix.of("NetworkPolicy"):
                rules = policy["spec"]["ingress"]
                assert {port["port"] for rule in rules for port in rule["ports"]} == there.keys()
        assert used == there.keys(), place
    for place, _, _, container in _servers(any_mix):
        options = _options(container)
        there = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert there == {"grpc": options.port, "rest": options.rest_api_port}, place


def test_what_routes_and_scalers_name_is_there(any_mix: Mix) -> None:
    services = {item["metadata"]["name"]: item for item in any_mix.of("Service")}
    for route in any_mix.of("GRPCRoute"):
        for rule in route["spec"]["rules"]:
            assert [item["name"] for item in rule["backendRefs"]] == ["graftserve", "graftserve-canary"]
            for backend in rule["backendRefs"]:
                ports = {port["port"]: port["name"] for port in services[backend["name"]]["spec"]["ports"]}
                assert ports[backend["port"]] == "grpc"
            called = {(item["method"]["service"], item["method"].get("method")) for item in rule["matches"]}
            # Reloading the configuration would take the pinned version away.
            assert ("tensorflow.serving.ModelService", "GetModelStatus") in called
            assert ("tensorflow.serving.ModelService", None) not in called
    for scaler in any_mix.of("ScaledObject", "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        found = any_mix.one(target["kind"], target["name"])
        assert found["apiVersion"] == target["apiVersion"]
        # What an apply must not set back.
        assert "replicas" not in found["spec"]
    for rollout in any_mix.of("Rollout"):
        canary = rollout["spec"]["strategy"]["canary"]
        # Argo tells pods on trial from others in its own two Services; the others go by its label.
        trial = {
            "app.kubernetes.io/name": "graftserve",
            "graftserve.dev/track": "stable",
            **canary["canaryMetadata"]["labels"],
        }
        for name in services.keys() - {canary["stableService"], canary["canaryService"]}:
            assert not _selects(services[name]["spec"]["selector"], trial), name
        budget = any_mix.one("PodDisruptionBudget", "graftserve")["spec"]["selector"]["matchLabels"]
        assert not _selects(budget, trial)
        plugin = canary["trafficRouting"]["plugins"]["argoproj-labs/gatewayAPI"]
        assert any_mix.one("GRPCRoute", plugin["grpcRoute"])
        assert plugin["namespace"] == rollout["metadata"]["namespace"]
        assert {canary["stableService"], canary["canaryService"]} <= services.keys()
        reference = rollout["spec"]["workloadRef"]
        deployment = any_mix.one(reference["kind"], reference["name"])
        assert deployment["spec"]["replicas"] == 0
        assert _selects(
            rollout["spec"]["selector"]["matchLabels"], deployment["spec"]["template"]["metadata"]["labels"]
        )
        steps = canary["steps"]
        named = [
            item["templateName"] for step in steps for item in step.get("analysis", {}).get("templates", [])
        ]
        named += [item["templateName"] for item in canary["analysis"]["templates"]]
        for name in named:
            assert any_mix.one("AnalysisTemplate", name)
        # Agreement is asked for before the first request of a caller.
        first = next(index for index, step in enumerate(steps) if "setWeight" in step)
        assert any("analysis" in step for step in steps[:first])
        assert canary["analysis"]["startingStep"] == first


def test_every_key_of_a_configuration_is_mounted_and_read(any_mix: Mix) -> None:
    unused = {item["metadata"]["name"]: set(item["data"]) for item in any_mix.of("ConfigMap")}
    for item in any_mix.of("ConfigMap"):
        if "grafana_dashboard" in item["metadata"].get("labels", {}):  # for Grafana's sidecar, no pod of ours
            del unused[item["metadata"]["name"]]
    for place, pod in pod_specs(any_mix.objects):
        for volume in pod["volumes"]:
            if "configMap" not in volume:
                continue
            name = volume["configMap"]["name"]
            assert any_mix.one("ConfigMap", name), place
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                for mount in container.get("volumeMounts", []):
                    if mount["name"] == volume["name"]:
                        words = [*container.get("command", []), *container["args"]]
                        if container["name"] in ("server", "kserve-container"):
                            words += _image(container).flags[: -len(_image(container).command("CMD"))]
                        said = " ".join(words)
                        unused[name] -= {key for key in unused[name] if f"{mount['mountPath']}/{key}" in said}
    for name, keys in unused.items():
        # The embedded server leaves exported models' batching to their engine.
        assert keys <= {"batching.config"}, name
        assert not keys or "embedded" in any_mix.components, name


def _config(some: Mix, container: Mapping[str, Any], place: str) -> str:
    options = _options(container)
    kind, name = place.split("/")
    item = some.one(kind, name)
    pod = item["spec"]["predictor"] if kind == "InferenceService" else item["spec"]["template"]["spec"]
    (mount,) = (
        mount
        for mount in container["volumeMounts"]
        if Path(options.model_config_file).parent == Path(mount["mountPath"])
    )
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    text: str = some.one("ConfigMap", volume["configMap"]["name"])["data"][
        Path(options.model_config_file).name
    ]
    return text


def test_one_version_is_pulled_pinned_asked_for_and_written_on_the_label(any_mix: Mix) -> None:
    for place, labels, pod, container in _servers(any_mix):
        options = _options(container)
        assert options.model_config_file_poll_wait_seconds == 0, place
        assert options.file_system_poll_wait_seconds == 0, place
        version = labels["graftserve.dev/version"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment["MODEL_VERSION"] == version, place
        if labels["graftserve.dev/track"] == "canary":  # there is none in the overlays as they come
            assert version == "", place
            continue
        config = text_format.Parse(_config(any_mix, container, place), ModelServerConfig())
        (model,) = config.model_config_list.config
        assert [str(number) for number in model.model_version_policy.specific.versions] == [version], place
        assert model.name == environment["MODEL_NAME"], place
        (pull,) = (item for item in pod["initContainers"] if item["name"] == "pull")
        name, *args = _expanded(pull)
        assert name == "pull"
        context = pull_command.make_context("pull", args)
        assert str(context.params["version"]) == version, place
        # Where the server looks for it.
        assert str(context.params["directory"]) == model.base_path, place
        mounts = [
            {mount["name"]: mount for mount in item["volumeMounts"]}["models"] for item in (pull, container)
        ]
        assert {mount["mountPath"] for mount in mounts} == {model.base_path}, place
        assert [mount.get("readOnly", False) for mount in mounts] == [False, True], place
        if "object-store/pvc" in any_mix.components and any_mix.overlay == "laptop":
            assert any(
                pull["env"][0]["value"].startswith(f"{mount['mountPath']}/") for mount in pull["volumeMounts"]
            ), place


def test_every_flag_is_one_and_threads_follow_the_quota(any_mix: Mix) -> None:
    for place, _, _, container in _servers(any_mix):
        options = _options(container)
        assert options.enable_grpc_healthcheck_service, place
        assert options.monitoring_config_file, place
        assert str(options.tensorflow_intra_op_parallelism) == container["resources"]["limits"]["cpu"], place


def test_the_job_names_its_own_workers(any_mix: Mix) -> None:
    for job in any_mix.of("Job"):
        spec = job["spec"]
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        (port,) = container["ports"]
        text = {entry["name"]: entry.get("value") for entry in container["env"]}["TF_CONFIG"]
        for index in range(spec["completions"]):
            config = json.loads(text.replace("$(INDEX)", str(index)))
            assert config["task"] == {"type": "worker", "index": index}
            assert config["cluster"]["worker"] == [
                f"{job['metadata']['name']}-{worker}.{pod['subdomain']}:{port['containerPort']}"
                for worker in range(spec["completions"])
            ]
        # A variable is expanded only by what stands before it.
        assert [entry["name"] for entry in container["env"]][:2] == ["INDEX", "TF_CONFIG"]
        assert spec["parallelism"] == spec["completions"]
        assert any_mix.one("Service", pod["subdomain"])["spec"]["publishNotReadyAddresses"] is True
        name, *args = container["args"]
        assert name == "train"
        assert train_command.make_context("train", list(args)).params["resume"] is True


def test_a_gpu_comes_with_all_that_belongs_to_it() -> None:
    for _, _, pod, container in _servers(mix("production")):
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"name": "TF_FORCE_GPU_ALLOW_GROWTH", "value": "true"} in container["env"]
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64", "nvidia.com/gpu.present": "true"}
    for _, _, pod, container in _servers(mix("production", "embedded")):
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
        assert not pod["nodeSelector"]


# What Prometheus is asked


def _expressions(some: Mix) -> Iterator[str]:
    for item in some.of("PrometheusRule"):
        for group in item["spec"]["groups"]:
            yield from (rule["expr"] for rule in group["rules"])
    for item in some.of("ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in item["spec"]["triggers"])
    for item in some.of("AnalysisTemplate"):
        for metric in item["spec"]["metrics"]:
            if "prometheus" in metric["provider"]:
                yield metric["provider"]["prometheus"]["query"]


def test_queries_ask_for_metrics_and_labels_that_exist() -> None:
    promql_parser = pytest.importorskip("promql_parser", reason="needs promql-parser")
    some = mix("production", "progressive")
    recorded = {
        rule["record"]
        for item in some.of("PrometheusRule")
        for group in item["spec"]["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    (endpoint,) = some.one("PodMonitor", "graftserve")["spec"]["podMetricsEndpoints"]
    given = {item["targetLabel"] for item in endpoint["relabelings"]} | {"namespace", "pod"}
    asked: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            asked.add(node.name)
            if node.name not in recorded and not node.name.startswith("kube_"):
                labels = {matcher.name for matcher in node.matchers.matchers}
                assert labels <= METRICS[node.name] | given, node.name

    expressions = list(_expressions(some))
    assert len(expressions) > 12
    for expression in expressions:
        promql_parser.walk(promql_parser.parse(expression.replace("{{args.canary-hash}}", "abc")), visit)
    assert recorded <= asked | {"graftserve:latency_seconds:p99"}
    # For Argo's pods, which are all of the stable track.
    assert "rollout_hash" in given


def test_the_autoscaler_asks_about_its_own_namespace() -> None:
    for overlay in overlays():
        some = mix(overlay, "autoscaling/keda")
        (scaler,) = some.of("ScaledObject")
        (trigger,) = scaler["spec"]["triggers"]
        assert f'namespace="{scaler["metadata"]["namespace"]}"' in trigger["metadata"]["query"]


def test_every_alert_says_what_is_wrong_and_how_bad_it_is() -> None:
    (alerts,) = (
        item for item in mix("production").of("PrometheusRule") if item["metadata"]["name"].endswith("alerts")
    )
    for group in alerts["spec"]["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert {"summary", "description"} <= rule["annotations"].keys()


# Files that are elsewhere, too


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("base/pod/monitoring.config", "monitoring.config"),
        ("base/pod/batching.config", "batching.config"),
        ("components/monitoring/graftserve.json", "grafana/dashboards/graftserve.json"),
    ],
)
def test_copies_are_those_of_the_images(here: str, there: str) -> None:
    """Kustomize reads nothing from outside its folder."""
    assert (_ROOT / "k8s" / here).read_bytes() == (_ROOT / "serving/container" / there).read_bytes()


def test_without_a_canary_stable_gets_everything() -> None:
    (route,) = mix("production").of("GRPCRoute")
    (rule,) = route["spec"]["rules"]
    assert [item["weight"] for item in rule["backendRefs"]] == [100, 0]
