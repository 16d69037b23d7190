"""The page for people at `/`: one file without external resources, and the JSON that it polls.

The page is served as it is, with `CONTENT_SECURITY_POLICY` as its Content-Security-Policy header: the
browser then runs this file's own script and style, and nothing else. What it shows comes from
`/overview.json`, shaped as `Overview`, once a second; what people try goes through the ordinary
`/v1/models/NAME/versions/N:predict`. The page's addresses are relative: it also works below a path of a
reverse proxy, if that path ends in a slash.
Source: https://www.w3.org/TR/CSP3/ (hashes), https://www.w3.org/TR/trusted-types/.
"""

import base64
import hashlib
import re
from importlib.resources import files
from typing import NotRequired, TypedDict

__all__ = [
    "CONTENT_SECURITY_POLICY",
    "PAGE",
    "ImageSignature",
    "ModelOverview",
    "Overview",
    "ServerOverview",
    "VersionOverview",
]


class VersionOverview(TypedDict):
    """One version of a model.

    version: a string, since JavaScript's numbers do not hold every int64.
    state: START, LOADING, AVAILABLE, UNLOADING or END.
    error: why it ended; empty if it did not fail.
    engine: what answers, "litert", "litert_int8" or "tensorflow"; empty while the version is not AVAILABLE.
    """

    version: str
    state: str
    error: str
    engine: str


class ImageSignature(TypedDict):
    """A signature that can be tried with an image: its only input is a string tensor.

    input, outputs: their names.
    scalar: whether the input takes one string rather than a batch of them; left out, it takes a batch.
    """

    name: str
    input: str
    outputs: list[str]
    scalar: NotRequired[bool]


class ModelOverview(TypedDict):
    """A model and its requests; every number counts from the start of the server and only grows.

    labels: the version, as a string, that each label means.
    image_signatures: those of the highest AVAILABLE version.
    requests, errors: all requests, and those among them that failed.
    latency_sum_s: of all requests, in seconds.
    latency_buckets: [upper limit in seconds, requests up to it], rising; empty before the first request.
        Requests beyond the last limit are in `requests` only.
    """

    name: str
    labels: dict[str, str]
    versions: list[VersionOverview]
    image_signatures: list[ImageSignature]
    requests: int
    errors: int
    latency_sum_s: float
    latency_buckets: list[list[float]]


class ServerOverview(TypedDict):
    """started_at: ISO 8601 with an offset; a change tells that all counts began again at 0."""

    version: str
    started_at: str
    uptime_s: float


class Overview(TypedDict):
    """What `/overview.json` holds. max_message_bytes: of a request's body; 0 is no limit."""

    server: ServerOverview
    max_message_bytes: int
    models: list[ModelOverview]


def _hash(page: bytes, element: str) -> str:
    """The source expression that allows the one inline `element` of the page."""
    content = re.search(rf"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
    if content is None:
        raise RuntimeError(f"expected one <{element}> without attributes in serving/page.html, found none")
    return f"'sha256-{base64.b64encode(hashlib.sha256(content[1]).digest()).decode()}'"


PAGE: bytes = files(__package__).joinpath("page.html").read_bytes()
"""The page: HTML in UTF-8."""

CONTENT_SECURITY_POLICY: str = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash(PAGE, 'script')}",
        f"style-src {_hash(PAGE, 'style')}",
        "img-src blob: data:",  # pictures that were dropped; the icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The browser itself then refuses to turn text into markup: innerHTML and its like throw.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The Content-Security-Policy header that goes with `PAGE`."""
