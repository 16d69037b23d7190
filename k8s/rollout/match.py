"""Whether an object in the cluster is as a manifest says already: a pure function."""

from typing import Any

__all__ = ["says_all"]


def says_all(live: Any, wanted: Any) -> bool:
    """Whether `live` has all that `wanted` has, with these values. What it has beside does not matter.

    Both are JSON. Lists must agree item by item, and null is as good as absent. The same value in other
    words, such as 1Gi for 1024Mi, is another one.
    """
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(says_all(live.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(live, list) and len(live) == len(wanted) and all(map(says_all, live, wanted))
    return bool(live == wanted)
