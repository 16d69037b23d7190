"""The Kubernetes API, as far as a rollout needs it, through the official client (extra k8s).

A question is asked again while the API server is away, throttles or fails by itself: reading does no harm,
and an apply that was done already changes nothing.

Sources: https://kubernetes.io/docs/reference/using-api/server-side-apply/ and, for watches,
https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from .errors import ClusterError, FieldConflictError, ForbiddenError

__all__ = ["FIELD_MANAGER", "Document", "KubernetesApi", "label_of"]

FIELD_MANAGER: Final = "graftserve-rollout"
Document = dict[str, Any]
"""A Kubernetes object, or a part of one, as JSON has it."""

_CONNECT_TIMEOUT_S = 5.0
_PAUSE_S = 1.0  # before the same question, unless the server says how long
_LONGEST_PAUSE_S = 30.0
_AWAY: Final = frozenset({429, 502, 503, 504})
_READ_AGAIN: Final = _AWAY | {500}  # an apply that an API server cannot make sense of may be a 500, too
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_SERVICE_ACCOUNT: Final = "KUBERNETES_SERVICE_HOST"
_ResultT = TypeVar("_ResultT")


class KubernetesApi:
    """One cluster. A context manager.

    context: of the kubeconfig (KUBECONFIG, or ~/.kube/config); "" for the current one. Without a kubeconfig,
        the service account of the pod that this runs in.
    timeout_s: for an answer. patience_s: how long an API server that is away is asked again.
    listener: told that it is waited for.
    Raises ClusterError if there is no such context, or the official client is not installed.
    """

    def __init__(
        self,
        *,
        context: str = "",
        timeout_s: float = 30.0,
        patience_s: float = 60.0,
        listener: Callable[[str], None] = lambda text: None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._timeouts_s = (min(_CONNECT_TIMEOUT_S, timeout_s), timeout_s)
        self._patience_s = patience_s
        self._listener = listener
        self._now = now
        self._sleep = sleep
        self._client = _connected(context)
        # What the server has, for this object's life only: the library's own cache outlives a cluster.
        self._cache = tempfile.TemporaryDirectory(prefix="graftserve-k8s-")
        self._dynamic: Any = None

    def __enter__(self) -> "KubernetesApi":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()
        self._cache.cleanup()

    def is_namespaced(self, document: Document) -> bool:
        """Whether objects of this kind are in namespaces. Raises ClusterError."""
        return self._ask(f"look {document['kind']} up", lambda: bool(self._resource(document).namespaced))

    def apply(self, document: Document, *, dry_run: bool = False) -> Document:
        """Server-side apply by FIELD_MANAGER, never forced; returns the object that it makes.

        dry_run: only see what it would make. Raises FieldConflictError if another manager owns a field that
        would change, ForbiddenError, ClusterError.
        """
        options = {"dry_run": "All"} if dry_run else {}
        applied = self._ask(
            f"apply {label_of(document)}",
            lambda: self._resource(document).server_side_apply(
                body=document,
                namespace=_namespace(document),
                field_manager=FIELD_MANAGER,
                _request_timeout=self._timeouts_s,
                **options,
            ),
            _AWAY,
        )
        return dict(applied.to_dict())

    def get(self, document: Document) -> Document | None:
        """The object with the kind and name of `document`, as it is now; None if it is not there.

        Raises ForbiddenError, ClusterError.
        """
        from kubernetes.dynamic.exceptions import NotFoundError

        def question() -> Document | None:
            try:
                found = self._resource(document).get(
                    name=document["metadata"]["name"],
                    namespace=_namespace(document),
                    _request_timeout=self._timeouts_s,
                )
            except NotFoundError:
                return None
            return dict(found.to_dict())

        return self._ask(f"get {label_of(document)}", question)

    def pods(self, namespace: str | None, selector: str) -> list[Document]:
        """The pods with the labels of a selector such as "a=b,c=d". Raises ClusterError."""

        def question() -> list[Document]:
            found = self._resource({"apiVersion": "v1", "kind": "Pod"}).get(
                namespace=namespace, label_selector=selector, _request_timeout=self._timeouts_s
            )
            return list(found.to_dict()["items"])

        return self._ask(f"list pods of {selector}", question)

    def disown(self, document: Document, manager: str) -> bool:
        """Take the fields that `manager` has by updates from it; they are nobody's then, unless shared.

        Returns whether it had any. Raises ClusterError.
        Source: csaupgrade/upgrade.go in https://github.com/kubernetes/client-go
        """

        def question() -> bool:
            live = self.get(document)
            metadata = {} if live is None else live["metadata"]
            entries = metadata.get("managedFields") or []
            kept = [item for item in entries if (item["manager"], item["operation"]) != (manager, "Update")]
            if len(kept) == len(entries):
                return False
            patch = {
                "managedFields": kept or [{}],  # an empty list would change nothing
                "resourceVersion": metadata["resourceVersion"],  # what was changed since is read again
                "annotations": {_LAST_APPLIED: None},
            }
            self._resource(document).patch(
                body={"metadata": patch},
                name=metadata["name"],
                namespace=_namespace(document),
                content_type="application/merge-patch+json",
                _request_timeout=self._timeouts_s,
            )
            return True

        return self._ask(f"take {label_of(document)} over from {manager}", question)

    def changes(self, document: Document, timeout_s: float) -> Iterator[Document]:
        """The object's states after that of `document`, as they come; ends after `timeout_s`, or earlier.

        It ends early, too, when the watch is dropped or its beginning is forgotten (410 Gone): look again
        then. Raises ClusterError if it may not be watched.
        """
        from kubernetes.client.exceptions import ApiException
        from kubernetes.watch import Watch
        from urllib3.exceptions import HTTPError

        connect_s, read_s = self._timeouts_s
        try:
            for event in Watch().stream(
                self._resource(document).get,
                namespace=_namespace(document),
                field_selector=f"metadata.name={document['metadata']['name']}",
                resource_version=document["metadata"]["resourceVersion"],
                timeout_seconds=max(1, round(timeout_s)),
                serialize=False,
                _request_timeout=(connect_s, timeout_s + read_s),
            ):
                if event is None or event["type"] == "DELETED":  # None: a line that was cut off
                    return
                yield event["object"]
        except ApiException as error:
            if error.status not in _READ_AGAIN | {410}:
                raise _failure(f"watch {label_of(document)}", error) from error
            self._sleep(_PAUSE_S)
        except (HTTPError, OSError, ValueError):
            self._sleep(_PAUSE_S)

    def _resource(self, document: Document) -> Any:
        """What the server has for a kind; raises what the official client raises, ClusterError if nothing."""
        from kubernetes.dynamic import DynamicClient
        from kubernetes.dynamic.exceptions import ResourceNotFoundError

        version, kind = document["apiVersion"], document["kind"]
        if self._dynamic is None:
            self._dynamic = DynamicClient(self._client, cache_file=str(Path(self._cache.name, "resources")))
        try:
            return self._dynamic.resources.get(api_version=version, kind=kind)
        except ResourceNotFoundError as error:
            raise ClusterError(
                f"{label_of(document)}: the cluster knows no {kind} of {version}: install what brings it, or "
                "leave the component out that has it"
            ) from error

    def _ask(
        self, what: str, question: Callable[[], _ResultT], again: frozenset[int] = _READ_AGAIN
    ) -> _ResultT:
        """The answer. again: statuses after which the same question may be answered later."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError, SSLError

        began = self._now()
        while True:
            pause_s = _PAUSE_S
            cause: Exception
            try:
                return question()
            except ApiException as error:
                # A conflict without an owner is of two writers at once.
                if _causes(error) or error.status not in again | {409}:
                    raise _failure(what, error) from error
                said, cause = _message(error), error
                pause_s = _retry_after_s(error) or _PAUSE_S
            except SSLError as error:
                raise ClusterError(f"{what}: {self._client.configuration.host}: {error}") from error
            except (HTTPError, OSError) as error:
                said, cause = f"{self._client.configuration.host}: {_root(error)}", error
            left_s = began + self._patience_s - self._now()
            if left_s <= 0:
                raise ClusterError(
                    f"{what}: no answer from the API server for {self._patience_s:g} s: {said}; run this "
                    "again when it is back, it goes on"
                ) from cause
            self._listener(f"waiting for the API server: {said}")
            self._sleep(min(pause_s, left_s))


