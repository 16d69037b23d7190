"""The objects of the fake API server, what happened to them, and who owns their fields."""

import json
import threading
import uuid
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.k8s.fake_fields import (
    Entry,
    FieldConflictError,
    apply_config,
    merge_patch,
    read_entries,
    track_update,
    write_entries,
)
from tests.k8s.fake_kinds import KINDS, Kind, with_defaults

__all__ = ["ApiError", "Change", "Store", "Target", "Write", "failure"]


@dataclass(frozen=True)
class Target:
    """What a request is about: a collection, an object, or a subresource of one."""

    kind: Kind
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def details(self) -> dict[str, str]:
        group = {"group": self.kind.group} if self.kind.group else {}
        return {"name": self.name, **group, "kind": self.kind.plural}


@dataclass(frozen=True)
class Write:
    """How a write is asked for. manager: "" where nobody says."""

    manager: str = ""
    dry_run: bool = False
    force: bool = False


@dataclass(frozen=True)
class Change:
    """One event. before, after: None where there is none. version: its resourceVersion."""

    version: int
    kind: Kind
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    @property
    def place(self) -> tuple[str, str]:
        metadata = (self.after or self.before or {})["metadata"]
        return metadata.get("namespace", ""), metadata["name"]


class ApiError(Exception):
    """An answer other than success: a Status."""

    def __init__(self, status: dict[str, Any]) -> None:
        super().__init__(status["message"])
        self.status = status


