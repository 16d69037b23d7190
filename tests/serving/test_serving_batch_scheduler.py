"""--enable_batching without a server: its parameters, its queues, and a servable that does as it is told."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftserve.client.wire import SignatureDefMap
from graftserve.serving.batch_scheduler import BatchQueue, BatchScheduler
from graftserve.serving.batching import BatchingServable, join, split
from graftserve.serving.batching_options import VERSION_FILE, BatchingOptions, read_batching
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.flags import Options, schedulable_cpus
from graftserve.serving.metrics import Metrics
from graftserve.serving.servable import Array, Signature, TensorSpec

# --- the parameters


def read(tmp_path: Path, text: str) -> BatchingOptions:
    file = tmp_path / "batching.config"
    file.write_text(text)
    options = Options(model_base_path="m", enable_batching=True, batching_parameters_file=str(file))
    batching = read_batching(options)
    assert batching is not None
    return batching


def test_without_the_flag_nothing_is_batched_and_without_a_file_the_real_defaults_hold() -> None:
    assert read_batching(Options(model_base_path="m")) is None
    assert read_batching(Options(model_base_path="m", enable_batching=True)) == BatchingOptions(
        max_batch_size=1000,
        batch_timeout_s=0,
        max_enqueued_batches=10,
        num_batch_threads=schedulable_cpus(),
        thread_pool_name="model_server_batch_threads",
    )


def test_a_file_says_what_differs(tmp_path: Path) -> None:
    assert read(tmp_path, "max_batch_size { value: 128 }") == BatchingOptions(
        max_batch_size=128, thread_pool_name="batch_threads"
    )
    everything = """
        max_batch_size { value: 512 } batch_timeout_micros { value: 1500 } max_enqueued_batches { value: 7 }
        num_batch_threads { value: 3 } thread_pool_name { value: "pool" } allowed_batch_sizes: 8
        allowed_batch_sizes: 32 pad_variable_length_inputs: true
        enable_large_batch_splitting { value: true } max_execution_batch_size { value: 32 }"""
    options = read(tmp_path, everything)
    assert options == BatchingOptions(
        max_batch_size=512,
        batch_timeout_s=0.0015,
        max_enqueued_batches=7,
        num_batch_threads=3,
        thread_pool_name="pool",
        allowed_batch_sizes=(8, 32),
        pad_variable_length_inputs=True,
        enable_large_batch_splitting=True,
        max_execution_batch_size=32,
    )
    assert options.run_rows == 32
    assert read(tmp_path, "max_enqueued_batches { value: 0 }").max_enqueued_batches == 1


def test_a_parameter_that_does_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = read(tmp_path, "max_batch_size { value: 64 } max_execution_batch_size { value: 32 }")
    assert options.run_rows == 64
    assert "max_execution_batch_size is for enable_large_batch_splitting only" in caplog.text


def test_a_run_is_as_large_as_a_request_unless_the_file_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splitting = "max_batch_size { value: 64 } enable_large_batch_splitting { value: true }"
    assert read(tmp_path, "max_batch_size { value: 64 }").run_rows == 64
    assert read(tmp_path, splitting).run_rows == 64
    assert read(tmp_path, f"{splitting} max_execution_batch_size {{ value: 1 }}").run_rows == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: 4", "expected a BatchingParameters in text format"),
        ("max_batch_size { value: 0 }", "max_batch_size must be positive; was 0"),
        ("num_batch_threads { value: 0 }", "num_batch_threads must be positive; was 0"),
        ("max_enqueued_batches { value: -1 }", "max_enqueued_batches must be positive; was -1"),
        (
            "batch_timeout_micros { value: -5000000 }",
            "must be non-negative; was -5000000",
        ),
        ("max_execution_batch_size { value: -1 }", "max_execution_batch_size must be positive; was -1"),
        (
            "max_batch_size { value: 8 } allowed_batch_sizes: 4",
            "Last entry in allowed_batch_sizes must match max_batch_size; last entry was 4; expected 8",
        ),
        ("allowed_batch_sizes: 2 allowed_batch_sizes: 4", "last entry was 4; expected 1000"),
        (
            "allowed_batch_sizes: 1000 allowed_batch_sizes: 1000",
            "must be positive and monotonically",
        ),
        (
            "allowed_batch_sizes: 4 allowed_batch_sizes: 2 allowed_batch_sizes: 1000",
            "allowed_batch_sizes entries must be positive and monotonically increasing; were 4, 2, 1000",
        ),
        ("max_batch_size { value: 2 } allowed_batch_sizes: 0 allowed_batch_sizes: 2", "must be positive and"),
        (
            "max_batch_size { value: 8 } enable_large_batch_splitting { value: true } "
            "max_execution_batch_size { value: 4 } allowed_batch_sizes: 8",
            "must match max_execution_batch_size; last entry was 8; expected 4",
        ),
        (
            "max_batch_size { value: 8 } enable_large_batch_splitting { value: true } "
            "max_execution_batch_size { value: 16 }",
            "max_batch_size must be greater than or equal to max_execution_batch_size; max_batch_size was 8",
        ),
        (
            "max_enqueued_batches { value: 0 } enable_large_batch_splitting { value: true }",
            "max_enqueued_batches must be positive; was 0",
        ),
    ],
)
def test_parameters_that_cannot_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        read(tmp_path, text)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.message.startswith(f"--batching_parameters_file: {tmp_path / 'batching.config'}: ")
    assert message in caught.value.message


def test_a_version_brings_its_own_parameters_but_for_the_threads(tmp_path: Path) -> None:
    common = BatchingOptions(max_batch_size=4, num_batch_threads=3, thread_pool_name="pool")
    assert common.of_version(tmp_path) is None
    (tmp_path / VERSION_FILE).write_text("max_batch_size { value: 9 } num_batch_threads { value: 50 }")
    assert common.of_version(tmp_path) == BatchingOptions(
        max_batch_size=9, num_batch_threads=3, thread_pool_name="pool"
    )
    (tmp_path / VERSION_FILE).write_text("max_batch_size { value: 0 }")
    with pytest.raises(ServingError, match=rf"{tmp_path / VERSION_FILE}: max_batch_size must be positive"):
        common.of_version(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "rows", "size"),
    [((), 5, 5), ((1, 8), 1, 1), ((4, 8), 1, 4), ((4, 8), 4, 4), ((4, 8), 5, 8), ((8,), 8, 8)],
)
def test_a_batch_is_run_in_the_next_allowed_size(sizes: tuple[int, ...], rows: int, size: int) -> None:
    limit = sizes[-1] if sizes else 8
    assert BatchingOptions(max_batch_size=limit, allowed_batch_sizes=sizes).padded(rows) == size


# --- the queue


@dataclass(frozen=True)
class Work:
    name: str
    rows: int = 1

    def split(self, sizes: Sequence[int]) -> list["Work"]:
        return [Work(f"{self.name}{number}", rows) for number, rows in enumerate(sizes)]


def queue_of(*works: Work, **values: Any) -> BatchQueue[Work]:
    queue: BatchQueue[Work] = BatchQueue(BatchingOptions(**values))
    for second, work in enumerate(works):
        queue.add(work, second)
    return queue


def all_of(queue: BatchQueue[Work]) -> list[str]:
    return ["".join(f"{work.name}({work.rows})" for work in queue.take()) for _ in range(len(queue))]


SPLIT = {"enable_large_batch_splitting": True, "max_batch_size": 16, "max_execution_batch_size": 4}


@pytest.mark.parametrize(
    ("rows", "values", "batches"),
    [
        ([1, 1, 1], {"max_batch_size": 4}, ["a(1)b(1)c(1)"]),
        ([1, 2, 1, 1], {"max_batch_size": 4}, ["a(1)b(2)c(1)", "d(1)"]),
        ([3, 2, 4], {"max_batch_size": 4}, ["a(3)", "b(2)", "c(4)"]),
        ([3, 3], SPLIT, ["a(3)b0(1)", "b1(2)"]),
        ([1, 10, 1], SPLIT, ["a(1)b0(3)", "b1(4)", "b2(3)c(1)"]),
        ([4, 8], SPLIT, ["a(4)", "b0(4)", "b1(4)"]),
    ],
)
def test_how_batches_are_made(rows: list[int], values: dict[str, Any], batches: list[str]) -> None:
    works = [Work(name, count) for name, count in zip("abcd", rows, strict=False)]
    assert all_of(queue_of(*works, **values)) == batches


@pytest.mark.parametrize(
    ("rows", "values", "due_s"),
    [
        ([1], {}, 0),  # no timeout: at once
        ([1, 1], {"batch_timeout_s": 5}, 5),  # counted from the first
        ([2, 2], {"batch_timeout_s": 5, "max_batch_size": 4}, 0),  # full
        ([3, 2], {"batch_timeout_s": 5, "max_batch_size": 4}, 0),  # as full as it gets
    ],
)
def test_when_a_batch_is_due(rows: list[int], values: dict[str, Any], due_s: float) -> None:
    queue = queue_of(*(Work("a", count) for count in rows), **values)
    assert queue.due_s() == due_s
    queue.close()
    assert queue.due_s() == 0


@pytest.mark.parametrize(
    ("waiting", "rows", "values", "code", "message"),
    [
        (
            [],
            33,
            {"max_batch_size": 32},
            Code.INVALID_ARGUMENT,
            "Task size 33 is larger than maximum input batch ",
        ),
        (
            [2, 2],
            1,
            {"max_batch_size": 2, "max_enqueued_batches": 2},
            Code.UNAVAILABLE,
            "The batch scheduling queue to which this task was submitted is full; currently 2 batches "
            "enqueued and max_enqueued_batches is 2",
        ),
        (
            [],
            9,
            {**SPLIT, "max_enqueued_batches": 2},
            Code.UNAVAILABLE,
            "task size is 9 but scheduling capacity is only 8 (num_enqueued_batches=1, ",
        ),
        (
            [4, 2],
            3,
            {**SPLIT, "max_enqueued_batches": 2},
            Code.UNAVAILABLE,
            "is full; task size is 3 but scheduling capacity is only 2 (num_enqueued_batches=2, "
            "max_enqueued_batches=2, open_batch_size=2, max_execution_batch_size=4)",
        ),
    ],
)
def test_what_a_queue_refuses(
    waiting: list[int], rows: int, values: dict[str, Any], code: Code, message: str
) -> None:
    queue = queue_of(*(Work("a", count) for count in waiting), **values)
    before = len(queue)
    with pytest.raises(ServingError) as caught:
        queue.add(Work("b", rows), 9)
    assert (caught.value.code, len(queue)) == (code, before)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("waiting", "rows", "values", "batches"),
    [
        ([2, 1], 1, {"max_batch_size": 2, "max_enqueued_batches": 2}, ["a(2)", "a(1)b(1)"]),
        ([4, 2], 2, {**SPLIT, "max_enqueued_batches": 2}, ["a(4)", "a0(2)b(2)"]),
        ([], 8, {**SPLIT, "max_enqueued_batches": 2}, ["b0(4)", "b1(4)"]),
        ([], 16, {**SPLIT, "max_enqueued_batches": 4}, ["b0(4)", "b1(4)", "b2(4)", "b3(4)"]),
    ],
)
def test_a_queue_takes_what_just_fits(
    waiting: list[int], rows: int, values: dict[str, Any], batches: list[str]
) -> None:
    queue = queue_of(*(Work("a", count) for count in waiting), **values)
    queue.add(Work("b", rows), 9)
    assert all_of(queue) == batches


def test_what_is_dropped_makes_room() -> None:
    queue = queue_of(Work("a", 2), Work("b", 1), Work("c", 1), max_batch_size=2, max_enqueued_batches=2)
    queue.drop(lambda work: work.name == "a")
    queue.add(Work("d", 2), 9)
    assert all_of(queue) == ["b(1)c(1)", "d(2)"]


# --- joining and cutting


def test_requests_are_joined_and_padded_with_a_row_that_is_one() -> None:
    requests = [{"x": np.float32([1, 2]), "s": np.array([b"a", b"b"], object)},
                {"x": np.float32([3]), "s": np.array([b"c"], object)}]  # fmt: skip
    joined = join(requests, 5)
    assert joined["x"].dtype == np.float32
    assert joined["x"].tolist() == [1, 2, 3, 3, 3]
    assert joined["s"].tolist() == [b"a", b"b", b"c", b"c", b"c"]
    assert join(requests[:1], 2)["x"] is requests[0]["x"]  # alone it is not copied


def test_shorter_requests_are_padded_with_their_own_first_value() -> None:
    joined = join([{"x": np.array([[7, 8]])}, {"x": np.array([[1, 2, 3], [4, 5, 6]])}], 4)
    assert joined["x"].tolist() == [[7, 8, 7], [1, 2, 3], [4, 5, 6], [1, 2, 3]]
    texts = join([{"x": np.array([[b"a", b"b"]], object)}, {"x": np.array([[b"c"]], object)}], 2)
    assert texts["x"].tolist() == [[b"a", b"b"], [b"c", b"c"]]


def test_outputs_are_cut_apart() -> None:
    parts = split([np.arange(5), np.arange(10).reshape(5, 2)], [1, 3], 5)
    assert [[value.tolist() for value in part] for part in parts] == [
        [[0], [[0, 1]]],
        [[1, 2, 3], [[2, 3], [4, 5], [6, 7]]],
    ]
    with pytest.raises(ServingError, match="FAILED_PRECONDITION: Batched output tensor has 0 dimensions"):
        split([np.array(1)], [1], 1)
    with pytest.raises(ServingError, match="0th dimension does not equal the sum of the 0th dimension sizes"):
        split([np.arange(4)], [1, 2], 3)


# --- a servable that waits when it is told to

SIGNATURE = Signature("s", {"x": TensorSpec("x:0", 1)}, {"y": TensorSpec("y:0", 1)}, {})


@dataclass
class Gated:
    """Doubles its input, once the gate is open; a row of -1 is an error."""

    engine: str = "fake"
    signatures: Mapping[str, Signature] = field(default_factory=lambda: {"s": SIGNATURE})
    signature_def_map: SignatureDefMap = field(default_factory=SignatureDefMap)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    runs: list[list[float]] = field(default_factory=list)
    failure: Exception | None = None
    closed: bool = False

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        self.runs.append(inputs["x"].tolist())
        self.entered.release()
        assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        if (inputs["x"] == -1).any():
            raise ServingError(Code.INVALID_ARGUMENT, "minus one")
        return [inputs["x"] * 2]

    def close(self) -> None:
        self.closed = True


@dataclass
class Lab:
    """A batched Gated servable, and who asks it."""

    gated: Gated
    servable: BatchingServable
    metrics: Metrics
    threads: list[threading.Thread] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    def ask(self, name: str, *rows: float, timeout_s: float | None = None) -> None:
        """In the background; the answer, or the error, goes to `answers`."""

        def run() -> None:
            try:
                (y,) = self.servable.run(SIGNATURE, {"x": np.array(rows)}, ("y",), timeout_s)
                self.answers[name] = y.tolist()
            except ServingError as exc:
                self.answers[name] = str(exc)

        before = self.asked
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()
        wait_for(lambda: self.asked > before)

    @property
    def asked(self) -> float:
        name = ":tensorflow:serving:batching_session:input_batch_size_count"
        return self.metrics.registry.get_sample_value(name, {"thread_pool_name": "lab"}) or 0

    def join(self) -> dict[str, Any]:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.answers


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


@pytest.fixture
def lab() -> Iterator[Callable[..., Lab]]:
    labs: list[Lab] = []

    def make(**values: Any) -> Lab:
        options = BatchingOptions(num_batch_threads=1, thread_pool_name="lab", **values)
        scheduler = BatchScheduler(options.num_batch_threads, options.thread_pool_name)
        gated, metrics = Gated(), Metrics()
        labs.append(Lab(gated, BatchingServable(gated, options, scheduler, "m", metrics), metrics))
        return labs[-1]

    yield make
    for each in labs:
        each.gated.gate.set()
        each.join()
        each.servable.close()
        assert each.gated.closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lab_")]


def test_what_comes_while_a_batch_runs_is_the_next_batch(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=4)
    it.ask("first", 1)
    assert it.gated.entered.acquire(timeout=30)
    it.ask("second", 2, 3)
    it.ask("third", 4)
    wait_for(lambda: queued(it) == 2)
    it.gated.gate.set()
    assert it.join() == {"first": [2], "second": [4, 6], "third": [8]}
    assert [sorted(run) for run in it.gated.runs] == [[1], [2, 3, 4]]


def queued(it: Lab) -> int:
    return sum(len(batch.tasks) for queue in it.servable._batcher._scheduler._queues.values()
               for batch in queue._batches)  # fmt: skip


def test_a_batch_that_does_not_fill_is_run_after_the_timeout(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=4, batch_timeout_s=0.02)
    it.gated.gate.set()
    it.ask("alone", 1)
    assert it.join() == {"alone": [2]}


def test_closing_runs_what_waits_for_a_timeout() -> None:
    ran: list[str] = []
    scheduler = BatchScheduler(num_threads=1, name="closing")
    batcher = scheduler.open(
        BatchingOptions(batch_timeout_s=30), lambda works: ran.extend(work.name for work in works)
    )
    for number, kind in enumerate("abab"):
        batcher.schedule(kind, Work(f"{kind}{number}"))
    batcher.close()
    assert ran == ["a0", "a2", "b1", "b3"]


def test_what_is_taken_back_is_not_run_and_the_rest_is() -> None:
    ran: list[str] = []
    scheduler = BatchScheduler(num_threads=1, name="dropping")
    batcher = scheduler.open(
        BatchingOptions(batch_timeout_s=30), lambda works: ran.extend(work.name for work in works)
    )
    for name in "abc":
        batcher.schedule("some", Work(name))
    batcher.drop("some", lambda work: work.name == "a")
    batcher.schedule("all", Work("d"))
    batcher.drop("all", lambda _: True)
    batcher.drop("none", lambda _: True)
    batcher.close()
    assert ran == ["b", "c"]


def test_a_batcher_that_is_left_open_keeps_no_program_from_ending() -> None:
    scheduler = BatchScheduler(num_threads=2, name="left")
    batcher = scheduler.open(BatchingOptions(), lambda works: None)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("left_")]
    batcher.close()
    assert [thread.daemon for thread in threads] == [True, True]


def test_the_parts_of_a_large_task_run_at_the_same_time() -> None:
    both = threading.Barrier(2)
    met: list[str] = []

    def run(works: list[Work]) -> None:
        both.wait(30)
        met.extend(work.name for work in works)

    scheduler = BatchScheduler(num_threads=2, name="parts")
    batcher = scheduler.open(BatchingOptions(**SPLIT), run)
    batcher.schedule("k", Work("a", 8))
    batcher.close()
    assert sorted(met) == ["a0", "a1"]


def test_a_full_queue_is_unavailable(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=1, max_enqueued_batches=1)
    it.ask("running", 1)
    assert it.gated.entered.acquire(timeout=30)
    it.ask("waiting", 2)
    wait_for(lambda: queued(it) == 1)
    it.ask("refused", 3)
    wait_for(lambda: "refused" in it.answers)
    it.gated.gate.set()
    assert it.join() == {
        "running": [2],
        "waiting": [4],
        "refused": "UNAVAILABLE: The batch scheduling queue to which this task was submitted is full; "
        "currently 1 batches enqueued and max_enqueued_batches is 1",
    }


def test_a_deadline_in_the_queue_is_answered_in_time_and_not_computed(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=2, max_enqueued_batches=1)
    it.ask("running", 1)
    assert it.gated.entered.acquire(timeout=30)
    it.ask("late", 2, timeout_s=0.02)
    wait_for(lambda: "late" in it.answers)  # while the first still runs
    assert it.answers == {"late": "DEADLINE_EXCEEDED: Timed out waiting for notification"}
    it.ask("after", 3, 4)  # its place in the queue is free again
    wait_for(lambda: queued(it) == 1)
    it.gated.gate.set()
    assert it.join() == it.answers | {"running": [2], "after": [6, 8]}
    assert it.gated.runs == [[1], [3, 4]]


def test_a_deadline_while_it_runs_does_not_touch_the_others(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=2, batch_timeout_s=30)
    it.ask("patient", 2)
    it.ask("hasty", 1, timeout_s=1)
    assert it.gated.entered.acquire(timeout=30)
    wait_for(lambda: "hasty" in it.answers)
    it.gated.gate.set()
    assert it.join() == {"hasty": "DEADLINE_EXCEEDED: Timed out waiting for notification", "patient": [4]}
    assert [sorted(run) for run in it.gated.runs] == [[1, 2]]


def test_only_those_fail_that_cannot_be_run(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=8, batch_timeout_s=30)
    it.gated.gate.set()
    for number in range(8):
        it.ask(str(number), -1 if number == 5 else number)
    expected: dict[str, Any] = {str(number): [2 * number] for number in range(8)}
    assert it.join() == expected | {"5": "INVALID_ARGUMENT: minus one"}
    assert sorted(it.gated.runs[0]) == [-1, 0, 1, 2, 3, 4, 6, 7]
    assert sorted(map(len, it.gated.runs)) == [1, 1, 2, 2, 4, 4, 8]


def test_what_is_nobodys_fault_is_not_tried_again(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=2, batch_timeout_s=30)
    it.gated.gate.set()
    it.gated.failure = ServingError(Code.UNAVAILABLE, "gone")
    it.ask("a", 1)
    it.ask("b", 2)
    assert it.join() == {"a": "UNAVAILABLE: gone", "b": "UNAVAILABLE: gone"}
    assert len(it.gated.runs) == 1


def test_whatever_is_raised_answers_all(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=2)
    it.gated.gate.set()
    it.gated.failure = ZeroDivisionError("odd")
    it.ask("a", 1)
    assert it.join() == {"a": "INTERNAL: ZeroDivisionError: odd"}
    it.gated.failure = None
    it.ask("b", 1)  # the thread is still there
    assert it.join()["b"] == [2]


def test_a_large_request_is_split_and_put_together_again(lab: Callable[..., Lab]) -> None:
    it = lab(max_batch_size=10, enable_large_batch_splitting=True, max_execution_batch_size=4)
    it.gated.gate.set()
    it.ask("large", *range(10))
    assert it.join() == {"large": [2 * row for row in range(10)]}
    assert sorted(map(len, it.gated.runs)) == [2, 4, 4]
    it.ask("bad", 1, 1, 1, 1, 1, 1, 1, 1, -1)
    assert it.join()["bad"] == "INVALID_ARGUMENT: minus one"
