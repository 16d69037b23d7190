"""CPU time by thread."""

import os
import threading
import time

import pytest

from benchmarks.threads import Times, by_group, group_of, thread_times


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("litert-0", "litert-N"),
        ("litert-12", "litert-N"),
        ("graftserve-grpc_3", "graftserve-grpc-N"),
        ("ThreadPoolExecutor-1_0", "ThreadPoolExecutor-N"),
        ("grpcpp_sync7", "grpcpp_sync-N"),
        ("event_engine", "event_engine"),
        ("python3.11", "python3.11"),
        ("Thread-1 (_serve)", "Thread-1 (_serve)"),
    ],
)
def test_groups_are_names_without_numbers(name: str, group: str) -> None:
    assert group_of(name) == group


def test_only_what_was_used_in_between_counts() -> None:
    before = {1: ("work-0", Times(1.0, 2.0)), 2: ("main", Times(5.0, 5.0)), 4: ("ended", Times(1.0))}
    after = {
        1: ("work-0", Times(1.5, 2.25)),
        2: ("main", Times(5.0, 5.5)),
        3: ("work-1", Times(0.25, 0.25)),
    }
    groups = by_group(before, after)
    assert groups == {"work-N": Times(0.75, 0.5, threads=2), "main": Times(0.0, 0.5)}
    assert list(groups) == ["work-N", "main"]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux' /proc")
def test_a_thread_that_works_is_seen_by_its_name() -> None:
    done, leave = threading.Event(), threading.Event()

    def work() -> None:
        while time.thread_time() < 0.1:
            pass
        done.set()
        leave.wait()

    before = thread_times()
    thread = threading.Thread(target=work, name="busy-7")
    thread.start()
    done.wait()
    groups = by_group(before, thread_times())
    leave.set()
    thread.join()
    assert groups["busy-N"].threads == 1
    assert groups["busy-N"].total_s > 0.05
