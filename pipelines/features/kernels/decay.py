"""The exponentially weighted mean: a value's weight halves with every half-life of its age."""

from __future__ import annotations

from math import ldexp
from typing import NamedTuple

import numpy as np

from pipelines.features.kernels.compiled import inner
from pipelines.features.kernels.layout import EMPTY

WIDTH = 3
C_EWM = 0
_LN2 = 0.6931471805599453


class Decay(NamedTuple):
    """The accumulator: weights and weighted values as of ``newest``, the last value's time; half-life in us."""

    weight: float
    total: float
    half_life: int
    newest: int


NOTHING = Decay(0.0, 0.0, 1, EMPTY)


@inner
def halved(times: float) -> float:
    """2 ** -times for ``times`` >= 0, within two units in the last place.

    It is made of products and sums alone, in one order: a library's exp2 may take other instructions, and give other
    last bits, on another processor, and a gateway's values would differ from a worker's.
    """
    if not times < 1070.0:
        return 0.0
    whole = np.rint(times)
    x = (whole - times) * _LN2  # within +-0.35: the term of degree 14 is below 1e-17
    y = 1.0
    for k in range(13, 0, -1):
        y = 1.0 + x * y / k
    return ldexp(y, -int(whole))


@inner
def update(a: Decay, value: float, time: int) -> Decay:
    """The fold ``a`` and after it one more value; NaN changes nothing."""
    if np.isnan(value):
        return a
    if a.weight == 0.0:
        return Decay(1.0, value + 0.0, a.half_life, time)
    left = halved((time - a.newest) / a.half_life)
    return Decay(a.weight * left + 1.0, a.total * left + value, a.half_life, time)


@inner
def merge(a: Decay, b: Decay) -> Decay:
    """The fold of what ``a`` folds followed by what ``b`` folds."""
    if a.weight == 0.0:
        return b
    if b.weight == 0.0:
        return a
    left = halved((b.newest - a.newest) / a.half_life)
    return Decay(a.weight * left + b.weight, a.total * left + b.total, a.half_life, b.newest)


@inner
def finish(code: int, a: Decay, now: int) -> float:
    """The weighted mean, whatever ``now`` is: the same factor would stand above and below. NaN of nothing."""
    return a.total / a.weight


@inner
def load(like: Decay, words: np.ndarray, floats: np.ndarray, at: int) -> Decay:
    """The accumulator whose words begin at ``at``; ``like`` names the family and its half-life."""
    return Decay(floats[at + 1], floats[at + 2], like.half_life, words[at])


@inner
def store(a: Decay, words: np.ndarray, floats: np.ndarray, at: int) -> None:
    """Writes the accumulator into the words from ``at`` on."""
    words[at] = a.newest
    floats[at + 1] = a.weight
    floats[at + 2] = a.total
