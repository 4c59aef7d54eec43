"""How many different values: the smallest hashes seen (Bar-Yossef et al., RANDOM 2002; "k minimum values").

Exact below ``K`` values; from there on an estimate whose standard error is 1 / sqrt(K - 2), 13 %. The accumulator is
an int64 array: the newest value's time, how many hashes are kept, the hashes ascending. It is a function of the set
of values alone, so any order of merging gives the same bits.
"""

from __future__ import annotations

import numpy as np

from pipelines.features.kernels.compiled import inner
from pipelines.features.kernels.layout import EMPTY

K = 64
WIDTH = 2 + K
C_DISTINCT = 0
_LARGEST = float(1 << 63)


@inner
def nothing() -> np.ndarray:
    """A new accumulator of nothing."""
    a = np.zeros(WIDTH, np.int64)
    a[0] = EMPTY
    return a


@inner
def _hash(value: float, scratch: np.ndarray) -> int:
    """63 well-mixed bits of a float64 (the finaliser of SplitMix64, Steele et al., OOPSLA 2014); -0 counts as 0."""
    scratch[0] = value + 0.0
    x = scratch.view(np.uint64)[0]
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((x ^ (x >> np.uint64(31))) >> np.uint64(1))  # type: ignore[return-value]


@inner
def _keep(a: np.ndarray, found: int) -> None:
    count = a[1]
    if count == K and found >= a[1 + K]:
        return
    at = 2
    while at < 2 + count and a[at] < found:
        at += 1
    if at < 2 + count and a[at] == found:
        return
    if count < K:
        count += 1
        a[1] = count
    for later in range(1 + count, at, -1):
        a[later] = a[later - 1]
    a[at] = found


@inner
def update(a: np.ndarray, value: float, time: int) -> np.ndarray:
    """The fold ``a``, which is changed in place, and after it one more value; NaN changes nothing."""
    if not np.isnan(value):
        _keep(a, _hash(value, np.empty(1)))
        a[0] = time
    return a


@inner
def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A new fold of what ``a`` folds followed by what ``b`` folds."""
    merged = a.copy()
    for at in range(2, 2 + b[1]):
        _keep(merged, b[at])
    if b[0] != EMPTY:
        merged[0] = b[0]
    return merged


@inner
def finish(code: int, a: np.ndarray, now: int) -> float:
    """The number of different values, a whole number; 0 of nothing."""
    if a[1] < K:
        return float(a[1])
    return float(np.rint((K - 1) / (a[1 + K] / _LARGEST)))


@inner
def load(like: np.ndarray, words: np.ndarray, floats: np.ndarray, at: int) -> np.ndarray:
    """A copy of the accumulator whose words begin at ``at``; ``like`` names the family."""
    a = np.empty(WIDTH, np.int64)
    for place in range(WIDTH):
        a[place] = words[at + place]
    return a


@inner
def store(a: np.ndarray, words: np.ndarray, floats: np.ndarray, at: int) -> None:
    """Writes the accumulator into the words from ``at`` on."""
    for place in range(WIDTH):
        words[at + place] = a[place]
