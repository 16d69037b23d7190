"""The heart of the client: items in, requests out, answers back; pure: no clocks, threads or I/O.

A shell (`client`, `aio`) tells it what happens and does what it says:

    submit, answered, failed, expire, leave, tick   ->  Work: requests to send and to cancel, items that
    are finished

An item waits in its lane (`batching`) until one of the requests that may be under way (`limits`) is free,
and becomes part of a batch. A batch is asked of a target (`targets`), again when it gets lost (`retry`),
a second time beside the first when that seems lost, and in parts when one of its items spoils it
(`isolation`), until every item has an answer, an error, or no time left. Moments are those of the shell's
monotonic clock.
"""

import copy
import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import grpc

from .attempts import Attempt, Batch, Failure, Work
from .batching import Item, Lane, Pending, share
from .engine_errors import EngineErrors
from .errors import ClientError, InvalidArgumentError
from .isolation import Search
from .limits import BatchSize, Concurrency
from .options import Options
from .results import ModelMetadata
from .retry import RetryBudget, retry_wait_s
from .stats import Counters, Stats, TargetStats
from .targets import Targets

__all__ = ["Engine"]

_INITIAL_IN_FLIGHT: Final = 4
_METADATA_S: Final = 10.0
_MAX_IDLE_LANES: Final = 64
_HEDGE_S: Final = 0.001  # at least
_STALL: Final = 10.0  # times the latency of the slowest
_STALL_S: Final = 1.0
_SPARE_BYTES: Final = 1024  # of a message, beside its images
_EXPLANATION_S: Final = 2.0
_CLOCKS_S: Final = 0.1  # between gRPC's and ours

# tensorflow_serving's batching_session.cc, and our server.
_TOO_MANY: Final = re.compile(r"Task size \d+ is larger than maximum input batch size (\d+)")
# gRPC's core, of any language.
_TOO_LARGE: Final = re.compile(r"message larger than max \(\d+ vs\. (\d+)\)", re.IGNORECASE)

_REFUSALS: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION})
# What says that the target is not there, where any other answer says that it is.
_ABSENT: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


