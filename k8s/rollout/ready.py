"""Whether a Deployment's pods are all of its newest template and ready; and if not, why not. Pure.

Source: `kubectl rollout status`, rollout_status.go in https://github.com/kubernetes/kubectl
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress", "pod_troubles", "progress", "route_troubles"]

_CONTAINERS = ("initContainerStatuses", "containerStatuses")
_LONGEST_WORDS = 300


@dataclass(frozen=True)
class Progress:
    """ready: done. failed: the cluster has given up. text: how far it is, for people."""

    ready: bool
    text: str
    failed: bool = False


def progress(deployment: Mapping[str, Any]) -> Progress:
    """How far a Deployment is, an object of the API."""
    status = deployment.get("status") or {}
    wanted = deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return Progress(False, "not seen by the cluster's controllers yet")
    for condition in status.get("conditions") or ():
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return Progress(False, str(condition.get("message") or "its progress deadline is over"), True)
    updated, total = status.get("updatedReplicas", 0), status.get("replicas", 0)
    available = status.get("availableReplicas", 0)
    if updated < wanted:
        return Progress(False, f"{updated} of {_pods(wanted)} made")
    if total > updated:
        return Progress(False, f"{_pods(total - updated)} still to go")
    if available < updated:
        return Progress(False, f"{available} of {_pods(updated)} ready")
    return Progress(True, f"{available} of {_pods(wanted)} ready")


def pod_troubles(pods: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps pods from being ready, by their own word: one line for each reason, the commonest first."""
    counts: dict[str, int] = {}
    for pod in pods:
        if pod["metadata"].get("deletionTimestamp"):
            continue
        for reason in _reasons(pod):
            counts[reason] = counts.get(reason, 0) + 1
    return [
        f"{_pods(count)}: {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def route_troubles(route: Mapping[str, Any]) -> list[str]:
    """What Gateways have against a route: one line for each condition that is not met.

    Source: RouteStatus in https://gateway-api.sigs.k8s.io/reference/spec/
    """
    troubles = []
    for parent in (route.get("status") or {}).get("parents") or ():
        for condition in parent.get("conditions") or ():
            if condition["status"] == "False":
                name = parent["parentRef"]["name"]
                troubles.append(f"Gateway {name}: not {condition['type']}: {_words(condition)}")
    return troubles


def _reasons(pod: Mapping[str, Any]) -> Iterator[str]:
    """The first thing that went wrong, since the others follow from it."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"not scheduled: {_words(condition)}"
            return
    for containers in _CONTAINERS:
        for container in status.get(containers) or ():
            if trouble := _trouble(container, is_init=containers == _CONTAINERS[0]):
                yield f"container {container['name']} {trouble}"
                return
    if status.get("phase") == "Failed":
        yield f"failed: {_words(status)}"


def _trouble(container: Mapping[str, Any], *, is_init: bool) -> str:
    """Why a container does not run, or is not ready; "" if it is well, or on its way."""
    state = container.get("state") or {}
    ended = state.get("terminated")
    if ended:
        return "" if is_init and ended["exitCode"] == 0 else f"ended{_end(ended)}"
    before = (container.get("lastState") or {}).get("terminated")
    if waiting := state.get("waiting"):
        if waiting.get("reason") in (None, "ContainerCreating", "PodInitializing"):
            return ""
        return f"waits: {_words(waiting)}{_end(before)}"
    if container.get("ready") or is_init:
        return ""
    return f"runs and is not ready{_end(before)}"


def _end(ended: Mapping[str, Any] | None) -> str:
    if not ended:
        return ""
    reason = ended.get("reason")
    why = f"{reason}, " if reason not in (None, "Error", "Completed") else ""
    said = _last_line(ended.get("message"))
    return f" ({why}exit status {ended['exitCode']}{f': {said}' if said else ''})"


def _words(values: Mapping[str, Any]) -> str:
    said = [str(values[key]) for key in ("reason", "message") if values.get(key)]
    return _short(": ".join(said) or "no reason is given")


def _last_line(text: str | None) -> str:
    """What a program says last is why it ends."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return _short(lines[-1]) if lines else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_WORDS else f"{text[: _LONGEST_WORDS - 1]}…"


def _pods(count: int) -> str:
    return "1 pod" if count == 1 else f"{count} pods"
