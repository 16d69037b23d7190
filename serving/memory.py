"""Keeps the process small and its pauses short while versions come and go."""

import ctypes
import gc
from collections.abc import Callable

__all__ = ["freeze", "release"]


def freeze() -> None:
    """Leave everything that is there now out of all later garbage collections.

    TensorFlow alone is a million objects. Looking through them, as each unload must, would stop every request
    for half a second. For a process that is a server and nothing else: what is frozen is never collected.
    """
    gc.collect()
    gc.freeze()


def release() -> None:
    """Free what a closed version leaves behind, and give the memory back to the system."""
    gc.collect()  # graphs, their tensors and sessions refer to each other in cycles
    if _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other systems' C libraries have none, and give memory back by themselves or not at all."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


_malloc_trim = _find_malloc_trim()
