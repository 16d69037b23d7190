"""A web service that classifies the image in a request's body, with a model server behind it.

    MODEL_TARGET=localhost:8500 MODEL_NAME=flowers uvicorn app:create_app --factory --workers 2
    curl --data-binary @photo.jpg localhost:8000/classify

One AsyncClient for each worker process: it is made when the worker's event loop runs, and closed with it.
Requests that come at the same time share batches; there is no queue to write here.
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Self

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from graftserve.client import (
    AsyncClient,
    ClientError,
    DeadlineExceededError,
    InvalidImageError,
    Prediction,
    RetryError,
    VersionState,
)

__all__ = ["Settings", "create_app"]

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = 1
_READY_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Settings:
    """target, model: as of AsyncClient. timeout_s: for a classification, retries included.
    max_image_bytes: of a body; larger ones are refused unread."""

    target: str
    model: str
    timeout_s: float = 2.0
    max_image_bytes: int = 10 * 2**20

    @classmethod
    def from_environment(cls) -> Self:
        """MODEL_TARGET, MODEL_NAME and, where it is set, MODEL_TIMEOUT_S."""
        return cls(
            target=os.environ.get("MODEL_TARGET", "localhost:8500"),
            model=os.environ.get("MODEL_NAME", "flowers"),
            timeout_s=float(os.environ.get("MODEL_TIMEOUT_S", cls.timeout_s)),
        )


class Answer(BaseModel):
    """top: the best classes with their scores, the best first. version: of the model."""

    label: str
    score: float
    top: list[tuple[str, float]]
    version: int

    @classmethod
    def of(cls, prediction: Prediction) -> Self:
        """For the caller of this service."""
        return cls(
            label=prediction.label,
            score=prediction.score,
            top=list(prediction.top),
            version=prediction.version,
        )


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service; without `settings`, those of the environment."""
    chosen = settings or Settings.from_environment()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with AsyncClient(chosen.target, chosen.model, timeout_s=chosen.timeout_s) as client:
            yield {"client": client, "max_image_bytes": chosen.max_image_bytes}

    app = FastAPI(title="Image classification", lifespan=lifespan)
    app.post("/classify")(classify)
    app.get("/healthz")(alive)
    app.get("/readyz")(ready)
    app.exception_handler(ClientError)(failed)
    return app


def _client(request: Request) -> AsyncClient:
    client: AsyncClient = request.state.client
    return client


Client = Annotated[AsyncClient, Depends(_client)]


async def classify(request: Request, client: Client) -> Answer:
    """Classify the JPEG, PNG, GIF, BMP or WebP that is the request's body."""
    return Answer.of(await client.classify(await _body(request)))


async def alive() -> dict[str, str]:
    """This process answers. Nothing else is asked: a restart would not mend the model server."""
    return {"status": "alive"}


async def ready(client: Client) -> JSONResponse:
    """200 if a version of the model is available, else 503."""
    try:
        statuses = await client.status(timeout_s=_READY_TIMEOUT_S)
    except ClientError as error:
        return JSONResponse({"status": "not ready", "reason": str(error)}, 503)
    versions = [status.version for status in statuses if status.state is VersionState.AVAILABLE]
    if not versions:
        return JSONResponse({"status": "not ready", "reason": "no version is available"}, 503)
    return JSONResponse({"status": "ready", "versions": versions})


async def failed(_: Request, error: Exception) -> JSONResponse:
    """Say it in HTTP: what the caller can mend, what will pass, and what only we can mend."""
    match error:
        case InvalidImageError():
            return JSONResponse({"detail": str(error)}, 422)
        case DeadlineExceededError():
            return JSONResponse({"detail": "the classification took too long"}, 504)
        case RetryError():
            _log.warning("%s", error)
            again = {"Retry-After": str(_RETRY_AFTER_S)}
            return JSONResponse({"detail": "no capacity at the moment"}, 503, headers=again)
    # A wrong model name or address, missing credentials: nothing that concerns the caller.
    _log.error("%s", error)
    return JSONResponse({"detail": "the classification failed"}, 502)


async def _body(request: Request) -> bytes:
    """The body, as long as it stays below the limit: it is read piece by piece, and no further."""
    limit: int = request.state.max_image_bytes
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise HTTPException(413, f"expected an image of at most {limit} bytes")
    return bytes(body)
