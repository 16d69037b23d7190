"""What of a version's recorded requests is run, and how often."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from graftserve.client.wire import DataType, PredictionLog, SignatureDefMap
from graftserve.client.wire.tensors import to_proto
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.servable import Array, Signature, TensorSpec
from graftserve.serving.warmup import MAX_WARMUP_RECORDS, warm_up


class Recorder:
    """A servable that notes what it is asked."""

    engine = "fake"
    signature_def_map = SignatureDefMap()

    def __init__(self) -> None:
        x, outputs = TensorSpec("x:0", DataType.DT_FLOAT), ("y", "z")
        self.signatures: Mapping[str, Signature] = {
            name: Signature(
                name, {"x": x}, {out: TensorSpec(f"{out}:0", DataType.DT_FLOAT) for out in outputs}, {}
            )
            for name in ("serving_default", "other")
        }
        self.asked: list[tuple[str, int, tuple[str, ...]]] = []

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        self.asked.append((signature.name, len(inputs["x"]), tuple(outputs)))
        return [inputs["x"] for _ in outputs]

    def close(self) -> None:
        raise AssertionError("a warmup closes nothing")


def record(rows: int, signature: str = "", *outputs: str) -> bytes:
    log = PredictionLog()
    request = log.predict_log.request
    request.model_spec.signature_name = signature
    request.inputs["x"].CopyFrom(to_proto(np.zeros(rows, np.float32)))
    request.output_filter.extend(outputs)
    return log.SerializeToString()


RECORDS = [record(1), record(2), record(1, "", "y"), record(2, "", "y"), record(1, "other"), record(8)]
FIRSTS = [("serving_default", 1, ("y", "z")), ("serving_default", 1, ("y",)), ("other", 1, ("y", "z"))]


def test_every_record_is_run_as_often_as_asked() -> None:
    servable = Recorder()
    assert warm_up(servable, RECORDS, 2) == 6
    assert [rows for _, rows, _ in servable.asked] == [1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 8, 8]


def test_one_of_each_kind_where_sizes_do_not_matter() -> None:
    servable = Recorder()
    assert warm_up(servable, RECORDS, every_size=False) == 6
    assert servable.asked == FIRSTS


def test_others_get_their_turn_after_each_run() -> None:
    servable = Recorder()
    looks: list[int] = []

    def is_busy() -> bool:
        looks.append(len(servable.asked))
        return True

    warm_up(servable, RECORDS, is_busy=is_busy)
    assert looks == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("records", "code", "message"),
    [
        ([b"\xff"], Code.INVALID_ARGUMENT, "Failed to parse warmup record 1"),
        ([record(1), b""], Code.UNIMPLEMENTED, "Unsupported log_type in warmup record 2"),
        ([record(1)] * (MAX_WARMUP_RECORDS + 1), Code.INVALID_ARGUMENT, "exceeds the maximum (1000)"),
        ([record(1, "nope")], Code.FAILED_PRECONDITION, 'Serving signature key "nope" not found.'),
    ],
)
def test_records_that_cannot_be_run_are_told(records: list[bytes], code: Code, message: str) -> None:
    with pytest.raises(ServingError) as raised:
        warm_up(Recorder(), records)
    assert raised.value.code is code
    assert message in raised.value.message
