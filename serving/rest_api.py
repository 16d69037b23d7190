"""The REST front door: TensorFlow Serving's JSON API as a WSGI application, and the HTTP server below it.

    POST /v1/models/NAME[/versions/N|/labels/L]:predict
    GET  /v1/models/NAME[/versions/N|/labels/L]            the states of its versions
    GET  /v1/models/NAME[/versions/N|/labels/L]/metadata   its signatures

Source: tensorflow_serving/model_servers/{http_rest_api_handler,http_rest_api_util,http_server}.cc.
"""

import json
import logging
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cheroot import wsgi
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from graftserve.client import wire
from graftserve.client.wire import methods

from .errors import Code, ServingError
from .grpc_api import status_to_proto
from .json_tensor import decode_inputs, encode_outputs, parse_predict_body
from .predict import SignatureNotFoundError
from .service import ModelServiceImpl, ModelSpec, PredictionServiceImpl

__all__ = ["HTTP_STATUS", "RestApi", "RestServer"]

_log = logging.getLogger(__name__)

HTTP_STATUS: Mapping[Code, str] = {
    Code.OK: "200 OK",
    Code.CANCELLED: "499 Client Closed Request",
    Code.UNKNOWN: "500 Internal Server Error",
    Code.INVALID_ARGUMENT: "400 Bad Request",
    Code.DEADLINE_EXCEEDED: "504 Gateway Timeout",
    Code.NOT_FOUND: "404 Not Found",
    Code.ALREADY_EXISTS: "409 Conflict",
    Code.PERMISSION_DENIED: "403 Forbidden",
    Code.RESOURCE_EXHAUSTED: "429 Too Many Requests",
    Code.FAILED_PRECONDITION: "400 Bad Request",
    Code.ABORTED: "409 Conflict",
    Code.OUT_OF_RANGE: "400 Bad Request",
    Code.UNIMPLEMENTED: "501 Not Implemented",
    Code.INTERNAL: "500 Internal Server Error",
    Code.UNAVAILABLE: "503 Service Unavailable",
    Code.DATA_LOSS: "500 Internal Server Error",
    Code.UNAUTHENTICATED: "401 Unauthorized",
}
"""The status line of each code. Source: http_server.cc, ToHTTPStatusCode."""

_CHOICE = r"(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_POST = re.compile(
    rf"/v1/models/(?P<name>[^/:]+){_CHOICE}:(?P<method>classify|regress|predict)", re.IGNORECASE | re.ASCII
)
_GET = re.compile(
    rf"/v1/models(?:/(?P<name>[^/:]+))?{_CHOICE}(?P<metadata>/metadata)?", re.IGNORECASE | re.ASCII
)
_MAX_VERSION = 2**63 - 1

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


