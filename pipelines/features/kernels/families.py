"""Families of folds that share an accumulator, and the operations that every kernel calls on any of them.

A family is a few plain functions over its accumulator: ``update`` with one value, ``merge`` of an earlier and a later
part, ``finish``, ``load`` and ``store``. The functions here are chosen by the accumulator's type when a kernel is
compiled, so a kernel is written once and each family has machine code of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from pipelines.features.kernels import decay, distinct, latest, moments, trend
from pipelines.features.kernels.layout import EMPTY

LATEST, MOMENTS, TREND, DECAY, DISTINCT = range(5)
WIDTHS = {
    LATEST: latest.WIDTH,
    MOMENTS: moments.WIDTH,
    TREND: trend.WIDTH,
    DECAY: decay.WIDTH,
    DISTINCT: distinct.WIDTH,
}

_OF_TUPLE = {latest.Latest: latest, moments.Moments: moments, trend.Trend: trend, decay.Decay: decay}


def _module(accumulator: Any) -> Any:
    if isinstance(accumulator, types.BaseNamedTuple):
        kind: Any = accumulator
        return _OF_TUPLE[kind.instance_class]
    return distinct


def empty(like: Any) -> Any:
    """The fold of nothing, of the family of ``like``: the identity of ``merge``."""
    raise NotImplementedError("compiled kernels call this")


def update(a: Any, value: float, time: int) -> Any:
    """The fold ``a``, which must not be used again, and after it one more value at ``time`` (us)."""
    raise NotImplementedError("compiled kernels call this")


def merge(a: Any, b: Any) -> Any:
    """The fold of what ``a`` folds followed by what ``b`` folds."""
    raise NotImplementedError("compiled kernels call this")


def finish(code: int, a: Any, now: int) -> float:
    """The value of the fold ``code`` at ``now`` (us)."""
    raise NotImplementedError("compiled kernels call this")


def newest(a: Any) -> int:
    """The time of the newest value, ``EMPTY`` when there is none."""
    raise NotImplementedError("compiled kernels call this")


def load(like: Any, words: np.ndarray, floats: np.ndarray, at: int) -> Any:
    """The accumulator whose words begin at ``at``, of the family of ``like``; ``floats`` is a view of ``words``."""
    raise NotImplementedError("compiled kernels call this")


def store(a: Any, words: np.ndarray, floats: np.ndarray, at: int) -> None:
    """Writes the accumulator into the words from ``at`` on."""
    raise NotImplementedError("compiled kernels call this")


@overload(empty, strict=False)
def _empty(like: Any) -> Any:
    module = _module(like)
    if module is distinct:
        nothing = distinct.nothing
        return lambda like: nothing()
    if module is decay:
        kind = decay.Decay
        return lambda like: kind(0.0, 0.0, like.half_life, EMPTY)
    constant = module.NOTHING
    return lambda like: constant


@overload(update, strict=False)
def _update(a: Any, value: Any, time: Any) -> Any:
    chosen = _module(a).update
    return lambda a, value, time: chosen(a, value, time)


@overload(merge, strict=False)
def _merge(a: Any, b: Any) -> Any:
    chosen = _module(a).merge
    return lambda a, b: chosen(a, b)


@overload(finish, strict=False)
def _finish(code: Any, a: Any, now: Any) -> Any:
    chosen = _module(a).finish
    return lambda code, a, now: chosen(code, a, now)


@overload(newest, strict=False)
def _newest(a: Any) -> Any:
    if _module(a) is distinct:
        return lambda a: a[0]
    return lambda a: a.newest


@overload(load, strict=False)
def _load(like: Any, words: Any, floats: Any, at: Any) -> Any:
    chosen = _module(like).load
    return lambda like, words, floats, at: chosen(like, words, floats, at)


@overload(store, strict=False)
def _store(a: Any, words: Any, floats: Any, at: Any) -> Any:
    chosen = _module(a).store
    return lambda a, words, floats, at: chosen(a, words, floats, at)
