"""Gathers tasks into batches and runs them on a few threads that all models share.

    scheduler = BatchScheduler(num_threads=2, name="batch_threads")
    batcher = scheduler.open(options, run_together)      # one for each version
    batcher.schedule(kind, task)                         # returns at once; run_together([task, ...]) follows
    batcher.close()

Tasks of a kind wait in a queue of their own. A batch is run when it is full, or when its first task has
waited for the timeout, as soon as a thread is free; meanwhile it fills. The queues take turns.
Source: tensorflow/core/kernels/batching_util/shared_batch_scheduler.h, also of the messages.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from .batching_options import BatchingOptions
from .errors import Code, ServingError

__all__ = ["BatchQueue", "BatchScheduler", "Batcher", "Task"]

_FULL = "The batch scheduling queue to which this task was submitted is full"


class Task(Protocol):
    """What is gathered."""

    @property
    def rows(self) -> int:
        """Its size; at least 1."""

    def split(self: "TaskT", sizes: Sequence[int]) -> Sequence["TaskT"]:
        """Tasks of these sizes, which add up to its own, to be run instead."""


TaskT = TypeVar("TaskT", bound=Task)


class _Batch(Generic[TaskT]):
    def __init__(self, opened_s: float) -> None:
        self.tasks: list[TaskT] = []
        self.rows = 0
        self.opened_s = opened_s


class BatchQueue(Generic[TaskT]):
    """Batches of one kind of task, the last of them open. Not thread-safe; times come from the caller."""

    def __init__(self, options: BatchingOptions) -> None:
        self._options = options
        self._batches: deque[_Batch[TaskT]] = deque()
        self._closed = False

    def __len__(self) -> int:
        """How many batches wait."""
        return len(self._batches)

    def add(self, task: TaskT, now_s: float) -> None:
        """Put a task into the open batch, or a new one.

        Raises ServingError: INVALID_ARGUMENT (larger than any batch may be), UNAVAILABLE (the queue is full).
        """
        self._check_room(task.rows)
        limit = self._options.run_rows
        room = limit - self._open_rows
        tasks: Sequence[TaskT] = [task]
        if task.rows > room and self._options.enable_large_batch_splitting:
            tasks = task.split(_split_sizes(task.rows, room, limit))
        for part in tasks:
            if not self._batches or self._open_rows + part.rows > limit:
                self._batches.append(_Batch(now_s))
            self._batches[-1].tasks.append(part)
            self._batches[-1].rows += part.rows

    def due_s(self) -> float:
        """When the next batch is to be run; a time past means at once. There must be one."""
        first = self._batches[0]
        if len(self._batches) > 1 or first.rows >= self._options.run_rows or self._closed:
            return first.opened_s
        return first.opened_s + self._options.batch_timeout_s

    def take(self) -> list[TaskT]:
        """The tasks of the next batch, which leaves the queue."""
        return self._batches.popleft().tasks

    def drop(self, unwanted: Callable[[TaskT], bool]) -> None:
        """Take tasks back."""
        for batch in self._batches:
            batch.tasks = [task for task in batch.tasks if not unwanted(task)]
            batch.rows = sum(task.rows for task in batch.tasks)
        self._batches = deque(batch for batch in self._batches if batch.tasks)

    def close(self) -> None:
        """Wait for no more tasks: all batches are due."""
        self._closed = True

    @property
    def _open_rows(self) -> int:
        return self._batches[-1].rows if self._batches else 0

    def _check_room(self, rows: int) -> None:
        options = self._options
        if rows > options.max_batch_size:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"Task size {rows} is larger than maximum input batch size {options.max_batch_size}",
            )
        batches, open_rows = max(1, len(self._batches)), self._open_rows
        if options.enable_large_batch_splitting:
            room = (options.max_enqueued_batches - batches + 1) * options.run_rows - open_rows
            if rows > room:
                raise ServingError(
                    Code.UNAVAILABLE,
                    f"{_FULL}; task size is {rows} but scheduling capacity is only {room} "
                    f"(num_enqueued_batches={batches}, max_enqueued_batches={options.max_enqueued_batches}, "
                    f"open_batch_size={open_rows}, max_execution_batch_size={options.run_rows})",
                )
        elif open_rows + rows > options.run_rows and batches >= options.max_enqueued_batches:
            raise ServingError(
                Code.UNAVAILABLE,
                f"{_FULL}; currently {batches} batches enqueued and max_enqueued_batches is "
                f"{options.max_enqueued_batches}",
            )


class BatchScheduler:
    """Owns the threads, which live while a Batcher is open. Thread-safe.

    num_threads: batches that run at the same time.
    name: what the threads' names begin with.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        lock = threading.Lock()  # guards what follows
        self._changed = threading.Condition(lock)  # what the threads wait for
        self._finished = threading.Condition(lock)  # what those wait for who close
        self._running: dict[Batcher[Any], int] = {}  # batches under way of each that is open
        self._queues: dict[_Kind, BatchQueue[Any]] = {}  # the next turn first; none is empty
        self._crew: list[threading.Thread] = []

    def open(self, options: BatchingOptions, process: Callable[[list[TaskT]], None]) -> "Batcher[TaskT]":
        """A place for the tasks of one version.

        process: runs a batch on one of the threads, several at once, and must not raise.
        """
        batcher = Batcher(self, options, process)
        with self._changed:
            if not self._running:
                crew: list[threading.Thread] = []
                for number in range(self._num_threads):
                    name = f"{self._name}_{number}"
                    crew.append(threading.Thread(target=self._work, args=(crew,), name=name, daemon=True))
                self._crew = crew
                for thread in crew:
                    thread.start()
            self._running[batcher] = 0
        return batcher

    def _schedule(self, batcher: "Batcher[TaskT]", kind: Hashable, task: TaskT) -> None:
        with self._changed:
            queue = self._queues.get((batcher, kind))
            if queue is None:
                queue = BatchQueue(batcher.options)
            queue.add(task, time.monotonic())
            self._queues[batcher, kind] = queue
            self._changed.notify()

    def _drop(self, batcher: "Batcher[TaskT]", kind: Hashable, unwanted: Callable[[TaskT], bool]) -> None:
        with self._changed:
            queue = self._queues.get((batcher, kind))
            if queue is not None:
                queue.drop(unwanted)
                if not queue:
                    del self._queues[batcher, kind]
                    self._finished.notify_all()

    def _close(self, batcher: "Batcher[Any]") -> None:
        with self._changed:
            for (owner, _), queue in self._queues.items():
                if owner is batcher:
                    queue.close()
            self._changed.notify_all()
            self._finished.wait_for(
                lambda: not self._running[batcher] and all(owner is not batcher for owner, _ in self._queues)
            )
            del self._running[batcher]
            if self._running:
                return
            crew, self._crew = self._crew, []
            self._changed.notify_all()
        for thread in crew:
            thread.join()

    def _work(self, crew: list[threading.Thread]) -> None:
        while self._run_next(crew):  # its own function: a thread that waits holds no task
            pass

    def _run_next(self, crew: list[threading.Thread]) -> bool:
        """Run the next batch when it is due; False if this thread is no longer needed."""
        with self._changed:
            batcher, tasks = None, []
            while batcher is None:
                if self._crew is not crew:
                    return False
                now_s = time.monotonic()
                dues = [(kind, queue.due_s()) for kind, queue in self._queues.items()]
                kind = next((kind for kind, due_s in dues if due_s <= now_s), None)
                if kind is None:
                    next_s = min((due_s for _, due_s in dues), default=None)
                    wait_s = None if next_s is None else min(next_s - now_s, threading.TIMEOUT_MAX)
                    self._changed.wait(wait_s)
                    continue
                batcher, queue = kind[0], self._queues.pop(kind)
                tasks = queue.take()
                if queue:
                    self._queues[kind] = queue  # behind all others
            self._running[batcher] += 1
            if self._queues:
                self._changed.notify()  # this thread may have been the one to watch the others
        try:
            batcher.process(tasks)
        finally:
            with self._changed:
                self._running[batcher] -= 1
                self._finished.notify_all()
        return True


