"""HTTP for the fake API server: requests in, answers, lists and watches out."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.k8s.fake_discovery import discover
from tests.k8s.fake_faults import APPLY, Fault, Request, is_said
from tests.k8s.fake_kinds import Kind
from tests.k8s.fake_store import ApiError, Change, Store, Target, Write, failure

__all__ = ["Server"]

STRATEGIC = "application/strategic-merge-patch+json"
PROTOBUF = "application/vnd.kubernetes.protobuf"
MERGE = "application/merge-patch+json"


class Api(Protocol):
    """Whose server it is. receive: told of each request; gives the fault that strikes."""

    store: Store
    errors: list[Exception]

    def receive(self, request: Request) -> Fault | None: ...


class Server(ThreadingHTTPServer):
    """stopping: set before the connections are closed."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, api: Api, port: int) -> None:
        self.api = api
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections end: that of a client that goes away, or all of them at the end."""

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _DropError(Exception):
    """Close the connection, with no further word."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Answers are small, and nobody should wait for their second packet.
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        api = self.server.api
        try:
            request = self._read()
            if request is not None:
                self._respond(request, api.receive(request))
        except (_DropError, OSError):
            self.close_connection = True
        except Exception as error:
            api.errors.append(error)
            self.close_connection = True
            with suppress(OSError):
                self._fail(500, "InternalError", f"Internal error occurred: {error!r}")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _read(self) -> Request | None:
        """None where the body cannot be read, and this is said already."""
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        text = self.rfile.read(length)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        content_type = self.headers.get("Content-Type", "").partition(";")[0]
        agent = self.headers.get("User-Agent", "").partition("/")[0]
        manager = query.get("fieldManager") or ("" if content_type == APPLY else agent)
        if content_type == PROTOBUF:
            # kubectl create says it; apply, patch and edit do not.
            self._fail(415, "UnsupportedMediaType", f"{PROTOBUF}: expected JSON or YAML")
            return None
        try:
            body = _parsed(text) if text else None
        except yaml.YAMLError as error:
            self._fail(400, "BadRequest", f"error decoding the body: {error}")
            return None
        return Request(self.command, url.path, query, body, manager, content_type)

    def _respond(self, request: Request, fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else ""
        if fault is not None and kind == "hang":
            while not fault.released.wait(0.02):
                if self.server.stopping.is_set():
                    raise _DropError
        elif fault is not None and kind not in ("drop_after", "drop_watch", "gone"):
            self._refuse(request, fault)
            return
        try:
            answer = self._answer(request, fault)
        except ApiError as error:
            answer = error.status["code"], error.status
        if kind == "drop_after":
            raise _DropError
        if answer is not None:
            self._send(*answer)

    def _refuse(self, request: Request, fault: Fault) -> None:
        if fault.kind == "drop_before":
            raise _DropError
        if fault.kind == "throttle":
            seconds = fault.retry_after_s
            headers = {} if seconds is None else {"Retry-After": str(seconds)}
            self._send_text(429, "Too many requests, please try again later.\n", headers)
        elif fault.kind == "unavailable":
            message = "the server is currently unable to handle the request"
            self._fail(503, "ServiceUnavailable", message)
        elif fault.kind == "internal":
            self._fail(500, "InternalError", "Internal error occurred: etcdserver: request timed out")
        elif fault.kind == "unauthorized":
            self._fail(401, "Unauthorized", "Unauthorized")
        else:
            target = self._parse(request.path)
            if target is None:
                words = f'User "fake" cannot {request.method.lower()} path "{request.path}"'
                self._fail(403, "Forbidden", f"forbidden: {words}")
                return
            name = f' "{target.name}"' if target.name else ""
            where = f' in the namespace "{target.namespace}"' if target.namespace else " at the cluster scope"
            message = (
                f'{target.kind.resource}{name} is forbidden: User "fake" cannot {_verb(request, target)} '
                f'resource "{target.kind.plural}" in API group "{target.kind.group}"{where}'
            )
            details = {key: value for key, value in target.details.items() if value}
            self._fail(403, "Forbidden", message, details)

    def _answer(self, request: Request, fault: Fault | None) -> tuple[int, dict[str, Any]] | None:
        """(code, body); None where it is sent already"""
        found = discover(self.server.api.store.kinds, request.path)
        if found is not None:
            return 200, found
        target = self._parse(request.path)
        if target is None:
            self._send_text(404, "404 page not found\n")
            return None
        if request.method != "GET":
            return self._write(request, target)
        if target.name and not request.is_watch:
            return 200, self.server.api.store.get(target)
        if request.is_watch:
            self._watch(request, target, fault)
            return None
        things, version = self.server.api.store.collection(target.kind, target.namespace)
        selects = _selector(request, target)
        for thing in things:
            # As in Go: only items without types of their own say what they are.
            if not target.kind.custom:
                del thing["apiVersion"], thing["kind"]
        return 200, {
            "kind": f"{target.kind.kind}List",
            "apiVersion": target.kind.api_version,
            "metadata": {"resourceVersion": str(version)},
            "items": [thing for thing in things if selects(thing)],
        }

    def _write(self, request: Request, target: Target) -> tuple[int, dict[str, Any]]:
        store = self.server.api.store
        if request.query.get("dryRun", "All") != "All":
            raise ApiError(failure(400, "BadRequest", "dryRun: expected All"))
        write = Write(request.manager, request.is_dry_run, is_said(request.query.get("force")))
        if request.method == "DELETE" and target.name:
            return 200, store.delete(target, write)
        if request.method == "POST" and not target.name:
            return 201, store.create(target, request.body, write)
        if request.method == "PUT" and target.name:
            return 200, store.update(target, request.body, write)
        if request.method == "PATCH" and target.name:
            if request.is_apply:
                thing, is_new = store.apply(target, request.body, write)
                return (201 if is_new else 200), thing
            strategic = request.content_type == STRATEGIC
            if request.content_type != MERGE and (not strategic or target.kind.custom):
                message = (
                    "the body of the request was in an unknown format - accepted media types include: "
                    f"{MERGE}, {APPLY}"
                )
                raise ApiError(failure(415, "UnsupportedMediaType", message))
            return 200, store.patch(target, request.body, write, strategic=strategic)
        message = "the server does not allow this method on the requested resource"
        raise ApiError(failure(405, "MethodNotAllowed", message))

    def _watch(self, request: Request, target: Target, fault: Fault | None) -> None:
        store, api = self.server.api.store, self.server
        selects = _selector(request, target)
        timeout_s = float(request.query.get("timeoutSeconds") or 0) or 3600.0
        deadline = time.monotonic() + timeout_s
        allows_bookmarks = is_said(request.query.get("allowWatchBookmarks"))
        asked = request.query.get("resourceVersion") or "0"
        sends_all = asked == "0" or is_said(request.query.get("sendInitialEvents"))
        with store.changed:
            things, version = store.collection(target.kind, target.namespace)
            bookmarks = store.bookmarks
        events = [("ADDED", thing) for thing in things if selects(thing)] if sends_all else []
        if is_said(request.query.get("sendInitialEvents")) and allows_bookmarks:
            events.append(
                ("BOOKMARK", _bookmark(target.kind, version, {"k8s.io/initial-events-end": "true"}))
            )
        if not sends_all:
            version = int(asked)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        stream = _Stream(self._chunk, fault)
        if not sends_all and store.forgot(version):
            stream.send("ERROR", _expired(version, store.version))
            stream.end()
            return
        while True:
            for event in events:
                stream.send(*event)
            stream.check()
            with store.changed:
                changes = store.since(version)
                if not changes and bookmarks == store.bookmarks:
                    left_s = deadline - time.monotonic()
                    if left_s > 0 and not api.stopping.is_set():
                        store.changed.wait(left_s)
                        changes = store.since(version)
                is_marked = bookmarks != store.bookmarks
                bookmarks, newest = store.bookmarks, store.version
            if api.stopping.is_set():
                raise _DropError
            events = [event for change in changes for event in _events(change, target, selects)]
            version = max(version, newest)
            is_over = time.monotonic() >= deadline
            if allows_bookmarks and (is_marked or is_over):
                events.append(("BOOKMARK", _bookmark(target.kind, version)))
            if is_over:
                for event in events:
                    stream.send(*event)
                break
        stream.end()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _parse(self, path: str) -> Target | None:
        for kind in self.server.api.store.kinds:
            if not path.startswith(f"{kind.root}/"):
                continue
            parts = path[len(kind.root) + 1 :].strip("/").split("/")
            namespace = ""
            if kind.namespaced and len(parts) > 2 and parts[0] == "namespaces":
                namespace, parts = parts[1], parts[2:]
            if parts[0] != kind.plural or len(parts) > 3 or (kind.namespaced and parts[1:] and not namespace):
                continue
            name, subresource = [*parts[1:], "", ""][:2]
            if subresource and not (subresource == "status" and kind.status):
                continue
            return Target(kind, namespace, name, subresource)
        return None

    def _fail(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        self._send(code, failure(code, reason, message, details))

    def _send(self, code: int, body: dict[str, Any]) -> None:
        self._send_text(code, json.dumps(body), {"Content-Type": "application/json"})

    def _send_text(self, code: int, text: str, headers: dict[str, str] | None = None) -> None:
        data = text.encode()
        self.send_response(code)
        for name, value in ({"Content-Type": "text/plain; charset=utf-8"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _parsed(text: bytes) -> Any:
    """YAML; JSON first, which is much faster."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


class _Stream:
    """The events of a watch, as far as a fault lets them through."""

    def __init__(self, write: Callable[[bytes], None], fault: Fault | None) -> None:
        self._write = write
        self._fault = fault if fault is not None and fault.kind in ("drop_watch", "gone") else None
        self._sent = 0

    def send(self, kind: str, thing: dict[str, Any]) -> None:
        line = json.dumps({"type": kind, "object": thing}).encode() + b"\n"
        if self._fault is not None and self._sent == self._fault.after_events:
            if self._fault.mid_line:
                self._write(line[: len(line) // 2])
                raise _DropError
            self.check()
        self._write(line)
        self._sent += 1

    def check(self) -> None:
        """The fault's turn, where it needs no further event."""
        fault = self._fault
        if fault is None or fault.mid_line or self._sent < fault.after_events:
            return
        if fault.kind == "gone":
            self._write(json.dumps({"type": "ERROR", "object": _expired(1, 2)}).encode() + b"\n")
            self.end()
        raise _DropError

    def end(self) -> None:
        # An empty chunk is the end of the answer.
        self._write(b"")


def _events(
    change: Change, target: Target, selects: Callable[[dict[str, Any]], bool]
) -> list[tuple[str, dict[str, Any]]]:
    """What a watch says of a change: an object that is selected no longer is deleted."""
    if change.kind is not target.kind or target.namespace not in ("", change.place[0]):
        return []
    before = change.before is not None and selects(change.before)
    after = change.after is not None and selects(change.after)
    if after:
        assert change.after is not None
        return [("MODIFIED" if before else "ADDED", change.after)]
    if before:
        thing = change.after or change.before
        assert thing is not None
        version = {"resourceVersion": str(change.version)}
        return [("DELETED", thing | {"metadata": thing["metadata"] | version})]
    return []


def _selector(request: Request, target: Target) -> Callable[[dict[str, Any]], bool]:
    """labelSelector: =, ==, !=, in, notin, key and !key; fieldSelector: metadata.name and .namespace."""
    tests: list[Callable[[dict[str, Any]], bool]] = []
    if target.name:
        tests.append(lambda thing: thing["metadata"]["name"] == target.name)
    for term in filter(None, request.query.get("fieldSelector", "").split(",")):
        path, operator, value = re.split(r"(!=|==|=)", term, maxsplit=1)
        if path not in ("metadata.name", "metadata.namespace"):
            message = f'field label not supported: "{path}"'
            raise ApiError(failure(400, "BadRequest", message))
        tests.append(_field_test(path.partition(".")[2], operator != "!=", value))
    for term in filter(None, re.split(r",(?![^(]*\))", request.query.get("labelSelector", ""))):
        tests.append(_label_test(term.strip()))
    return lambda thing: all(test(thing) for test in tests)


def _field_test(name: str, wanted: bool, value: str) -> Callable[[dict[str, Any]], bool]:
    return lambda thing: (thing["metadata"].get(name, "") == value) is wanted


def _label_test(term: str) -> Callable[[dict[str, Any]], bool]:
    match = re.fullmatch(r"(!?)([\w./-]+)(?:\s*(!=|==|=|\s(?:not)?in)\s*\(?([^)]*)\)?)?", term)
    if match is None:
        raise ApiError(failure(400, "BadRequest", f"unable to parse requirement: {term!r}"))
    absent, key, operator, text = match.groups()
    values = {value.strip() for value in (text or "").split(",")}

    def test(thing: dict[str, Any]) -> bool:
        labels = thing["metadata"].get("labels", {})
        if operator is None:
            return (key in labels) is not bool(absent)
        return (labels.get(key) in values) is (operator.strip() not in ("!=", "notin"))

    return test


def _bookmark(kind: Kind, version: int, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"resourceVersion": str(version), "creationTimestamp": None}
    if annotations:
        metadata["annotations"] = annotations
    return {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": metadata}


def _expired(asked: int, oldest: int) -> dict[str, Any]:
    return failure(410, "Expired", f"too old resource version: {asked} ({oldest})")


def _verb(request: Request, target: Target) -> str:
    if request.method == "GET":
        return "watch" if request.is_watch else "get" if target.name else "list"
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[request.method]