class Engine:
    """See the module. Not safe for threads: the shell lets one in at a time.

    random: gives numbers uniform in [0, 1).
    metadata_lane: asks for the model's signatures, to explain refusals with.
    """

    def __init__(
        self, options: Options, metadata_lane: Lane, now: float, random: Callable[[], float]
    ) -> None:
        self._options = options
        self._errors = EngineErrors(options)
        self._metadata_lane = metadata_lane
        self._random = random
        self._targets = Targets(options.targets)
        self._concurrency = Concurrency(_INITIAL_IN_FLIGHT * len(options.targets), options.max_in_flight)
        self._batch_size = BatchSize(options.max_batch_images, options.target_latency_s)
        self._max_batch_bytes = options.max_batch_bytes
        self._budget = RetryBudget(options.retry.budget_ratio, options.retry.budget_per_s, now)
        self._lanes: dict[Hashable, Pending] = {}
        self._queued_rows = 0
        self._queued_bytes = 0
        self._batches: list[Batch] = []
        self._where: dict[int, Batch] = {}  # by id() of an item
        self._in_flight = 0  # batches of lanes that are not urgent
        self._in_flight_rows = 0
        self._metadata: tuple[float, ModelMetadata] | None = None
        self._closed = False
        self._counters = Counters()
        self._work = Work()

    # What happens

    def submit(self, items: Sequence[Item], now: float) -> Work:
        """Items to be answered. Those that find no room are finished with OverloadedError."""
        for item in items:
            item.submitted = now
            self._counters.items += 1
            if self._closed:
                self._finish(item, self._errors.closed())
            elif not item.lane.urgent and not self.has_room(item.rows, item.size_bytes):
                self._finish(item, self._errors.overloaded(self._load()))
            else:
                self._enqueue(item)
        return self._pump(now)

    def answered(self, attempt: Attempt, results: Sequence[Any], now: float) -> Work:
        """The results for an attempt's items came."""
        if attempt.over:
            return self._flush()
        batch = attempt.batch
        self._end(attempt)
        self._targets.answered(attempt.target)
        self._cancel_attempts(batch, now)
        if attempt.explains:
            self._metadata = (now, results[0])
            self._judge(batch, now)
            return self._pump(now)
        latency_s = now - attempt.started
        if not attempt.lane.urgent:
            self._learn(attempt, latency_s, now)
        for item, result in zip(attempt.items, results, strict=True):
            self._finish(item, result)
        if batch.search is not None:
            batch.search.passed()
            self._next_group(batch, now)
        else:
            self._close_batch(batch)
        return self._pump(now)

    def failed(self, attempt: Attempt, failure: Failure, now: float) -> Work:
        """An attempt failed."""
        if attempt.over:
            return self._flush()
        batch = attempt.batch
        self._end(attempt)
        self._counters.failed(failure.code)
        if failure.code in _ABSENT:
            self._targets.breakers[attempt.target].failed(now, self._random())
        elif failure.code is None:
            self._targets.breakers[attempt.target].gave_up(now)
        elif failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._gave_up(attempt, now)
        else:
            self._targets.answered(attempt.target)
        if attempt.explains:
            self._judge(batch, now)
            return self._pump(now)
        batch.last_failure = failure
        if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not _too_large(failure):
            self._concurrency.overloaded(attempt.started, now)
        if failure.error is not None:
            self._cancel_attempts(batch, now)
            self._reject_asked(batch, failure.error, now)
        elif self._too_much(attempt, failure, now):
            pass
        elif failure.code in _REFUSALS:
            self._cancel_attempts(batch, now)
            self._refused(batch, failure, now)
        elif not batch.attempts:  # else another copy may do better
            self._lost(batch, failure, now)
        return self._pump(now)

    def take_over(self, attempt: Attempt, now: float) -> float:
        """The shell can wait for this attempt only, not send a second one beside it: for how many seconds
        it should.
        """
        hedge_at, attempt.batch.hedge_at = attempt.batch.hedge_at, None
        return hedge_at - now if hedge_at is not None and self._budget.allows(now) else math.inf

    def stalled(self, attempt: Attempt, now: float) -> Work:
        """An attempt that was taken over was given up: send another."""
        if not attempt.over:
            self._end(attempt)
            self._gave_up(attempt, now)
            self._counters.failed(grpc.StatusCode.DEADLINE_EXCEEDED)
            self._budget.spend(now)
            self._start(attempt.batch, now)
        return self._pump(now)

    def expire(self, item: Item, now: float) -> Work:
        """The item's deadline has passed."""
        if item.finished:
            return self._flush()
        return self._depart(item, self._deadline_error(item), now)

    def leave(self, item: Item, now: float) -> Work:
        """The item's caller waits no more."""
        if item.finished:
            return self._flush()
        return self._depart(item, self._errors.left(), now)

    def tick(self, now: float) -> Work:
        """Time has passed; see `wake_at`."""
        for batch in tuple(self._batches):
            if batch.retry_at is not None and batch.retry_at <= now:
                self._start(batch, now)
            elif batch.hedge_at is not None and batch.hedge_at <= now:
                self._hedge(batch, now)
        return self._pump(now)

    def close(self, now: float) -> Work:
        """Finish all items with ClosedError, and all to come."""
        self._closed = True
        for batch in tuple(self._batches):
            self._cancel_attempts(batch, now)
            self._reject(batch, self._errors.closed())
        for pending in self._lanes.values():
            while items := pending.take(1, 1):
                for item in items:
                    self._dequeue(item)
                    self._finish(item, self._errors.closed())
        return self._pump(now)

    # What a shell asks

    @property
    def closed(self) -> bool:
        """Whether it was told to close."""
        return self._closed

    def wake_at(self, now: float) -> float:
        """When `tick` is due; infinity if only other events can change anything."""
        wake = math.inf
        for batch in self._batches:
            if batch.retry_at is not None:
                wake = min(wake, batch.retry_at)
            elif batch.hedge_at is not None:
                wake = min(wake, batch.hedge_at)
        if self._in_flight < self._concurrency.limit:
            for pending in self._lanes.values():
                wake = min(wake, self._due_at(pending, now))
        return wake

    def has_room(self, rows: int, size_bytes: int) -> bool:
        """Whether so much more may wait."""
        return self._queued_rows + rows <= self._options.max_queued_images and (
            self._queued_bytes + size_bytes <= self._options.max_queued_bytes or not self._queued_bytes
        )

    def window(self) -> tuple[int, int]:
        """How many rows and bytes one call for many images should have submitted: what is under way, and
        the next.
        """
        requests = self._concurrency.limit + 1
        return requests * self._batch_size.limit, requests * self._max_batch_bytes

    def stats(self) -> Stats:
        """Counts since the start, and what is true now."""
        return self._counters.stats(
            queued=self._queued_rows,
            in_flight=self._in_flight,
            max_in_flight=self._concurrency.limit,
            max_batch_images=self._batch_size.limit,
            targets=tuple(
                TargetStats(name, in_flight, breaker.is_open)
                for name, in_flight, breaker in zip(
                    self._targets.names, self._targets.in_flight, self._targets.breakers, strict=True
                )
            ),
        )

    # From waiting to sent

    def _pump(self, now: float) -> Work:
        """Send what is due, and hand over all that there is to do."""
        while (pending := self._next_due(now)) is not None:
            if pending.lane.urgent:
                items = pending.take(1, self._max_batch_bytes)
            else:
                items = pending.take(self._enough(pending.rows + self._in_flight_rows), self._max_batch_bytes)
            for item in items:
                self._dequeue(item)
            batch = Batch(pending.lane, items, rows=sum(item.rows for item in items))
            for item in items:
                self._where[id(item)] = batch
            self._batches.append(batch)
            if not pending.lane.urgent:
                self._in_flight += 1
                self._in_flight_rows += batch.rows
            self._start(batch, now)
        return self._flush()

    def _next_due(self, now: float) -> Pending | None:
        """The lane whose oldest item has waited longest, among those that may go now."""
        room = self._in_flight < self._concurrency.limit
        choice: Pending | None = None
        since = math.inf
        for pending in self._lanes.values():
            oldest = pending.oldest()
            if oldest is None:
                continue
            if pending.lane.urgent:
                return pending
            if room and oldest.submitted < since and self._due_at(pending, now) <= now:
                choice, since = pending, oldest.submitted
        return choice

    def _due_at(self, pending: Pending, now: float) -> float:
        """When the lane's items should go, room given: now, or later to wait for company."""
        oldest = pending.oldest()
        if oldest is None:
            return math.inf
        if pending.lane.urgent or not pending.lane.merges:
            return now
        wait_until = oldest.submitted + self._options.max_delay_s
        expected = pending.rows + self._in_flight_rows
        if now < pending.back.until:
            expected += pending.back.rows
            wait_until = max(wait_until, pending.back.until)
        if wait_until <= now or pending.size_bytes >= self._max_batch_bytes:
            return now
        if pending.rows >= self._enough(expected):
            return now
        # No later than lets the nearest deadline be met: a quarter of the time is for that at least, and half
        # of it until more is known.
        nearest, slow_s = pending.nearest_deadline, pending.latency.slow_s
        left_s = nearest - oldest.submitted
        answer_s = left_s / 2 if slow_s is None else max(2 * slow_s, left_s / 4)
        return max(now, min(wait_until, nearest - answer_s))

    def _enough(self, rows: int) -> int:
        """How many of `rows` should share a request."""
        if self._options.max_delay_s > 0:
            return self._batch_size.limit  # company was waited for
        return share(rows, self._concurrency.limit, self._batch_size.limit)

    def _start(self, batch: Batch, now: float, *, hedge: bool = False, explains: bool = False) -> None:
        """Send the batch, or what is asked of it now, to a target."""
        batch.retry_at = None
        self._expire_due(batch, now)
        items = [item for item in batch.asked or batch.items if not item.finished]
        if not items:
            self._cancel_attempts(batch, now)
            self._next_group(batch, now)
            return
        batch.asked = items
        target = self._targets.pick(
            now, avoid=[attempt.target for attempt in batch.attempts], even_open=batch.lane.urgent
        )
        if target is None and hedge:
            return
        if target is None and explains:
            self._judge(batch, now)
            return
        if target is None:
            opens_at = self._targets.opens_at(now)
            if batch.sent or self._options.wait_for_ready:
                # Whoever is on trial will be known by then.
                batch.retry_at = opens_at if math.isfinite(opens_at) else now + _STALL_S / 10
            else:
                self._reject(batch, self._circuit_error(opens_at - now))
            return
        self._targets.sent(target)
        if not explains:
            batch.sent += 1
            batch.adaptations = self._lane(batch.lane).adaptations
        left_s = max(item.deadline for item in items) - now
        attempt = Attempt(
            batch,
            self._metadata_lane if explains else batch.lane,
            items,
            target,
            batch.sent,
            hedge,
            now,
            min(left_s, _EXPLANATION_S) if explains else left_s,
            explains,
        )
        batch.attempts.append(attempt)
        wait_s = self._hedge_wait_s(batch)
        batch.hedge_at = None if wait_s is None or explains else now + wait_s
        if batch.sent == 1 and not explains:
            self._budget.sent(now)
        self._counters.sent(attempt.rows, explains=explains, hedge=hedge, again=batch.sent > 1 and not hedge)
        self._work.sends.append(attempt)

    def _hedge_wait_s(self, batch: Batch) -> float | None:
        slow_s = self._lane(batch.lane).latency.slow_s
        if batch.lane.urgent or slow_s is None or batch.sent >= self._options.retry.max_attempts:
            return None
        return max(_HEDGE_S, slow_s) if self._options.retry.hedge else self._stall_s(batch.lane)

    def _stall_s(self, lane: Lane) -> float:
        """A request that takes so long seems lost."""
        return max(_STALL_S, _STALL * (self._lane(lane).latency.slow_s or 0.0))

    def _hedge(self, batch: Batch, now: float) -> None:
        batch.hedge_at = None
        if batch.attempts and self._budget.spend(now):
            self._start(batch, now, hedge=True)

    # From an answer to the next step

    def _learn(self, attempt: Attempt, latency_s: float, now: float) -> None:
        """Let the limits know."""
        lane = self._lane(attempt.lane)
        lane.latency.took(latency_s)
        self._counters.answered(attempt.rows, latency_s, attempt.queue_s)
        spent_s = sum((now - item.submitted) * item.rows for item in attempt.items)
        self._concurrency.answered(
            attempt.rows,
            spent_s,
            now,
            reached=self._in_flight >= self._concurrency.limit,
            queued=bool(self._queued_rows),
        )
        self._batch_size.answered(attempt.rows, latency_s)
        if attempt.lane.merges and len(attempt.items) > 1:
            lane.back.answered(attempt.rows, latency_s, now)

    def _too_much(self, attempt: Attempt, failure: Failure, now: float) -> bool:
        """Whether the request was refused for its size; then its items wait again, for smaller ones."""
        batch = attempt.batch
        count = _TOO_MANY.search(failure.details)
        size = _too_large(failure)
        # What does not make the next request smaller would be refused for ever.
        if count is not None:
            most = int(count[1])
            self._batch_size.learned(most if most < attempt.rows else attempt.rows // 2)
        elif size is not None:
            most = size - _SPARE_BYTES
            most = most if most < attempt.size_bytes else attempt.size_bytes // 2
            self._max_batch_bytes = max(1, min(self._max_batch_bytes, most))
        else:
            return False
        self._cancel_attempts(batch, now)
        items = [item for item in batch.asked if not item.finished]
        if len(items) == 1:
            self._reject_asked(batch, self._errors.failed(failure, batch.sent, InvalidArgumentError), now)
        elif batch.search is not None:
            batch.search.refused()
            self._next_group(batch, now)
        else:
            self._close_batch(batch)
            for item in items:
                self._where.pop(id(item), None)
            self._lane(batch.lane).put_back(items)
            self._queued_rows += sum(item.rows for item in items)
            self._queued_bytes += sum(item.size_bytes for item in items)
        return True

    def _refused(self, batch: Batch, failure: Failure, now: float) -> None:
        """The server does not take the request: find out why, and because of which item."""
        batch.refusal = failure
        if batch.explained or batch.lane.urgent or self._fresh_metadata(now) is not None:
            self._judge(batch, now)
        else:
            self._start(batch, now, explains=True)

    def _fresh_metadata(self, now: float) -> ModelMetadata | None:
        if self._metadata is None or now - self._metadata[0] >= _METADATA_S:
            return None
        return self._metadata[1]

    def _judge(self, batch: Batch, now: float) -> None:
        """Decide on a refusal, with the model's signatures if they could be had."""
        failure = batch.refusal
        if failure is None:
            return
        batch.refusal = None
        error = self._errors.failed(failure, batch.sent)
        if not batch.explained:
            batch.explained = True
            metadata = self._fresh_metadata(now)
            pending = self._lane(batch.lane)
            if metadata is not None and batch.lane.adapt(metadata):
                pending.adaptations += 1
            if batch.adaptations != pending.adaptations:
                batch.sent = 0
                self._start(batch, now)
                return
            contents = [item.content for item in batch.asked]
            explained = None if metadata is None else batch.lane.explain(metadata, error, contents)
            if explained is not None:
                explained.__cause__ = error
                self._reject(batch, explained)
                return
        items = [item for item in batch.asked if not item.finished]
        if failure.code is not grpc.StatusCode.INVALID_ARGUMENT:
            self._reject(batch, error)
        elif batch.search is not None:
            if batch.search.refused():
                self._reject(batch, batch.lane.blame(error), items)
            self._next_group(batch, now)
        elif len(items) > 1 and batch.lane.merges:
            batch.search = Search(items)
            self._counters.searches += 1
            self._next_group(batch, now)
        else:
            self._reject(batch, batch.lane.blame(error))

    def _next_group(self, batch: Batch, now: float) -> None:
        """Ask the next part of a batch that is searched; close one that is done."""
        if batch.search is not None:
            self._expire_due(batch, now)
            while group := batch.search.ask():
                batch.asked = [item for item in group if not item.finished]
                if batch.asked:
                    batch.sent = 0
                    self._start(batch, now)
                    return
        self._close_batch(batch)

    def _lost(self, batch: Batch, failure: Failure, now: float) -> None:
        """Send again what got lost, if policy, budget and time allow."""
        left_s = max((item.deadline for item in batch.asked if not item.finished), default=now) - now
        wait_s = None
        if batch.lane.retries:
            wait_s = retry_wait_s(
                self._options.retry, failure.code, batch.sent, left_s, self._random(), failure.pushback_s
            )
        if wait_s is not None and self._budget.spend(now):
            batch.retry_at = now + wait_s
        elif failure.code is grpc.StatusCode.DEADLINE_EXCEEDED and left_s < _CLOCKS_S:
            # gRPC's clock was a little ahead of the callers'.
            for item in batch.asked:
                self._finish(item, self._deadline_error(item))
            self._next_group(batch, now)
        else:
            self._reject(batch, self._errors.failed(failure, batch.sent))

    # Endings

    def _depart(self, item: Item, error: ClientError, now: float) -> Work:
        batch = self._where.get(id(item))
        self._finish(item, error)
        if item.submitted == -math.inf:
            self._counters.items += 1  # its caller was interrupted before it could submit it
        elif batch is None:
            self._dequeue(item)
            self._lane(item.lane).left(item)
        elif all(other.finished for other in batch.asked or batch.items):
            self._cancel_attempts(batch, now)
            batch.refusal = batch.retry_at = None
            self._next_group(batch, now)
        return self._pump(now)

    def _expire_due(self, batch: Batch, now: float) -> None:
        for item in batch.items:
            if item.deadline <= now and not item.finished:
                self._finish(item, self._deadline_error(item))

    def _reject(self, batch: Batch, error: ClientError, items: Sequence[Item] | None = None) -> None:
        """Finish items with the error, by default all of the batch; each gets a copy of its own."""
        for item in batch.items if items is None else items:
            if not item.finished:
                own = copy.copy(error)
                own.__cause__ = error.__cause__
                self._finish(item, own)
        if items is None:
            self._close_batch(batch)

    def _reject_asked(self, batch: Batch, error: ClientError, now: float) -> None:
        """Finish with the error what the last attempt asked for, and go on with the rest."""
        self._reject(batch, error, batch.asked)
        self._next_group(batch, now)

    def _finish(self, item: Item, result: Any) -> None:
        if item.finished:
            return
        self._where.pop(id(item), None)
        item.finished = True
        item.result = result
        self._counters.finished(result)
        self._work.finished.append(item)

    def _close_batch(self, batch: Batch) -> None:
        if batch not in self._batches:
            return
        self._batches.remove(batch)
        batch.retry_at = batch.hedge_at = None
        if not batch.lane.urgent:
            self._in_flight -= 1
            self._in_flight_rows -= batch.rows

    def _end(self, attempt: Attempt) -> None:
        attempt.over = True
        attempt.batch.attempts.remove(attempt)
        attempt.batch.hedge_at = None
        self._targets.ended(attempt.target)

    def _cancel_attempts(self, batch: Batch, now: float) -> None:
        for attempt in tuple(batch.attempts):
            self._end(attempt)
            self._gave_up(attempt, now)
            self._work.cancels.append(attempt)

    def _gave_up(self, attempt: Attempt, now: float) -> None:
        """Nothing came from the target, be that its fault or not."""
        self._targets.breakers[attempt.target].gave_up(now)
        if now - attempt.started >= self._stall_s(attempt.batch.lane):
            self._targets.stalled(attempt.target, now)

    # The queue

    def _enqueue(self, item: Item) -> None:
        pending = self._lane(item.lane)
        pending.add(item)
        pending.back.came(item.rows)
        if not item.lane.urgent:
            self._queued_rows += item.rows
            self._queued_bytes += item.size_bytes

    def _dequeue(self, item: Item) -> None:
        if not item.lane.urgent:
            self._queued_rows -= item.rows
            self._queued_bytes -= item.size_bytes

    def _lane(self, lane: Lane) -> Pending:
        pending = self._lanes.get(lane.key)
        if pending is None:
            if len(self._lanes) >= _MAX_IDLE_LANES:
                busy = {batch.lane.key for batch in self._batches}
                self._lanes = {key: kept for key, kept in self._lanes.items() if kept.rows or key in busy}
            pending = self._lanes[lane.key] = Pending(lane)
        return pending

    def _flush(self) -> Work:
        work, self._work = self._work, Work()
        return work

    def _deadline_error(self, item: Item) -> ClientError:
        return self._errors.deadline(item, self._where.get(id(item)), self._load())

    def _circuit_error(self, rest_s: float) -> ClientError:
        return self._errors.circuit(max(breaker.failures for breaker in self._targets.breakers), rest_s)

    def _load(self) -> str:
        return f"{self._queued_rows} images wait and {self._in_flight} requests are under way"


def _too_large(failure: Failure) -> int | None:
    """How large a message may be, if that is what it says."""
    found = _TOO_LARGE.search(failure.details)
    return int(found[1]) if found and failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED else None
