"""What a cluster's controllers and nodes do to Deployments, for API servers that run alone."""

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kubernetes.dynamic.exceptions import NotFoundError

from tests.k8s.api_client import Api, Thing, new_thing

__all__ = ["Controllers"]

_LOOK_S = 0.02
_VERSION = "graftserve.dev/version"


class Controllers:
    """Makes the pods of all Deployments in a namespace ready, from `with` on.

    troubles: versions whose pods never are, with the status that they show.
    """

    def __init__(
        self, config_path: Path, namespace: str, troubles: Mapping[int, dict[str, Any]] | None = None
    ) -> None:
        self._cache = tempfile.TemporaryDirectory()
        self._api = Api(config_path, Path(self._cache.name, "discovery"), namespace)
        self._troubles = {str(version): status for version, status in (troubles or {}).items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None

    def __enter__(self) -> "Controllers":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._api.close()
        self._cache.cleanup()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(_LOOK_S):
                for deployment in self._api.collection("Deployment")["items"]:
                    seen = deployment.get("status", {}).get("observedGeneration")
                    if seen != deployment["metadata"]["generation"]:
                        self._reconcile(deployment)
        except Exception as error:
            self._error = error

    def _reconcile(self, deployment: Thing) -> None:
        metadata, wanted = deployment["metadata"], deployment["spec"].get("replicas", 1)
        template = deployment["spec"]["template"]
        trouble = self._troubles.get(template["metadata"]["labels"][_VERSION])
        self._remove_pod(metadata["name"])
        if trouble is not None and wanted:
            pod = new_thing("Pod", metadata["name"], spec=template["spec"])
            pod["metadata"]["labels"] = template["metadata"]["labels"]
            self._api.create(pod)
            self._api.write_status("Pod", metadata["name"], trouble)
        ready = 0 if trouble is not None else wanted
        status = {
            "observedGeneration": metadata["generation"],
            "replicas": wanted,
            "updatedReplicas": wanted,
            "readyReplicas": ready,
            "availableReplicas": ready,
        }
        self._api.write_status("Deployment", metadata["name"], status)

    def _remove_pod(self, name: str) -> None:
        try:
            self._api.delete("Pod", name)
        except NotFoundError:
            return
