"""A real API server for tests: etcd and kube-apiserver from a folder, as controller-runtime's envtest does.

    KUBEBUILDER_ASSETS=$HOME/kubebuilder/bin python -m pytest tests/k8s/test_fake_api.py

Nothing runs in it: no controllers, no nodes. It has two users: envtest may do everything, deployer what Roles
give to the group graftserve-deployers.
"""

import os
import secrets
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import trustme
from kubernetes import client, config

from tests.k8s.fake_api import write_kubeconfig
from tests.k8s.fake_kinds import KINDS, Kind

__all__ = ["ASSETS", "EnvTest", "find_assets"]

ASSETS = "KUBEBUILDER_ASSETS"
_START_TIMEOUT_S = 90.0


def find_assets() -> Path | None:
    """The folder that the environment names; None where it names none. Raises FileNotFoundError."""
    value = os.environ.get(ASSETS)
    if not value:
        return None
    folder = Path(value)
    for name in ("etcd", "kube-apiserver"):
        if not os.access(folder / name, os.X_OK):
            raise FileNotFoundError(f"{ASSETS}={value}: expected etcd and kube-apiserver, no {name} to run")
    return folder


class EnvTest:
    """etcd and kube-apiserver from `assets`, with definitions of our custom kinds, from `with` on.

    config_path, deployer_path: the users' kubeconfigs, whose contexts are "envtest" and "deployer".
    etcd_url: for those who look below.
    """

    def __init__(self, assets: Path) -> None:
        self._assets = assets
        self._cleanup = ExitStack()
        self.config_path = self.deployer_path = Path()
        self.etcd_url = ""
        self.version = ""
        self.minor = 0

    def __enter__(self) -> "EnvTest":
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="envtest-")))
            self._start(folder, stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _start(self, folder: Path, stack: ExitStack) -> None:
        etcd_port, peer_port, port = _free_ports(3)
        self.etcd_url = f"http://127.0.0.1:{etcd_port}"
        peer_url = f"http://127.0.0.1:{peer_port}"
        etcd = self._run(
            stack,
            folder / "etcd.log",
            "etcd",
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls={self.etcd_url}",
            f"--advertise-client-urls={self.etcd_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
            "--unsafe-no-fsync",
        )
        _wait(f"{self.etcd_url}/health", None, {}, etcd, folder / "etcd.log")
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        authority.cert_pem.write_to_path(folder / "ca.crt")
        certificate.private_key_pem.write_to_path(folder / "server.key")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(folder / "server.crt", append=True)
        users = {"envtest": "system:masters", "deployer": "graftserve-deployers"}
        tokens = {user: secrets.token_hex(16) for user in users}
        (folder / "tokens.csv").write_text(
            "".join(f'{tokens[user]},{user},{user},"{group}"\n' for user, group in users.items())
        )
        url = f"https://127.0.0.1:{port}"
        api = self._run(
            stack,
            folder / "kube-apiserver.log",
            "kube-apiserver",
            f"--etcd-servers={self.etcd_url}",
            f"--cert-dir={folder}",
            f"--tls-cert-file={folder / 'server.crt'}",
            f"--tls-private-key-file={folder / 'server.key'}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            # There is no Service to reach it by, and an endpoint on the loopback would be refused.
            "--endpoint-reconciler-type=none",
            f"--secure-port={port}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--authorization-mode=RBAC",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder / 'server.key'}",
            f"--service-account-signing-key-file={folder / 'server.key'}",
        )
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        _wait(
            f"{url}/readyz",
            context,
            {"Authorization": f"Bearer {tokens['envtest']}"},
            api,
            folder / "kube-apiserver.log",
        )
        cluster = {"server": url, "certificate-authority": str(folder / "ca.crt")}
        self.config_path, self.deployer_path = (
            write_kubeconfig(folder / user, user, cluster, {"token": token}) for user, token in tokens.items()
        )
        self._install_kinds()

    def _run(self, stack: ExitStack, log: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [self._assets / name, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        stack.callback(_stop, process)
        return process

    def _install_kinds(self) -> None:
        with config.new_client_from_config(str(self.config_path)) as connection:
            code = client.VersionApi(connection).get_code()
            self.version, self.minor = code.git_version, int(code.minor.rstrip("+") or 0)
            extensions = client.ApiextensionsV1Api(connection)
            for kind in KINDS:
                if kind.custom:
                    extensions.create_custom_resource_definition(_definition(kind))
            deadline = time.monotonic() + _START_TIMEOUT_S
            objects = client.CustomObjectsApi(connection)
            for kind in (kind for kind in KINDS if kind.custom):
                while True:
                    with suppress(client.ApiException):
                        objects.list_cluster_custom_object(kind.group, kind.version, kind.plural)
                        break
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{kind.resource}: not served after {_START_TIMEOUT_S:g} s")
                    time.sleep(0.05)


def _definition(kind: Kind) -> dict[str, Any]:
    """The smallest definition; without a schema lists are one value, as in those of the real kinds."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": kind.resource,
            # Groups below k8s.io want to know who approved of them.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": kind.group,
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
            },
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [
                {
                    "name": kind.version,
                    "served": True,
                    "storage": True,
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "properties": {"spec": anything, "status": anything},
                        }
                    },
                    "subresources": {"status": {}} if kind.status else {},
                }
            ],
        },
    }


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(
    url: str,
    context: ssl.SSLContext | None,
    headers: dict[str, str],
    process: subprocess.Popen[bytes],
    log: Path,
) -> None:
    """Until `url` answers. Raises RuntimeError with the log's end."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    # The environment may name a proxy, which does not lead here.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    reason: object = "no answer"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(urllib.request.Request(url, headers=headers), timeout=5):
                return
        except OSError as error:
            reason = error
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            time.sleep(0.05)
    state = "still runs" if process.returncode is None else f"ended with status {process.returncode}"
    raise RuntimeError(f"{url}: {reason}; the program {state}: ...{log.read_text(errors='replace')[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
