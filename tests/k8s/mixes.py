"""Overlays with components of all kinds, each rendered once in a process, as Python objects."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from graftserve.k8s.manifests import CONFLICTS, ORDER, REQUIRED, overlays, used_components
from graftserve.k8s.render import render

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Mix:
    """An overlay with components added, and those that exclude these left out."""

    overlay: str
    add: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "".join(
            [self.overlay, *(f"+{name}" for name in self.add), *(f"-{name}" for name in self.leave_out)]
        )

    @property
    def components(self) -> set[str]:
        return {*used_components(self.overlay), *self.add} - set(self.leave_out)

    @property
    def text(self) -> str:
        return _text(self)

    @property
    def objects(self) -> tuple[Object, ...]:
        return _objects(self)

    def of(self, *kinds: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        (found,) = (item for item in self.of(kind) if item["metadata"]["name"] == name)
        return found


@cache
def _text(mix: Mix) -> str:
    return render(mix.overlay, add=mix.add, leave_out=mix.leave_out)


@cache
def _objects(mix: Mix) -> tuple[Object, ...]:
    return parse(_text(mix))


def parse(text: str) -> tuple[Object, ...]:
    """The objects of a stream of YAML, in its order."""
    return tuple(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def mix(overlay: str, *wanted: str) -> Mix:
    """The overlay with these components, what they need, and without what they exclude."""
    add = list(wanted)
    for name in wanted:
        for choice in REQUIRED.get(name, ()):
            if not choice & {*add, *used_components(overlay)}:
                add.append(min(choice))
    for name in tuple(add):  # what is needed may itself need something
        add += [
            min(choice) for choice in REQUIRED.get(name, ()) if not choice & {*add, *used_components(overlay)}
        ]
    there = {*used_components(overlay), *add}
    out = {
        next(iter(pair - {name}))
        for pair in CONFLICTS
        if pair <= there
        for name in pair & set(add)
        if not pair <= set(add)
    }
    # One store to pull from is what people have.
    if any(name.startswith("object-store/") for name in wanted):
        out |= {name for name in there if name.startswith("object-store/") and name not in wanted}
    return Mix(overlay, tuple(dict.fromkeys(add)), tuple(sorted(out - set(add))))


def _mixes() -> Iterator[Mix]:
    for overlay in overlays():
        yield Mix(overlay)
        for name in ORDER:
            if name not in used_components(overlay):
                yield mix(overlay, name)
    yield mix("production", "progressive", "tls", "object-store/pvc", "training-job")
    yield mix("production", "progressive", "object-store/gcs", "embedded")
    yield mix("laptop", "progressive", "tls", "autoscaling/hpa", "network-policy", "training-job")
    yield mix("staging", "kserve", "tls", "embedded", "object-store/gcs")
    yield mix("production", "autoscaling/hpa", "tls", "object-store/gcs", "training-job")


MIXES = tuple(dict.fromkeys(_mixes()))


def pod_specs(objects: Iterable[Object]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every pod's specification, wherever it is, with the place; those without containers are none."""
    for item in objects:
        yield from _within(item, f"{item['kind']}/{item['metadata']['name']}")


def _within(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if isinstance(node.get("containers"), list):
            yield place, node
        for key, value in node.items():
            yield from _within(value, f"{place}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _within(value, f"{place}[{index}]")


def pod_labels(objects: Iterable[Object]) -> list[tuple[str, Mapping[str, str], Mapping[str, Any]]]:
    """Of every workload: its place, its pods' labels, its pods' specification.

    Pods of an Argo Rollout are those of the Deployment it refers to, with the labels of its stable ones.
    """
    found = []
    items = tuple(objects)
    added = {
        item["spec"]["workloadRef"]["name"]: item["spec"]["strategy"]["canary"]["stableMetadata"]["labels"]
        for item in items
        if item["kind"] == "Rollout"
    }
    for item in items:
        place = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] in ("Deployment", "Job"):
            template = item["spec"]["template"]
            labels = template["metadata"]["labels"] | added.get(item["metadata"]["name"], {})
            found.append((place, labels, template["spec"]))
        elif item["kind"] == "InferenceService":
            found.append((place, item["metadata"]["labels"], item["spec"]["predictor"]))
    return found


__all__ = ["MIXES", "Mix", "Object", "mix", "parse", "pod_labels", "pod_specs"]
