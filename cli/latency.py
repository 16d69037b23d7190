"""Latencies in bins that widen with the latency: little memory, and a known error for any percentile."""

import math
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["PERCENTILES", "Histogram"]

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)

# Each doubling of the latency has so many bins of equal width, as in Gil Tene's HdrHistogram. Its Python
# package would bring pbr and setuptools at run time, for what are some lines here.
_BINS: Final = 128
RELATIVE_ERROR: Final = 1 / _BINS


class Histogram:
    """Latencies in seconds, 0 and more.

    A percentile is the upper edge of its bin: never below the true value, and above it by at most 1/128 of it
    (0.8%). The least, the largest and the mean are exact.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._sum_s = 0.0
        self.count = 0
        self.min_s = math.inf
        self.max_s = 0.0

    def add(self, latency_s: float) -> None:
        """Count one."""
        key = _bin(latency_s)
        self._counts[key] = self._counts.get(key, 0) + 1
        self.count += 1
        self._sum_s += latency_s
        self.min_s = min(self.min_s, latency_s)
        self.max_s = max(self.max_s, latency_s)

    @property
    def mean_s(self) -> float:
        """NaN if there are none."""
        return self._sum_s / self.count if self.count else math.nan

    def percentile_s(self, percent: float) -> float:
        """The least latency that at least `percent` of all do not exceed; NaN if there are none."""
        if not self.count:
            return math.nan
        # 1e-9: 99.9 percent of 1000 is 999, whatever binary fractions make of it.
        rank = max(1, math.ceil(percent / 100 * self.count - 1e-9))
        seen = 0
        for key in sorted(self._counts):
            seen += self._counts[key]
            if seen >= rank:
                return min(_upper_edge_s(key), self.max_s)
        return self.max_s

    def to_dict(self) -> Mapping[str, Any]:
        """`bins`: [upper edge in ms, count] of those that are not empty, ascending."""
        bins = [[_upper_edge_s(key) * 1e3, self._counts[key]] for key in sorted(self._counts)]
        return {"relative_error": RELATIVE_ERROR, "bins": bins}


def _bin(latency_s: float) -> int:
    # frexp: latency_s = fraction * 2**exponent with a fraction in [0.5, 1).
    fraction, exponent = math.frexp(latency_s)
    return exponent * _BINS + int((fraction - 0.5) * 2 * _BINS) if latency_s > 0 else -(2**31)


def _upper_edge_s(key: int) -> float:
    if key == -(2**31):
        return 0.0
    exponent, number = divmod(key, _BINS)
    return math.ldexp(0.5 + (number + 1) / (2 * _BINS), exponent)
