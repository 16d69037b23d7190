"""The fake API server and a real one behave alike."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic.exceptions import (
    BadRequestError,
    ConflictError,
    DynamicApiError,
    NotFoundError,
    ResourceNotFoundError,
    UnprocessibleEntityError,
)

from graftserve.k8s.render import KubectlError, find_kubectl
from tests.k8s.api_client import OURS, Api, Thing, config_map, deployment, new_thing, route


@pytest.fixture
def api(api_config: Path, tmp_path: Path) -> Iterator[Api]:
    api = Api(api_config, tmp_path / "discovery")
    yield api
    api.close()


def _owned(thing: Thing, manager: str, operation: str = "Apply", subresource: str = "") -> Any:
    """fieldsV1 of one entry; None without one."""
    found = [
        entry["fieldsV1"]
        for entry in thing["metadata"]["managedFields"]
        if (entry["manager"], entry["operation"], entry.get("subresource", ""))
        == (manager, operation, subresource)
    ]
    assert len(found) < 2, thing["metadata"]["managedFields"]
    return found[0] if found else None


def _containers(thing: Thing) -> dict[str, Thing]:
    return {each["name"]: each for each in thing["spec"]["template"]["spec"]["containers"]}


def _status(error: DynamicApiError) -> Thing:
    return json.loads(error.body)


def _untime(status: Thing) -> None:
    """Servers before 1.22 also say when another manager wrote."""

    def without(text: str) -> str:
        return re.sub(r" at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "", text)

    status["message"] = without(status["message"])
    for cause in status["details"]["causes"]:
        cause["message"] = without(cause["message"])


class TestApply:
    def test_creates_what_is_not_there(self, api: Api) -> None:
        made = api.apply(config_map(a="1"))
        assert made["data"] == {"a": "1"}
        assert _owned(made, OURS) == {"f:data": {"f:a": {}}}
        [entry] = made["metadata"]["managedFields"]
        assert entry["apiVersion"] == "v1"
        assert entry["fieldsType"] == "FieldsV1"
        assert {"uid", "resourceVersion", "creationTimestamp"} <= made["metadata"].keys()
        assert api.get("ConfigMap", "settings") == made

    def test_owns_leaves_keyed_items_and_whole_lists(self, api: Api) -> None:
        container = {
            "name": "server",
            "image": "server:1",
            "args": ["--port=1", "--name=x"],
            "env": [{"name": "A", "value": "1"}],
            "ports": [{"containerPort": 8500, "name": "grpc"}],
            "volumeMounts": [{"name": "models", "mountPath": "/models"}],
            "resources": {"limits": {"memory": "1Gi"}},
        }
        spread = {
            "topologyKey": "kubernetes.io/hostname",
            "maxSkew": 1,
            "whenUnsatisfiable": "ScheduleAnyway",
        }
        pod = {
            "volumes": [{"name": "models", "configMap": {"name": "models"}}],
            "topologySpreadConstraints": [spread],
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        }
        made = api.apply(deployment([container], pod=pod))
        fields = _owned(made, OURS)
        assert fields["f:metadata"] == {"f:labels": {"f:app": {}}}
        assert "f:replicas" not in fields["f:spec"]
        assert fields["f:spec"]["f:template"]["f:spec"] == {
            "f:containers": {
                'k:{"name":"server"}': {
                    ".": {},
                    "f:name": {},
                    "f:image": {},
                    "f:args": {},
                    "f:env": {'k:{"name":"A"}': {".": {}, "f:name": {}, "f:value": {}}},
                    "f:ports": {
                        'k:{"containerPort":8500,"protocol":"TCP"}': {
                            ".": {},
                            "f:containerPort": {},
                            "f:name": {},
                        }
                    },
                    "f:volumeMounts": {
                        'k:{"mountPath":"/models"}': {".": {}, "f:mountPath": {}, "f:name": {}}
                    },
                    "f:resources": {"f:limits": {"f:memory": {}}},
                }
            },
            "f:volumes": {'k:{"name":"models"}': {".": {}, "f:name": {}, "f:configMap": {"f:name": {}}}},
            "f:topologySpreadConstraints": {
                'k:{"topologyKey":"kubernetes.io/hostname","whenUnsatisfiable":"ScheduleAnyway"}': {
                    ".": {},
                    "f:maxSkew": {},
                    "f:topologyKey": {},
                    "f:whenUnsatisfiable": {},
                }
            },
            "f:tolerations": {},
        }

    def test_fills_in_defaults_that_nobody_owns(self, api: Api) -> None:
        made = api.apply(
            deployment([{"name": "server", "image": "server:1", "ports": [{"containerPort": 1}]}])
        )
        assert made["spec"]["replicas"] == 1
        assert made["spec"]["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"},
        }
        assert made["spec"]["progressDeadlineSeconds"] == 600
        server = _containers(made)["server"]
        assert server["ports"] == [{"containerPort": 1, "protocol": "TCP"}]
        assert server["imagePullPolicy"] == "IfNotPresent"
        assert made["metadata"]["generation"] == 1

    def test_a_conflict_names_manager_version_and_field(self, api: Api) -> None:
        api.apply(deployment(replicas=1))
        api.patch("Deployment", "server", {"spec": {"replicas": 5}})
        with pytest.raises(ConflictError) as caught:
            api.apply(deployment(replicas=2))
        status = _status(caught.value)
        _untime(status)
        assert status == {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": (
                'Apply failed with 1 conflict: conflict with "kubectl-edit" using apps/v1: .spec.replicas'
            ),
            "reason": "Conflict",
            "details": {
                "causes": [
                    {
                        "reason": "FieldManagerConflict",
                        "message": 'conflict with "kubectl-edit" using apps/v1',
                        "field": ".spec.replicas",
                    }
                ]
            },
            "code": 409,
        }
        assert api.get("Deployment", "server")["spec"]["replicas"] == 5

    def test_an_applier_is_named_without_a_version(self, api: Api) -> None:
        api.apply(config_map(a="1"), "other")
        with pytest.raises(ConflictError) as caught:
            api.apply(config_map(a="2"))
        assert (
            _status(caught.value)["message"] == 'Apply failed with 1 conflict: conflict with "other": .data.a'
        )

    def test_conflicts_are_listed_by_manager(self, api: Api) -> None:
        image, env = {"image": "server:2"}, {"env": [{"name": "A", "value": "2"}]}
        first = {"name": "server", "image": "server:1", "env": [{"name": "A", "value": "1"}]}
        api.apply(deployment([first], replicas=1))
        strategic = "application/strategic-merge-patch+json"
        for change, manager in (
            ({"replicas": 3, "template": {"spec": {"containers": [{"name": "server"} | env]}}}, "b-edit"),
            ({"template": {"spec": {"containers": [{"name": "server"} | image]}}}, "a-edit"),
        ):
            api.patch("Deployment", "server", {"spec": change}, manager, content_type=strategic)
        with pytest.raises(ConflictError) as caught:
            api.apply(deployment([first], replicas=1))
        status = _status(caught.value)
        _untime(status)
        assert status["message"] == (
            'Apply failed with 3 conflicts: conflicts with "a-edit" using apps/v1:\n'
            '- .spec.template.spec.containers[name="server"].image\n'
            'conflicts with "b-edit" using apps/v1:\n'
            "- .spec.replicas\n"
            '- .spec.template.spec.containers[name="server"].env[name="A"].value'
        )
        assert {(cause["message"], cause["field"]) for cause in status["details"]["causes"]} == {
            (
                'conflict with "a-edit" using apps/v1',
                '.spec.template.spec.containers[name="server"].image',
            ),
            ('conflict with "b-edit" using apps/v1', ".spec.replicas"),
            (
                'conflict with "b-edit" using apps/v1',
                '.spec.template.spec.containers[name="server"].env[name="A"].value',
            ),
        }

    def test_a_conflict_in_a_port_names_both_keys(self, api: Api) -> None:
        ports = [{"containerPort": 8500, "name": "grpc"}]
        container = {"name": "server", "image": "server:1", "ports": ports}
        api.apply(deployment([container]), "other")
        with pytest.raises(ConflictError) as caught:
            api.apply(deployment([container | {"ports": [{"containerPort": 8500, "name": "rest"}]}]))
        assert [cause["field"] for cause in _status(caught.value)["details"]["causes"]] == [
            '.spec.template.spec.containers[name="server"].ports[containerPort=8500,protocol="TCP"].name'
        ]

    def test_the_same_value_is_shared(self, api: Api) -> None:
        api.apply(config_map(a="1", b="1"), "other")
        both = api.apply(config_map(a="1"))
        assert _owned(both, OURS) == {"f:data": {"f:a": {}}}
        assert _owned(both, "other") == {"f:data": {"f:a": {}, "f:b": {}}}
        # Either gives it up, and it stays with the other.
        assert api.apply(config_map(b="1"), "other")["data"] == {"a": "1", "b": "1"}
        assert api.apply(config_map(c="1"))["data"] == {"b": "1", "c": "1"}

    def test_force_takes_over(self, api: Api) -> None:
        api.apply(config_map(a="1", b="1"), "other")
        forced = api.apply(config_map(a="2"), force_conflicts=True)
        assert forced["data"] == {"a": "2", "b": "1"}
        assert _owned(forced, OURS) == {"f:data": {"f:a": {}}}
        assert _owned(forced, "other") == {"f:data": {"f:b": {}}}

    def test_an_entry_without_fields_goes(self, api: Api) -> None:
        api.apply(config_map(a="1"), "other")
        forced = api.apply(config_map(a="2"), force_conflicts=True)
        assert [entry["manager"] for entry in forced["metadata"]["managedFields"]] == [OURS]

    def test_removes_what_it_no_longer_says(self, api: Api) -> None:
        server = {"name": "server", "image": "server:1", "env": [{"name": "A", "value": "1"}]}
        api.apply(deployment([server, {"name": "sidecar", "image": "sidecar:1"}], replicas=3))
        less = api.apply(deployment([{"name": "server", "image": "server:1"}]))
        assert _containers(less).keys() == {"server"}
        assert "env" not in _containers(less)["server"]
        assert less["spec"]["replicas"] == 1

    def test_leaves_what_others_added(self, api: Api) -> None:
        api.apply(deployment())
        proxy = {"name": "proxy", "image": "proxy:1"}
        strategic = "application/strategic-merge-patch+json"
        patch = {"spec": {"template": {"spec": {"containers": [proxy]}}}}
        api.patch("Deployment", "server", patch, "injector", content_type=strategic)
        again = api.apply(deployment([{"name": "server", "image": "server:2"}]))
        images = {name: each["image"] for name, each in _containers(again).items()}
        assert images == {"server": "server:2", "proxy": "proxy:1"}

    def test_a_container_goes_with_what_others_changed_in_it(self, api: Api) -> None:
        proxy = {"name": "proxy", "image": "proxy:1"}
        api.apply(deployment([{"name": "server", "image": "server:1"}, proxy]))
        patch = {"spec": {"template": {"spec": {"containers": [{"name": "proxy", "args": ["a"]}]}}}}
        strategic = "application/strategic-merge-patch+json"
        api.patch("Deployment", "server", patch, content_type=strategic)
        assert _containers(api.apply(deployment())).keys() == {"server"}

    def test_a_container_that_others_apply_too_stays_without_its_image(self, api: Api) -> None:
        proxy = {"name": "proxy", "image": "proxy:1"}
        api.apply(deployment([{"name": "server", "image": "server:1"}, proxy]))
        api.apply(deployment([{"name": "proxy", "args": ["a"]}]), "other")
        with pytest.raises(UnprocessibleEntityError) as caught:
            api.apply(deployment())
        message = _status(caught.value)["message"]
        assert re.search(r"spec.template.spec.containers\[\d\].image: Required value", message)

    def test_the_creator_gets_back_what_is_left_of_its_maps(self, api: Api) -> None:
        api.create(config_map(a="1"))
        api.apply(config_map(a="2"), force_conflicts=True)
        with pytest.raises(ConflictError, match="kubectl-create"):
            api.apply(config_map(a="3"))

    def test_a_field_given_up_stays_with_who_updated_it(self, api: Api) -> None:
        api.apply(deployment(replicas=2))
        api.patch("Deployment", "server", {"spec": {"replicas": 7}}, "autoscaler")
        assert api.apply(deployment())["spec"]["replicas"] == 7

    def test_the_map_that_an_update_made_outlives_its_last_field(self, api: Api) -> None:
        api.create(config_map(a="1"))
        api.apply(config_map(b="1"))
        assert api.apply(new_thing("ConfigMap", "settings"))["data"] == {"a": "1"}

    def test_lists_without_keys_are_one_value(self, api: Api) -> None:
        api.apply(deployment([{"name": "server", "image": "server:1", "args": ["a", "b"]}]), "other")
        with pytest.raises(ConflictError) as caught:
            api.apply(deployment([{"name": "server", "image": "server:1", "args": ["a"]}]))
        assert [cause["field"] for cause in _status(caught.value)["details"]["causes"]] == [
            '.spec.template.spec.containers[name="server"].args'
        ]

    def test_lists_of_custom_kinds_are_one_value(self, api: Api) -> None:
        rules = [{"backendRefs": [{"name": "stable", "weight": 90}, {"name": "canary", "weight": 10}]}]
        made = api.apply(route(hostnames=["a.example"], rules=rules))
        assert _owned(made, OURS) == {"f:spec": {"f:hostnames": {}, "f:rules": {}}}
        assert made["metadata"]["generation"] == 1
        changed = [{"backendRefs": [{"name": "stable", "weight": 100}]}]
        api.patch("GRPCRoute", "route", {"spec": {"rules": changed}})
        with pytest.raises(ConflictError) as caught:
            api.apply(route(hostnames=["a.example"], rules=rules))
        status = _status(caught.value)
        _untime(status)
        assert status["message"] == (
            'Apply failed with 1 conflict: conflict with "kubectl-edit" using gateway.networking.k8s.io/v1: '
            ".spec.rules"
        )

    def test_service_ports_are_keyed_by_port_and_protocol(self, api: Api) -> None:
        service = new_thing(
            "Service", "server", spec={"ports": [{"name": "grpc", "port": 8500, "protocol": "TCP"}]}
        )
        made = api.apply(service)
        assert made["spec"]["ports"] == [
            {"name": "grpc", "port": 8500, "protocol": "TCP", "targetPort": 8500}
        ]
        assert made["spec"]["type"] == "ClusterIP"
        assert made["spec"]["clusterIP"].startswith("10.0.0.")
        assert _owned(made, OURS) == {
            "f:spec": {
                "f:ports": {
                    'k:{"port":8500,"protocol":"TCP"}': {
                        ".": {},
                        "f:name": {},
                        "f:port": {},
                        "f:protocol": {},
                    },
                }
            }
        }

    def test_the_same_again_changes_nothing(self, api: Api) -> None:
        first = api.apply(deployment(replicas=2))
        assert api.apply(deployment(replicas=2)) == first

    def test_dry_run_changes_nothing(self, api: Api) -> None:
        first = api.apply(config_map(a="1"))
        tried = api.apply(config_map(a="2"), dry_run="All")
        assert tried["data"] == {"a": "2"}
        assert tried["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        assert api.get("ConfigMap", "settings") == first
        new = new_thing("ConfigMap", "new", data={"a": "1"})
        assert "resourceVersion" not in api.apply(new, dry_run="All")["metadata"]
        with pytest.raises(NotFoundError):
            api.get("ConfigMap", "new")

    def test_dry_run_finds_conflicts(self, api: Api) -> None:
        api.apply(config_map(a="1"), "other")
        with pytest.raises(ConflictError):
            api.apply(config_map(a="2"), dry_run="All")

    def test_reads_yaml(self, api: Api) -> None:
        path = f"/api/v1/namespaces/{api.namespace}/configmaps/settings"
        text = 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {a: "1"}\n'
        assert api.apply_text(path, text)[1]["data"] == {"a": "1"}
        status, answer = api.apply_text(path, "a: [")
        assert (status, answer["reason"]) == (400, "BadRequest")

    def test_needs_a_manager(self, api: Api) -> None:
        with pytest.raises(UnprocessibleEntityError) as caught:
            api.apply(config_map(a="1"), "")
        status = _status(caught.value)
        assert status["message"] == (
            'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: '
            "is required for apply patch"
        )
        assert status["details"]["causes"] == [
            {
                "reason": "FieldValueRequired",
                "message": "Required value: is required for apply patch",
                "field": "fieldManager",
            }
        ]

    def test_refuses_managed_fields(self, api: Api) -> None:
        made = api.apply(config_map(a="1"))
        with pytest.raises(BadRequestError) as caught:
            api.apply(made)
        assert _status(caught.value)["message"] == "metadata.managedFields must be nil"

    def test_an_old_version_conflicts(self, api: Api) -> None:
        old = api.apply(config_map(a="1"))["metadata"]["resourceVersion"]
        api.apply(config_map(a="2"))
        late = config_map(a="3")
        late["metadata"]["resourceVersion"] = old
        with pytest.raises(ConflictError) as caught:
            api.apply(late)
        assert _status(caught.value)["message"] == (
            'Operation cannot be fulfilled on configmaps "settings": the object has been modified; '
            "please apply your changes to the latest version and try again"
        )

    def test_the_status_of_a_deployment_is_not_applied(self, api: Api) -> None:
        made = api.apply(deployment() | {"status": {"replicas": 3}})
        assert "replicas" not in made.get("status", {})


class TestOtherWrites:
    def test_an_edit_takes_the_field_over(self, api: Api) -> None:
        api.apply(deployment(replicas=1))
        edited = api.patch("Deployment", "server", {"spec": {"replicas": 5}})
        assert _owned(edited, "kubectl-edit", "Update") == {"f:spec": {"f:replicas": {}}}
        assert "f:replicas" not in _owned(edited, OURS)["f:spec"]

    def test_an_edit_to_the_same_value_owns_nothing(self, api: Api) -> None:
        first = api.apply(deployment(replicas=1))
        assert api.patch("Deployment", "server", {"spec": {"replicas": 1}}) == first

    def test_the_same_manager_conflicts_with_its_own_updates(self, api: Api) -> None:
        api.apply(config_map(a="1"))
        api.patch("ConfigMap", "settings", {"data": {"a": "2"}}, OURS)
        with pytest.raises(ConflictError):
            api.apply(config_map(a="1"))

    def test_what_is_created_belongs_to_who_created_it(self, api: Api) -> None:
        made = api.create(deployment(replicas=2), "kubectl-client-side-apply")
        fields = _owned(made, "kubectl-client-side-apply", "Update")
        assert fields["f:metadata"] == {"f:labels": {".": {}, "f:app": {}}}
        assert fields["f:spec"]["f:replicas"] == {}
        assert fields["f:spec"]["f:strategy"] == {
            "f:type": {},
            "f:rollingUpdate": {".": {}, "f:maxSurge": {}, "f:maxUnavailable": {}},
        }
        template = fields["f:spec"]["f:template"]
        assert template["f:metadata"] == {"f:labels": {".": {}, "f:app": {}}}
        assert template["f:spec"]["f:containers"]['k:{"name":"server"}'] == {
            ".": {},
            "f:image": {},
            "f:imagePullPolicy": {},
            "f:name": {},
            "f:resources": {},
            "f:terminationMessagePath": {},
            "f:terminationMessagePolicy": {},
        }
        with pytest.raises(ConflictError) as caught:
            api.apply(deployment(replicas=3))
        status = _status(caught.value)
        _untime(status)
        assert status["message"] == (
            'Apply failed with 1 conflict: conflict with "kubectl-client-side-apply" using apps/v1: '
            ".spec.replicas"
        )

    def test_a_replace_is_tracked(self, api: Api) -> None:
        thing = api.apply(config_map(a="1", b="1"))
        thing["data"] = {"a": "2"}
        replaced = api.replace(thing)
        assert replaced["data"] == {"a": "2"}
        assert _owned(replaced, "kubectl-replace", "Update") == {"f:data": {"f:a": {}}}
        assert _owned(replaced, OURS) is None or _owned(replaced, OURS) == {"f:data": {}}

    def test_a_replace_of_an_old_version_conflicts(self, api: Api) -> None:
        old = api.apply(config_map(a="1"))
        api.apply(config_map(a="2"))
        old["data"] = {"a": "3"}
        with pytest.raises(ConflictError) as caught:
            api.replace(old)
        assert _status(caught.value)["details"] == {"name": "settings", "kind": "configmaps"}
        assert _status(caught.value)["reason"] == "Conflict"

    def test_a_patch_of_an_old_version_conflicts(self, api: Api) -> None:
        old = api.apply(config_map(a="1"))["metadata"]["resourceVersion"]
        api.apply(config_map(a="2"))
        patch = {"metadata": {"resourceVersion": old}, "data": {"a": "3"}}
        with pytest.raises(ConflictError):
            api.patch("ConfigMap", "settings", patch)

    def test_null_in_a_patch_removes(self, api: Api) -> None:
        api.apply(config_map(a="1", b="1"))
        assert api.patch("ConfigMap", "settings", {"data": {"a": None}})["data"] == {"b": "1"}

    def test_what_is_there_is_not_created(self, api: Api) -> None:
        api.create(config_map(a="1"))
        with pytest.raises(ConflictError) as caught:
            api.create(config_map(a="1"))
        status = _status(caught.value)
        assert status["reason"] == "AlreadyExists"
        assert status["message"] == 'configmaps "settings" already exists'

    def test_generation_counts_changes_of_the_spec(self, api: Api) -> None:
        first = api.apply(deployment(replicas=1))
        status = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1}
        seen = api.write_status("Deployment", "server", status)
        assert seen["metadata"]["generation"] == 1
        assert seen["metadata"]["resourceVersion"] != first["metadata"]["resourceVersion"]
        assert seen["status"]["updatedReplicas"] == 1
        labelled = api.patch("Deployment", "server", {"metadata": {"labels": {"b": "1"}}})
        assert labelled["metadata"]["generation"] == 1
        assert api.apply(deployment(replicas=2))["metadata"]["generation"] == 2
        noted = api.patch("Deployment", "server", {"metadata": {"annotations": {"b": "1"}}})
        assert noted["metadata"]["generation"] == 3
        assert noted["status"]["observedGeneration"] == 1

    def test_the_status_subresource_writes_nothing_else(self, api: Api) -> None:
        api.apply(deployment(replicas=1))
        resource = api.resource("Deployment").subresources["status"]
        body = {"spec": {"replicas": 9}, "status": {"replicas": 1}}
        written = api.dynamic.patch(
            resource,
            body=body,
            name="server",
            namespace=api.namespace,
            content_type="application/merge-patch+json",
        ).to_dict()
        assert written["spec"]["replicas"] == 1
        assert written["status"]["replicas"] == 1

    def test_an_edit_of_the_status_changes_nothing(self, api: Api) -> None:
        api.apply(deployment())
        assert "replicas" not in api.patch("Deployment", "server", {"status": {"replicas": 3}})["status"]

    def test_a_selector_cannot_change(self, api: Api) -> None:
        api.apply(deployment())
        other = deployment()
        other["spec"]["selector"] = {"matchLabels": {"app": "other"}}
        other["spec"]["template"]["metadata"]["labels"] = {"app": "other"}
        with pytest.raises(UnprocessibleEntityError) as caught:
            api.apply(other)
        status = _status(caught.value)
        assert status["reason"] == "Invalid"
        assert status["message"].startswith('Deployment.apps "server" is invalid: ')
        assert "spec.selector: Invalid value: " in status["message"]
        assert "field is immutable" in status["message"]

    def test_deleting(self, api: Api) -> None:
        uid = api.apply(deployment())["metadata"]["uid"]
        gone = api.delete("Deployment", "server")
        assert gone["status"] == "Success"
        assert gone["details"] == {"name": "server", "group": "apps", "kind": "deployments", "uid": uid}
        with pytest.raises(NotFoundError):
            api.delete("Deployment", "server")

    def test_finalizers_delay_the_deletion(self, api: Api) -> None:
        thing = config_map(a="1")
        thing["metadata"]["finalizers"] = ["graftserve.dev/test"]
        api.create(thing)
        api.delete("ConfigMap", "settings")
        assert "deletionTimestamp" in api.get("ConfigMap", "settings")["metadata"]
        api.patch("ConfigMap", "settings", {"metadata": {"finalizers": None}})
        with pytest.raises(NotFoundError):
            api.get("ConfigMap", "settings")


class TestWhatIsNotThere:
    def test_an_object(self, api: Api) -> None:
        with pytest.raises(NotFoundError) as caught:
            api.get("Deployment", "nothing")
        assert _status(caught.value) == {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": 'deployments.apps "nothing" not found',
            "reason": "NotFound",
            "details": {"name": "nothing", "group": "apps", "kind": "deployments"},
            "code": 404,
        }

    @pytest.mark.parametrize("options", [{}, {"dry_run": "All"}])
    def test_a_namespace(self, api: Api, options: dict[str, str]) -> None:
        api.namespace = "nowhere"
        with pytest.raises(NotFoundError) as caught:
            api.apply(config_map(a="1"), **options)
        status = _status(caught.value)
        assert status["message"] == 'namespaces "nowhere" not found'
        assert status["details"] == {"name": "nowhere", "kind": "namespaces"}
        assert api.collection("ConfigMap")["items"] == []

    def test_a_kind(self, api: Api) -> None:
        with pytest.raises(ResourceNotFoundError):
            api.dynamic.resources.get(api_version="example.com/v1", kind="Nothing")
        with pytest.raises(NotFoundError) as caught:
            api.dynamic.request("get", "/apis/example.com/v1/namespaces/default/nothings/a")
        assert caught.value.body == "404 page not found\n"

    def test_what_the_url_does_not_say(self, api: Api) -> None:
        resource = api.resource("ConfigMap")
        thing = new_thing("ConfigMap", "other")
        with pytest.raises(BadRequestError) as caught:
            api.dynamic.server_side_apply(
                resource, body=thing, name="settings", namespace=api.namespace, field_manager=OURS
            )
        assert _status(caught.value)["reason"] == "BadRequest"
        thing["metadata"] = {"name": "settings", "namespace": "other"}
        with pytest.raises(BadRequestError) as caught:
            api.dynamic.server_side_apply(
                resource, body=thing, name="settings", namespace=api.namespace, field_manager=OURS
            )
        assert "namespace" in _status(caught.value)["message"]
        del thing["metadata"]["name"]
        with pytest.raises(BadRequestError, match="name must be provided"):
            api.dynamic.server_side_apply(
                resource, body=thing, name="settings", namespace=api.namespace, field_manager=OURS
            )


class TestCollections:
    def test_lists_what_is_selected(self, api: Api) -> None:
        for name, labels in (("a", {"track": "stable"}), ("b", {"track": "canary"}), ("c", {})):
            thing = new_thing("ConfigMap", name)
            thing["metadata"]["labels"] = labels
            api.create(thing)

        def names(**options: str) -> list[str]:
            found = api.collection("ConfigMap", **options)
            assert found["kind"] == "ConfigMapList"
            assert int(found["metadata"]["resourceVersion"]) > 0
            # Newer servers put a certificate into every namespace.
            return [name for item in found["items"] if (name := item["metadata"]["name"]) in "abc"]

        assert names() == ["a", "b", "c"]
        assert names(label_selector="track=stable") == ["a"]
        assert names(label_selector="track==stable") == ["a"]
        assert names(label_selector="track!=stable") == ["b", "c"]
        assert names(label_selector="track") == ["a", "b"]
        assert names(label_selector="!track") == ["c"]
        assert names(label_selector="track in (stable, canary)") == ["a", "b"]
        assert names(label_selector="track notin (stable, other)") == ["b", "c"]
        assert names(label_selector="track=canary,track!=stable") == ["b"]
        assert names(field_selector="metadata.name=b") == ["b"]
        assert names(field_selector="metadata.name!=b") == ["a", "c"]

    def test_items_of_custom_kinds_alone_say_what_they_are(self, api: Api) -> None:
        api.create(config_map(a="1"))
        api.create(route(hostnames=["a.example"]))

        def items(kind: str) -> list[Thing]:
            answer = api.dynamic.get(api.resource(kind), namespace=api.namespace, serialize=False)
            return json.loads(answer.data)["items"]

        assert all(item.keys() == {"metadata", "data"} for item in items("ConfigMap"))
        [item] = items("GRPCRoute")
        assert (item["apiVersion"], item["kind"]) == ("gateway.networking.k8s.io/v1", "GRPCRoute")

    def test_all_namespaces(self, api: Api) -> None:
        api.create(config_map(a="1"))
        found = api.dynamic.get(api.resource("ConfigMap")).to_dict()["items"]
        assert (api.namespace, "settings") in [
            (item["metadata"]["namespace"], item["metadata"]["name"]) for item in found
        ]


class TestWatch:
    def test_says_what_is_there_and_what_happens(self, api: Api) -> None:
        api.create(deployment(replicas=1))
        events = api.watch("Deployment", timeout=20)
        first = next(events)
        assert first["type"] == "ADDED"
        assert first["object"]["metadata"]["name"] == "server"
        api.patch("Deployment", "server", {"spec": {"replicas": 2}})
        second = next(events)
        assert second["type"] == "MODIFIED"
        assert second["object"]["spec"]["replicas"] == 2
        api.delete("Deployment", "server")
        third = next(events)
        assert third["type"] == "DELETED"
        assert int(third["object"]["metadata"]["resourceVersion"]) > int(
            second["object"]["metadata"]["resourceVersion"]
        )
        events.close()

    def test_goes_on_from_a_version(self, api: Api) -> None:
        api.create(deployment(replicas=1))
        version = api.collection("Deployment")["metadata"]["resourceVersion"]
        for replicas in (2, 3):
            api.patch("Deployment", "server", {"spec": {"replicas": replicas}})
        events = list(api.watch("Deployment", resource_version=version))
        assert [(event["type"], event["object"]["spec"]["replicas"]) for event in events] == [
            ("MODIFIED", 2),
            ("MODIFIED", 3),
        ]

    def test_one_object(self, api: Api) -> None:
        for name in ("a", "b"):
            api.create(new_thing("ConfigMap", name))
        events = list(api.watch("ConfigMap", name="b"))
        assert [event["object"]["metadata"]["name"] for event in events] == ["b"]

    def test_an_object_no_longer_selected_is_deleted(self, api: Api) -> None:
        version = api.collection("ConfigMap")["metadata"]["resourceVersion"]
        api.create(new_thing("ConfigMap", "a"))
        for track in ("stable", "canary", "stable"):
            api.patch("ConfigMap", "a", {"metadata": {"labels": {"track": track}}})
        events = api.watch("ConfigMap", resource_version=version, label_selector="track=stable")
        assert [event["type"] for event in events] == ["ADDED", "DELETED", "ADDED"]

    def test_an_old_version_is_gone(self, api: Api) -> None:
        # Of a kind that came later: of the others a new server still knows everything.
        api.create(route())
        with pytest.raises(ApiException) as caught:
            list(api.watch("GRPCRoute", resource_version="1"))
        assert caught.value.status == 410
        assert caught.value.reason.startswith("Expired: too old resource version: 1 (")

    def test_ends_when_its_time_is_over(self, api: Api) -> None:
        version = api.collection("Deployment")["metadata"]["resourceVersion"]
        assert list(api.watch("Deployment", resource_version=version)) == []


class TestKubectl:
    @pytest.fixture
    def kubectl(self, api: Api, api_config: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
        """kubectl(*arguments, thing to send) -> (exit status, stdout and stderr)"""
        try:
            program = find_kubectl()
        except KubectlError as error:
            pytest.skip(str(error))

        def kubectl(*arguments: str, thing: Thing | None = None) -> tuple[int, str]:
            where = [f"--kubeconfig={api_config}", f"--cache-dir={tmp_path}", f"--namespace={api.namespace}"]
            done = subprocess.run(
                [program, *where, *arguments],
                input=json.dumps(thing),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
            )
            return done.returncode, done.stdout.strip()

        return kubectl

    def test_applies_and_reads(self, api: Api, kubectl: Callable[..., tuple[int, str]]) -> None:
        apply = ("apply", "--server-side", f"--field-manager={OURS}", "--filename=-")
        assert kubectl(*apply, thing=deployment(replicas=2)) == (
            0,
            "deployment.apps/server serverside-applied",
        )
        assert kubectl("get", "deploy", "server", "--output=jsonpath={.spec.replicas}") == (0, "2")
        api.patch("Deployment", "server", {"spec": {"replicas": 5}})
        status, said = kubectl(*apply, thing=deployment(replicas=2))
        assert status == 1
        assert 'Apply failed with 1 conflict: conflict with "kubectl-edit" using apps/v1' in said

    def test_applies_in_the_client(self, api: Api, kubectl: Callable[..., tuple[int, str]]) -> None:
        for replicas, word in ((2, "created"), (3, "configured"), (3, "unchanged")):
            said = kubectl("apply", "--filename=-", thing=deployment(replicas=replicas))
            assert said == (0, f"deployment.apps/server {word}")
        fields = _owned(api.get("Deployment", "server"), "kubectl-client-side-apply", "Update")
        assert fields["f:spec"]["f:replicas"] == {}
        with pytest.raises(ConflictError, match="kubectl-client-side-apply"):
            api.apply(deployment(replicas=4))

    def test_waits_for_a_rollout(self, api: Api, kubectl: Callable[..., tuple[int, str]]) -> None:
        api.apply(deployment(replicas=1))
        wait = ("rollout", "status", "deployment/server", "--timeout=1s")
        assert "timed out waiting for the condition" in kubectl(*wait)[1]
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
        api.write_status("Deployment", "server", {"observedGeneration": 1, **counts})
        assert kubectl(*wait) == (0, 'deployment "server" successfully rolled out')