def failure(code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    """A Status."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        **({"details": details} if details else {}),
        "code": code,
    }


class Store:
    """Thread-safe. changed: notified at each change; its lock guards everything here."""

    def __init__(self, without: frozenset[str], *, ready: bool) -> None:
        self.kinds = tuple(kind for kind in KINDS if kind.group not in without)
        self.changed = threading.Condition(threading.RLock())
        self.history: list[Change] = []
        self.bookmarks = 0
        self.version = 100
        self._ready = ready
        self._forgotten = 100  # no watch starts before this one
        self._objects: dict[Kind, dict[tuple[str, str], dict[str, Any]]] = {kind: {} for kind in self.kinds}
        self._addresses = 0
        for name in ("default", "kube-system"):
            self.create(Target(self.kind("Namespace")), {"metadata": {"name": name}}, Write("kube-apiserver"))

    def kind(self, name: str) -> Kind:
        return next(kind for kind in self.kinds if kind.kind == name)

    def get(self, target: Target) -> dict[str, Any]:
        with self.changed:
            found = self._objects[target.kind].get((target.namespace, target.name))
            if found is None:
                raise self._not_found(target)
            return deepcopy(found)

    def collection(self, kind: Kind, namespace: str = "") -> tuple[list[dict[str, Any]], int]:
        """(the objects, the resourceVersion that they are of); of all namespaces where none is named"""
        with self.changed:
            found = [
                deepcopy(thing)
                for (where, _), thing in sorted(self._objects[kind].items())
                if not namespace or where == namespace
            ]
            return found, self.version

    def since(self, version: int) -> list[Change]:
        with self.changed:
            return [change for change in self.history if change.version > version]

    def forgot(self, version: int) -> bool:
        """Whether a watch can no longer start there."""
        with self.changed:
            return version < self._forgotten

    def compact(self) -> None:
        with self.changed:
            # One more, so that the newest version that anybody has seen is too old. The watches that run have
            # seen it all.
            self.version += 1
            self._forgotten = self.version

    def bookmark(self) -> None:
        with self.changed:
            self.bookmarks += 1
            self.changed.notify_all()

    def create(self, target: Target, thing: dict[str, Any], write: Write) -> dict[str, Any]:
        with self.changed:
            self._check_body(target, thing)
            metadata = thing.get("metadata", {})
            name = metadata.get("name") or target.name
            if not name and metadata.get("generateName"):
                name = metadata["generateName"] + uuid.uuid4().hex[:5]
            if not name:
                raise self._invalid(target, "metadata.name: Required value: name or generateName is required")
            target = Target(target.kind, target.namespace, name)
            self._check_namespace(target)
            new = self._identified(target, self._new(target), thing)
            if target.kind.status:
                new.pop("status", None)
            new = with_defaults(target.kind, new)
            self._check_valid(target, None, new)
            if (target.namespace, name) in self._objects[target.kind]:
                message = f'{target.kind.resource} "{name}" already exists'
                raise ApiError(failure(409, "AlreadyExists", message, target.details))
            empty = self._empty(target.kind)
            entries = track_update(target.kind, empty, new, [], self._entry(target, write, "Update"))
            return self._store(target, None, new, entries, write)

    def update(self, target: Target, thing: dict[str, Any], write: Write) -> dict[str, Any]:
        with self.changed:
            live = self.get(target)
            self._check_body(target, thing)
            if target.kind.custom and not thing.get("metadata", {}).get("resourceVersion"):
                raise self._invalid(
                    target,
                    "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update",
                )
            return self._update(target, live, thing, write)

    def patch(
        self, target: Target, patch: dict[str, Any], write: Write, *, strategic: bool
    ) -> dict[str, Any]:
        with self.changed:
            live = self.get(target)
            new = merge_patch(target.kind, live, patch, strategic=strategic)
            if "resourceVersion" not in patch.get("metadata", {}):
                new["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
            return self._update(target, live, new, write)

    def apply(self, target: Target, config: dict[str, Any], write: Write) -> tuple[dict[str, Any], bool]:
        """(the object, whether it is new)"""
        with self.changed:
            if not write.manager:
                raise ApiError(
                    failure(
                        422,
                        "Invalid",
                        'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: '
                        "is required for apply patch",
                        {
                            "group": "meta.k8s.io",
                            "kind": "PatchOptions",
                            "causes": [
                                {
                                    "reason": "FieldValueRequired",
                                    "message": "Required value: is required for apply patch",
                                    "field": "fieldManager",
                                }
                            ],
                        },
                    )
                )
            config = _without_nulls(config)
            if config.get("metadata", {}).get("managedFields"):
                raise ApiError(failure(400, "BadRequest", "metadata.managedFields must be nil"))
            self._check_body(target, config)
            live = self._objects[target.kind].get((target.namespace, target.name))
            if live is None:
                if target.subresource:
                    raise self._not_found(target)
                self._check_namespace(target)
                before: dict[str, Any] = self._new(target)
            else:
                self._check_version(target, live, config)
                before = deepcopy(live)
            own = self._entry(target, write, "Apply")
            if target.subresource:
                config = {key: config[key] for key in ("apiVersion", "kind", "status") if key in config}
            elif target.kind.status:
                config = {key: value for key, value in config.items() if key != "status"}
            try:
                new, entries = apply_config(
                    target.kind, before, config, read_entries(before), own, force=write.force
                )
            except FieldConflictError as conflicts:
                causes = [
                    {
                        "reason": "FieldManagerConflict",
                        "message": f"conflict with {entry.described}",
                        "field": path,
                    }
                    for entry, path in conflicts.found
                ]
                raise ApiError(failure(409, "Conflict", str(conflicts), {"causes": causes})) from conflicts
            new = self._identified(target, before, new)
            return self._store(target, live, with_defaults(target.kind, new), entries, write), live is None

    def delete(self, target: Target, write: Write) -> dict[str, Any]:
        with self.changed:
            live = self.get(target)
            if live["metadata"].get("finalizers"):
                new = deepcopy(live)
                new["metadata"].setdefault("deletionTimestamp", _now())
                new["metadata"].setdefault("deletionGracePeriodSeconds", 0)
                return self._store(target, live, new, read_entries(live), write)
            if not write.dry_run:
                if target.kind.kind == "Namespace":
                    for kind, things in self._objects.items():
                        for namespace, name in [place for place in things if place[0] == target.name]:
                            self._remove(Target(kind, namespace, name))
                self._remove(target)
            details = target.details | {"uid": live["metadata"]["uid"]}
            return {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Success",
                "details": details,
            }

    def _update(
        self, target: Target, live: dict[str, Any], thing: dict[str, Any], write: Write
    ) -> dict[str, Any]:
        self._check_version(target, live, thing)
        thing = _without_nulls(thing)
        if target.subresource == "status":
            new = live | {"status": thing.get("status", {})}
        else:
            new = self._identified(target, live, thing)
            if target.kind.status:
                new.pop("status", None)
                new |= {"status": live["status"]} if "status" in live else {}
            if target.kind.kind == "Service":
                for name in ("clusterIP", "clusterIPs"):
                    if name in live["spec"]:
                        new.setdefault("spec", {}).setdefault(name, live["spec"][name])
        new = with_defaults(target.kind, new)
        before = read_entries(live)
        entries = thing.get("metadata", {}).get("managedFields")
        if entries:
            # One empty entry is the way to forget them all.
            before = [] if entries == [{}] else read_entries(thing)
        own = self._entry(target, write, "Update")
        return self._store(target, live, new, track_update(target.kind, live, new, before, own), write)

    def _store(
        self,
        target: Target,
        live: dict[str, Any] | None,
        new: dict[str, Any],
        entries: list[Entry],
        write: Write,
    ) -> dict[str, Any]:
        self._check_valid(target, live, new)
        kind, metadata = target.kind, new["metadata"]
        written = write_entries(entries)
        if live is not None:
            # A write that changes nothing is none; not even its time counts.
            old = {_untimed(entry): entry["time"] for entry in live["metadata"].get("managedFields", [])}
            for entry in written:
                entry["time"] = old.get(_untimed(entry), entry["time"])
        metadata["managedFields"] = written
        if kind.kind == "Service" and live is None and "clusterIP" not in new["spec"]:
            self._addresses += 1
            new["spec"]["clusterIP"] = f"10.0.0.{self._addresses}"
        if live is not None:
            if new == live:
                return deepcopy(live)
            if kind.generation and _specified(kind, new) != _specified(kind, live):
                metadata["generation"] += 1
        if not write.dry_run:
            self.version += 1
            metadata["resourceVersion"] = str(self.version)
            gone = "deletionTimestamp" in metadata and not metadata.get("finalizers")
            if gone:
                del self._objects[kind][target.namespace, target.name]
            else:
                self._objects[kind][target.namespace, target.name] = deepcopy(new)
            self._record(Change(self.version, kind, live, None if gone else deepcopy(new)))
            if self._ready and kind.kind == "Deployment" and not target.subresource and not gone:
                self.make_ready(target)
        return deepcopy(new)

    def make_ready(self, target: Target) -> dict[str, Any]:
        """What the controllers would write, when the Deployment's pods are ready."""
        live = self.get(target)
        count = live["spec"]["replicas"]
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), count)
        conditions = [
            {
                "type": name,
                "status": "True",
                "reason": reason,
                "message": message,
                "lastUpdateTime": live["metadata"]["creationTimestamp"],
                "lastTransitionTime": live["metadata"]["creationTimestamp"],
            }
            for name, reason, message in (
                ("Available", "MinimumReplicasAvailable", "Deployment has minimum availability."),
                ("Progressing", "NewReplicaSetAvailable", "ReplicaSet has successfully progressed."),
            )
        ]
        return self.set_status(
            target,
            {
                "observedGeneration": live["metadata"]["generation"],
                **({name: value for name, value in counts.items() if value}),
                "conditions": conditions,
            },
        )

    def set_status(self, target: Target, status: dict[str, Any]) -> dict[str, Any]:
        """As kube-controller-manager would write it."""
        with self.changed:
            live = self.get(target)
            write = Write("kube-controller-manager")
            target = Target(target.kind, target.namespace, target.name, "status")
            return self._update(target, live, {"metadata": {}, "status": status}, write)

    def _remove(self, target: Target) -> None:
        self.version += 1
        gone = self._objects[target.kind].pop((target.namespace, target.name))
        self._record(Change(self.version, target.kind, gone, None))

    def _record(self, change: Change) -> None:
        self.history.append(change)
        self.changed.notify_all()

    def _entry(self, target: Target, write: Write, operation: str) -> Entry:
        return Entry(write.manager, operation, target.kind.api_version, target.subresource, _now())

    def _empty(self, kind: Kind) -> dict[str, Any]:
        """What a new object is compared with: the maps that Go's types always have are no news."""
        if kind.custom:
            return {}
        empty: dict[str, Any] = {"metadata": {}, "spec": {}, "status": {}}
        if kind.kind in ("Deployment", "ReplicaSet", "Job"):
            empty["spec"] = {"strategy": {}, "template": {"metadata": {}, "spec": {"containers": []}}}
        return empty

    def _new(self, target: Target) -> dict[str, Any]:
        metadata = {"namespace": target.namespace} if target.kind.namespaced else {}
        metadata |= {
            "name": target.name,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": _now(),
        }
        if target.kind.generation:
            metadata["generation"] = 1
        return {"apiVersion": target.kind.api_version, "kind": target.kind.kind, "metadata": metadata}

    @staticmethod
    def _identified(target: Target, live: dict[str, Any], thing: dict[str, Any]) -> dict[str, Any]:
        """A copy of `thing` with what only the server writes from `live`."""
        new = _without_nulls(thing)
        metadata = new.setdefault("metadata", {})
        for name in ("name", "namespace", "uid", "creationTimestamp", "generation", "resourceVersion"):
            metadata.pop(name, None)
            if name in live["metadata"]:
                metadata[name] = live["metadata"][name]
        for name in ("deletionTimestamp", "deletionGracePeriodSeconds"):
            metadata.pop(name, None)
            if name in live["metadata"]:
                metadata[name] = live["metadata"][name]
        metadata.pop("managedFields", None)
        return {"apiVersion": live["apiVersion"], "kind": live["kind"]} | new

    def _check_namespace(self, target: Target) -> None:
        if target.kind.namespaced:
            self.get(Target(self.kind("Namespace"), "", target.namespace))

    @staticmethod
    def _check_body(target: Target, thing: dict[str, Any]) -> None:
        found = (thing.get("apiVersion", target.kind.api_version), thing.get("kind", target.kind.kind))
        if found != (target.kind.api_version, target.kind.kind):
            message = (
                f"the API version and kind in the data ({found[0]}, {found[1]}) do not match the expected "
                f"({target.kind.api_version}, {target.kind.kind})"
            )
            raise ApiError(failure(400, "BadRequest", message))
        metadata = thing.get("metadata", {})
        if target.name and not metadata.get("name"):
            message = (
                f"the name of the object ({target.name} based on URL) was undeterminable: "
                "name must be provided"
            )
            raise ApiError(failure(400, "BadRequest", message))
        for word, expected in (("name", target.name), ("namespace", target.namespace)):
            value = metadata.get(word)
            if expected and value and value != expected:
                message = f"the name of the object ({value}) does not match the name on the URL ({expected})"
                if word == "namespace":
                    message = (
                        "the namespace of the provided object does not match the namespace sent on the "
                        "request"
                    )
                raise ApiError(failure(400, "BadRequest", message))

    @staticmethod
    def _check_version(target: Target, live: dict[str, Any], thing: dict[str, Any]) -> None:
        version = thing.get("metadata", {}).get("resourceVersion")
        if version and version != live["metadata"]["resourceVersion"]:
            message = (
                f'Operation cannot be fulfilled on {target.kind.resource} "{target.name}": the object has '
                "been modified; please apply your changes to the latest version and try again"
            )
            raise ApiError(failure(409, "Conflict", message, target.details))

    def _check_valid(self, target: Target, live: dict[str, Any] | None, new: dict[str, Any]) -> None:
        if target.kind.kind != "Deployment" or target.subresource:
            return
        selector = new["spec"].get("selector", {})
        labels = new["spec"].get("template", {}).get("metadata", {}).get("labels", {})
        if not selector.get("matchLabels", {}).items() <= labels.items() or not selector:
            raise self._invalid(
                target,
                f"spec.template.metadata.labels: Invalid value: {json.dumps(labels)}: "
                "`selector` does not match template `labels`",
            )
        for index, container in enumerate(new["spec"]["template"].get("spec", {}).get("containers", [])):
            # What is left of one that its applier took away, where somebody else owns a field of it.
            if not container.get("image"):
                field = f"spec.template.spec.containers[{index}].image"
                raise self._invalid(target, f"{field}: Required value")
        if live is not None and live["spec"]["selector"] != selector:
            raise self._invalid(
                target, f"spec.selector: Invalid value: {json.dumps(selector)}: field is immutable"
            )

    @staticmethod
    def _invalid(target: Target, message: str) -> ApiError:
        kind = target.kind
        name = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
        field, _, rest = message.partition(": ")
        details = target.details | {
            "kind": kind.kind,
            "causes": [
                {
                    "reason": "FieldValueRequired" if rest.startswith("Required") else "FieldValueInvalid",
                    "message": rest,
                    "field": field,
                }
            ],
        }
        return ApiError(failure(422, "Invalid", f'{name} "{target.name}" is invalid: {message}', details))

    @staticmethod
    def _not_found(target: Target) -> ApiError:
        message = f'{target.kind.resource} "{target.name}" not found'
        return ApiError(failure(404, "NotFound", message, target.details))


def _specified(kind: Kind, thing: dict[str, Any]) -> Any:
    """What the generation counts the changes of."""
    if kind.custom:
        return {key: value for key, value in thing.items() if key not in ("metadata", "status")}
    annotations = thing["metadata"].get("annotations") if kind.kind == "Deployment" else None
    return thing.get("spec"), annotations


def _untimed(entry: dict[str, Any]) -> str:
    return json.dumps(entry | {"time": ""}, sort_keys=True)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
