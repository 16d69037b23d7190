"""What the fake API server says of itself: its groups and kinds, and what kubectl asks before it writes."""

from collections.abc import Sequence
from typing import Any

from tests.k8s.fake_kinds import Kind

__all__ = ["discover"]

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def discover(kinds: Sequence[Kind], path: str) -> dict[str, Any] | None:
    """The answer at `path`; None where this is none of discovery's."""
    roots = {kind.root: kind.api_version for kind in kinds}
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "/apis":
        groups = []
        for group, version in dict.fromkeys((kind.group, kind.version) for kind in kinds if kind.group):
            each = {"groupVersion": f"{group}/{version}", "version": version}
            groups.append({"name": group, "versions": [each], "preferredVersion": each})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        return {"paths": {root[1:]: {"serverRelativeURL": f"/openapi/v3{root}"} for root in roots}}
    document = path.removeprefix("/openapi/v3")
    if document != path and document in roots:
        return _openapi([kind for kind in kinds if kind.root == document])
    if path in roots:
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": roots[path],
            "resources": [each for kind in kinds if kind.root == path for each in _resources(kind)],
        }
    return None


def _resources(kind: Kind) -> list[dict[str, Any]]:
    common = {"singularName": kind.kind.lower(), "namespaced": kind.namespaced, "kind": kind.kind}
    found = [
        {"name": kind.plural, **common, "verbs": _VERBS, "shortNames": [kind.short] if kind.short else []}
    ]
    if kind.status:
        found.append({"name": f"{kind.plural}/status", **common, "verbs": ["get", "patch", "update"]})
    return found


def _openapi(kinds: Sequence[Kind]) -> dict[str, Any]:
    """No schemas: only that the server checks fields itself, so that kubectl does not."""
    patch = {"parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]}
    paths = {}
    for kind in kinds:
        where = "/namespaces/{namespace}" if kind.namespaced else ""
        names = {"group": kind.group, "version": kind.version, "kind": kind.kind}
        paths[f"{kind.root}{where}/{kind.plural}/{{name}}"] = {
            "patch": patch | {"x-kubernetes-group-version-kind": names}
        }
    return {"openapi": "3.0.0", "info": {"title": "fake", "version": "1"}, "paths": paths}
