"""The official client of Kubernetes, as the tests of API servers use it, and things to send."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient

__all__ = ["OURS", "Api", "Thing", "config_map", "deployment", "new_thing", "route"]

Thing = dict[str, Any]
OURS = "graftserve-rollout"


class Api:
    """The official client in one namespace, a new one unless it is named; answers are plain dictionaries."""

    def __init__(self, config_path: Path, cache: Path, namespace: str = "") -> None:
        settings = client.Configuration()
        settings.retries = urllib3.Retry(0, respect_retry_after_header=False)
        self._connection = config.new_client_from_config(
            str(config_path), client_configuration=settings, persist_config=False
        )
        self.dynamic = DynamicClient(self._connection, cache_file=str(cache))
        self.namespace = namespace or f"test-{uuid.uuid4().hex[:8]}"
        if not namespace:
            self.create(new_thing("Namespace", self.namespace), namespace=None)

    def close(self) -> None:
        self._connection.close()

    def resource(self, kind: str) -> Any:
        versions = {"Deployment": "apps/v1", "GRPCRoute": "gateway.networking.k8s.io/v1"}
        return self.dynamic.resources.get(api_version=versions.get(kind, "v1"), kind=kind)

    def apply(self, thing: Thing, manager: str = OURS, **options: Any) -> Thing:
        return self.dynamic.server_side_apply(
            self.resource(thing["kind"]),
            body=thing,
            namespace=self.namespace,
            field_manager=manager,
            **options,
        ).to_dict()

    def create(self, thing: Thing, manager: str = "kubectl-create", **options: Any) -> Thing:
        options = {"namespace": self.namespace} | options
        return self.dynamic.create(
            self.resource(thing["kind"]), body=thing, field_manager=manager, **options
        ).to_dict()

    def get(self, kind: str, name: str) -> Thing:
        return self.dynamic.get(self.resource(kind), name=name, namespace=self.namespace).to_dict()

    def collection(self, kind: str, **options: Any) -> Thing:
        return self.dynamic.get(self.resource(kind), namespace=self.namespace, **options).to_dict()

    def patch(
        self, kind: str, name: str, patch: Thing, manager: str = "kubectl-edit", **options: Any
    ) -> Thing:
        options = {"content_type": "application/merge-patch+json"} | options
        return self.dynamic.patch(
            self.resource(kind),
            body=patch,
            name=name,
            namespace=self.namespace,
            field_manager=manager,
            **options,
        ).to_dict()

    def replace(self, thing: Thing, manager: str = "kubectl-replace", **options: Any) -> Thing:
        return self.dynamic.replace(
            self.resource(thing["kind"]),
            body=thing,
            namespace=self.namespace,
            field_manager=manager,
            **options,
        ).to_dict()

    def write_status(self, kind: str, name: str, status: Thing) -> Thing:
        resource = self.resource(kind).subresources["status"]
        return self.dynamic.patch(
            resource,
            body={"status": status},
            name=name,
            namespace=self.namespace,
            field_manager="controller",
            content_type="application/merge-patch+json",
        ).to_dict()

    def delete(self, kind: str, name: str) -> Thing:
        return self.dynamic.delete(self.resource(kind), name=name, namespace=self.namespace).to_dict()

    def apply_text(self, path: str, text: str) -> tuple[int, Thing]:
        """Server-side apply of a text, of which the client would make JSON; the status and the answer."""
        settings = self._connection.configuration
        answer = self._connection.rest_client.pool_manager.request(
            "PATCH",
            f"{settings.host}{path}?fieldManager={OURS}",
            body=text.encode(),
            headers={
                "Content-Type": "application/apply-patch+yaml",
                "Authorization": settings.auth_settings()["BearerToken"]["value"],
            },
        )
        return answer.status, json.loads(answer.data)

    def watch(self, kind: str, **options: Any) -> Iterator[Thing]:
        options = {"timeout": 1} | options
        for event in self.dynamic.watch(self.resource(kind), namespace=self.namespace, **options):
            yield {"type": event["type"], "object": event["raw_object"]}


def new_thing(kind: str, name: str, **more: Any) -> Thing:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **more}


def deployment(containers: list[Thing] | None = None, /, *, pod: Thing | None = None, **spec: Any) -> Thing:
    labels = {"app": "server"}
    if containers is None:
        containers = [{"name": "server", "image": "server:1"}]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "server", "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers} | (pod or {})},
            **spec,
        },
    }


def config_map(**data: str) -> Thing:
    return new_thing("ConfigMap", "settings", data=data)


def route(**spec: Any) -> Thing:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GRPCRoute",
        "metadata": {"name": "route"},
        "spec": spec,
    }
