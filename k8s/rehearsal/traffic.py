"""Callers that ask all the time, each over a connection of its own, and note every answer."""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from graftserve.client import Client, ClientError, RetryPolicy

from .steps import Answer

__all__ = ["Traffic", "TrafficError"]

_PAUSE_S: Final = 0.1  # after a failure: one cause should not be counted a thousand times a second
_ROUND_TIMEOUT_S: Final = 60.0


class TrafficError(Exception):
    """A caller got no answer for a minute."""


class Traffic:
    """A context manager: on entering the callers begin, on leaving they end with the call that they are in.

    images: their bytes and true labels, asked for in turn.
    callers: how many ask at a time.
    timeout_s: for each call. Each is tried once: a retry would hide a request that was lost.
    """

    def __init__(
        self,
        target: str,
        model: str,
        images: Sequence[tuple[bytes, str]],
        *,
        callers: int,
        timeout_s: float = 20.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target, self._model, self._images = target, model, images
        self._timeout_s = timeout_s
        self._now = now
        self._start_s = now()
        self._answers: list[Answer] = []
        self._stop = threading.Event()
        self._changed = threading.Condition()  # guards what the callers write
        self._last_sent_s = [-1.0] * callers
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(callers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def now_s(self) -> float:
        """Seconds since it was made, the clock of all answers."""
        return self._now() - self._start_s

    def answers(self) -> tuple[Answer, ...]:
        """What came so far, failures too, in the order of their end."""
        with self._changed:
            return tuple(self._answers)

    def wait_for_round(self) -> None:
        """Wait until each caller has had an answer to a request that was sent after this was called.

        By then nothing is under way that was sent before. Raises TrafficError after a minute.
        """
        since_s = self.now_s()
        with self._changed:
            if not self._changed.wait_for(lambda: min(self._last_sent_s) >= since_s, _ROUND_TIMEOUT_S):
                raise TrafficError(f"callers of {self._target} had no answer for {_ROUND_TIMEOUT_S:g} s")

    def _ask(self, caller: int) -> None:
        retry = RetryPolicy(max_attempts=1)
        with Client(self._target, self._model, retry=retry, timeout_s=self._timeout_s) as client:
            index = caller
            while not self._stop.is_set():
                image, label = self._images[index % len(self._images)]
                index += len(self._threads)
                answer = self._one(client, image, label)
                with self._changed:
                    self._answers.append(answer)
                    self._last_sent_s[caller] = answer.sent_s
                    self._changed.notify_all()
                if answer.error:
                    self._stop.wait(_PAUSE_S)

    def _one(self, client: Client, image: bytes, label: str) -> Answer:
        sent_s = self.now_s()
        try:
            prediction = client.classify(image)
        except ClientError as error:
            return Answer(sent_s, self.now_s() - sent_s, None, False, f"{type(error).__name__}: {error}")
        return Answer(sent_s, self.now_s() - sent_s, prediction.version, prediction.label == label)
