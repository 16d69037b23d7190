"""Callers of a served model who check every answer; a process of their own, so that they do not slow the
server's threads.

    python benchmarks/callers.py plan.json > calls.json

They call until the standard input ends, wait for what is under way, and write one row for each call. The
plan is what `Plan` holds; no TensorFlow is needed.
"""

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np

from graftserve.client.wire import PredictRequest, PredictResponse
from graftserve.client.wire.contract import IMAGE_BYTES
from graftserve.client.wire.methods import PREDICT
from graftserve.client.wire.tensors import to_array, to_proto

__all__ = ["Plan", "Row", "label_of"]

_TOLERANCE = 1e-3
_TIMEOUT_S = 60.0
_CORRUPT_EVERY = 100
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]

Row = tuple[float, float, int, int, str]
"""A call: when it was due on time.monotonic's clock, seconds until its answer, images, version, and what was
wrong with the answer (empty: nothing)."""


@dataclass(frozen=True)
class Plan:
    """What to call with.

    callers: connections. rate: calls a second of them together, as a Poisson process, whatever the answers
        take (an open loop); 0: each caller sends the next one when it has the answer (a closed loop).
    labels: version labels to ask for in turn; an empty one asks for the latest version.
    images: files. classes: of each image, the best ones, as the version's own `label_of` names them; scores:
        theirs.
    """

    target: str
    model: str
    callers: int
    rate: float
    labels: Sequence[str]
    images: Sequence[str]
    classes: Sequence[Sequence[str]]
    scores: Sequence[Sequence[float]]

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))


def label_of(version: int, label: str) -> str:
    """What a label is called in a version, so that no two versions give the same answer."""
    return f"v{version} {label}"


class _Request:
    """A request with what its answer must be. images: indexes; None is a corrupt one."""

    def __init__(self, plan: Plan, images: Sequence[int | None], label: str, contents: list[bytes]) -> None:
        self._plan, self._images = plan, images
        self.count = len(images)
        corrupt = contents[0][: len(contents[0]) // 2]
        rows = [corrupt if index is None else contents[index] for index in images]
        self.message = PredictRequest()
        self.message.model_spec.name = plan.model
        if label:
            self.message.model_spec.version_label = label
        self.message.inputs[IMAGE_BYTES].CopyFrom(to_proto(np.array(rows, object)))

    def fault_in(self, response: PredictResponse) -> str:
        version = response.model_spec.version.value
        outputs = {name: to_array(response.outputs[name]) for name in ("valid", "classes", "scores")}
        for row, index in enumerate(self._images):
            valid, classes, scores = (outputs[name][row] for name in ("valid", "classes", "scores"))
            if index is None:
                if valid or scores.any() or any(classes):
                    return f"row {row} is corrupt, but the answer is {valid} {classes} {scores}"
                continue
            expected = [label_of(version, label) for label in self._plan.classes[index]]
            got = [label.decode() for label in classes]
            difference = np.abs(scores - self._plan.scores[index]).max()
            if not (valid and got == expected and difference < _TOLERANCE):
                return f"row {row}: version {version} answered {valid} {got} {scores}, expected {expected}"
        return ""


class _Callers:
    def __init__(self, plan: Plan) -> None:
        contents = [Path(image).read_bytes() for image in plan.images]
        whole = [
            _Request(plan, [index], label, contents)
            for index in range(len(contents))
            for label in plan.labels
        ]
        self._whole = whole
        self._corrupt = [_Request(plan, [index, None], "", contents) for index in range(len(contents))]
        self._plan = plan
        self._channels = [grpc.insecure_channel(plan.target, options=_OPTIONS) for _ in range(plan.callers)]
        self._calls = [
            channel.unary_unary(PREDICT.path, PredictRequest.SerializeToString, PredictResponse.FromString)
            for channel in self._channels
        ]
        self._changed = threading.Condition()  # guards what follows
        self._sent = 0
        self._under_way = 0
        self._stopping = False
        self.rows: list[Row] = []

    def run(self, stop: threading.Event) -> None:
        for channel in self._channels:
            grpc.channel_ready_future(channel).result(_TIMEOUT_S)
        if self._plan.rate:
            self._send_at_rate(stop)
        else:
            for caller in range(len(self._calls)):
                self._send(caller, time.monotonic())
            stop.wait()
        with self._changed:
            self._stopping = True
            self._changed.wait_for(lambda: self._under_way == 0)
        for channel in self._channels:
            channel.close()

    def _send_at_rate(self, stop: threading.Event) -> None:
        chance = random.Random(1)
        due_s = time.monotonic()
        while not stop.wait(max(0.0, due_s - time.monotonic())):
            self._send(self._sent % len(self._calls), due_s)
            due_s += chance.expovariate(self._plan.rate)

    def _send(self, caller: int, due_s: float) -> None:
        with self._changed:
            number = self._sent
            self._sent += 1
            self._under_way += 1
        requests = self._corrupt if number % _CORRUPT_EVERY == 0 else self._whole
        request = requests[number % len(requests)]
        future = self._calls[caller].future(request.message, timeout=_TIMEOUT_S)
        future.add_done_callback(lambda answer: self._done(answer, request, caller, due_s))

    def _done(self, answer: grpc.Future, request: _Request, caller: int, due_s: float) -> None:
        took_s = time.monotonic() - due_s
        version = 0
        try:
            response = answer.result()
            version = response.model_spec.version.value
            fault = request.fault_in(response)
        except grpc.RpcError as exc:
            fault = f"{exc.code().name}: {exc.details()}"
        except Exception as exc:
            fault = f"{type(exc).__name__}: {exc}"
        with self._changed:
            self.rows.append((due_s, took_s, request.count, version, fault))
            self._under_way -= 1
            self._changed.notify_all()
            go_on = not self._stopping and not self._plan.rate
        if go_on:
            self._send(caller, time.monotonic())


def main() -> None:
    """Call until the standard input ends; print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("plan", type=Path)
    callers = _Callers(Plan(**json.loads(parser.parse_args().plan.read_text())))
    stop = threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=await_end, daemon=True).start()
    callers.run(stop)
    print(json.dumps(callers.rows))


if __name__ == "__main__":
    main()
