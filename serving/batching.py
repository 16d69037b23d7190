"""Runs the requests of concurrent callers together, for models that do not gather them in their graph.

A BatchingServable stands before a servable as TensorFlow Serving's BatchingSession stands before a Session:
it joins the inputs of several requests along their first axis, runs them once, and cuts the outputs apart.

Why not TensorFlow's own scheduler, which its BatchFunction op offers? Two ways were tried. With the
signature's function as the body, a request whose deadline passes in the queue is answered only when its batch
is done, since the op cannot be cancelled; models of TensorFlow 1 have no function to be the body; and each
request still costs a call of the Session, so that a small model gains nothing. With a body that calls the
Session from Python any model works, but each batch holds one of the threads that the Session then waits for:
with as many batches as CPUs they wait for ever. And in both a bad request fails all that run with it. Here
the model runs as it does alone, with the same messages, and an answer is due when the caller's time is up.

What differs from the real server, where a client can see it:
- Requests of different dtypes or shapes wait in different queues; there all members of the batch fail.
- A batch that fails is halved and run again, so that only those fail that cannot be run.
- A request without rows is answered at once; there it waits for another.
- One whose deadline passes in the queue is answered in time, by DEADLINE_EXCEEDED.
With pad_variable_length_inputs outputs come back as long as the longest request of the batch made them, as
there.
Source: tensorflow_serving/batching/{batching_session,batching_util}.cc, also of the messages.
"""

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftserve.client.wire import SignatureDefMap

from .batch_scheduler import BatchScheduler
from .batching_options import BatchingOptions
from .errors import Code, ServingError, timed_out
from .metrics import Metrics
from .servable import Array, Servable, Signature

__all__ = ["BatchingServable", "join", "split"]

# Not the fault of a member: running them again in halves would only cost time.
_NOBODYS_FAULT = frozenset({Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE})


class BatchingServable:
    """A servable whose requests run together. `run` may be called from many threads at once.

    Owns `servable`, and closes it. model_name: for the metrics.
    """

    def __init__(
        self,
        servable: Servable,
        options: BatchingOptions,
        scheduler: BatchScheduler,
        model_name: str,
        metrics: Metrics,
    ) -> None:
        self.signatures: Mapping[str, Signature] = servable.signatures
        self.signature_def_map: SignatureDefMap = servable.signature_def_map
        self._servable = servable
        self._options = options
        self._batcher = scheduler.open(options, self._run_batch)
        self._model_name = model_name
        self._metrics = metrics

    @property
    def engine(self) -> str:
        """What runs the batches."""
        return self._servable.engine

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        """See `servable.Servable.run`. Every input and output has the rows on its first axis.

        Raises ServingError, among others INVALID_ARGUMENT (inputs that are scalars, or have different numbers
        of rows, or too many), UNAVAILABLE (too many requests are waiting) and FAILED_PRECONDITION (an output
        that does not have the rows of the inputs).
        """
        rows = _rows(inputs)
        self._metrics.batch_asked(self._options.thread_pool_name, rows)
        if not rows:
            return self._servable.run(signature, inputs, outputs, timeout_s)
        request = _Request(signature, outputs, timeout_s)
        kind = (signature.name, tuple(outputs), *_shapes(inputs, self._options.pad_variable_length_inputs))
        self._batcher.schedule(kind, _Task(request, 0, rows, inputs))
        wait_s = None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
        if not request.answered.wait(wait_s):
            self._batcher.drop(kind, lambda task: task.request is request)
            request.fail(timed_out())
        return request.answer()

    def close(self) -> None:
        """Wait for the batch under way, if all who asked for it have gone, and free the servable."""
        self._batcher.close()
        self._servable.close()

    def _run_batch(self, tasks: list["_Task"]) -> None:
        now_s = time.monotonic()
        for task in tasks:
            waited_s = now_s - task.request.asked_s
            self._metrics.batch_waited(self._options.thread_pool_name, self._model_name, waited_s)
        self._run(tasks)

    def _run(self, tasks: list["_Task"]) -> None:
        tasks = [task for task in tasks if not task.request.answered.is_set()]
        now_s = time.monotonic()
        for task in tasks:
            if task.request.deadline_s <= now_s:
                task.request.fail(timed_out())
        tasks = [task for task in tasks if task.request.deadline_s > now_s]
        if not tasks:
            return
        try:
            self._run_once(tasks, max(task.request.deadline_s for task in tasks) - now_s)
        except ServingError as exc:
            if len(tasks) == 1 or exc.code in _NOBODYS_FAULT or isinstance(exc, _OutputError):
                for task in tasks:
                    task.request.fail(exc)
            else:
                middle = len(tasks) // 2
                self._run(tasks[:middle])
                self._run(tasks[middle:])
        except Exception as exc:  # a thread that ended here would leave its callers waiting
            for task in tasks:
                task.request.fail(ServingError(Code.INTERNAL, f"{type(exc).__name__}: {exc}"))

    def _run_once(self, tasks: list["_Task"], timeout_s: float) -> None:
        first = tasks[0].request
        sizes = [task.rows for task in tasks]
        rows = sum(sizes)
        size = self._options.padded(rows)
        self._metrics.batch_runs(self._options.thread_pool_name, self._model_name, rows, size)
        inputs = join([task.inputs for task in tasks], size)
        values = self._servable.run(
            first.signature, inputs, first.outputs, None if timeout_s == _FOR_EVER_S else timeout_s
        )
        for task, part in zip(tasks, split(values, sizes, size), strict=True):
            task.request.take(task.number, part)


