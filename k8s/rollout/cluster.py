"""What an overlay says, brought to its cluster by kubectl: server-side apply, and the wait for the pods.

Fields belong to the manager `graftserve-rollout`. Where another manager owns one that would change, nothing
is applied, and nothing is ever forced. Plain `kubectl apply` is such a manager, too: the server lets only the
manager `kubectl` take over its fields without a conflict.

Source: https://kubernetes.io/docs/reference/using-api/server-side-apply/, and lastappliedmanager.go in
https://github.com/kubernetes/apimachinery
"""

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

from ..render import find_kubectl, render_folder
from .errors import ClusterError, ConflictError, NotReadyError, OverlayError
from .overlay import Tracks

__all__ = ["CANARY_DEPLOYMENT", "FIELD_MANAGER", "STABLE_DEPLOYMENT", "Cluster", "Deployment", "deployments"]

FIELD_MANAGER: Final = "graftserve-rollout"
STABLE_DEPLOYMENT, CANARY_DEPLOYMENT = "graftserve-stable", "graftserve-canary"
_VERSION_LABEL = "graftserve.dev/version"
_NO_CONFLICT_HELP = re.compile(r"\s*Please review the fields above.*", re.DOTALL)
_CLIENT_SIDE = '"kubectl-client-side-apply"'
_LOG_LINE = re.compile(r"^[EWI]\d{4} .*\n?", re.MULTILINE)  # of kubectl's libraries
_NOT_READY = ("timed out waiting for the condition", "exceeded its progress deadline")
_GRACE_S = 30.0  # for kubectl to see by itself that its time is over


@dataclass(frozen=True)
class Deployment:
    """One Deployment of the rendered manifests. namespace, version: "" where the manifests have none."""

    namespace: str = ""
    version: str = ""


def deployments(manifests: str) -> dict[str, Deployment]:
    """The Deployments in what `kubectl kustomize` prints, by name.

    It prints YAML of one form: blocks with two spaces a level, keys in order, so that lines are enough.
    """
    found = {}
    for document in manifests.split("\n---\n"):
        if not re.search(r"^kind: Deployment$", document, re.MULTILINE):
            continue
        metadata = re.search(r"^metadata:\n((?: .*\n?)+)", document, re.MULTILINE)
        text = "" if metadata is None else metadata[1]
        found[_value(text, "  name")] = Deployment(
            _value(text, "  namespace"), _value(text, f"    {_VERSION_LABEL}")
        )
    return found


class Cluster:
    """Where the overlay in `folder` is applied.

    context: of the kubeconfig; "" for the current one.
    timeout_s: for an apply. ready_timeout_s: for a Deployment's pods, each of both.
    listener: told each step in words.
    """

    def __init__(
        self,
        folder: Path,
        *,
        context: str = "",
        timeout_s: float = 60.0,
        ready_timeout_s: float = 600.0,
        listener: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder = folder
        self._context = [f"--context={context}"] if context else []
        self._timeout_s = timeout_s
        self._ready_timeout_s = ready_timeout_s
        self._listener = listener

    def settle(self, tracks: Tracks) -> None:
        """Apply the overlay, whose files say `tracks`, and wait until the pods of both tracks are ready.

        The server is asked first whether it would take all of it, so that a conflict changes nothing.
        Raises ConflictError, NotReadyError, ClusterError, OverlayError (the files do not reach the
        manifests), KubectlError, ManifestsError (they cannot be rendered).
        """
        found = deployments(render_folder(self._folder))
        for name, version in ((STABLE_DEPLOYMENT, tracks.stable), (CANARY_DEPLOYMENT, tracks.canary)):
            wanted = "" if version is None else str(version)
            seen = found.get(name)
            if seen is None or seen.version != wanted:
                got = "no such Deployment" if seen is None else repr(seen.version)
                raise OverlayError(
                    f"{self._folder}: expected Deployment {name} with the label {_VERSION_LABEL} {wanted!r}, "
                    f"got {got}: is component versions the last in its kustomization.yaml?"
                )
        self._listener(f"kubectl apply -k {self._folder}, by {FIELD_MANAGER}")
        self._apply("--dry-run=server")
        self._apply()
        for name in (STABLE_DEPLOYMENT, CANARY_DEPLOYMENT):
            self._wait(name, found[name].namespace)

    def _apply(self, *options: str) -> None:
        command = ["apply", "--server-side", f"--field-manager={FIELD_MANAGER}", *options]
        done = self._kubectl([*command, "-k", str(self._folder)], self._timeout_s)
        if done.returncode == 0:
            return
        said = _words(done)
        if re.search(r"Apply failed with \d+ conflict", said):
            remedy = "take the field out of the overlay, or let the other manager give it up"
            if _CLIENT_SIDE in said:
                remedy = (
                    "the overlay was applied without --server-side: hand it over once with `kubectl "
                    f"apply --server-side --field-manager={FIELD_MANAGER} --force-conflicts -k "
                    f"{self._folder}`, if nobody else applies it"
                )
            raise ConflictError(
                f"{self._folder}: another field manager owns what would change, and nothing is forced: "
                f"{_NO_CONFLICT_HELP.sub('', said)}. To go on, {remedy}, and run this again"
            )
        raise ClusterError(f"kubectl apply -k {self._folder}: {said}")

    def _wait(self, name: str, namespace: str) -> None:
        self._listener(f"waiting for deployment/{name}")
        where = [f"--namespace={namespace}"] if namespace else []
        command = ["rollout", "status", f"deployment/{name}", *where]
        timeout_s = ceil(self._ready_timeout_s)
        done = self._kubectl([*command, f"--timeout={timeout_s}s"], timeout_s + _GRACE_S)
        if done.returncode == 0:
            return
        said = _words(done)
        if any(words in said for words in _NOT_READY):
            track = name.removeprefix("graftserve-")
            at = f" -n {namespace}" if namespace else ""
            raise NotReadyError(
                f"deployment/{name} is not ready within {timeout_s} s: {said}; see why with "
                f"`kubectl{at} describe pods -l graftserve.dev/track={track}`",
                name,
            )
        raise ClusterError(f"kubectl rollout status deployment/{name}: {said}")

    def _kubectl(self, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [find_kubectl(), *command, *self._context],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"kubectl {' '.join(command[:2])}: no end after {timeout_s:g} s") from error


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What kubectl says went wrong; its last line on stdout where stderr is silent."""
    said = _LOG_LINE.sub("", done.stderr).strip() or done.stdout.strip().rpartition("\n")[2]
    return " ".join(said.removeprefix("error: ").split()) or f"exit status {done.returncode}"


def _value(text: str, key: str) -> str:
    match = re.search(rf"^{re.escape(key)}: (.*)$", text, re.MULTILINE)
    return "" if match is None else match[1].strip("\"'")
