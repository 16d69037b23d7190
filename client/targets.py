"""Which of several targets to ask, and which to leave alone: pure, time is passed in.

A target is an address as gRPC takes it; behind one may be many replicas, among which gRPC itself chooses.
Source of the breaker: Michael Nygard, "Release It!" (2007), ch. 5; the waits are those of `retry`.
"""

import math
from collections.abc import Sequence
from typing import Final

__all__ = ["Breaker", "Targets"]

_FAILURES: Final = 5
_FAILING_S: Final = 3.0
_FIRST_REST_S: Final = 0.5
_MAX_REST_S: Final = 10.0
_STALLED_S: Final = 10.0


class Breaker:
    """The circuit breaker of one target.

    It opens when five attempts in a row have failed over at least three seconds: a restart takes less, and
    retries bridge that. While it is open nothing is sent but one attempt at the end of each rest, which
    closes it if it succeeds and doubles the rest, up to ten seconds, if not.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._failing_since = 0.0
        self._rest_s = _FIRST_REST_S
        self._probe_at: float | None = None  # None: closed

    @property
    def is_open(self) -> bool:
        """Whether the target is left alone."""
        return self._probe_at is not None

    def opens_at(self, now: float) -> float:
        """When the next attempt may be sent: `now`, or a later moment; infinity while one is on trial."""
        return now if self._probe_at is None else max(now, self._probe_at)

    def sent(self) -> None:
        """An attempt goes out. While open it is the one on trial."""
        if self._probe_at is not None:
            self._probe_at = math.inf

    def succeeded(self) -> None:
        """The target answered, be it with an error of its own."""
        self.failures = 0
        self._rest_s = _FIRST_REST_S
        self._probe_at = None

    def failed(self, now: float, random: float) -> None:
        """The target could not be reached, or went away; random: uniform in [0, 1)."""
        if not self.failures:
            self._failing_since = now
        self.failures += 1
        on_trial = self._probe_at == math.inf
        lasting = self.failures >= _FAILURES and now - self._failing_since >= _FAILING_S
        # While it rests, only what was sent before can fail.
        if on_trial or (lasting and self._probe_at is None):
            self._probe_at = now + self._rest_s * (0.5 + 0.5 * random)
            self._rest_s = min(2 * self._rest_s, _MAX_REST_S)

    def gave_up(self, now: float) -> None:
        """The attempt was cancelled: nothing was learned."""
        if self._probe_at == math.inf:
            self._probe_at = now


class Targets:
    """Chooses the target with the fewest requests under way among those whose circuit is closed.

    For ten seconds after a request stalled at one, it is asked only if all have stalled: a server that hangs
    looks idle, because what it does not answer is given up.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self.names = tuple(targets)
        self.breakers = tuple(Breaker() for _ in targets)
        self.in_flight = [0] * len(targets)
        self._stalled_until = [-math.inf] * len(targets)
        self._turn = 0

    def pick(self, now: float, *, avoid: Sequence[int] = (), even_open: bool = False) -> int | None:
        """The number of the target to ask next, or None if all are to be left alone.

        avoid: those that have this request already; taken only if there is no other.
        even_open: do not ask the breakers.
        """
        count = len(self.names)
        best: tuple[bool, bool, int, int] | None = None
        choice = None
        for step in range(count):
            number = (self._turn + step) % count
            if not even_open and self.breakers[number].opens_at(now) > now:
                continue
            stalled = now < self._stalled_until[number]
            rank = (number in avoid, stalled, self.in_flight[number], step)
            if best is None or rank < best:
                best, choice = rank, number
        if choice is not None:
            self._turn = (choice + 1) % count
        return choice

    def opens_at(self, now: float) -> float:
        """When the first of them may be asked: `now` if one may be at once."""
        return min(breaker.opens_at(now) for breaker in self.breakers)

    def sent(self, number: int) -> None:
        """A request goes to this target."""
        self.in_flight[number] += 1
        self.breakers[number].sent()

    def ended(self, number: int) -> None:
        """A request to this target has ended, however it did."""
        self.in_flight[number] -= 1

    def answered(self, number: int) -> None:
        """This target answered a request, be it with an error of its own."""
        self._stalled_until[number] = -math.inf
        self.breakers[number].succeeded()

    def stalled(self, number: int, now: float) -> None:
        """A request to this target was given up after long silence."""
        self._stalled_until[number] = now + _STALLED_S