class RestApi:
    """The WSGI application. Thread-safe.

    timeout_s: a request may take this long, counted from when its body was read.
    """

    def __init__(
        self, prediction: PredictionServiceImpl, model: ModelServiceImpl, *, timeout_s: float
    ) -> None:
        self._prediction = prediction
        self._model = model
        self._timeout_s = timeout_s

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        try:
            # Read before anything else: an answer given over an unread body would break the connection.
            body: bytes = environ["wsgi.input"].read()
            status, answer = HTTP_STATUS[Code.OK], self._answer(environ, body)
        except ServingError as exc:
            status, answer = HTTP_STATUS[exc.code], _to_json({"error": exc.message})
        except Exception as exc:
            _log.exception("a request failed in an unforeseen way")
            status, answer = HTTP_STATUS[Code.INTERNAL], _to_json({"error": f"{type(exc).__name__}: {exc}"})
        start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]

    def _answer(self, environ: dict[str, Any], body: bytes) -> bytes:
        method: str = environ["REQUEST_METHOD"]
        path = _raw_path(environ)
        if not path.lower().startswith("/v1/"):
            raise ServingError(
                Code.NOT_FOUND, f"Not found: {method} {path}. Expected a path that begins with /v1/"
            )
        pattern = {"POST": _POST, "GET": _GET}.get(method)
        match = pattern.fullmatch(path) if pattern else None
        if match is None:
            raise ServingError(Code.INVALID_ARGUMENT, f"Malformed request: {method} {path}")
        name, version, label = _choice(match)
        if method == "POST":
            if match["method"].lower() != "predict":
                raise ServingError(
                    Code.UNIMPLEMENTED, f"This server does not offer {match['method']}; use predict"
                )
            return self._predict(name, version, label, body)
        if not name:
            raise ServingError(Code.INVALID_ARGUMENT, "Missing model name in request.")
        spec = ModelSpec(name, version, label)
        return self._metadata(spec) if match["metadata"] else self._status(spec)

    def _predict(self, name: str, version: int | None, label: str | None, body: bytes) -> bytes:
        deadline_s = time.monotonic() + self._timeout_s
        request = parse_predict_body(body)
        spec = ModelSpec(name, version, label, request.signature_name)
        try:
            prediction = self._prediction.predict(
                spec, lambda signature: decode_inputs(request, signature), deadline_s=deadline_s
            )
        except SignatureNotFoundError as exc:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f'Serving signature name: "{exc.signature_name}" not found in signature def',
            ) from exc
        return encode_outputs(prediction.outputs, row_form=request.row_form)

    def _status(self, spec: ModelSpec) -> bytes:
        if spec.version_label is not None:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"Unrecognized servable version label: {spec.version_label}"
            )
        states = self._model.get_model_status(spec)
        response = wire.GetModelStatusResponse(model_version_status=map(status_to_proto, states))
        return _to_json(_proto_to_json(response))

    def _metadata(self, spec: ModelSpec) -> bytes:
        servable_id, signatures = self._prediction.get_model_metadata(spec, [methods.SIGNATURE_DEF_FIELD])
        model_spec = wire.ModelSpec(name=servable_id.name)
        model_spec.version.value = servable_id.version
        return _to_json(
            {
                "model_spec": _proto_to_json(model_spec),
                "metadata": {methods.SIGNATURE_DEF_FIELD: _proto_to_json(signatures)},
            }
        )


class _HttpServer(wsgi.Server):
    @staticmethod
    def bind_socket(socket_: socket.socket, bind_addr: Any) -> socket.socket:
        """As cheroot's, which leaves the socket of a failed attempt open."""
        try:
            socket_.bind(bind_addr)
        except OSError:
            socket_.close()
            raise
        return socket_

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        """Log, where cheroot would write to stderr itself."""
        _log.log(level, "%s", msg, exc_info=traceback)


class RestServer:
    """Serves a WSGI application over HTTP/1.1 from a pool of threads; requests beyond it wait in line.

    port: 0 takes any free one.
    Raises ServingError (UNAVAILABLE) from `start` if the port cannot be had.
    """

    def __init__(self, host: str, port: int, app: RestApi, *, num_threads: int) -> None:
        self._host = host
        self._server = _HttpServer(
            (host, port), app, numthreads=num_threads, max=num_threads, request_queue_size=128
        )
        self._thread = threading.Thread(target=self._server.serve, name="graftserve-rest", daemon=True)
        self.port = port

    def start(self) -> None:
        host, port = self._server.bind_addr
        try:
            self._server.prepare()
        except OSError as exc:
            raise ServingError(
                Code.UNAVAILABLE,
                f"Could not listen for REST on {host}:{port}: is the port in use? Choose another one with "
                f"--rest_api_port. ({exc})",
            ) from exc
        self.port = self._server.socket.getsockname()[1]
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Accept nothing more and let requests under way finish; after grace_s cut their connections."""
        if not self._thread.is_alive():
            return
        self._server.shutdown_timeout = grace_s
        self._server.stop()
        self._thread.join()


def _raw_path(environ: Mapping[str, Any]) -> str:
    """The path as sent, before %-decoding: a decoded "/" in a model's name must not look like a separator."""
    uri = environ.get("REQUEST_URI")
    if uri is None:
        return urllib.parse.quote(environ.get("PATH_INFO", ""), safe="/:", encoding="latin-1")
    return str(urllib.parse.urlsplit(uri).path)


def _choice(match: re.Match[str]) -> tuple[str, int | None, str | None]:
    name = urllib.parse.unquote(match["name"] or "")
    label = urllib.parse.unquote(match["label"]) if match["label"] else None
    if match["version"] is None:
        return name, None, label
    # Compared by length first: Python refuses to convert digits without end.
    if len(match["version"]) > 19 or int(match["version"]) > _MAX_VERSION:
        raise ServingError(
            Code.INVALID_ARGUMENT, f"Failed to convert version: {match['version'][:40]} to numeric."
        )
    return name, int(match["version"]), label


def _proto_to_json(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _to_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
