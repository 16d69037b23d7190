"""The CPU time of a process by what its threads are for.

Imports nothing but the standard library.
"""

import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Times", "by_group", "group_of", "thread_times"]

_NUMBERED = re.compile(r"(?<![\d.])[-_]?\d+(_\d+)?$")
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Times:
    """CPU seconds in the program's own code and in the system's, of so many threads."""

    user_s: float = 0.0
    system_s: float = 0.0
    threads: int = 1

    @property
    def total_s(self) -> float:
        return self.user_s + self.system_s


def thread_times() -> dict[int, tuple[str, Times]]:
    """Of each of this process' threads by its id: the name that Python knows, or else the system's."""
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    found = {}
    for task in _TASKS.iterdir():
        with suppress(OSError):  # it has ended meanwhile
            head, _, tail = (task / "stat").read_text().rpartition(")")
            fields = tail.split()
            name = python.get(int(task.name), head.partition("(")[2])
            found[int(task.name)] = name, Times(int(fields[11]) * tick_s, int(fields[12]) * tick_s)
    return found


def group_of(name: str) -> str:
    """The name without the thread's own number: "litert-1" and "litert-2" are "litert-N"."""
    short = _NUMBERED.sub("", name)
    return short if short == name else f"{short}-N"


def by_group(
    before: Mapping[int, tuple[str, Times]], after: Mapping[int, tuple[str, Times]]
) -> dict[str, Times]:
    """What threads did in between, of those that are there afterwards; the busiest group first."""
    groups: dict[str, Times] = {}
    for number, (name, times) in after.items():
        _, began = before.get(number, ("", Times()))
        group = groups.get(group_of(name), Times(threads=0))
        groups[group_of(name)] = Times(
            group.user_s + times.user_s - began.user_s,
            group.system_s + times.system_s - began.system_s,
            group.threads + 1,
        )
    return dict(sorted(groups.items(), key=lambda item: -item[1].total_s))
