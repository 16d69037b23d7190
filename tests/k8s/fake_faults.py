"""What goes wrong with the fake API server, when a test says so."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["APPLY", "Fault", "Request", "is_said"]

APPLY = "application/apply-patch+yaml"
FaultKind = Literal[
    "throttle",
    "unavailable",
    "internal",
    "forbidden",
    "unauthorized",
    "drop_before",
    "drop_after",
    "drop_watch",
    "gone",
    "hang",
]


@dataclass(frozen=True)
class Request:
    """What came in. body: parsed, None without one. manager: who writes, by fieldManager or User-Agent."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    manager: str
    content_type: str

    @property
    def is_watch(self) -> bool:
        return is_said(self.query.get("watch"))

    @property
    def is_apply(self) -> bool:
        return self.method == "PATCH" and self.content_type == APPLY

    @property
    def is_dry_run(self) -> bool:
        return "dryRun" in self.query


@dataclass
class Fault:
    """What goes wrong, with the requests that match `method`, `path` (a pattern in it) and `when`.

    kind: throttle (429), unavailable (503), internal (500), forbidden (403) and unauthorized (401) are
    answers, and nothing is done. drop_before and drop_after close the connection without an answer, before
    and after the request was done. hang waits for release(), and goes on then. drop_watch and gone (410) end
    a watch after `after_events` events, drop_watch in the middle of the line of the next one with `mid_line`.
    skip: how many matching requests pass first. times: how many it hits then; None for all.
    """

    kind: FaultKind
    method: str = ""
    path: str = ""
    when: Callable[[Request], bool] = lambda request: True
    skip: int = 0
    times: int | None = 1
    retry_after_s: int | None = 0
    after_events: int = 0
    mid_line: bool = False
    hits: int = field(default=0, init=False)
    hit: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    released: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def release(self) -> None:
        self.released.set()

    def strikes(self, request: Request) -> bool:
        """Whether it is this one's turn; counts."""
        matches = (
            self.method in ("", request.method)
            and re.search(self.path, request.path)
            and (request.is_watch or self.kind not in ("drop_watch", "gone"))
            and self.when(request)
        )
        if not matches or (self.times is not None and self.hits >= self.times):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        self.hit.set()
        return True


def is_said(value: str | None) -> bool:
    """As Go reads a query's flag."""
    return value is not None and value.lower() not in ("false", "0")
