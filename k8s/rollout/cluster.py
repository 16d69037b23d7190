"""What an overlay says, brought to its cluster: server-side apply, and the wait for the pods.

Fields belong to the manager `graftserve-rollout`. Where another manager owns one that would change, nothing
is applied, and nothing is ever forced.

What belongs to no namespace, the Namespace itself above all, is applied only where it is not yet as the
overlay says: otherwise rights in one namespace are enough. So a label that the overlay drops stays on it.

A route is applied before the pods where it takes calls away from the canary, and after they are ready where
it gives it more: nobody is sent to pods that are not there.
"""

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..render import render_folder
from .api import FIELD_MANAGER, Document, KubernetesApi, label_of
from .errors import (
    ClusterError,
    ConflictError,
    FieldConflictError,
    ForbiddenError,
    NotReadyError,
    OverlayError,
)
from .forwarding import port_forward
from .match import says_all
from .overlay import Tracks
from .ready import Progress, pod_troubles, progress, route_troubles

__all__ = ["CANARY_DEPLOYMENT", "STABLE_DEPLOYMENT", "Cluster", "TrackState"]

STABLE_DEPLOYMENT, CANARY_DEPLOYMENT = "graftserve-stable", "graftserve-canary"
_DEPLOYMENTS: Final = (STABLE_DEPLOYMENT, CANARY_DEPLOYMENT)
_ROUTE: Final = ("GRPCRoute", "graftserve")
_STABLE_SERVICE, _CANARY_SERVICE = "graftserve", "graftserve-canary"
_SERVICES: Final = frozenset({_STABLE_SERVICE, _CANARY_SERVICE})
_VERSION_LABEL = "graftserve.dev/version"
_WATCH_S = 15.0  # then the pods are asked why they are not ready


@dataclass(frozen=True)
class TrackState:
    """One track in the cluster. version: None for none. ready: all pods are of it and ready.

    text: how many are. troubles: what keeps the others, in the pods' words.
    """

    version: int | None
    ready: bool
    text: str
    troubles: tuple[str, ...] = ()