_FOR_EVER_S = float("inf")


class _OutputError(ServingError):
    """The model's outputs do not have the rows of its inputs."""


class _Request:
    """One caller's, and what is known of its answer so far."""

    def __init__(self, signature: Signature, outputs: Sequence[str], timeout_s: float | None) -> None:
        self.signature = signature
        self.outputs = outputs
        self.asked_s = time.monotonic()
        self.deadline_s = _FOR_EVER_S if timeout_s is None else self.asked_s + timeout_s
        self.answered = threading.Event()
        self._lock = threading.Lock()
        self._error: ServingError | None = None
        self._parts: list[list[Array] | None] = [None]  # one for each task, when it has run

    def divide(self, parts: int) -> None:
        """Expect this many parts of an answer instead of one. Before any of them can come."""
        self._parts = [None] * parts

    def take(self, number: int, values: list[Array]) -> None:
        with self._lock:
            self._parts[number] = values
            if all(part is not None for part in self._parts):
                self.answered.set()

    def fail(self, error: ServingError) -> None:
        """Answer with an error, unless there is an answer."""
        with self._lock:
            if not self.answered.is_set():
                self._error = error
                self.answered.set()

    def answer(self) -> list[Array]:
        with self._lock:
            if self._error is not None:
                # Not the error itself, which all members of a batch share.
                raise ServingError(self._error.code, self._error.message) from self._error
            parts = [part for part in self._parts if part is not None]
            return (
                parts[0]
                if len(parts) == 1
                else [np.concatenate(values) for values in zip(*parts, strict=True)]
            )


@dataclass(frozen=True, slots=True)
class _Task:
    """A request, or some rows of it. number: which part of the answer they are."""

    request: _Request
    number: int
    rows: int
    inputs: Mapping[str, Array]

    def split(self, sizes: Sequence[int]) -> Sequence["_Task"]:
        self.request.divide(len(sizes))
        tasks, start = [], 0
        for number, rows in enumerate(sizes):
            part = {name: array[start : start + rows] for name, array in self.inputs.items()}
            tasks.append(_Task(self.request, number, rows, part))
            start += rows
        return tasks


def join(requests: Sequence[Mapping[str, Array]], size: int) -> Mapping[str, Array]:
    """The inputs of several requests as one, of `size` rows.

    Where there are fewer, the first row of the last request is repeated: it is known to be a row. Shorter
    arrays are padded at the end of the other axes, with their own first value. Dtypes and ranks are equal.
    """
    joined: dict[str, Array] = {}
    for name in requests[0]:
        arrays = _padded_alike([inputs[name] for inputs in requests])
        missing = size - sum(len(array) for array in arrays)
        if missing:
            arrays.append(np.repeat(arrays[-1][:1], missing, axis=0))
        joined[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return joined


def split(values: Sequence[Array], rows: Sequence[int], size: int) -> list[list[Array]]:
    """Outputs of `size` rows as those of each request, padding left out.

    Raises ServingError (FAILED_PRECONDITION) if an output does not have these rows.
    """
    for value in values:
        if not value.ndim:
            raise _OutputError(Code.FAILED_PRECONDITION, "Batched output tensor has 0 dimensions")
        if len(value) != size:
            raise _OutputError(
                Code.FAILED_PRECONDITION,
                "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of "
                "the input tensors",
            )
    parts, start = [], 0
    for count in rows:
        parts.append([value[start : start + count] for value in values])
        start += count
    return parts


def _padded_alike(arrays: list[Array]) -> list[Array]:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) == 1:
        return arrays
    longest = [max(lengths) for lengths in zip(*shapes, strict=True)]
    padded = []
    for array in arrays:
        target = np.full((len(array), *longest), array.flat[0], array.dtype)
        target[tuple(slice(length) for length in array.shape)] = array
        padded.append(target)
    return padded


def _rows(inputs: Mapping[str, Array]) -> int:
    if not inputs:
        raise ServingError(Code.INVALID_ARGUMENT, "Batching Run() must have at least one input tensor")
    if not all(array.ndim for array in inputs.values()):
        raise ServingError(
            Code.INVALID_ARGUMENT, "Batching Run() input tensors must have at least one dimension"
        )
    first, *others = (len(array) for array in inputs.values())
    if any(rows != first for rows in others):
        raise ServingError(
            Code.INVALID_ARGUMENT, "Batching Run() input tensors must have equal 0th-dimension size"
        )
    return first


def _shapes(inputs: Mapping[str, Array], padding: bool) -> Sequence[Hashable]:
    """What two requests must have in common to run together."""
    if padding:
        # What is empty has no value to be padded with.
        return [(array.dtype, array.ndim, array.size == 0) for array in inputs.values()]
    return [(array.dtype, array.shape[1:]) for array in inputs.values()]
