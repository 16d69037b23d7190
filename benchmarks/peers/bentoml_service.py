"""BentoML's part of `handwritten.py`: its command imports this module."""

import os
from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType
from model import HTTP_PATH, open_model


@bentoml.service(workers=1, threads=40, traffic={"timeout": 60})
class Classifier:
    """One worker with as many threads as FastAPI has; each request runs the model in one of them."""

    def __init__(self) -> None:
        self.classify = open_model(Path(os.environ["VERSION"]), os.environ["ENGINE"])

    @bentoml.api(route=HTTP_PATH)
    def predict(self, image: Annotated[Path, ContentType("image/jpeg")], /) -> dict[str, object]:
        ((label, score),) = self.classify([image.read_bytes()])
        return {"label": label, "score": score}
