"""What only the fake API server can do: faults, a restart, a cluster without a kind, controllers by hand."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic.exceptions import (
    ConflictError,
    ForbiddenError,
    InternalServerError,
    ResourceNotFoundError,
    ServiceUnavailableError,
    TooManyRequestsError,
    UnauthorizedError,
)

from tests.k8s.api_client import OURS, Api, config_map, deployment
from tests.k8s.fake_api import FakeApi, Fault
from tests.k8s.fake_store import ApiError


@pytest.fixture
def api(fake_api: FakeApi, tmp_path: Path) -> Iterator[Api]:
    """With a Deployment, and all requests so far forgotten."""
    api = Api(fake_api.kubeconfig(tmp_path / "config"), tmp_path / "discovery")
    api.apply(deployment(replicas=1))
    api.resource("ConfigMap")
    fake_api.requests.clear()
    yield api
    api.close()


def _configs(api: Api) -> int:
    return len(api.collection("ConfigMap")["items"])


class TestAnswers:
    @pytest.mark.parametrize(
        ("kind", "error", "reason"),
        [
            ("unavailable", ServiceUnavailableError, "ServiceUnavailable"),
            ("internal", InternalServerError, "InternalError"),
            ("unauthorized", UnauthorizedError, "Unauthorized"),
        ],
    )
    def test_say_it_once_and_do_nothing(
        self, fake_api: FakeApi, api: Api, kind: Any, error: type[ApiException], reason: str
    ) -> None:
        fault = fake_api.fail(Fault(kind, method="PATCH"))
        with pytest.raises(error) as caught:
            api.apply(config_map(a="1"))
        assert json.loads(caught.value.body)["reason"] == reason
        assert fault.hits == 1
        assert _configs(api) == 0
        assert api.apply(config_map(a="1"))["data"] == {"a": "1"}

    @pytest.mark.parametrize("seconds", [0, 7, None])
    def test_throttled_with_a_time_to_wait(self, fake_api: FakeApi, api: Api, seconds: int | None) -> None:
        fake_api.fail(Fault("throttle", retry_after_s=seconds))
        with pytest.raises(TooManyRequestsError) as caught:
            api.apply(config_map(a="1"))
        assert caught.value.headers.get("Retry-After") == (None if seconds is None else str(seconds))

    def test_forbidden_as_rbac_says_it(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.fail(Fault("forbidden", path="/deployments", times=None))
        with pytest.raises(ForbiddenError) as caught:
            api.apply(deployment())
        status = json.loads(caught.value.body)
        assert status["message"] == (
            'deployments.apps "server" is forbidden: User "fake" cannot patch resource "deployments" in API '
            f'group "apps" in the namespace "{api.namespace}"'
        )
        assert status["reason"] == "Forbidden"
        assert status["details"] == {"name": "server", "group": "apps", "kind": "deployments"}
        with pytest.raises(ForbiddenError) as caught:
            list(api.watch("Deployment"))
        assert 'cannot watch resource "deployments"' in json.loads(caught.value.body)["message"]


class TestWhichRequests:
    def test_by_method_path_and_what_a_test_thinks_of(self, fake_api: FakeApi, api: Api) -> None:
        fault = fake_api.fail(
            Fault("internal", "PATCH", "/configmaps/", lambda request: not request.is_dry_run, times=None)
        )
        api.apply(config_map(a="1"), dry_run="All")
        api.apply(deployment(replicas=2))
        assert fault.hits == 0
        for _ in range(2):
            with pytest.raises(InternalServerError):
                api.apply(config_map(a="1"))
        assert fault.hits == 2
        fake_api.mend()
        api.apply(config_map(a="1"))

    def test_the_nth(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.fail(Fault("internal", "PATCH", skip=1, times=2))
        seen = []
        for value in "1234":
            try:
                api.apply(config_map(a=value))
                seen.append(value)
            except InternalServerError:
                seen.append("failed")
        assert seen == ["1", "failed", "failed", "4"]

    def test_all_that_comes_is_written_down(self, fake_api: FakeApi, api: Api) -> None:
        api.apply(config_map(a="1"), dry_run="All")
        api.get("Deployment", "server")
        list(api.watch("Deployment", timeout=1))
        apply, get, watch = fake_api.requests
        assert apply.method == "PATCH"
        assert apply.path == f"/api/v1/namespaces/{api.namespace}/configmaps/settings"
        assert apply.query == {"fieldManager": OURS, "dryRun": "All"}
        assert apply.body["data"] == {"a": "1"}
        assert (apply.manager, apply.is_apply, apply.is_dry_run) == (OURS, True, True)
        assert (get.method, get.body, get.is_watch) == ("GET", None, False)
        assert watch.is_watch


class TestConnections:
    def test_dropped_before_anything_is_done(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.fail(Fault("drop_before", "PATCH"))
        with pytest.raises(urllib3.exceptions.HTTPError):
            api.apply(config_map(a="1"))
        assert _configs(api) == 0

    def test_dropped_after_it_is_done(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.fail(Fault("drop_after", "PATCH"))
        with pytest.raises(urllib3.exceptions.HTTPError):
            api.apply(config_map(a="1"))
        assert api.get("ConfigMap", "settings")["data"] == {"a": "1"}

    def test_hangs_until_released(self, fake_api: FakeApi, api: Api) -> None:
        fault = fake_api.fail(Fault("hang", "PATCH"))
        done = threading.Event()

        def apply() -> None:
            api.apply(config_map(a="1"))
            done.set()

        thread = threading.Thread(target=apply)
        thread.start()
        assert fault.hit.wait(30)
        with pytest.raises(ApiError, match="not found"):
            fake_api.get("ConfigMap", "settings", api.namespace)
        assert not done.is_set()
        fault.release()
        assert done.wait(30)
        thread.join()
        assert fake_api.get("ConfigMap", "settings", api.namespace)["data"] == {"a": "1"}

    def test_a_server_that_restarts_knows_everything(self, fake_api: FakeApi, api: Api) -> None:
        before = api.get("Deployment", "server")
        fake_api.stop()
        with pytest.raises(urllib3.exceptions.HTTPError):
            api.get("Deployment", "server")
        fake_api.start()
        assert api.get("Deployment", "server") == before

    def test_a_stop_ends_watches_and_what_hangs(self, fake_api: FakeApi, api: Api) -> None:
        events = api.watch("Deployment", timeout=60)
        assert next(events)["type"] == "ADDED"
        fault = fake_api.fail(Fault("hang", "PATCH"))
        errors = []

        def apply() -> None:
            try:
                api.apply(config_map(a="1"))
            except urllib3.exceptions.HTTPError as error:
                errors.append(error)

        thread = threading.Thread(target=apply)
        thread.start()
        assert fault.hit.wait(30)
        fake_api.stop()
        thread.join(30)
        assert len(errors) == 1
        with pytest.raises(urllib3.exceptions.HTTPError):
            list(events)


class TestWatches:
    def test_cut_between_two_events(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.fail(Fault("drop_watch", after_events=1))
        events = api.watch("Deployment", timeout=60)
        assert next(events)["type"] == "ADDED"
        with pytest.raises(urllib3.exceptions.HTTPError):
            next(events)

    def test_cut_in_the_middle_of_a_line(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.fail(Fault("drop_watch", after_events=1, mid_line=True))
        events = api.watch("Deployment", timeout=60)
        assert next(events)["type"] == "ADDED"
        fake_api.edit("Deployment", "server", api.namespace, {"spec": {"replicas": 3}})
        with pytest.raises(urllib3.exceptions.HTTPError):
            next(events)

    def test_gone_in_the_middle(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.fail(Fault("gone", after_events=1))
        events = api.watch("Deployment", timeout=60)
        assert next(events)["type"] == "ADDED"
        with pytest.raises(ApiException) as caught:
            next(events)
        assert caught.value.status == 410

    def test_a_compacted_version_is_gone(self, fake_api: FakeApi, api: Api) -> None:
        version = api.collection("Deployment")["metadata"]["resourceVersion"]
        running = api.watch("Deployment", timeout=60)
        next(running)
        fake_api.compact()
        with pytest.raises(ApiException) as caught:
            list(api.watch("Deployment", resource_version=version))
        assert caught.value.status == 410
        # Whoever reads again goes on, and so does a watch that has seen everything.
        newer = api.collection("Deployment")["metadata"]["resourceVersion"]
        fake_api.edit("Deployment", "server", api.namespace, {"spec": {"replicas": 3}})
        [event] = api.watch("Deployment", resource_version=newer)
        assert event["object"]["spec"]["replicas"] == 3
        assert next(running)["object"]["spec"]["replicas"] == 3
        running.close()

    def test_bookmarks(self, fake_api: FakeApi, api: Api) -> None:
        events = api.watch("Deployment", allow_watch_bookmarks=True, timeout=60)
        seen = next(events)["object"]["metadata"]["resourceVersion"]
        api.apply(config_map(a="1"))
        fake_api.bookmark()
        event = next(events)
        assert event["type"] == "BOOKMARK"
        assert event["object"].keys() == {"apiVersion", "kind", "metadata"}
        assert int(event["object"]["metadata"]["resourceVersion"]) > int(seen)
        events.close()


class TestTheCluster:
    def test_without_a_group(self, tmp_path: Path) -> None:
        with FakeApi(without={"keda.sh"}) as fake:
            api = Api(fake.kubeconfig(tmp_path / "config"), tmp_path / "discovery")
            assert api.dynamic.resources.get(kind="PodMonitor").group == "monitoring.coreos.com"
            with pytest.raises(ResourceNotFoundError):
                api.dynamic.resources.get(api_version="keda.sh/v1alpha1", kind="ScaledObject")
            api.close()

    def test_another_writer_and_applier(self, fake_api: FakeApi, api: Api) -> None:
        fake_api.edit("Deployment", "server", api.namespace, {"spec": {"replicas": 4}})
        with pytest.raises(ConflictError, match="kubectl-edit"):
            api.apply(deployment(replicas=2))
        thing = config_map(a="1") | {"metadata": {"name": "settings", "namespace": api.namespace}}
        fake_api.apply(thing, "argocd")
        with pytest.raises(ConflictError, match="argocd"):
            api.apply(config_map(a="2"))
        fake_api.delete("ConfigMap", "settings", api.namespace)
        assert _configs(api) == 0

    def test_pods_become_ready_when_the_test_says_so(self, fake_api: FakeApi, api: Api) -> None:
        assert api.get("Deployment", "server")["status"] == {}
        fake_api.make_ready("server", api.namespace)
        status = api.get("Deployment", "server")["status"]
        assert status["observedGeneration"] == 1
        assert status["availableReplicas"] == status["updatedReplicas"] == 1
        again = api.apply(deployment(replicas=2))
        assert (again["metadata"]["generation"], again["status"]["observedGeneration"]) == (2, 1)
        fake_api.set_status("Deployment", "server", api.namespace, {"observedGeneration": 2})
        assert api.get("Deployment", "server")["status"] == {"observedGeneration": 2}

    def test_pods_become_ready_by_themselves(self, tmp_path: Path) -> None:
        with FakeApi(ready=True) as fake:
            api = Api(fake.kubeconfig(tmp_path / "config"), tmp_path / "discovery")
            version = api.collection("Deployment")["metadata"]["resourceVersion"]
            api.apply(deployment(replicas=2))
            made, ready = api.watch("Deployment", resource_version=version)
            assert made["object"]["status"] == {}
            assert ready["object"]["status"]["availableReplicas"] == 2
            api.close()
