"""The slope of values over time by least squares, in units per second.

Co-moments follow Chan, Golub & LeVeque (The American Statistician 37, 1983); times count from the part's first
value, so no precision is lost to the distance from the epoch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipelines.features.kernels.compiled import inner
from pipelines.features.kernels.layout import EMPTY

WIDTH = 7
C_SLOPE = 0


class Trend(NamedTuple):
    """The accumulator: mean time (seconds from ``origin``) and mean value, their squared and mixed deviations."""

    n: float
    seconds: float
    mean: float
    squares: float
    mixed: float
    origin: int
    newest: int


NOTHING = Trend(0.0, 0.0, 0.0, 0.0, 0.0, EMPTY, EMPTY)


@inner
def update(a: Trend, value: float, time: int) -> Trend:
    """The fold ``a`` and after it one more value; NaN changes nothing."""
    if np.isnan(value):
        return a
    if a.n == 0.0:
        return Trend(1.0, 0.0, value + 0.0, 0.0, 0.0, time, time)
    n = a.n + 1.0
    after = (time - a.origin) / 1e6 - a.seconds
    seconds = a.seconds + after / n
    mean = a.mean + (value - a.mean) / n
    squares = a.squares + after * ((time - a.origin) / 1e6 - seconds)
    return Trend(n, seconds, mean, squares, a.mixed + after * (value - mean), a.origin, time)


@inner
def merge(a: Trend, b: Trend) -> Trend:
    """The fold of what ``a`` folds followed by what ``b`` folds."""
    if a.n == 0.0:
        return b
    if b.n == 0.0:
        return a
    n = a.n + b.n
    after = ((b.origin - a.origin) / 1e6 + b.seconds) - a.seconds
    above = b.mean - a.mean
    share = b.n / n
    weight = a.n * share
    squares = (a.squares + b.squares) + after * after * weight
    mixed = (a.mixed + b.mixed) + after * above * weight
    return Trend(n, a.seconds + after * share, a.mean + above * share, squares, mixed, a.origin, b.newest)


@inner
def finish(code: int, a: Trend, now: int) -> float:
    """Units per second; NaN unless there are values at two different times."""
    return a.mixed / a.squares if a.squares > 0.0 else np.nan


@inner
def load(like: Trend, words: np.ndarray, floats: np.ndarray, at: int) -> Trend:
    """The accumulator whose words begin at ``at``; ``like`` names the family."""
    return Trend(
        floats[at + 1], floats[at + 2], floats[at + 3], floats[at + 4], floats[at + 5], words[at + 6], words[at]
    )


@inner
def store(a: Trend, words: np.ndarray, floats: np.ndarray, at: int) -> None:
    """Writes the accumulator into the words from ``at`` on."""
    words[at] = a.newest
    floats[at + 1] = a.n
    floats[at + 2] = a.seconds
    floats[at + 3] = a.mean
    floats[at + 4] = a.squares
    floats[at + 5] = a.mixed
    words[at + 6] = a.origin
