"""How stored features are read from entity state.

A window is the suffix of the previous block of tiles, the prefix of this block and the open tile, blocks being
aligned to absolute time: the association that ``rolling`` has too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.features.kernels import decay, distinct, families, latest, moments, trend
from pipelines.features.kernels.compiled import compiled, inner
from pipelines.features.kernels.families import empty, finish, load, merge, newest
from pipelines.features.kernels.layout import (
    EMPTY,
    FLOOR,
    FRESH,
    L_OUT,
    L_ROW,
    L_SERIES,
    L_TILES,
    MISSING,
    NEVER,
    NEWEST,
    P_HEADER,
    P_LAGS,
    P_REACH,
    P_SERIES,
    P_TTL,
    P_WINDOWS,
    S_FAMILY,
    S_HALF_LIFE,
    S_HOP,
    S_RING,
    S_ROW,
    S_TILES,
    S_WIDTH,
    SEEN,
    STALE,
    W_OUTS,
    W_ROW,
    W_SERIES,
    W_TILES,
)
from pipelines.features.kernels.tiles import from_raw, load_tile


@inner
def judge(
    value: float, newest: int, now: int, ttl: int,
    values: np.ndarray, status: np.ndarray, age: np.ndarray | None, row: int, out: int,
) -> None:  # fmt: skip
    """Writes one value with its age and status; nothing newer than ``ttl`` (us) contributed to a STALE one."""
    values[out, row] = value
    if age is not None:
        age[out, row] = (now - newest) / 1e6 if newest != EMPTY else np.nan
    if np.isnan(value):
        status[row, out] = MISSING
    elif newest == EMPTY or now - newest > ttl:
        status[row, out] = STALE
    else:
        status[row, out] = FRESH


@inner
def _put(
    code: int, whole: Any, now: int, present: int, seconds: float, program: np.ndarray, w: int,
    values: np.ndarray, status: np.ndarray, age: np.ndarray | None, row: int,
) -> None:  # fmt: skip
    out = program[w + W_OUTS + code]
    if out >= 0:
        value = finish(code, whole, now)
        values[out, row] = value
        status[row, out] = MISSING if np.isnan(value) else present
        if age is not None:
            age[out, row] = seconds


@inner
def finish_window(
    whole: Any, program: np.ndarray, w: int, now: int,
    values: np.ndarray, status: np.ndarray, age: np.ndarray | None, row: int,
) -> None:  # fmt: skip
    """Writes the folds of the window at program word ``w``, whose accumulator at ``now`` is ``whole``."""
    last = newest(whole)
    present = STALE if last == EMPTY or now - last > program[P_TTL] else FRESH
    seconds = (now - last) / 1e6 if last != EMPTY else np.nan
    # One line per code: the compiler leaves of ``finish`` what that code needs, and in a loop it would not.
    _put(0, whole, now, present, seconds, program, w, values, status, age, row)
    _put(1, whole, now, present, seconds, program, w, values, status, age, row)
    _put(2, whole, now, present, seconds, program, w, values, status, age, row)
    _put(3, whole, now, present, seconds, program, w, values, status, age, row)
    _put(4, whole, now, present, seconds, program, w, values, status, age, row)
    _put(5, whole, now, present, seconds, program, w, values, status, age, row)
    _put(6, whole, now, present, seconds, program, w, values, status, age, row)
    _put(7, whole, now, present, seconds, program, w, values, status, age, row)
    _put(8, whole, now, present, seconds, program, w, values, status, age, row)
    _put(9, whole, now, present, seconds, program, w, values, status, age, row)
    _put(10, whole, now, present, seconds, program, w, values, status, age, row)


@inner
def _window(
    like: Any,
    state: np.ndarray,
    floats: np.ndarray,
    program: np.ndarray,
    w: int,
    now: int,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray | None,
    row: int,
) -> None:
    series = P_HEADER + program[w + W_SERIES] * S_ROW
    ring, width, tiles = program[series + S_RING], program[series + S_WIDTH], program[series + S_TILES]
    n = program[w + W_TILES]
    k = now // program[series + S_HOP]
    block = (k // n) * n
    suffix, prefix = empty(like), empty(like)
    place = (block - 1) % ring
    for tag in range(block - 1, k - n - 1, -1):
        at = tiles + place * width
        if state[at] == tag:
            suffix = merge(load(like, state, floats, at + 1), suffix)
        place = ring - 1 if place == 0 else place - 1
    place = block % ring
    for tag in range(block, k):
        at = tiles + place * width
        if state[at] == tag:
            prefix = merge(prefix, load(like, state, floats, at + 1))
        place = 0 if place == ring - 1 else place + 1
    if now >= state[NEWEST]:
        head = load_tile(like, state, floats, tiles + (k % ring) * width, k)
    else:
        head = from_raw(like, state, floats, program, series, k, now)
    finish_window(merge(merge(suffix, prefix), head), program, w, now, values, status, age, row)


@compiled
def read(
    state: np.ndarray, program: np.ndarray, mixed: bool | None, now: int,
    values: np.ndarray, status: np.ndarray, age: np.ndarray | None, row: int,
) -> bool:  # fmt: skip
    """Fills one column of stored features as of ``now``; False when the state has moved on too far for that.

    Nothing can be told of a time before the state's floor: then all of them are MISSING.

    values, age (seconds) float64[features, rows], status uint8[rows, features]; ``mixed`` is None for a
    program whose windows are all of MOMENTS: the code of other families is then not even compiled.
    Without ``age`` (None) ages are left out.
    """
    if state[SEEN] > 0 and now < state[NEWEST] - program[P_REACH]:
        return False
    if now < state[FLOOR]:
        values[:, row] = np.nan
        status[row, :] = MISSING
        if age is not None:
            age[:, row] = np.nan
        return True
    floats = state.view(np.float64)
    windows = P_HEADER + program[P_SERIES] * S_ROW
    lags = windows + program[P_WINDOWS] * W_ROW
    for w in range(windows, lags, W_ROW):
        series = P_HEADER + program[w + W_SERIES] * S_ROW
        family = program[series + S_FAMILY]
        if family == families.MOMENTS:
            _window(moments.NOTHING, state, floats, program, w, now, values, status, age, row)
        elif mixed is not None:
            if family == families.LATEST:
                _window(latest.NOTHING, state, floats, program, w, now, values, status, age, row)
            elif family == families.TREND:
                _window(trend.NOTHING, state, floats, program, w, now, values, status, age, row)
            elif family == families.DECAY:
                like = decay.Decay(0.0, 0.0, program[series + S_HALF_LIFE], EMPTY)
                _window(like, state, floats, program, w, now, values, status, age, row)
            else:
                _window(distinct.nothing(), state, floats, program, w, now, values, status, age, row)
    for at in range(lags, lags + program[P_LAGS] * L_ROW, L_ROW):
        series = P_HEADER + program[at + L_SERIES] * S_ROW
        tag = now // program[series + S_HOP] - program[at + L_TILES]
        tile = program[series + S_TILES] + (tag % program[series + S_RING]) * program[series + S_WIDTH]
        found = load_tile(latest.NOTHING, state, floats, tile, tag)
        # A lag is as old as it is meant to be.
        judge(found.last, found.newest, now, NEVER, values, status, age, row, program[at + L_OUT])
    return True