def label_of(document: Document) -> str:
    """For messages: "deployment/graftserve-stable"."""
    name = document.get("metadata", {}).get("name", "")
    return f"{document['kind'].lower()}{f'/{name}' if name else ''}"


def _connected(context: str) -> Any:
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ClusterError(
            "expected Kubernetes' Python client, which --apply and --cluster need: pip install "
            f"'graftserve[k8s]' ({error})"
        ) from error
    from yaml import YAMLError

    configuration = client.Configuration()
    configuration.retries = False  # ours tell what they wait for
    paths = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    try:
        if any(Path(path).exists() for path in paths.split(os.pathsep)):
            config.load_kube_config(paths, context or None, configuration)
        elif context or _SERVICE_ACCOUNT not in os.environ:
            raise ClusterError(
                f"{paths}: expected a kubeconfig, found none: say where it is with KUBECONFIG; inside of a "
                "pod its service account would do"
            )
        else:
            config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, YAMLError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(
            f"{paths}: not a kubeconfig that can be used: {' '.join(str(error).split())}"
        ) from error
    return client.ApiClient(configuration)


def _namespace(document: Document) -> str | None:
    namespace = document.get("metadata", {}).get("namespace")
    return None if namespace is None else str(namespace)


def _failure(what: str, error: Any) -> ClusterError | FieldConflictError:
    if causes := _causes(error):
        fields: dict[str, list[str]] = {}
        for cause in causes:
            fields.setdefault(cause.get("message", ""), []).append(cause.get("field", ""))
        text = "; ".join(f"{message}: {', '.join(names)}" for message, names in fields.items())
        return FieldConflictError(f"{what}: {text}", frozenset(_manager(cause) for cause in causes))
    failure = ForbiddenError if error.status == 403 else ClusterError
    return failure(f"{what}: {_message(error)}")


def _causes(error: Any) -> list[Mapping[str, str]]:
    """Of the conflicts with other managers, one for each field."""
    causes = (_status(error).get("details") or {}).get("causes") or []
    return [cause for cause in causes if cause.get("reason") == "FieldManagerConflict"]


def _manager(cause: Mapping[str, str]) -> str:
    """The name in 'conflict with "kubectl-edit" using apps/v1'."""
    parts = cause.get("message", "").split('"')
    return parts[1] if len(parts) > 2 else ""


def _message(error: Any) -> str:
    """What the server says, in one line."""
    said = _status(error).get("message") or error.reason or f"status {error.status}"
    return " ".join(str(said).split())


def _status(error: Any) -> Mapping[str, Any]:
    try:
        status = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _retry_after_s(error: Any) -> float:
    """What the server asks for, within reason; 0 for nothing."""
    try:
        return min(max(0.0, float((error.headers or {}).get("Retry-After", 0))), _LONGEST_PAUSE_S)
    except ValueError:  # a date
        return 0.0


def _root(error: BaseException) -> str:
    """The innermost reason of a connection that failed, without the addresses of objects."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
