"""The kinds that the fake API server knows: their names, and what a real server fills in."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Kind", "with_defaults"]


@dataclass(frozen=True)
class Kind:
    """One kind. status: has the subresource. generation: counts changes of the spec. custom: from a CRD."""

    group: str
    version: str
    kind: str
    plural: str
    short: str = ""
    namespaced: bool = True
    status: bool = True
    generation: bool = False
    custom: bool = False

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"

    @property
    def resource(self) -> str:
        """As messages name it: deployments.apps."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


def _custom(group: str, version: str, kind: str, plural: str) -> Kind:
    return Kind(group, version, kind, plural, generation=True, custom=True)


KINDS = (
    Kind("", "v1", "Namespace", "namespaces", "ns", namespaced=False),
    Kind("", "v1", "Service", "services", "svc"),
    Kind("", "v1", "ServiceAccount", "serviceaccounts", "sa", status=False),
    Kind("", "v1", "ConfigMap", "configmaps", "cm", status=False),
    Kind("", "v1", "Secret", "secrets", status=False),
    Kind("", "v1", "Pod", "pods", "po"),
    Kind("", "v1", "Event", "events", "ev", status=False),
    Kind("", "v1", "PersistentVolume", "persistentvolumes", "pv", namespaced=False),
    Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", "pvc"),
    Kind("apps", "v1", "Deployment", "deployments", "deploy", generation=True),
    Kind("apps", "v1", "ReplicaSet", "replicasets", "rs", generation=True),
    Kind("batch", "v1", "Job", "jobs", generation=True),
    Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", "pdb", generation=True),
    Kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", "hpa"),
    Kind(
        "networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", "netpol", status=False, generation=True
    ),
    _custom("gateway.networking.k8s.io", "v1", "GRPCRoute", "grpcroutes"),
    _custom("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
    _custom("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules"),
    _custom("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects"),
    _custom("argoproj.io", "v1alpha1", "AnalysisTemplate", "analysistemplates"),
    _custom("argoproj.io", "v1alpha1", "Rollout", "rollouts"),
    _custom("serving.kserve.io", "v1beta1", "InferenceService", "inferenceservices"),
)

_POD = {
    "restartPolicy": "Always",
    "terminationGracePeriodSeconds": 30,
    "dnsPolicy": "ClusterFirst",
    "securityContext": {},
    "schedulerName": "default-scheduler",
}
_CONTAINER = {
    "terminationMessagePath": "/dev/termination-log",
    "terminationMessagePolicy": "File",
    "resources": {},
}
_PROBE = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
_DEPLOYMENT = {
    "replicas": 1,
    "strategy": {"type": "RollingUpdate"},
    "revisionHistoryLimit": 10,
    "progressDeadlineSeconds": 600,
}
_ROLLING = {"maxUnavailable": "25%", "maxSurge": "25%"}


def with_defaults(kind: Kind, thing: dict[str, Any]) -> dict[str, Any]:
    """A copy with what a real server fills in, as far as rollouts can see it."""
    thing = deepcopy(thing)
    if kind.kind == "Deployment":
        spec = thing.setdefault("spec", {})
        _fill(spec, _DEPLOYMENT)
        strategy = spec["strategy"]
        strategy.setdefault("type", "RollingUpdate")
        if strategy["type"] == "RollingUpdate":
            _fill(strategy.setdefault("rollingUpdate", {}), _ROLLING)
        pod = spec.get("template", {}).get("spec", {})
        if pod:
            _fill_pod(pod)
    elif kind.kind == "Pod":
        _fill_pod(thing.setdefault("spec", {}))
    elif kind.kind == "Service":
        spec = thing.setdefault("spec", {})
        _fill(spec, {"type": "ClusterIP", "sessionAffinity": "None"})
        for port in spec.get("ports", []):
            _fill(port, {"protocol": "TCP", "targetPort": port["port"]})
    elif kind.kind == "Namespace":
        thing.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
        thing["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = thing["metadata"]["name"]
        thing.setdefault("status", {}).setdefault("phase", "Active")
    if kind.status and not kind.custom:
        thing.setdefault("status", {})
    return thing


def _fill_pod(pod: dict[str, Any]) -> None:
    _fill(pod, _POD)
    for container in [*pod.get("containers", []), *pod.get("initContainers", [])]:
        _fill(container, _CONTAINER)
        tag = container.get("image", "").rpartition("/")[2].partition(":")[2]
        container.setdefault("imagePullPolicy", "Always" if tag in ("", "latest") else "IfNotPresent")
        for port in container.get("ports", []):
            _fill(port, {"protocol": "TCP"})
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                _fill(container[probe], _PROBE)


def _fill(target: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key not in target:
            target[key] = deepcopy(value)
