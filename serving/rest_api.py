"""The REST front door: TensorFlow Serving's JSON API as a WSGI application.

    POST /v1/models/NAME[/versions/N|/labels/L]:predict    also :classify and :regress
    GET  /v1/models/NAME[/versions/N|/labels/L]            the states of its versions
    GET  /v1/models/NAME[/versions/N|/labels/L]/metadata   its signatures
    GET  /monitoring/prometheus/metrics                    if a monitoring config says so
    GET  /, /overview.json                                 a page for people, and what it shows

Source: tensorflow_serving/model_servers/{http_rest_api_handler,http_rest_api_util,http_server}.cc.
"""

import gzip
import json
import logging
import re
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from graftserve.client import wire
from graftserve.client.wire import methods

from .errors import Code, ServingError
from .grpc_api import status_to_proto
from .http_server import CLOSE, BodyError, read_body
from .json_examples import encode_classifications, encode_regressions, parse_examples_body
from .json_tensor import decode_inputs, encode_outputs, is_row_form, parse_document
from .metrics import CONTENT_TYPE, Call, Metrics
from .page import CONTENT_SECURITY_POLICY, PAGE, Overview
from .predict import SignatureNotFoundError
from .service import ModelServiceImpl, ModelSpec, PredictionServiceImpl
from .tracing import Origin

__all__ = ["HTTP_STATUS", "RestApi", "RestSettings"]

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
_APIS = {"predict": "Predict", "classify": "Classify", "regress": "Regress"}
_ROUTES = {
    **{api: f"/v1/models/{{name}}:{method}" for method, api in _APIS.items()},
    "GetModelStatus": "/v1/models/{name}",
    "GetModelMetadata": "/v1/models/{name}/metadata",
}
_MIN_GZIP_BYTES = 1024
_PAGE_HEADERS = [("Content-Security-Policy", CONTENT_SECURITY_POLICY), ("Cache-Control", "no-cache")]
_CORS_HEADERS = [
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "GET, POST"),
    ("Access-Control-Allow-Headers", "Content-Type, Content-Encoding"),
]

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


@dataclass(frozen=True)
class RestSettings:
    """How the front door behaves.

    timeout_s: a request may take this long to arrive, and then as long again to be answered.
    max_body_bytes: of a request, after gzip is undone; 0 is no limit.
    allow_cors: let pages of other origins read the answers.
    metrics_path: where Prometheus finds the metrics; empty is nowhere.
    """

    timeout_s: float = 30.0
    max_body_bytes: int = 0
    allow_cors: bool = False
    metrics_path: str = ""


@dataclass(frozen=True)
class _Response:
    body: bytes
    status: str = HTTP_STATUS[Code.OK]
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()


