"""Ray Serve's part of `handwritten.py`: its workers import the class by its name."""

import signal
from collections.abc import Callable
from pathlib import Path

import ray
from model import HTTP_PATH, open_model
from ray import serve
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0})
class Classifier:
    """One replica; the model runs in Starlette's threads, so that the loop stays free."""

    def __init__(self, version: Path, engine: str) -> None:
        self.classify = open_model(version, engine)

    async def __call__(self, request: Request) -> dict[str, object]:
        ((label, score),) = await run_in_threadpool(self.classify, [await request.body()])
        return {"label": label, "score": score}


def serve_until_killed(version: Path, engine: str, port: int, on_ready: Callable[[], None]) -> None:
    """Start Ray on this machine's loopback, deploy, call on_ready, wait."""
    ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Classifier.bind(version, engine), route_prefix=HTTP_PATH)
    on_ready()
    signal.pause()
