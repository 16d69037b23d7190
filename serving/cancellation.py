"""Whether anybody still waits for the answer to the request that the current thread is at.

A front door that can tell says so with `cancellable`; an engine whose requests wait for something asks with
`on_cancel`. It travels beside the calls in between, which have no use for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["AddCallback", "cancellable", "on_cancel"]

AddCallback = Callable[[Callable[[], None]], bool]
"""Takes what to call when the request is over; False if it is over, and nothing will be called. As
`grpc.RpcContext.add_callback`."""

_add_callback: ContextVar[AddCallback | None] = ContextVar("add_callback", default=None)


@contextmanager
def cancellable(add_callback: AddCallback) -> Iterator[None]:
    """What runs in the `with` block, on this thread, is for a request whose caller may go."""
    token = _add_callback.set(add_callback)
    try:
        yield
    finally:
        _add_callback.reset(token)


def on_cancel(callback: Callable[[], None]) -> bool:
    """Have `callback` called, on another thread, once the caller has gone; False if that is so already.

    It is called after the answer, too, and never where the front door cannot tell. It must be quick.
    """
    add_callback = _add_callback.get()
    return add_callback is None or add_callback(callback)
