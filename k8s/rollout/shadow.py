"""Ask two versions about the same images, and compare what they say and how long they take.

Images go one at a time to both versions, in an order that a coin decides, so that neither is always the one
whose image the server has just seen. Callers' own requests run beside; that is meant: it is the latency that
they would have.
"""

import random
import time
from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from statistics import median

from graftserve.client import Client, ClientError, InvalidImageError, Prediction

from .gate import Report

__all__ = ["compare", "score_shift"]

_SHOWN = 5
_WARM_UP = 3


def compare(
    stable: Client,
    canary: Client,
    images: Sequence[Path],
    *,
    seed: int,
    max_errors: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    now: Callable[[], float] = time.perf_counter,
) -> Report:
    """Ask both versions about `images`.

    max_errors: more errors of the canary than that end the replay: it has failed, and each may have taken all
        of the client's time.
    progress: told (done, total) after each image.
    Raises ClientError if both versions fail for another reason than the image.
    """
    coin = random.Random(seed)
    for path in images[:_WARM_UP]:  # connections, and what a server prepares at a version's first request
        for client in (stable, canary):
            _ask(client, path, now)
    tally = _Tally()
    for done, path in enumerate(images, start=1):
        pair = [("stable", stable), ("canary", canary)]
        if coin.random() < 0.5:
            pair.reverse()
        answers = {name: _ask(client, path, now) for name, client in pair}
        tally.add(str(path), answers["stable"], answers["canary"])
        progress(done, len(images))
        if tally.errors > max_errors:
            break
    return tally.report()


def score_shift(stable: Prediction, canary: Prediction) -> float:
    """The most that the score of a class must have changed by, in [0, 1].

    An answer names its best classes only. One that it does not name has at most the lowest score named, and
    at most what the named ones leave of 1; the value in that range that differs least is taken. A score that
    is no number counts as a shift of 1.
    """
    first, second = dict(stable.top), dict(canary.top)
    shift = 0.0
    for label in first.keys() | second.keys():
        if label in first and label in second:
            difference = abs(first[label] - second[label])
        elif label in first:
            difference = max(0.0, first[label] - _most_unnamed(second))
        else:
            difference = max(0.0, second[label] - _most_unnamed(first))
        if isnan(difference):
            return 1.0
        shift = max(shift, difference)
    return shift


def _most_unnamed(scores: dict[str, float]) -> float:
    return max(0.0, min(1.0 - sum(scores.values()), *scores.values())) if scores else 1.0


class _Tally:
    def __init__(self) -> None:
        self.errors = 0
        self._first_error = ""
        self._images = self._compared = self._agreed = self._stable_errors = self._unreadable = 0
        self._shift, self._shift_image = 0.0, ""
        self._stable_s: list[float] = []
        self._canary_s: list[float] = []
        self._disagreements: list[tuple[str, str, str]] = []

    def add(
        self,
        image: str,
        stable: tuple[Prediction | ClientError, float],
        canary: tuple[Prediction | ClientError, float],
    ) -> None:
        self._images += 1
        (first, first_s), (second, second_s) = stable, canary
        if isinstance(first, ClientError):
            if isinstance(first, InvalidImageError) and isinstance(second, InvalidImageError):
                self._unreadable += 1
            elif isinstance(second, ClientError):
                raise first  # it is not the image, and not the canary
            else:
                self._stable_errors += 1
            return
        if isinstance(second, ClientError):
            self.errors += 1
            self._first_error = self._first_error or f"{image}: {second}"
            return
        self._compared += 1
        self._stable_s.append(first_s)
        self._canary_s.append(second_s)
        if first.label == second.label:
            self._agreed += 1
        elif len(self._disagreements) < _SHOWN:
            self._disagreements.append((image, first.label, second.label))
        shift = score_shift(first, second)
        if shift > self._shift or not self._shift_image:
            self._shift, self._shift_image = shift, image

    def report(self) -> Report:
        nan = float("nan")
        both = bool(self._compared)
        stable_p50, canary_p50 = (median(self._stable_s), median(self._canary_s)) if both else (nan, nan)
        return Report(
            images=self._images,
            compared=self._compared,
            agreement=self._agreed / self._compared if both else nan,
            largest_shift=self._shift if both else nan,
            shift_image=self._shift_image,
            latency_ratio=canary_p50 / stable_p50 if both and stable_p50 > 0 else nan,
            stable_p50_ms=stable_p50 * 1e3,
            stable_p95_ms=_p95(self._stable_s) * 1e3,
            canary_p50_ms=canary_p50 * 1e3,
            canary_p95_ms=_p95(self._canary_s) * 1e3,
            errors=self.errors,
            first_error=self._first_error,
            stable_errors=self._stable_errors,
            unreadable=self._unreadable,
            disagreements=tuple(self._disagreements),
        )


def _ask(client: Client, path: Path, now: Callable[[], float]) -> tuple[Prediction | ClientError, float]:
    """The answer, or why there is none, and the seconds that it took."""
    since = now()
    answer: Prediction | ClientError
    try:
        answer = client.classify(path)
    except ClientError as error:
        answer = error
    return answer, now() - since


def _p95(seconds: Sequence[float]) -> float:
    """By rank, so that it is a time that was seen; NaN of none."""
    return sorted(seconds)[max(0, -(-len(seconds) * 95 // 100) - 1)] if seconds else float("nan")
