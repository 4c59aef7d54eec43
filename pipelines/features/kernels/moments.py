"""Count, sum, mean, spread, extremes, first and last of the values of a part of time, and how many were null.

Mean and spread come from sums of differences from the part's first value. As that value is one of the part, the sum of
squared differences from the mean is at least ``first_difference_of_the_mean ** 2``, so no more than about n units in
the last place are lost, however far the values lie from zero; and an update or a merge has no division (compare Chan,
Golub & LeVeque, The American Statistician 37, 1983, on shifted data).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipelines.features.kernels.compiled import inner
from pipelines.features.kernels.layout import EMPTY

WIDTH = 10
C_COUNT, C_SUM, C_MEAN, C_MIN, C_MAX, C_STD, C_FIRST, C_LAST, C_DELTA, C_MISSING, C_SINCE = range(11)


class Moments(NamedTuple):
    """The accumulator: ``sum1`` and ``sum2`` are of differences from ``first``; ``newest`` is the last value's time."""

    n: float
    total: float
    sum1: float
    sum2: float
    low: float
    high: float
    first: float
    last: float
    nulls: float
    newest: int


NOTHING = Moments(0.0, 0.0, 0.0, 0.0, np.nan, np.nan, np.nan, np.nan, 0.0, EMPTY)


@inner
def update(a: Moments, value: float, time: int) -> Moments:
    """The fold ``a`` and after it one more value; NaN is a null."""
    if np.isnan(value):
        return Moments(a.n, a.total, a.sum1, a.sum2, a.low, a.high, a.first, a.last, a.nulls + 1.0, a.newest)
    if a.n == 0.0:
        return Moments(1.0, value + 0.0, 0.0, 0.0, value, value, value, value, a.nulls, time)
    d = value - a.first
    low = value if value < a.low else a.low
    high = value if value > a.high else a.high
    return Moments(a.n + 1.0, a.total + value, a.sum1 + d, a.sum2 + d * d, low, high, a.first, value, a.nulls, time)


@inner
def merge(a: Moments, b: Moments) -> Moments:
    """The fold of what ``a`` folds followed by what ``b`` folds."""
    nulls = a.nulls + b.nulls
    if a.n == 0.0:
        return Moments(b.n, b.total, b.sum1, b.sum2, b.low, b.high, b.first, b.last, nulls, b.newest)
    if b.n == 0.0:
        return Moments(a.n, a.total, a.sum1, a.sum2, a.low, a.high, a.first, a.last, nulls, a.newest)
    d = b.first - a.first
    moved = b.n * d
    sum1 = a.sum1 + (b.sum1 + moved)
    sum2 = a.sum2 + (b.sum2 + d * (2.0 * b.sum1 + moved))
    low = b.low if b.low < a.low else a.low
    high = b.high if b.high > a.high else a.high
    return Moments(a.n + b.n, a.total + b.total, sum1, sum2, low, high, a.first, b.last, nulls, b.newest)


@inner
def finish(code: int, a: Moments, now: int) -> float:
    """The value of one fold at ``now``.

    Of no value, count and sum are 0 and the others NaN; the spread needs two values; the share missing is NaN when
    there was no event at all.
    """
    if code == C_COUNT:
        return a.n
    if code == C_SUM:
        return a.total
    if code == C_MEAN:
        return a.first + a.sum1 / a.n  # NaN of nothing
    if code == C_STD:
        squares = a.sum2 - a.sum1 * (a.sum1 / a.n)
        return np.sqrt(max(squares, 0.0) / (a.n - 1.0)) if a.n >= 2.0 else np.nan
    if code == C_MIN:
        return a.low
    if code == C_MAX:
        return a.high
    if code == C_FIRST:
        return a.first
    if code == C_LAST:
        return a.last
    if code == C_DELTA:
        return a.last - a.first
    if code == C_MISSING:
        return a.nulls / (a.n + a.nulls)  # 0 / 0 is NaN
    return (now - a.newest) / 1e6 if a.n > 0.0 else np.nan


@inner
def load(like: Moments, words: np.ndarray, floats: np.ndarray, at: int) -> Moments:
    """The accumulator whose words begin at ``at``; ``like`` names the family."""
    return Moments(
        floats[at + 1], floats[at + 2], floats[at + 3], floats[at + 4], floats[at + 5], floats[at + 6],
        floats[at + 7], floats[at + 8], floats[at + 9], words[at],
    )  # fmt: skip


@inner
def store(a: Moments, words: np.ndarray, floats: np.ndarray, at: int) -> None:
    """Writes the accumulator into the words from ``at`` on."""
    words[at] = a.newest
    floats[at + 1] = a.n
    floats[at + 2] = a.total
    floats[at + 3] = a.sum1
    floats[at + 4] = a.sum2
    floats[at + 5] = a.low
    floats[at + 6] = a.high
    floats[at + 7] = a.first
    floats[at + 8] = a.last
    floats[at + 9] = a.nulls