class RestApi:
    """The WSGI application. Thread-safe."""

    def __init__(
        self,
        settings: RestSettings,
        prediction: PredictionServiceImpl,
        model: ModelServiceImpl,
        metrics: Metrics,
        overview: Callable[[], Overview],
    ) -> None:
        self._settings = settings
        self._prediction = prediction
        self._model = model
        self._metrics = metrics
        self._overview = overview

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        try:
            # Read before anything else: an answer given over an unread body would break the connection.
            response = self._respond(environ, read_body(environ, self._settings.max_body_bytes))
        except BodyError as exc:
            # Where the next request begins is not known.
            response = _Response(_to_json({"error": str(exc)}), exc.status, headers=[CLOSE])
        except ServingError as exc:
            response = _failure(exc)
        except Exception as exc:
            _log.exception("a request failed in an unforeseen way")
            response = _failure(ServingError(Code.INTERNAL, f"{type(exc).__name__}: {exc}"))
        body = response.body
        headers = [("Content-Type", response.content_type), *response.headers]
        if self._settings.allow_cors:
            headers += _CORS_HEADERS
        if len(body) >= _MIN_GZIP_BYTES and _accepts_gzip(environ):
            body = gzip.compress(body, compresslevel=1)
            headers += [("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")]
        start_response(response.status, [*headers, ("Content-Length", str(len(body)))])
        return [body]

    def _respond(self, environ: dict[str, Any], body: bytes) -> _Response:
        method: str = environ["REQUEST_METHOD"]
        path = _raw_path(environ)
        if method == "OPTIONS" and self._settings.allow_cors:
            return _Response(b"")
        if method == "GET":
            if path == "/":
                return _Response(PAGE, content_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)
            if path == "/overview.json":
                return _Response(_to_json(self._overview()), headers=[("Cache-Control", "no-store")])
            if path == self._settings.metrics_path:
                return _Response(self._metrics.render(), content_type=CONTENT_TYPE)
        if not path.lower().startswith("/v1/"):
            raise ServingError(
                Code.NOT_FOUND, f"Not found: {method} {path}. Expected a path that begins with /v1/"
            )
        pattern = {"POST": _POST, "GET": _GET}.get(method)
        match = pattern.fullmatch(path) if pattern else None
        if match is None:
            raise ServingError(Code.INVALID_ARGUMENT, f"Malformed request: {method} {path}")
        spec = ModelSpec(*_choice(match))
        if method == "POST":
            api = match["method"].lower()
            return self._measure(environ, _APIS[api], lambda call: self._infer(call, api, spec, body))
        if not spec.name:
            raise ServingError(Code.INVALID_ARGUMENT, "Missing model name in request.")
        if match["metadata"]:
            return self._measure(environ, "GetModelMetadata", lambda call: self._metadata(call, spec))
        return self._measure(environ, "GetModelStatus", lambda call: self._status(call, spec))

    def _measure(self, environ: Mapping[str, Any], api: str, answer: Callable[[Call], bytes]) -> _Response:
        origin = partial(_origin, environ, api)
        call = self._metrics.begin(api, "REST", origin)
        code, message = Code.INTERNAL, ""
        try:
            response = _Response(answer(call))
            code = Code.OK
        except ServingError as exc:
            code, message = exc.code, exc.message
            response = _failure(exc)
        finally:
            self._metrics.end(call, code, message)
        return response

    def _infer(self, call: Call, api: str, spec: ModelSpec, body: bytes) -> bytes:
        deadline_s = time.monotonic() + self._settings.timeout_s
        try:
            if api == "predict":
                document, signature_name = parse_document(body)
                spec = replace(spec, signature_name=signature_name)
                answer = self._prediction.predict(
                    *(call, spec, lambda signature: decode_inputs(document, signature)), deadline_s=deadline_s
                )
                return encode_outputs(answer.result, row_form=is_row_form(document))
            signature_name, given = parse_examples_body(body)
            spec = replace(spec, signature_name=signature_name)
            if api == "classify":
                return encode_classifications(self._prediction.classify(call, spec, given, deadline_s).result)
            return encode_regressions(self._prediction.regress(call, spec, given, deadline_s).result)
        except SignatureNotFoundError as exc:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f'Serving signature name: "{exc.signature_name}" not found in signature def',
            ) from exc

    def _status(self, call: Call, spec: ModelSpec) -> bytes:
        states = self._model.get_model_status(call, spec)
        response = wire.GetModelStatusResponse(model_version_status=map(status_to_proto, states))
        return _to_json(_proto_to_json(response))

    def _metadata(self, call: Call, spec: ModelSpec) -> bytes:
        answer = self._prediction.get_model_metadata(call, spec, [methods.SIGNATURE_DEF_FIELD])
        model_spec = wire.ModelSpec(name=answer.id.name)
        model_spec.version.value = answer.id.version
        return _to_json(
            {
                "model_spec": _proto_to_json(model_spec),
                "metadata": {methods.SIGNATURE_DEF_FIELD: _proto_to_json(answer.result)},
            }
        )


def _raw_path(environ: Mapping[str, Any]) -> str:
    """The path as sent, before %-decoding: a decoded "/" in a model's name must not look like a separator."""
    uri = environ.get("REQUEST_URI")
    if uri is None:
        return urllib.parse.quote(environ.get("PATH_INFO", ""), safe="/:", encoding="latin-1")
    return str(urllib.parse.urlsplit(uri).path)


def _origin(environ: Mapping[str, Any], api: str, code: Code) -> Origin:
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    method = environ["REQUEST_METHOD"]
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "http.route": _ROUTES[api],
        "http.response.status_code": int(HTTP_STATUS[code].split()[0]),
        "url.path": _raw_path(environ),
        "url.scheme": environ.get("wsgi.url_scheme", "http"),
        "network.peer.address": environ.get("REMOTE_ADDR", ""),
    }
    return Origin(f"{method} {_ROUTES[api]}", headers, attributes)


def _failure(error: ServingError) -> _Response:
    return _Response(_to_json({"error": error.message}), HTTP_STATUS[error.code])


def _accepts_gzip(environ: Mapping[str, Any]) -> bool:
    for entry in environ.get("HTTP_ACCEPT_ENCODING", "").split(","):
        coding, _, quality = (part.strip().lower() for part in entry.partition(";"))
        if coding == "gzip" and not re.fullmatch(r"q=0(\.0*)?", quality):
            return True
    return False


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
