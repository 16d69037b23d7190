"""Work of the client in a thread of its own, so that Ctrl-C ends the command and never hangs it."""

import threading
from collections.abc import Callable, Generator, Iterable
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

__all__ = ["interruptible"]

ItemT = TypeVar("ItemT")

_AHEAD: Final = 64
_END: Final = object()
# Python acts on a signal between two steps of the main thread. One that comes just before a wait, or to
# another thread, does not end the wait.
_AWAKE_S: Final = 0.2
_STOP_TIMEOUT_S: Final = 5.0


def interruptible(items: Iterable[ItemT], stop: Callable[[], object]) -> Generator[ItemT, None, None]:
    """The same items, taken in another thread, at most some dozens ahead; what they raise is raised here.

    A KeyboardInterrupt is raised in the main thread only. In the midst of gRPC's own code it can leave a call
    that nobody finishes, and grpc.Channel.close waits for that without end; here it meets but a queue.

    stop: ends what the other thread waits for, such as the client's `close`; called if this generator ends
        before the items do.
    """
    ready: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    room = threading.Semaphore(_AHEAD)
    stopped = threading.Event()

    def take() -> None:
        try:
            for item in items:
                room.acquire()
                if stopped.is_set():
                    return
                ready.put((item, None))
            ready.put((_END, None))
        except BaseException as error:
            ready.put((_END, error))

    # A daemon: it may wait for a line on stdin that never comes.
    thread = threading.Thread(target=take, name="graftserve-answers", daemon=True)
    thread.start()
    finished = False
    try:
        while True:
            try:
                item, error = ready.get(timeout=_AWAKE_S)
            except Empty:
                continue
            if item is _END:
                finished = True
                if error is not None:
                    raise error
                return
            room.release()
            yield item
    finally:
        if not finished:
            stopped.set()
            room.release()
            stop()
            thread.join(_STOP_TIMEOUT_S)
