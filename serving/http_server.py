"""The HTTP/1.1 server below the REST API: cheroot, made safe against clients that never finish.

    server = HttpServer("0.0.0.0", 8501, app, num_threads=8, max_queued=1000, request_timeout_s=30)
    body = read_body(environ, limit)          # for the application

Source: https://cheroot.cherrypy.dev/, RFC 9112 (chunked bodies).
"""

import logging
import math
import queue
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from cheroot import wsgi
from cheroot.server import ChunkedRFile, HeaderReader, HTTPConnection, HTTPRequest
from cheroot.workers.threadpool import ThreadPool

from .errors import Code, ServingError

__all__ = ["CLOSE", "BodyError", "HttpServer", "read_body"]

_log = logging.getLogger(__name__)

CLOSE = ("Connection", "close")
"""The header after which the connection is closed."""

_BAD_REQUEST = "400 Bad Request"
_TOO_LARGE = "413 Content Too Large"
_TIMEOUT = "408 Request Timeout"
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r\n")
_MAX_LINE_BYTES = 8192  # of a chunk's size and of a trailer
_MAX_TRAILERS = 100
_GZIP_WBITS = 16 + zlib.MAX_WBITS


class BodyError(Exception):
    """A body that was not read to its end. status: HTTP has some for it that our codes have not."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_body(environ: Mapping[str, Any], limit: int) -> bytes:
    """A WSGI request's body, with gzip undone.

    limit: the most bytes, before and after that; 0 is none.
    Raises BodyError, and ServingError (INVALID_ARGUMENT) if it should be gzip and is not.
    """
    stream = environ["wsgi.input"]
    try:
        if isinstance(stream, ChunkedRFile):
            body = _read_chunks(stream.rfile, limit)
        else:
            body = stream.read(limit + 1) if limit else stream.read()
    except OSError as exc:
        raise BodyError(_TIMEOUT, f"Expected the whole body, which did not come: {exc}") from exc
    if limit and len(body) > limit:
        raise _too_large(limit)
    if environ.get("HTTP_CONTENT_ENCODING", "").lower() != "gzip":
        return body
    try:
        unzip = zlib.decompressobj(_GZIP_WBITS)
        plain = unzip.decompress(body, limit + 1 if limit else 0)
    except zlib.error as exc:
        raise ServingError(Code.INVALID_ARGUMENT, f"Expected a body in gzip: {exc}") from exc
    if limit and len(plain) > limit:
        raise BodyError(_TOO_LARGE, f"Expected at most {limit} bytes out of the body's gzip")
    if not unzip.eof:
        raise ServingError(Code.INVALID_ARGUMENT, "Expected a body in gzip: it ends too early")
    return plain


def _too_large(limit: int) -> BodyError:
    return BodyError(_TOO_LARGE, f"Expected a body of at most {limit} bytes: send fewer rows at once")


def _read_chunks(file: BinaryIO, limit: int) -> bytes:
    """A body in chunks. cheroot's reader buffers a chunk of any size, and copies all it has for each new one.

    limit: as in `read_body`. Raises BodyError, and OSError if the connection fails.
    """
    chunks: list[bytes] = []
    total = 0
    while True:
        line = file.readline(_MAX_LINE_BYTES)
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise _malformed(f"expected the size of a chunk in hexadecimal digits, got {line[:40]!r}")
        size = int(match[1], 16)
        if size == 0:
            break
        total += size
        if limit and total > limit:
            raise _too_large(limit)
        chunk = file.read(size)
        if len(chunk) < size or file.read(2) != b"\r\n":
            raise _malformed(f"expected {size} bytes and a line's end, got something else")
        chunks.append(chunk)
    for _ in range(_MAX_TRAILERS):
        if file.readline(_MAX_LINE_BYTES) in (b"\r\n", b""):
            return b"".join(chunks)
    raise _malformed(f"expected at most {_MAX_TRAILERS} trailers")


def _malformed(why: str) -> BodyError:
    return BodyError(_BAD_REQUEST, f"Malformed chunked body: {why}")


class _Gateway(wsgi.Gateway_10):
    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """As cheroot's, which would say that it closes the connection, and keep it."""
        if CLOSE in headers:
            self.req.close_connection = True
        return super().start_response(status, headers, exc_info)


