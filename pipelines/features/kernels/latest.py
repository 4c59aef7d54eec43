"""The last value of a part of time, for lags and windows of it alone: the smallest accumulator there is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipelines.features.kernels.compiled import inner
from pipelines.features.kernels.layout import EMPTY

WIDTH = 2
C_LAST = 0


class Latest(NamedTuple):
    """The accumulator."""

    last: float
    newest: int


NOTHING = Latest(np.nan, EMPTY)


@inner
def update(a: Latest, value: float, time: int) -> Latest:
    """The fold ``a`` and after it one more value; NaN changes nothing."""
    return a if np.isnan(value) else Latest(value, time)


@inner
def merge(a: Latest, b: Latest) -> Latest:
    """The fold of what ``a`` folds followed by what ``b`` folds."""
    return a if b.newest == EMPTY else b


@inner
def finish(code: int, a: Latest, now: int) -> float:
    """The last value, NaN of nothing."""
    return a.last


@inner
def load(like: Latest, words: np.ndarray, floats: np.ndarray, at: int) -> Latest:
    """The accumulator whose words begin at ``at``; ``like`` names the family."""
    return Latest(floats[at + 1], words[at])


@inner
def store(a: Latest, words: np.ndarray, floats: np.ndarray, at: int) -> None:
    """Writes the accumulator into the words from ``at`` on."""
    words[at] = a.newest
    floats[at + 1] = a.last
