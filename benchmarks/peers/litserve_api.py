"""LitServe's part of `handwritten.py`: its worker processes import the class by its name.

It reads JSON, so images come in base64.
"""

import base64
from pathlib import Path

import litserve
from model import HTTP_PATH, open_model


class Classifier(litserve.LitAPI):
    """One worker, up to 8 images at once, 5 ms to gather them."""

    def __init__(self, version: Path, engine: str) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.005, api_path=HTTP_PATH)
        self.version, self.engine = version, engine

    def setup(self, device: str) -> None:
        self.classify = open_model(self.version, self.engine)

    def decode_request(self, request: dict[str, str]) -> bytes:
        return base64.b64decode(request["image"])

    def predict(self, images: list[bytes]) -> list[tuple[str, float]]:
        return self.classify(list(images))

    def encode_response(self, output: tuple[str, float]) -> dict[str, object]:
        return {"label": output[0], "score": output[1]}


def serve(version: Path, engine: str, port: int) -> None:
    """Serve until the process is killed."""
    server = litserve.LitServer(Classifier(version, engine), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