class Cluster:
    """Where the overlay in `folder` is applied. A context manager.

    context, timeout_s, patience_s: as KubernetesApi. ready_timeout_s: for a Deployment's pods, each of both.
    listener: told each step in words, when it is new.
    Raises ClusterError as KubernetesApi does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        context: str = "",
        timeout_s: float = 30.0,
        patience_s: float = 60.0,
        ready_timeout_s: float = 600.0,
        listener: Callable[[str], None] = lambda text: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._context = context
        self._timeout_s = timeout_s
        self._ready_timeout_s = ready_timeout_s
        self._tell = listener
        self._told = ""
        self._places: list[Document] = []
        self._now = now
        self._api = KubernetesApi(
            context=context, timeout_s=timeout_s, patience_s=patience_s, listener=self._tell_once
        )

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self._api.__exit__(*error)

    def observe(self) -> Tracks | None:
        """What is applied, whoever did it; None if nothing is. Without a route the weights are 100 and 0.

        Raises ForbiddenError, ClusterError, OverlayError (no such Deployments, or no namespace, in the
        manifests), KubectlError, ManifestsError (the overlay cannot be rendered).
        """
        documents = self._placed()
        stable, canary = (self._get(_deployment(documents, name)) for name in _DEPLOYMENTS)
        if stable is None:
            return None
        version = _version(stable)
        if version is None:
            raise ClusterError(
                f"{label_of(stable)}: expected pods with a version in the label {_VERSION_LABEL}, got none"
            )
        route = _route(documents)
        live = None if route is None else self._get(route)
        weights = (100, 0) if live is None else _weights(live)
        if canary is None:
            return Tracks(version, None, 0, *weights)
        return Tracks(version, _version(canary), canary["spec"].get("replicas", 1), *weights)

    @contextmanager
    def way_to(self, track: str) -> Iterator[str]:
        """An address on this machine that leads to one of a track's pods, while the context lasts.

        track: stable or canary. Raises ClusterError, and as `observe` does.
        """
        namespace = _deployment(self._placed(), STABLE_DEPLOYMENT)["metadata"]["namespace"]
        service = {"stable": _STABLE_SERVICE, "canary": _CANARY_SERVICE}[track]
        with port_forward(
            service, namespace=namespace, context=self._context, timeout_s=self._timeout_s
        ) as target:
            yield target

    def states(self) -> dict[str, TrackState]:
        """Both tracks, by the name of their Deployment. Raises as `observe` does."""
        documents = self._placed()
        states = {}
        for name in _DEPLOYMENTS:
            document = _deployment(documents, name)
            found = self._get(document)
            if found is None:
                states[name] = TrackState(None, False, "not there")
                continue
            done = progress(found)
            troubles = () if done.ready else tuple(self._troubles(found))
            states[name] = TrackState(_version(found), done.ready, done.text, troubles)
        return states

    def route_troubles(self) -> list[str]:
        """Why Gateways do not serve the route, in their words; empty without a route. Raises as `observe`."""
        route = _route(self._placed())
        live = None if route is None else self._get(route)
        return [] if live is None else route_troubles(live)

    def canary_trouble(self) -> str:
        """Why no pod of the canary can answer, in words; "" if one can. Raises as `observe` does."""
        found = self._get(_deployment(self._placed(), CANARY_DEPLOYMENT))
        if found is not None and (found.get("status") or {}).get("availableReplicas", 0):
            return ""
        troubles = [] if found is None else self._troubles(found)
        return "; ".join(("no pod of the canary is ready", *troubles))

    def differences(self) -> list[str]:
        """The objects that are not as the overlay says, such as "deployment/graftserve-stable".

        Raises FieldConflictError and as `observe` does.
        """
        differ = []
        for document in self._to_apply(self._rendered()):
            live = self._get(document)
            if live is None or _meant(self._apply(document, dry_run=True)) != _meant(live):
                differ.append(label_of(document))
        return differ

    def settle(self, tracks: Tracks) -> None:
        """Apply the overlay, whose files say `tracks`, and wait until the pods of both tracks are ready.

        The server is asked first whether it would take all of it, so that a conflict changes nothing.
        Raises FieldConflictError, NotReadyError, ForbiddenError, ClusterError, OverlayError (the files do not
        reach the manifests, or these name no namespace), KubectlError, ManifestsError (they cannot be
        rendered).
        """
        documents = self._rendered()
        _check_versions(self._folder, documents, tracks)
        self._tell_once(f"apply {self._folder}, by {FIELD_MANAGER}")
        documents = self._to_apply(documents)
        self._try(documents)
        route = _route(documents)
        live = None if route is None else self._get(route)
        loses = route is not None and live is not None and _share(route) <= _share(live)
        others = [document for document in documents if document is not route]
        for document in [route, *others] if route is not None and loses else others:
            self._apply(document)
        for name in _DEPLOYMENTS:
            self._wait(_deployment(documents, name))
        if route is not None and not loses:
            self._apply(route)

    def take_over(self, managers: Sequence[str]) -> None:
        """Have other managers give up what they wrote of the overlay's objects: `settle` makes it ours.

        managers: by name, such as kubectl-client-side-apply for `kubectl apply` without --server-side.
        Raises as `observe` does.
        """
        for document in self._to_apply(self._rendered()):
            for manager in managers:
                if self._api.disown(document, manager):
                    self._tell_once(f"{label_of(document)}: taken over from {manager}")

    def _rendered(self) -> list[Document]:
        """What the overlay says now."""
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C is not everywhere
        text = render_folder(self._folder)
        documents = [document for document in yaml.load_all(text, loader) if document]
        for document in documents:
            if not _has_namespace(document) and self._api.is_namespaced(document):
                raise OverlayError(
                    f"{self._folder / 'kustomization.yaml'}: expected `namespace: NAME`, got none: "
                    f"{label_of(document)} would be in no namespace"
                )
        self._places = documents
        return documents

    def _placed(self) -> list[Document]:
        """The same of names and namespaces alone, which no rollout changes."""
        return self._places or self._rendered()

    def _to_apply(self, documents: Sequence[Document]) -> list[Document]:
        """Without what belongs to no namespace and is as it should be already."""
        return [
            document
            for document in documents
            if _has_namespace(document) or not says_all(self._get(document), document)
        ]

    def _try(self, documents: Sequence[Document]) -> None:
        """Without effect, except that namespaces must be there for what is in them: new ones are made."""
        for document in documents:
            if document["kind"] == "Namespace" and self._get(document) is None:
                self._apply(document)
        for document in documents:
            self._apply(document, dry_run=True)

    def _get(self, document: Document) -> Document | None:
        try:
            return self._api.get(document)
        except ForbiddenError as error:
            raise self._forbidden(document, error) from error

    def _apply(self, document: Document, *, dry_run: bool = False) -> Document:
        try:
            return self._api.apply(document, dry_run=dry_run)
        except ForbiddenError as error:
            raise self._forbidden(document, error) from error
        except FieldConflictError as error:
            remedy = "take the field out of the overlay, or let the other manager give it up"
            if all(manager.startswith("kubectl") for manager in error.managers):
                names = " ".join(f"--take-over {manager}" for manager in sorted(error.managers))
                remedy = (
                    "if that was done by hand, and is not needed any more, take it over: `graftserve rollout "
                    f"apply --overlay {self._folder} {names}`"
                )
            raise FieldConflictError(
                f"{error}: another field manager owns what would change, and nothing is forced; {remedy}, "
                "and run this again",
                error.managers,
            ) from error

    def _forbidden(self, document: Document, error: ForbiddenError) -> ForbiddenError:
        """With who must do what."""
        apply_all = f"`graftserve rollout apply --overlay {shlex.quote(str(self._folder))}`"
        if not _has_namespace(document):
            return ForbiddenError(
                f"{error}. It is not there, or not as the overlay says, or not yours to see. An "
                f"administrator applies it once, by {apply_all}"
            )
        # It has no reason where an apply lacks only the right to create. A quota or a policy has its own.
        if not re.search(r" cannot |is forbidden:$", str(error)):
            return ForbiddenError(str(error))
        deployer = Path(os.path.normpath(self._folder / "../../deployer"))
        origin = "" if deployer.is_dir() else ", a folder that `graftserve k8s render --output` makes"
        return ForbiddenError(
            f"{error}. An administrator gives the rights to roll out once, by `kubectl apply --namespace "
            f"{document['metadata']['namespace']} -k {shlex.quote(str(deployer))}`{origin}, after "
            f"{apply_all} if nothing is there yet"
        )

    def _wait(self, document: Document) -> None:
        deadline = self._now() + self._ready_timeout_s
        while True:
            found = self._get(document)
            if found is None:
                raise ConflictError(
                    f"{label_of(document)}: somebody else took it away while it was waited for"
                )
            done = progress(found)
            if not done.ready and not done.failed and (left_s := deadline - self._now()) > 0:
                self._waiting(document, "; ".join((done.text, *self._troubles(found))))
                for state in self._api.changes(found, min(_WATCH_S, left_s)):
                    done = progress(state)
                    if done.ready or done.failed:
                        break
                    self._waiting(document, done.text)
            if done.ready:
                return
            if done.failed or self._now() >= deadline:
                raise self._not_ready(found, done)

    def _waiting(self, document: Document, why: str) -> None:
        self._tell_once(f"waiting for {label_of(document)}: {why}")

    def _not_ready(self, deployment: Document, done: Progress) -> NotReadyError:
        metadata = deployment["metadata"]
        return NotReadyError(
            f"{label_of(deployment)} is not ready within {self._ready_timeout_s:g} s: "
            f"{'; '.join((done.text, *self._troubles(deployment)))}; see more with `kubectl -n "
            f"{metadata['namespace']} describe pods -l {_selector(deployment)}`",
            metadata["name"],
        )

    def _troubles(self, deployment: Document) -> list[str]:
        return pod_troubles(self._api.pods(deployment["metadata"]["namespace"], _selector(deployment)))

    def _tell_once(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(text)


def _check_versions(folder: Path, documents: Sequence[Document], tracks: Tracks) -> None:
    for name, wanted in zip(_DEPLOYMENTS, (tracks.stable, tracks.canary), strict=True):
        found = _version(_deployment(documents, name))
        if found != wanted:
            raise OverlayError(
                f"{folder}: expected {_said(wanted)} in the label {_VERSION_LABEL} of {name}'s pods, got "
                f"{_said(found)}: is component versions the last in its kustomization.yaml?"
            )


def _has_namespace(document: Document) -> bool:
    return "namespace" in document["metadata"]


def _meant(document: Document) -> Document:
    """An object without the books that the server keeps of it."""
    metadata = {key: value for key, value in document["metadata"].items() if key in ("labels", "annotations")}
    return {**document, "metadata": metadata, "status": None}


def _deployment(documents: Sequence[Document], name: str) -> Document:
    for document in documents:
        if document["kind"] == "Deployment" and document["metadata"]["name"] == name:
            return document
    raise OverlayError(
        f"expected a Deployment {name} in the overlay's manifests, got none: is its base ours?"
    )


def _route(documents: Sequence[Document]) -> Document | None:
    return next((item for item in documents if (item["kind"], item["metadata"]["name"]) == _ROUTE), None)


def _version(deployment: Document) -> int | None:
    """What its pods serve, by their template: that is what `kubectl rollout undo` changes."""
    labels = deployment["spec"]["template"]["metadata"].get("labels") or {}
    value = str(labels.get(_VERSION_LABEL, ""))
    return int(value) if value.isdecimal() else None


def _weights(route: Document) -> tuple[int, int]:
    """Of stable and canary, in the first rule that names both."""
    for rule in route["spec"].get("rules") or ():
        weights = {item["name"]: item.get("weight", 1) for item in rule.get("backendRefs") or ()}
        if weights.keys() >= _SERVICES:
            stable, canary = (int(weights[name]) for name in (_STABLE_SERVICE, _CANARY_SERVICE))
            return stable, canary
    return 100, 0


def _share(route: Document) -> float:
    """The canary's share of the calls, in [0, 1]."""
    stable, canary = _weights(route)
    return canary / (stable + canary) if stable + canary else 0.0


def _selector(deployment: Document) -> str:
    return ",".join(f"{key}={value}" for key, value in deployment["spec"]["selector"]["matchLabels"].items())


def _said(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"
