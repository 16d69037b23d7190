"""What people write by hand around an exported version: the peers of `benchmarks/serving.py`.

    python benchmarks/peers.py grpc models/flowers/1       # prints "ready PORT" and serves until it is killed

Each answers one encoded image with its best class and score, by the version's own signature in TensorFlow, as
its framework's first tutorial would have it, with enough threads for 32 callers.
"""

import argparse
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow as tf

from graftserve.client.wire.methods import PREDICT

GRPC_METHOD = "/peer.Classifier/Classify"
HTTP_PATH = "/predict"
THREADS = 40  # what FastAPI has by itself


def open_signature(path: Path) -> Callable[[list[bytes]], list[tuple[str, float]]]:
    """classify(encoded images) gives the best class and its score for each."""
    model = tf.saved_model.load(str(path))
    signature = model.signatures["serving_default"]

    def classify(images: list[bytes]) -> list[tuple[str, float]]:
        outputs = signature(image_bytes=tf.constant(images))
        classes, scores = outputs["classes"].numpy(), outputs["scores"].numpy()
        return [(names[0].decode(), float(row[0])) for names, row in zip(classes, scores, strict=True)]

    classify.model = model  # type: ignore[attr-defined]  # a signature does not keep its variables alive
    return classify


def serve_grpc(path: Path, port: int) -> None:
    """grpcio's threads, one signature call for each request."""
    import grpc

    classify = open_signature(path)
    server = grpc.server(ThreadPoolExecutor(THREADS))
    service, method = GRPC_METHOD.strip("/").split("/")

    def answer(content: bytes, context: grpc.ServicerContext) -> bytes:
        return json.dumps(classify([content])[0]).encode()

    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_registered_method_handlers(service, {method: handler})
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    _say_ready(port)
    server.wait_for_termination()


def serve_fastapi(path: Path, port: int) -> None:
    """FastAPI on uvicorn; the model runs in Starlette's threads, so that the loop stays free."""
    import fastapi
    import uvicorn
    from starlette.concurrency import run_in_threadpool

    app = fastapi.FastAPI()
    classify = open_signature(path)

    @app.post(HTTP_PATH)
    async def predict(request: fastapi.Request) -> tuple[str, float]:
        ((label, score),) = await run_in_threadpool(classify, [await request.body()])
        return label, score

    _say_ready_once_open(port)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def serve_litserve(path: Path, port: int) -> None:
    """LitServe with its batching, in processes of its own."""
    import peer_litserve

    _say_ready_once_open(port)
    peer_litserve.serve(path, port)


def serve_echo(path: Path, port: int) -> None:
    """Returns a PredictRequest's bytes as they came: the least that a call costs grpcio's threads."""
    import grpc

    server = grpc.server(ThreadPoolExecutor(THREADS))
    handler = grpc.unary_unary_rpc_method_handler(lambda content, context: content)
    server.add_registered_method_handlers(PREDICT.service, {PREDICT.name: handler})
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    _say_ready(port)
    server.wait_for_termination()


PEERS: dict[str, Callable[[Path, int], None]] = {
    "grpc": serve_grpc,
    "fastapi": serve_fastapi,
    "litserve": serve_litserve,
}


def _say_ready(port: int) -> None:
    print(f"ready {port}", flush=True)


def _say_ready_once_open(port: int) -> None:
    def wait() -> None:
        opened = threading.Event()
        while not opened.wait(0.1):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    opened.set()
        _say_ready(port)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Serve one peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peer", choices=[*PEERS, "echo"])
    parser.add_argument("version", type=Path, help="a version's folder")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    {**PEERS, "echo": serve_echo}[arguments.peer](arguments.version, port)


if __name__ == "__main__":
    main()
