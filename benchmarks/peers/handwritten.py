"""What people write by hand around an exported version: the peers of serving.py and serving_peers.py.

    python benchmarks/peers/handwritten.py grpc tensorflow models/flowers/1

Prints "ready PORT" and serves until it is killed. Each answers one encoded image with its best class and its
score, as its framework's first tutorial would have it, with enough threads for the callers. Nothing here
needs graftserve, so that each runs in an environment of its own.
"""

import argparse
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model import ENGINES, GRPC_METHOD, HTTP_PATH, open_model

THREADS = 40  # what FastAPI has by itself


def serve_grpc(version: Path, engine: str, port: int) -> None:
    """grpcio's threads, one call of the model for each request."""
    classify = open_model(version, engine)
    _serve_method(GRPC_METHOD, lambda content: json.dumps(classify([content])[0]).encode(), port)


def serve_fastapi(version: Path, engine: str, port: int) -> None:
    """FastAPI on uvicorn; the model runs in Starlette's threads, so that the loop stays free."""
    import fastapi
    import uvicorn
    from starlette.concurrency import run_in_threadpool

    app = fastapi.FastAPI()
    classify = open_model(version, engine)

    @app.post(HTTP_PATH)
    async def predict(request: fastapi.Request) -> tuple[str, float]:
        ((label, score),) = await run_in_threadpool(classify, [await request.body()])
        return label, score

    _say_ready_once_open(port)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def serve_litserve(version: Path, engine: str, port: int) -> None:
    """LitServe with its batching, in processes of its own."""
    import litserve_api

    _say_ready_once_open(port)
    litserve_api.serve(version, engine, port)


def serve_bentoml(version: Path, engine: str, port: int) -> None:
    """BentoML by its command, one worker."""
    os.environ |= {"VERSION": str(version.resolve()), "ENGINE": engine, "BENTOML_DO_NOT_TRACK": "True"}
    _say_ready_once_open(port)
    command = ["-m", "bentoml", "serve", "bentoml_service:Classifier", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--working-dir", str(Path(__file__).parent)]
    os.spawnv(os.P_WAIT, sys.executable, [sys.executable, *command])


def serve_ray(version: Path, engine: str, port: int) -> None:
    """Ray Serve on this machine alone, one replica."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray_deployment

    ray_deployment.serve_until_killed(version.resolve(), engine, port, lambda: _say_ready(port))


def serve_echo(version: Path, engine: str, port: int) -> None:
    """Returns a PredictRequest's bytes as they came: the least that a call costs grpcio's threads."""
    _serve_method("/tensorflow.serving.PredictionService/Predict", lambda content: content, port)


PEERS: dict[str, Callable[[Path, str, int], None]] = {
    "grpc": serve_grpc,
    "fastapi": serve_fastapi,
    "litserve": serve_litserve,
    "bentoml": serve_bentoml,
    "ray": serve_ray,
}


def _serve_method(path: str, answer: Callable[[bytes], bytes], port: int) -> None:
    import grpc

    server = grpc.server(ThreadPoolExecutor(THREADS))
    service, method = path.strip("/").split("/")
    handler = grpc.unary_unary_rpc_method_handler(lambda content, context: answer(content))
    server.add_registered_method_handlers(service, {method: handler})
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    _say_ready(port)
    server.wait_for_termination()


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
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("version", type=Path, help="a version's folder")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    {**PEERS, "echo": serve_echo}[arguments.peer](arguments.version, arguments.engine, port)


if __name__ == "__main__":
    main()
