"""An exported version without graftserve, as a peer runs it."""

import io
import json
import os
import queue
from collections.abc import Callable
from pathlib import Path

__all__ = ["ENGINES", "GRPC_METHOD", "HTTP_PATH", "Classify", "open_model"]

GRPC_METHOD = "/peer.Classifier/Classify"
HTTP_PATH = "/predict"
ENGINES = ("litert", "tensorflow")

Classify = Callable[[list[bytes]], list[tuple[str, float]]]
"""From encoded images to the best class of each and its score. Takes calls from any thread."""


def open_model(version: Path, engine: str) -> Classify:
    """tensorflow: the version's own signature. litert: its network.tflite, and decoding by Pillow."""
    return {"litert": _litert, "tensorflow": _tensorflow}[engine](version)


def _tensorflow(version: Path) -> Classify:
    import tensorflow as tf

    model = tf.saved_model.load(str(version))
    signature = model.signatures["serving_default"]

    def classify(images: list[bytes]) -> list[tuple[str, float]]:
        outputs = signature(image_bytes=tf.constant(images))
        classes, scores = outputs["classes"].numpy(), outputs["scores"].numpy()
        return [(names[0].decode(), float(row[0])) for names, row in zip(classes, scores, strict=True)]

    classify.model = model  # type: ignore[attr-defined]  # a signature does not keep its variables alive
    return classify


def _litert(version: Path) -> Classify:
    """An interpreter of one thread for each CPU, which gives the most images a second there."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter
    from PIL import Image, ImageOps

    preprocess = json.loads((version / "assets.extra" / "contract.json").read_text())["preprocess"]
    labels = (version / "assets" / "labels.txt").read_text().splitlines()
    size_px = (preprocess["side_px"], preprocess["side_px"])
    border = (1 - preprocess["crop_fraction"]) / 2 if preprocess["resize"] == "crop" else 0.0
    free: queue.SimpleQueue = queue.SimpleQueue()
    interpreters = [  # which their runners do not keep
        Interpreter(str(version / "assets.extra" / "network.tflite"), num_threads=1)
        for _ in range(len(os.sched_getaffinity(0)))
    ]
    for interpreter in interpreters:
        free.put((interpreter, interpreter.get_signature_runner("serving_default")))

    def classify(images: list[bytes]) -> list[tuple[str, float]]:
        answers = []
        for content in images:
            image = Image.open(io.BytesIO(content))
            image.draft("RGB", (2 * size_px[0], 2 * size_px[1]))
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), size_px, Image.Resampling.BICUBIC, border))
            runner = free.get()
            try:
                (probabilities,) = runner[1](pixels=pixels[None])["probabilities"]
            finally:
                free.put(runner)
            best = int(probabilities.argmax())
            answers.append((labels[best], float(probabilities[best])))
        return answers

    return classify
