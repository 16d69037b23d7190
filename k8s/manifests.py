"""The Kustomize folders of this package: what there is, and what goes with what.

    base/                   two tracks of one pod, Services, service account, disruption budget
    components/<feature>/   what may be added; the first line of kustomization.yaml says what it is
    overlays/<place>/       a base with components, and stable.env and canary.env
    deployer/               what whoever rolls out may do: an administrator's, and part of no overlay

They are plain Kustomize: `kubectl apply -k k8s/overlays/production` needs none of this module.
"""

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

__all__ = [
    "CONFLICTS",
    "ORDER",
    "REQUIRED",
    "ManifestsError",
    "components",
    "copy_manifests",
    "overlays",
    "used_components",
]

_ROOT = Path(__file__).parent
_KUSTOMIZATION = "kustomization.yaml"
_MARKER = "../../components/"

ORDER = (
    "embedded",
    "gpu",
    "single",
    "monitoring",
    "autoscaling/keda",
    "autoscaling/hpa",
    "gateway",
    "progressive",
    "object-store/s3",
    "object-store/gcs",
    "object-store/pvc",
    "tls",
    "network-policy",
    "training-job",
    "versions",
    "kserve",
)
"""The order of components in an overlay: each of them changes what those before it have made."""

REQUIRED: Mapping[str, tuple[frozenset[str], ...]] = MappingProxyType(
    {
        "autoscaling/keda": (frozenset({"monitoring"}),),
        "progressive": (
            frozenset({"gateway"}),
            frozenset({"monitoring"}),
            frozenset({"autoscaling/keda", "autoscaling/hpa"}),
        ),
    }
)
"""What a component needs beside it: one of each of these sets."""

CONFLICTS: Mapping[frozenset[str], str] = MappingProxyType(
    {
        frozenset({"embedded", "gpu"}): "the embedded server's image is for CPU nodes",
        frozenset({"autoscaling/keda", "autoscaling/hpa"}): "two autoscalers would undo each other's work",
        frozenset({"kserve", "autoscaling/keda"}): "KServe scales its own pods",
        frozenset({"kserve", "autoscaling/hpa"}): "KServe scales its own pods",
        frozenset({"kserve", "gateway"}): "KServe makes the routes to its pods",
        frozenset({"kserve", "progressive"}): "KServe and Argo Rollouts would both own the pods",
    }
)
"""Pairs of components that exclude each other, and why."""


class ManifestsError(Exception):
    """There is no such overlay or component, or they do not go together; the message says what does."""


def overlays() -> dict[str, str]:
    """What each overlay is, by name."""
    return {path.parent.name: _summary(path) for path in sorted(_ROOT.glob(f"overlays/*/{_KUSTOMIZATION}"))}


def components() -> dict[str, str]:
    """What each component is, by name, in their order."""
    return {name: _summary(_ROOT / "components" / name / _KUSTOMIZATION) for name in ORDER}


def used_components(overlay: str) -> tuple[str, ...]:
    """The components of an overlay, in their order. Raises ManifestsError if there is no such overlay."""
    return _listed((_overlay(_ROOT, overlay) / _KUSTOMIZATION).read_text(encoding="utf-8"))


def copy_manifests(
    overlay: str, directory: Path, *, add: Sequence[str] = (), leave_out: Collection[str] = ()
) -> Path:
    """Copy an overlay and all that goes with it to a folder of one's own; returns the overlay's folder there.

    directory: new, or empty. add, leave_out: components that the copy has beside, or without, those of the
    overlay. Raises ManifestsError (no such overlay or component, or they do not go together), OSError.
    """
    wanted = _checked(overlay, add, leave_out)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ManifestsError(f"{directory}: expected a new or an empty folder, since its files would be lost")
    for folder in ("base", "components", "deployer", f"overlays/{overlay}"):
        shutil.copytree(
            _ROOT / folder, directory / folder, ignore=shutil.ignore_patterns("__pycache__", "__init__.py")
        )
    place = _overlay(directory, overlay)
    path = place / _KUSTOMIZATION
    path.write_text(_with_components(path.read_text(encoding="utf-8"), wanted), encoding="utf-8")
    return place


def _checked(overlay: str, add: Sequence[str], leave_out: Collection[str]) -> list[str]:
    """The components of the overlay and the others, in order, if they go together."""
    known = components()
    for name in (*add, *leave_out):
        if name not in known:
            raise ManifestsError(f"{name}: no such component; expected one of {', '.join(known)}")
    there = {*used_components(overlay), *add} - set(leave_out)
    for pair, reason in CONFLICTS.items():
        if pair <= there:
            one, other = sorted(pair)
            raise ManifestsError(f"{one} and {other} exclude each other: {reason}; leave one of them out")
    for name, needs in REQUIRED.items():
        for choice in needs:
            if name in there and not choice & there:
                raise ManifestsError(f"{name} needs {' or '.join(sorted(choice))} beside it: add that, too")
    if "versions" not in there:
        raise ManifestsError("versions carries the overlay's .env files into the manifests: keep it")
    return [name for name in ORDER if name in there]


def _overlay(root: Path, name: str) -> Path:
    known = overlays()
    if name not in known:
        raise ManifestsError(f"{name}: no such overlay; expected one of {', '.join(known)}")
    return root / "overlays" / name


def _summary(path: Path) -> str:
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("# ")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(re.findall(rf"^  - {re.escape(_MARKER)}(\S+)$", text, re.MULTILINE))


def _with_components(text: str, names: Sequence[str]) -> str:
    """The text of an overlay with these components in place of those that it lists."""
    lines = [line for line in text.splitlines() if not line.startswith(f"  - {_MARKER}")]
    at = lines.index("components:") + 1
    return "\n".join([*lines[:at], *(f"  - {_MARKER}{name}" for name in names), *lines[at:], ""])
