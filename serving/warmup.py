"""Replays recorded requests at load, so that the first real ones find everything compiled and cached.

Source: tensorflow_serving/servables/tensorflow/saved_model_warmup.cc and saved_model_warmup_util.h.
"""

from collections.abc import Callable, Iterable

from google.protobuf.message import DecodeError

from graftserve.client.wire import PredictionLog, PredictRequest

from .errors import Code, ServingError

__all__ = ["MAX_WARMUP_RECORDS", "WARMUP_FILE", "replay"]

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
"""Where a version's folder holds its records: a TFRecord file of PredictionLog."""

MAX_WARMUP_RECORDS = 1000


def replay(records: Iterable[bytes], predict: Callable[[PredictRequest], object]) -> int:
    """Run `predict` on each record's request, one after another; returns how many there were.

    records: serialized PredictionLog messages.
    Raises ServingError if a record is not one, holds another request than Predict, or is the 1,001st;
    whatever `predict` raises passes through.
    """
    count = 0
    for record in records:
        count += 1
        if count > MAX_WARMUP_RECORDS:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"Number of warmup records exceeds the maximum ({MAX_WARMUP_RECORDS})"
            )
        predict(_request(record, count))
    return count


def _request(record: bytes, number: int) -> PredictRequest:
    try:
        log = PredictionLog.FromString(record)
    except DecodeError as exc:
        raise ServingError(
            Code.INVALID_ARGUMENT,
            f"Failed to parse warmup record {number}: expected a serialized PredictionLog. "
            "Please verify your warmup data is in TFRecord format.",
        ) from exc
    if not log.HasField("predict_log"):
        raise ServingError(
            Code.UNIMPLEMENTED, f"Unsupported log_type in warmup record {number}: expected predict_log"
        )
    return log.predict_log.request
