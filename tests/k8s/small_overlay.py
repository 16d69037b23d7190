"""An overlay to roll out in tests: staging, without what an API server of 2020 does not know."""

from pathlib import Path

from graftserve.k8s.manifests import copy_manifests

__all__ = ["copy_small_overlay"]

_PATCHES = """
  - target:
      kind: Deployment
    patch: |-
      - op: remove
        path: /spec/template/spec/topologySpreadConstraints
      - op: remove
        path: /spec/template/spec/containers/0/lifecycle
      - op: remove
        path: /spec/template/spec/containers/0/livenessProbe
  - patch: |-
      apiVersion: policy/v1
      kind: PodDisruptionBudget
      metadata:
        name: graftserve
      $patch: delete
"""


def copy_small_overlay(directory: Path, namespace: str) -> Path:
    """A folder of it, with version 3 on the stable track and no canary."""
    folder = copy_manifests("staging", directory, leave_out=["monitoring", "network-policy"])
    for name in ("kustomization.yaml", "namespace.yaml"):
        path = folder / name
        path.write_text(path.read_text().replace("graftserve-staging", namespace))
    with (folder / "kustomization.yaml").open("a") as file:
        file.write(f"patches:{_PATCHES}")
    stable = folder / "stable.env"
    lines = {"MODEL_VERSION=1": "MODEL_VERSION=3", "s3://models/flowers": "/source/flowers"}
    text = stable.read_text()
    for before, after in lines.items():
        text = text.replace(before, after)
    stable.write_text(text)
    return folder
