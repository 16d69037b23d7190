"""Who owns which field: server-side apply as real API servers do it, on plain dictionaries.

A path is a tuple of elements as FieldsV1 writes them: `f:spec`, `k:{"name":"server"}`, `v:"a"`. A member of a
set is a leaf, or an item of a keyed list, or a map that an update added as a whole.

Source: https://kubernetes.io/docs/reference/using-api/server-side-apply/, and merge/update.go and typed/ in
https://github.com/kubernetes-sigs/structured-merge-diff
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from tests.k8s.fake_kinds import Kind

__all__ = [
    "Entry",
    "FieldConflictError",
    "apply_config",
    "merge_patch",
    "read_entries",
    "track_update",
    "write_entries",
]

Path = tuple[str, ...]
Paths = frozenset[Path]

# Lists whose items have keys, of the kinds that come with Kubernetes. All other lists are one value.
_KEYED = {
    "conditions": ("type",),
    "containers": ("name",),
    "env": ("name",),
    "ephemeralContainers": ("name",),
    "hostAliases": ("ip",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "ownerReferences": ("uid",),
    "resourceClaims": ("name",),
    "schedulingGates": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "volumeDevices": ("devicePath",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
_CUSTOM_KEYED = {"PrometheusRule": {"groups": ("name",)}}
_SETS = {"finalizers"}
# Maps that are one value.
_ATOMIC = {
    "claimRef",
    "configMapKeyRef",
    "fieldRef",
    "labelSelector",
    "namespaceSelector",
    "nodeSelector",
    "objectSelector",
    "podSelector",
    "resourceFieldRef",
    "scaleTargetRef",
    "secretKeyRef",
    "selector",
}
_KEY_DEFAULTS = {"protocol": "TCP"}
# What identifies an object, and what the server writes, belongs to nobody.
_NOBODYS = frozenset(
    [("f:apiVersion",), ("f:kind",), ("f:metadata",)]
    + [
        ("f:metadata", f"f:{name}")
        for name in (
            "name",
            "namespace",
            "creationTimestamp",
            "selfLink",
            "uid",
            "generation",
            "managedFields",
            "resourceVersion",
        )
    ]
)
_ABSENT: Any = object()


@dataclass(frozen=True)
class Entry:
    """One entry of metadata.managedFields. fields: the paths that `manager` owns."""

    manager: str
    operation: str
    api_version: str
    subresource: str = ""
    time: str = ""
    fields: Paths = field(default=frozenset())

    def same_writer(self, other: "Entry") -> bool:
        return (self.manager, self.operation, self.subresource) == (
            other.manager,
            other.operation,
            other.subresource,
        )

    @property
    def described(self) -> str:
        words = json.dumps(self.manager)
        if self.subresource:
            words += f" with subresource {json.dumps(self.subresource)}"
        return f"{words} using {self.api_version}" if self.operation == "Update" else words


class FieldConflictError(Exception):
    """An apply that would change fields of others. found: (their entry, the path in words) of each."""

    def __init__(self, found: list[tuple[Entry, str]]) -> None:
        self.found = found
        if len(found) == 1:
            entry, path = found[0]
            super().__init__(f"Apply failed with 1 conflict: conflict with {entry.described}: {path}")
            return
        lines = []
        for owner in sorted({entry.described for entry, _ in found}):
            lines.append(f"conflicts with {owner}:")
            lines += [f"- {path}" for entry, path in found if entry.described == owner]
        super().__init__(f"Apply failed with {len(found)} conflicts: " + "\n".join(lines))


def apply_config(
    kind: Kind, live: dict[str, Any], config: dict[str, Any], entries: list[Entry], own: Entry, *, force: bool
) -> tuple[dict[str, Any], list[Entry]]:
    """`live` with what `config` says, and who owns what then.

    own: the applying manager, without fields. Raises FieldConflictError, unless forced.
    """
    schema = _Schema(kind)
    entries = schema.expanded(live, entries)
    last = next((entry.fields for entry in entries if entry.same_writer(own)), frozenset())
    own = replace(own, fields=schema.owned(config) - _NOBODYS)
    others = [entry for entry in entries if not entry.same_writer(own)]
    merged = schema.merge(live, config)
    still_owned = _with_parents(frozenset().union(own.fields, *(entry.fields for entry in others)))
    merged = schema.without(merged, _with_parents(last) - still_owned)
    changed, removed = schema.compare(live, merged)
    found = []
    for entry in others:
        found += [(entry, _words(path)) for path in _in_order(entry.fields & changed)]
    if found and not force:
        raise FieldConflictError(found)
    return merged, [*_disowned(others, changed | removed), own]


def track_update(
    kind: Kind, live: dict[str, Any], new: dict[str, Any], entries: list[Entry], own: Entry
) -> list[Entry]:
    """Who owns what after an update by `own` that makes `new` of `live`."""
    schema = _Schema(kind)
    changed, removed = schema.compare(live, new)
    changed -= _NOBODYS
    entries = _disowned(schema.expanded(live, entries), changed | removed)
    before = next((entry for entry in entries if entry.same_writer(own)), None)
    if not changed:
        return entries
    if before is None:
        return [*entries, replace(own, fields=changed)]
    return [replace(own, fields=entry.fields | changed) if entry is before else entry for entry in entries]


def merge_patch(kind: Kind, target: Any, patch: Any, *, strategic: bool) -> Any:
    """RFC 7396, where null removes; strategic: lists with keys are merged by them."""
    return _Schema(kind).patched(target, patch, "", strategic)


def read_entries(thing: dict[str, Any]) -> list[Entry]:
    return [
        Entry(
            entry["manager"],
            entry["operation"],
            entry["apiVersion"],
            entry.get("subresource", ""),
            entry["time"],
            frozenset(_paths(entry["fieldsV1"])),
        )
        for entry in thing["metadata"].get("managedFields", [])
    ]


def write_entries(entries: list[Entry]) -> list[dict[str, Any]]:
    written = []
    order = sorted(entries, key=lambda entry: (entry.operation, entry.time, entry.manager, entry.subresource))
    for entry in order:
        tree: dict[str, Any] = {}
        for path in sorted(entry.fields):
            node = tree
            for element in path:
                node = node.setdefault(element, {})
        _mark_members(tree, (), entry.fields)
        written.append(
            {
                "manager": entry.manager,
                "operation": entry.operation,
                "apiVersion": entry.api_version,
                "time": entry.time,
                "fieldsType": "FieldsV1",
                "fieldsV1": tree,
            }
            | ({"subresource": entry.subresource} if entry.subresource else {})
        )
    return written


def _mark_members(node: dict[str, Any], path: Path, fields: Paths) -> None:
    for element, child in list(node.items()):
        _mark_members(child, (*path, element), fields)
    if node and path in fields:
        node["."] = {}


def _paths(tree: dict[str, Any], path: Path = ()) -> Iterator[Path]:
    for element, child in tree.items():
        if element == ".":
            yield path
        elif not child:
            yield (*path, element)
        else:
            yield from _paths(child, (*path, element))


def _disowned(entries: list[Entry], fields: Paths) -> list[Entry]:
    left = [replace(entry, fields=entry.fields - fields) for entry in entries]
    return [entry for entry in left if entry.fields]


def _with_parents(fields: Paths) -> Paths:
    """With the named fields above them; an item of a list is only a member where it says so."""
    return fields | {
        path[:length]
        for path in fields
        for length in range(1, len(path))
        if path[length - 1].startswith("f:")
    }


def _in_order(fields: Paths) -> list[Path]:
    """As real servers list them: at each level what ends there first."""

    def visit(prefix: Path) -> Iterator[Path]:
        below = sorted({path[len(prefix)] for path in fields if path[: len(prefix)] == prefix != path})
        yield from ((*prefix, element) for element in below if (*prefix, element) in fields)
        for element in below:
            yield from visit((*prefix, element))

    return list(visit(()))


def _words(path: Path) -> str:
    """.spec.template.spec.containers[name="server"].image"""
    text = ""
    for element in path:
        what, _, name = element.partition(":")
        if what == "f":
            text += f".{name}"
        elif what == "v":
            text += f"[={name}]"
        else:
            text += f"[{','.join(f'{key}={_json(value)}' for key, value in json.loads(name).items())}]"
    return text


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class _Schema:
    """What the fields of a kind are: maps of fields, lists with keys, sets, or one value."""

    def __init__(self, kind: Kind) -> None:
        self._custom = kind.custom
        self._keyed = _CUSTOM_KEYED.get(kind.kind, {}) if kind.custom else _KEYED

    def _children(self, name: str, value: Any) -> dict[str, tuple[str, Any]] | None:
        """{path element: (name, value)}; None where `value`, of the field `name`, is one value."""
        if isinstance(value, dict):
            if name in _ATOMIC and not self._custom:
                return None
            return {f"f:{key}": (key, below) for key, below in value.items()}
        if isinstance(value, list):
            if name in _SETS:
                return {f"v:{_json(item)}": ("", item) for item in value}
            keys = self._keys(name, value)
            if keys:
                return {self._element(keys, item): ("", item) for item in value}
        return None

    def _keys(self, name: str, items: list[Any]) -> tuple[str, ...]:
        if name == "ports" and not self._custom:
            return ("port" if items and "port" in items[0] else "containerPort", "protocol")
        return self._keyed.get(name, ())

    @staticmethod
    def _element(keys: tuple[str, ...], item: dict[str, Any]) -> str:
        found = {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in keys}
        return f"k:{_json({key: value for key, value in found.items() if value is not None})}"

    def owned(self, value: Any, name: str = "", path: Path = ()) -> Paths:
        """What an apply of `value` owns."""
        children = self._children(name, value)
        if not children:
            return frozenset([path])
        found: set[Path] = set()
        for element, (below, item) in children.items():
            found |= self.owned(item, below, (*path, element))
            if element[0] in "kv":
                found.add((*path, element))
        return frozenset(found)

    def expanded(self, live: dict[str, Any], entries: list[Entry]) -> list[Entry]:
        """Who owns a map, and nothing in it, owns all of it: the server takes it for one that was atomic.

        This is how the creator of a ConfigMap gets back what others changed since.
        """
        expanded = []
        for entry in entries:
            parents = {path[:end] for path in entry.fields for end in range(1, len(path))}
            fields = set(entry.fields)
            for path in entry.fields - parents:
                name, value = self._at(live, path)
                if value is not _ABSENT and self._children(name, value):
                    fields |= self.owned(value, name, path)
            expanded.append(replace(entry, fields=frozenset(fields)))
        return expanded

    def _at(self, value: Any, path: Path) -> tuple[str, Any]:
        name = ""
        for element in path:
            name, value = (self._children(name, value) or {}).get(element, ("", _ABSENT))
        return name, value

    def merge(self, live: Any, config: Any, name: str = "") -> Any:
        ours, theirs = self._children(name, config), self._children(name, live)
        if ours is None or theirs is None or type(live) is not type(config):
            return deepcopy(config)
        merged = {element: deepcopy(value) for element, (_, value) in theirs.items()}
        for element, (below, value) in ours.items():
            merged[element] = self.merge(merged[element], value, below) if element in merged else value
        return _assembled(merged, live)

    def without(self, value: Any, fields: Paths, name: str = "", path: Path = ()) -> Any:
        """Less the fields; what is empty then goes, too."""
        children = self._children(name, value)
        if not children:
            return value
        left = {}
        for element, (below, item) in children.items():
            place = (*path, element)
            if place in fields:
                continue
            rest = self.without(item, fields, below, place)
            if rest is not item and rest in ({}, []):
                continue
            left[element] = rest
        return _assembled(left, value)

    def compare(self, old: Any, new: Any, name: str = "", path: Path = ()) -> tuple[Paths, Paths]:
        """(what was added or changed, what was removed)"""
        changed: set[Path] = set()
        removed: set[Path] = set()
        before = {} if old is _ABSENT else self._children(name, old)
        after = {} if new is _ABSENT else self._children(name, new)
        if before is None or after is None or not (before or after):
            if new is _ABSENT:
                removed.add(path)
            elif old is _ABSENT or old != new:
                changed.add(path)
            return frozenset(changed), frozenset(removed)
        for element in before.keys() | after.keys():
            (below, first), (_, second) = (
                before.get(element) or ((after[element][0]), _ABSENT),
                after.get(element) or ("", _ABSENT),
            )
            more, less = self.compare(first, second, below, (*path, element))
            changed |= more
            removed |= less
        if old is _ABSENT:
            changed.add(path)
        elif new is _ABSENT:
            removed.add(path)
        return frozenset(changed), frozenset(removed)

    def patched(self, target: Any, patch: Any, name: str, strategic: bool) -> Any:
        if isinstance(patch, dict):
            out = dict(target) if isinstance(target, dict) else {}
            for key, value in patch.items():
                if value is None:
                    out.pop(key, None)
                else:
                    out[key] = self.patched(out.get(key), value, key, strategic)
            return out
        keys = self._keys(name, patch) if strategic and isinstance(patch, list) else ()
        if not keys or not isinstance(target, list):
            return deepcopy(patch)
        before = {self._element(keys, item): item for item in target}
        place = {element: index for index, element in enumerate(before)}
        named = {self._element(keys, item): item for item in patch}
        others = [element for element in before if element not in named]
        merged = []
        for element, item in named.items():
            if item.get("$patch") == "delete":
                continue
            # What the patch does not name stays before what it came before.
            while others and place[others[0]] < place.get(element, -1):
                merged.append(before[others.pop(0)])
            merged.append(self.patched(before.get(element), item, "", strategic))
        return merged + [before[element] for element in others]


def _assembled(children: dict[str, Any], like: Any) -> Any:
    if isinstance(like, dict):
        return {element[2:]: value for element, value in children.items()}
    return list(children.values())
