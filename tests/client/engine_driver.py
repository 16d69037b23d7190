"""A shell for the engine without threads, clocks or network: time moves when a test says so."""

import math

import grpc

from graftserve.client.attempts import Failure
from graftserve.client.batching import Item
from graftserve.client.engine import Engine
from graftserve.client.errors import InvalidImageError, ModelMismatchError
from graftserve.client.options import Options

CODE = grpc.StatusCode


class PlainLane:
    """Items whose content is text; an answer says it again.

    form: how requests are written; `adapt` takes over the metadata's, unless `rigid`.
    """

    method = None
    signature = ""
    metadata = ()

    def __init__(self, key="plain", *, merges=True, urgent=False, retries=True, form="old", rigid=False):
        self.key, self.merges, self.urgent, self.retries = key, merges, urgent, retries
        self.form, self.rigid = form, rigid

    def adapt(self, metadata):
        changed = not self.rigid and metadata != self.form
        if changed:
            self.form = metadata
        return changed

    def explain(self, metadata, error, contents):
        return None if metadata == self.form else ModelMismatchError(f"the model is {metadata}")

    def blame(self, error):
        return InvalidImageError(f"refused alone: {error.details}", code=error.code, details=error.details)


class Driver:
    """An engine and what it has said so far; checks after every event that its books are right.

    under_way: attempts that are sent and not over, oldest first; cancelled: those to be cancelled, in order.
    """

    def __init__(self, *, targets=("a:1",), random=lambda: 0.5, **options):
        self.options = Options(targets=tuple(targets), model="m", **options)
        self.metadata_lane = PlainLane("metadata", merges=False, urgent=True)
        self.now = 100.0
        self.engine = Engine(self.options, self.metadata_lane, self.now, random)
        self.lane = PlainLane()
        self.items = []
        self.under_way = []
        self.cancelled = []
        self.sent = 0

    # Events

    def submit(self, *contents, lane=None, timeout_s=10.0, rows=1, size_bytes=1):
        """Items with these contents, as one submission."""
        items = [
            Item(lane or self.lane, content, rows, size_bytes, self.now + timeout_s, self._notified)
            for content in contents
        ]
        self.items += items
        self._do(self.engine.submit(items, self.now))
        return items

    def answer(self, attempt, results=None):
        """The target answers."""
        self._ended(attempt)
        if results is None:
            results = [f"re {item.content}" for item in attempt.items]
        self._do(self.engine.answered(attempt, results, self.now))

    def fail(self, attempt, code=CODE.UNAVAILABLE, details="", pushback_s=None, error=None):
        """The target, or gRPC, fails the attempt."""
        self._ended(attempt)
        self._do(self.engine.failed(attempt, Failure(code, details, pushback_s, error), self.now))

    def stalled(self, attempt):
        """The thread that waits for the attempt gives up."""
        self._ended(attempt)
        self._do(self.engine.stalled(attempt, self.now))

    def expire(self, item):
        """Its deadline has passed."""
        self._do(self.engine.expire(item, self.now))

    def leave(self, item):
        """Its caller waits no more."""
        self._do(self.engine.leave(item, self.now))

    def close(self):
        """Close the client."""
        self._do(self.engine.close(self.now))

    def sleep(self, seconds):
        """Time passes; the engine is woken when it wants to be, and items expire when they should."""
        until = self.now + seconds
        while True:
            deadline = min((item.deadline for item in self.items if not item.finished), default=math.inf)
            wake = self.engine.wake_at(self.now)
            if min(wake, deadline) > until:
                break
            self.now = max(self.now, min(wake, deadline))
            if wake <= self.now:
                self._do(self.engine.tick(self.now))
                assert self.engine.wake_at(self.now) > self.now, "it wants to be woken for ever"
            for item in self.items:
                if item.deadline <= self.now and not item.finished:
                    self.expire(item)
        self.now = until

    # What came of it

    @property
    def stats(self):
        return self.engine.stats()

    def only(self):
        """The one attempt under way."""
        (attempt,) = self.under_way
        return attempt

    def contents(self):
        """What is asked in the attempts under way."""
        return [[item.content for item in attempt.items] for attempt in self.under_way]

    def idle(self):
        """Nothing is left of all that was."""
        stats = self.stats
        assert all(item.finished for item in self.items)
        assert not self.under_way
        assert (stats.queued, stats.in_flight) == (0, 0)
        assert [target.in_flight for target in stats.targets] == [0] * len(stats.targets)
        assert not self.engine._batches
        assert not self.engine._where
        assert not any(pending.rows or pending.size_bytes for pending in self.engine._lanes.values())
        assert (self.engine._queued_bytes, self.engine._in_flight_rows) == (0, 0)
        assert self.engine.wake_at(self.now) == math.inf
        assert stats.items == len(self.items) == stats.succeeded + stats.failed
        return True

    def _notified(self, item):
        item.caller = (item.caller or 0) + 1

    def _ended(self, attempt):
        if attempt in self.under_way:
            self.under_way.remove(attempt)

    def _do(self, work):
        for item in work.finished:
            assert item.finished
            item.notify(item)
            assert item.caller == 1, f"{item.content} was finished twice"
        for attempt in work.cancels:
            self.under_way.remove(attempt)
            self.cancelled.append(attempt)
        self.under_way += work.sends
        self.sent += len(work.sends)
        self._check()

    def _check(self):
        engine, stats = self.engine, self.stats
        live = [item for item in self.items if not item.finished]
        assert all(item.caller is None for item in live)
        assert all(item.caller == 1 for item in self.items if item.finished)
        # Every attempt is known to both sides, and to its target.
        assert all(not attempt.over for attempt in self.under_way)
        assert {id(a) for batch in engine._batches for a in batch.attempts} == {id(a) for a in self.under_way}
        for number, target in enumerate(stats.targets):
            assert target.in_flight == sum(attempt.target == number for attempt in self.under_way)
        # Every live item waits in the queue or in a batch, and something will come of that.
        for batch in engine._batches:
            assert batch.attempts or batch.retry_at is not None
            assert any(not item.finished for item in batch.items)
        batched = [item for item in live if id(item) in engine._where]
        assert len(engine._where) == len(batched)
        queued = [item for item in live if id(item) not in engine._where]
        ordinary = [item for item in queued if not item.lane.urgent]
        assert stats.queued == sum(item.rows for item in ordinary)
        assert engine._queued_bytes == sum(item.size_bytes for item in ordinary)
        assert sum(pending.rows for pending in engine._lanes.values()) == sum(item.rows for item in queued)
        batches = [batch for batch in engine._batches if not batch.lane.urgent]
        assert stats.in_flight == len(batches) <= self.options.max_in_flight
        assert engine._in_flight_rows == sum(batch.rows for batch in batches)
        if queued and stats.in_flight < stats.max_in_flight:
            assert self.now <= engine.wake_at(self.now) < math.inf
