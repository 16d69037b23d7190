"""A way from this machine to a Service's pods: `kubectl port-forward`, for as long as it is needed."""

import re
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from ..render import find_kubectl
from .errors import ClusterError

__all__ = ["port_forward"]

_GRPC_PORT = 8500
_FORWARDING = re.compile(rb"^Forwarding from 127\.0\.0\.1:(\d+) ->", re.MULTILINE)
_END_S = 5.0  # that kubectl has to end by itself


@contextmanager
def port_forward(
    service: str, *, namespace: str = "", context: str = "", timeout_s: float = 30.0
) -> Iterator[str]:
    """The address on this machine of a Service's gRPC port, or rather of one of its pods: "127.0.0.1:40123".

    context: of the kubeconfig; "" for the current one. timeout_s: until it is there.
    Raises ClusterError (kubectl's own words, or no answer in time), KubectlError (there is no kubectl).
    """
    command = [str(find_kubectl()), "port-forward", f"service/{service}", f":{_GRPC_PORT}"]
    command += ["--address=127.0.0.1"]
    command += [f"--namespace={namespace}"] if namespace else []
    command += [f"--context={context}"] if context else []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            # Ctrl-C is for us: it must not end the way to the pods under a comparison that ends in order.
            start_new_session=True,
        )
        pipe = cast(IO[bytes], process.stdout)
        try:
            port = _port(pipe, timeout_s)
            if port is None:
                raise ClusterError(
                    f"kubectl port-forward service/{service}: {_said(process, errors, timeout_s)}"
                )
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            pipe.close()


def _port(pipe: IO[bytes], timeout_s: float) -> int | None:
    """The port that kubectl says it listens on; None if it ends, or says nothing in time."""
    deadline, said = time.monotonic() + timeout_s, b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = pipe.read(4096)
        if not part:
            break
        said += part
        if match := _FORWARDING.search(said):
            return int(match[1])
    return None


def _said(process: subprocess.Popen[bytes], errors: IO[str], timeout_s: float) -> str:
    """Why there is no port."""
    try:
        process.wait(min(_END_S, timeout_s))
    except subprocess.TimeoutExpired:
        return f"no answer after {timeout_s:g} s"
    errors.seek(0)
    return " ".join(errors.read().split()).removeprefix("error: ") or f"exit status {process.returncode}"