class _TimedSocket:
    """A socket from which nothing can be read after deadline_s, on time.monotonic's clock."""

    def __init__(self, plain: socket.socket) -> None:
        self._plain = plain
        self.deadline_s = math.inf

    def recv_into(self, buffer: Any) -> int:
        timeout_s = self._plain.gettimeout()
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")  # cheroot reads the text, and answers 408
        self._plain.settimeout(left_s if timeout_s is None else min(left_s, timeout_s))
        try:
            return self._plain.recv_into(buffer)
        finally:
            self._plain.settimeout(timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


class _UnfoldedLines:
    """A file whose lines begin no continuation of the one before."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readline(self) -> bytes:
        line: bytes = self._file.readline()
        if line[:1] in (b" ", b"\t"):
            raise ValueError("Expected a header in one line, got a line that goes on with the one before")
        return line


class _HeaderReader(HeaderReader):
    """Refuses headers over several lines, as RFC 9112 (5.2) allows. cheroot takes the last line of one for
    all of it, and fails on one that goes on with nothing."""

    def __call__(self, rfile: Any, hdict: Any = None) -> Any:
        return super().__call__(_UnfoldedLines(rfile), hdict)


class _Request(HTTPRequest):
    header_reader = _HeaderReader()


class _Connection(HTTPConnection):
    """Bounds the time in which a whole request must arrive; cheroot's bounds each piece of it, so that a
    client which sends a byte now and then would keep a thread for ever."""

    RequestHandlerClass = _Request

    def __init__(self, server: "_Server", plain: socket.socket, makefile: Any) -> None:
        self._timed = _TimedSocket(plain)
        super().__init__(server, self._timed, makefile)

    def close(self) -> None:
        """Close a refused one's socket, too, which cheroot leaves to the garbage collector."""
        super().close()
        if self.linger:
            self._timed.close()

    def communicate(self) -> bool:
        self._timed.deadline_s = time.monotonic() + self.server.request_timeout_s
        return bool(super().communicate())  # type: ignore[no-untyped-call]


class _Pool(ThreadPool):
    """Calls `on_refused` for each connection that finds as many in line as there may be."""

    def __init__(
        self, server: "_Server", num_threads: int, max_queued: int, on_refused: Callable[[], None]
    ) -> None:
        super().__init__(
            server,
            min=num_threads,
            max=num_threads,
            accepted_queue_size=max_queued,
            accepted_queue_timeout=0,
        )
        self._on_refused = on_refused

    def put(self, obj: HTTPConnection) -> None:
        try:
            super().put(obj)
        except queue.Full:  # which cheroot answers with 503
            self._on_refused()
            raise


class _Server(wsgi.Server):
    ConnectionClass = _Connection
    request_timeout_s = math.inf

    def process_conn(self, conn: _Connection) -> None:
        """Give a connection a thread once there is something to read; cheroot gives it to a new one at once,
        so that a few which never send anything would keep all threads."""
        if conn.last_used is None and self.can_add_keepalive_connection:
            self.put_conn(conn)
        else:
            super().process_conn(conn)

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


class HttpServer:
    """Serves a WSGI application over HTTP/1.1 from a pool of threads; requests beyond it wait in line.

    port: 0 takes any free one. max_queued: requests that may wait for a thread, and connections that may be
        open without one; more are closed. request_timeout_s: a request must arrive in this time.
    on_refused: called for each request that is answered with 503, unread, since too many wait.
    Raises ServingError (UNAVAILABLE) from `start` if the port cannot be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        app: Callable[..., Any],
        *,
        num_threads: int,
        max_queued: int,
        request_timeout_s: float,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._server = _Server((host, port), app, request_queue_size=128)
        self._server.requests = _Pool(self._server, num_threads, max(1, max_queued), on_refused)
        self._server.keep_alive_conn_limit = max(1, max_queued)
        self._server.request_timeout_s = request_timeout_s
        self._server.gateway = _Gateway
        self._thread = threading.Thread(target=self._server.serve, name="graftserve-rest", daemon=True)
        self.port = port

    def start(self) -> None:
        """Accept requests; `port` is then the one that was taken."""
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