class Batcher(Generic[TaskT]):
    """The tasks of one version; made by `BatchScheduler.open`. Thread-safe."""

    def __init__(
        self, scheduler: BatchScheduler, options: BatchingOptions, process: Callable[[list[TaskT]], None]
    ) -> None:
        self.options = options
        self.process = process
        self._scheduler = scheduler

    def schedule(self, kind: Hashable, task: TaskT) -> None:
        """Have a task run together with others of its kind.

        Raises ServingError: INVALID_ARGUMENT (larger than any batch may be), UNAVAILABLE (the queue is full).
        """
        self._scheduler._schedule(self, kind, task)

    def drop(self, kind: Hashable, unwanted: Callable[[TaskT], bool]) -> None:
        """Take back tasks of a kind, unless they are running."""
        self._scheduler._drop(self, kind, unwanted)

    def close(self) -> None:
        """Return when all tasks have run. None may be scheduled any more."""
        self._scheduler._close(self)


_Kind = tuple[Batcher[Any], Hashable]


def _split_sizes(rows: int, room: int, limit: int) -> list[int]:
    """What fills the open batch, whole batches, and the rest. Source: input_split_metadata.cc."""
    sizes = [room] if room else []
    rows -= room
    sizes += [limit] * (rows // limit)
    if rows % limit:
        sizes.append(rows % limit)
    return sizes
