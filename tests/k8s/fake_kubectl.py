"""`kubectl port-forward` without a cluster, for tests: a relay to a server that stands for a Service's pods.

    python fake_kubectl.py WAYS ARGUMENT...

WAYS is a file of JSON: for each service/NAME the "host:port" that its calls go to, or {"stderr": ..., "rc":
...}, or {"sleep_s": ...} to say nothing for a while. Each call adds its arguments to WAYS.calls, one line of
JSON, and then "ended" when it is told to end.
"""

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main() -> None:
    ways, arguments = Path(sys.argv[1]), sys.argv[2:]
    calls = ways.with_name(f"{ways.name}.calls")
    _add(calls, arguments)

    def end(*_: Any) -> None:
        _add(calls, "ended")
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    way = json.loads(ways.read_text())[arguments[1]]
    if not isinstance(way, str):
        time.sleep(way.get("sleep_s", 0))
        sys.stderr.write(way.get("stderr", ""))
        sys.exit(way.get("rc", 0))
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"Forwarding from 127.0.0.1:{listener.getsockname()[1]} -> 8500\n")
    sys.stdout.flush()
    host, _, port = way.rpartition(":")
    while True:
        here, _ = listener.accept()
        there = socket.create_connection((host, int(port)))
        for source, sink in ((here, there), (there, here)):
            threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


def _add(calls: Path, item: Any) -> None:
    with calls.open("a") as file:
        file.write(json.dumps(item) + "\n")


if __name__ == "__main__":
    main()
