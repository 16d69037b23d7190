"""Replays recorded requests at load, so that the first real ones find everything compiled and cached.

Source: tensorflow_serving/servables/tensorflow/saved_model_warmup.cc and saved_model_warmup_util.h.
"""

import time
from collections.abc import Callable, Iterable

from google.protobuf.message import DecodeError

from graftserve.client.wire import PredictionLog

from .errors import Code, ServingError
from .inference import classify, multi_inference, regress
from .predict import predict
from .proto_tensors import ProtoInputs
from .servable import Servable

__all__ = ["MAX_WARMUP_RECORDS", "WARMUP_FILE", "warm_up"]

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
"""Where a version's folder holds its records: a TFRecord file of PredictionLog."""

MAX_WARMUP_RECORDS = 1000


def warm_up(
    servable: Servable,
    records: Iterable[bytes],
    iterations: int = 1,
    *,
    is_busy: Callable[[], bool] = lambda: False,
    every_size: bool = True,
) -> int:
    """Run each record's request `iterations` times, one after another; returns how many records there were.

    records: serialized PredictionLog messages.
    is_busy: whether others need the processors. Each request is then followed by a pause as long as it took:
        engines run it on as many threads as they run the others' on, and would take half of everything.
    every_size: run all of them; otherwise, of Predict requests for the same outputs of a signature, only the
        first: for an engine that prepares nothing for a batch size.
    Raises ServingError if a record is not one, holds no request that can be replayed, or is the 1,001st, and
    what the requests raise.
    """
    count = 0
    seen: set[tuple[str, ...]] = set()
    for record in records:
        count += 1
        if count > MAX_WARMUP_RECORDS:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"Number of warmup records exceeds the maximum ({MAX_WARMUP_RECORDS})"
            )
        log = _parse(record, count)
        if not every_size and log.HasField("predict_log"):
            request = log.predict_log.request
            kind = (request.model_spec.signature_name, *request.output_filter)
            if kind in seen:
                continue
            seen.add(kind)
        for _ in range(iterations):
            began_s = time.monotonic()
            _run(servable, log, count)
            if is_busy():
                time.sleep(time.monotonic() - began_s)
    return count


def _parse(record: bytes, number: int) -> PredictionLog:
    try:
        return PredictionLog.FromString(record)
    except DecodeError as exc:
        raise ServingError(
            Code.INVALID_ARGUMENT,
            f"Failed to parse warmup record {number}: expected a serialized PredictionLog. "
            "Please verify your warmup data is in TFRecord format.",
        ) from exc


def _run(servable: Servable, log: PredictionLog, number: int) -> None:
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        request = log.predict_log.request
        inputs = ProtoInputs(request.inputs)
        predict(servable, request.model_spec.signature_name, lambda _: inputs, request.output_filter)
    elif kind == "classify_log":
        classify_request = log.classify_log.request
        classify(servable, classify_request.model_spec.signature_name, classify_request.input)
    elif kind == "regress_log":
        regress_request = log.regress_log.request
        regress(servable, regress_request.model_spec.signature_name, regress_request.input)
    elif kind == "multi_inference_log":
        multi_request = log.multi_inference_log.request
        multi_inference(servable, multi_request.tasks, multi_request.input)
    else:
        raise ServingError(
            Code.UNIMPLEMENTED,
            f"Unsupported log_type in warmup record {number}: expected a predict_log, classify_log, "
            "regress_log or multi_inference_log",
        )
