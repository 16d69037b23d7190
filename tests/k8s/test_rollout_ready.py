"""How far a Deployment is, and what its pods say."""

from typing import Any

import pytest

from graftserve.k8s.rollout.ready import pod_troubles, progress, route_troubles


def _deployment(wanted: int = 2, generation: int = 3, conditions: Any = (), **status: int) -> dict[str, Any]:
    seen = {"observedGeneration": generation, "conditions": list(conditions)}
    return {
        "metadata": {"generation": 3},
        "spec": {"replicas": wanted},
        "status": seen | status,
    }


def _ready(count: int) -> dict[str, int]:
    return dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), count)


@pytest.mark.parametrize(
    ("deployment", "is_ready", "text"),
    [
        (_deployment(**_ready(2)), True, "2 of 2 pods ready"),
        (_deployment(1, **_ready(1)), True, "1 of 1 pod ready"),
        (_deployment(0), True, "0 of 0 pods ready"),
        ({"metadata": {}, "spec": {}, "status": _ready(1)}, True, "1 of 1 pod ready"),
        (_deployment(generation=2, **_ready(2)), False, "not seen by the cluster's controllers yet"),
        ({"metadata": {"generation": 1}, "spec": {}}, False, "not seen by the cluster's controllers yet"),
        (_deployment(replicas=2, updatedReplicas=1, availableReplicas=2), False, "1 of 2 pods made"),
        (_deployment(replicas=3, updatedReplicas=2, availableReplicas=3), False, "1 pod still to go"),
        (_deployment(replicas=2, updatedReplicas=2, availableReplicas=1), False, "1 of 2 pods ready"),
        (_deployment(0, replicas=1), False, "1 pod still to go"),
    ],
)
def test_progress(deployment: dict[str, Any], is_ready: bool, text: str) -> None:
    found = progress(deployment)
    assert (found.ready, found.failed, found.text) == (is_ready, False, text)


def test_progress_that_has_stopped() -> None:
    condition = {"type": "Progressing", "reason": "ProgressDeadlineExceeded", "message": "no progress"}
    found = progress(_deployment(conditions=[{"type": "Available"}, condition], replicas=2))
    assert (found.ready, found.failed, found.text) == (False, True, "no progress")


def _pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "pod"}, "status": status}


def _container(name: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "state": state, **more}


RUNS = {"running": {}}
DONE = {"terminated": {"exitCode": 0, "reason": "Completed"}}
PULLED = _container("pull", DONE, ready=True)


@pytest.mark.parametrize(
    ("pod", "trouble"),
    [
        (_pod(phase="Running", containerStatuses=[_container("server", RUNS, ready=True)]), None),
        (_pod(phase="Pending"), None),
        ({"metadata": {}}, None),
        (_pod(initContainerStatuses=[PULLED], containerStatuses=[_container("server", {})]), "runs"),
        (_pod(initContainerStatuses=[_container("pull", RUNS, ready=False)]), None),
        (
            _pod(
                conditions=[
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unfit",
                        "message": "no\nGPU",
                    }
                ]
            ),
            "not scheduled: Unfit: no GPU",
        ),
        (
            _pod(containerStatuses=[_container("server", {"waiting": {"reason": "PodInitializing"}})]),
            None,
        ),
        (
            _pod(
                containerStatuses=[
                    _container("server", {"waiting": {"reason": "ErrImagePull", "message": "no such tag"}})
                ]
            ),
            "container server waits: ErrImagePull: no such tag",
        ),
        (
            _pod(
                initContainerStatuses=[PULLED],
                containerStatuses=[
                    _container(
                        "server", RUNS, lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
                    )
                ],
            ),
            "container server runs and is not ready (OOMKilled, exit status 137)",
        ),
        (
            _pod(
                initContainerStatuses=[
                    _container("pull", {"terminated": {"exitCode": 1, "message": "a\nwhy\n"}})
                ]
            ),
            "container pull ended (exit status 1: why)",
        ),
        (
            _pod(phase="Failed", reason="Evicted", message="low on memory"),
            "failed: Evicted: low on memory",
        ),
    ],
)
def test_pods_say_what_keeps_them(pod: dict[str, Any], trouble: str | None) -> None:
    expected = {"runs": "container server runs and is not ready"}.get(str(trouble), trouble)
    assert pod_troubles([pod]) == ([] if expected is None else [f"1 pod: {expected}"])


def test_many_pods_are_told_by_reason() -> None:
    evicted = _pod(phase="Failed", reason="Evicted")
    going = {"metadata": {"deletionTimestamp": "now"}, "status": evicted["status"]}
    unready = _pod(containerStatuses=[_container("server", RUNS, ready=False)])
    assert pod_troubles([evicted, unready, going, unready]) == [
        "2 pods: container server runs and is not ready",
        "1 pod: failed: Evicted",
    ]


def test_long_words_are_cut() -> None:
    (line,) = pod_troubles([_pod(phase="Failed", message="x" * 1000)])
    assert len(line) < 330
    assert line.endswith("x…")


def test_gateways_say_what_they_have_against_a_route() -> None:
    accepted = {"type": "Accepted", "status": "True", "reason": "Accepted"}
    unresolved = {
        "type": "ResolvedRefs",
        "status": "False",
        "reason": "BackendNotFound",
        "message": "Service graftserve-canary",
    }
    parent = {"parentRef": {"name": "gateway"}, "conditions": [accepted, unresolved]}
    assert route_troubles({"status": {"parents": [parent]}}) == [
        "Gateway gateway: not ResolvedRefs: BackendNotFound: Service graftserve-canary"
    ]
    parent["conditions"] = [accepted]
    assert route_troubles({"status": {"parents": [parent]}}) == []
    assert route_troubles({"spec": {}}) == []
