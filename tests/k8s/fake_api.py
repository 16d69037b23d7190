"""A small Kubernetes API server for tests: real HTTP, real field ownership, watches, and faults on request.

    with FakeApi() as api:
        api.kubeconfig(tmp_path / "config")
        fault = api.fail(Fault("throttle", method="PATCH", path="/deployments/"))

It keeps what it is given, and nothing runs: `set_status`, `make_ready` and `edit` are the controllers and the
other people. tests/k8s/test_fake_api.py holds it and a real server to the same behaviour.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.k8s.fake_faults import Fault, Request
from tests.k8s.fake_http import Server
from tests.k8s.fake_store import Store, Target, Write

__all__ = ["FakeApi", "Fault", "Request", "write_kubeconfig"]


class FakeApi:
    """An API server at http://127.0.0.1:`port`, from `with` or start() on.

    without: groups that this cluster lacks. ready: Deployments become ready as soon as they are written.
    requests: all that came in, in order; errors: bugs of the fake itself, which the end of `with` raises.
    """

    def __init__(self, *, without: set[str] | frozenset[str] = frozenset(), ready: bool = False) -> None:
        self.store = Store(frozenset(without), ready=ready)
        self.requests: list[Request] = []
        self.errors: list[Exception] = []
        self.port = 0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server: Server | None = None

    def __enter__(self) -> "FakeApi":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self.errors:
            raise self.errors[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen: on the port of last time, with the objects of last time."""
        self._server = Server(self, self.port)
        self.port = self._server.server_address[1]
        # Its loop looks this often whether it should end.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and all connections."""
        server, self._server = self._server, None
        if server is not None:
            server.stopping.set()
            server.shutdown()
            server.server_close()
            with self.store.changed:
                self.store.changed.notify_all()
            server.close_connections()

    def kubeconfig(self, path: Path, context: str = "fake") -> Path:
        """Write a kubeconfig that leads here."""
        return write_kubeconfig(path, context, {"server": self.url}, {"token": "fake"})

    def fail(self, fault: Fault) -> Fault:
        """From now on; the first that strikes wins."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def mend(self) -> None:
        """No more faults; what hangs goes on."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.release()

    def compact(self) -> None:
        """Forget what happened: a watch from any earlier resourceVersion gets 410 Gone."""
        self.store.compact()

    def bookmark(self) -> None:
        """Send all watches that allow it a bookmark."""
        self.store.bookmark()

    def get(self, kind: str, name: str, namespace: str = "") -> dict[str, Any]:
        return self.store.get(self._target(kind, name, namespace))

    def create(self, thing: dict[str, Any], manager: str = "kubectl-create") -> dict[str, Any]:
        target = self._target(thing["kind"], "", thing["metadata"].get("namespace", ""))
        return self.store.create(target, thing, Write(manager))

    def edit(
        self, kind: str, name: str, namespace: str, patch: dict[str, Any], manager: str = "kubectl-edit"
    ) -> dict[str, Any]:
        """Another writer: a strategic merge patch."""
        target = self._target(kind, name, namespace)
        return self.store.patch(target, patch, Write(manager), strategic=True)

    def apply(
        self, thing: dict[str, Any], manager: str = "kubectl", *, force: bool = False
    ) -> dict[str, Any]:
        """Another applier."""
        metadata = thing["metadata"]
        target = self._target(thing["kind"], metadata["name"], metadata.get("namespace", ""))
        return self.store.apply(target, thing, Write(manager, force=force))[0]

    def delete(self, kind: str, name: str, namespace: str = "") -> None:
        self.store.delete(self._target(kind, name, namespace), Write("kubectl"))

    def set_status(self, kind: str, name: str, namespace: str, status: dict[str, Any]) -> dict[str, Any]:
        """As a controller would write it."""
        return self.store.set_status(self._target(kind, name, namespace), status)

    def make_ready(self, name: str, namespace: str) -> dict[str, Any]:
        """The Deployment's pods are ready now, as many as it wants."""
        return self.store.make_ready(self._target("Deployment", name, namespace))

    def _target(self, kind: str, name: str, namespace: str) -> Target:
        return Target(self.store.kind(kind), namespace, name)

    def receive(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            return next((fault for fault in self._faults if fault.strikes(request)), None)


def write_kubeconfig(path: Path, context: str, cluster: dict[str, str], user: dict[str, str]) -> Path:
    """One cluster, one user, and the context of both, which is the current one."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context,
        "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
        "clusters": [{"name": context, "cluster": cluster}],
        "users": [{"name": context, "user": user}],
    }
    path.write_text(yaml.safe_dump(config))
    return path
