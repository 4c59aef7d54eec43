"""Every compiled kernel of features: folds, and how entity state is written, read and swept.

Served and trained values are equal bit for bit because both come from these functions and from no others.
They stand in one file because numba's cache watches only the file of the function that it compiled.

A fold is three functions over ``(n, sum, mean, M2, min, max, last, newest)``: ``update`` with one value,
``merge`` of an earlier and a later part, ``finish``. Moments follow Welford (Technometrics 4, 1962) and Chan,
Golub & LeVeque (The American Statistician 37, 1983). ``fastmath`` stays off: it would let the compiler
reassociate. ``pipelines.features.windows`` writes the ``program`` that the kernels follow; the layout of
entity state is described there and has the version ``FORMAT``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

FORMAT = 1
EMPTY = -(1 << 62)  # a tile tag or a time that no event has

# Words of the state's header.
VERSION, NEWEST, START, COUNT, UNPLACED, SEEN, HEADER = 0, 1, 2, 3, 4, 5, 8
# A tile: its tag, the time of its newest value, that value; a wide tile goes on with the moments.
NARROW, WIDE = 3, 9
# Words of the program's header, then rows of series, windows and lags.
P_SERIES, P_WINDOWS, P_LAGS, P_FIELDS, P_REACH, P_FIXED, P_TTL, P_HEADER = 0, 1, 2, 3, 4, 5, 6, 8
S_FIELD, S_HOP, S_RING, S_WIDTH, S_SETTLED, S_TILES, S_ROW = 0, 1, 2, 3, 4, 5, 6
W_SERIES, W_TILES, W_OUT, W_FOLDS, W_CODES, W_ROW = 0, 1, 2, 3, 4, 11
L_SERIES, L_TILES, L_OUT, L_ROW = 0, 1, 2, 3

C_COUNT, C_SUM, C_MEAN, C_MIN, C_MAX, C_STD, C_LAST = 0, 1, 2, 3, 4, 5, 6
FRESH, STALE, MISSING = 0, 1, 3  # served.Status, as numba sees it

Parts = tuple[float, float, float, float, float, float, float, int]
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def _compiled(kernel: _Kernel) -> _Kernel:
    compiled: Any = njit(cache=True, fastmath=False, error_model="numpy", nogil=True)(kernel)
    kept: _Kernel = compiled
    return kept


@_compiled
def empty() -> Parts:
    """The fold of nothing: the identity of ``merge``."""
    return (0.0, 0.0, 0.0, 0.0, np.nan, np.nan, np.nan, EMPTY)


@_compiled
def update(a: Parts, value: float, time: int) -> Parts:
    """The fold ``a`` and after it one more value, which must not be NaN."""
    n = a[0] + 1.0
    delta = value - a[2]
    mean = a[2] + delta / n
    low = value if n == 1.0 or value < a[4] else a[4]
    high = value if n == 1.0 or value > a[5] else a[5]
    return (n, a[1] + value, mean, a[3] + delta * (value - mean), low, high, value, time)


@_compiled
def merge(a: Parts, b: Parts) -> Parts:
    """The fold of what ``a`` folds followed by what ``b`` folds."""
    if a[0] == 0.0:
        return b
    if b[0] == 0.0:
        return a
    n = a[0] + b[0]
    delta = b[2] - a[2]
    mean = a[2] + delta * (b[0] / n)
    m2 = (a[3] + b[3]) + delta * delta * (a[0] * b[0] / n)
    low = b[4] if b[4] < a[4] else a[4]
    high = b[5] if b[5] > a[5] else a[5]
    return (n, a[1] + b[1], mean, m2, low, high, b[6], b[7])


@_compiled
def finish(code: int, a: Parts) -> float:
    """The value of one fold: of nothing, count and sum are 0 and the others NaN; std needs two values."""
    if code == C_COUNT:
        return a[0]
    if code == C_SUM:
        return a[1]
    if code == C_STD:
        return np.sqrt(a[3] / (a[0] - 1.0)) if a[0] >= 2.0 else np.nan
    if a[0] == 0.0:
        return np.nan
    if code == C_MEAN:
        return a[2]
    if code == C_MIN:
        return a[4]
    if code == C_MAX:
        return a[5]
    return a[6]


@_compiled
def _load(state: np.ndarray, floats: np.ndarray, at: int, tag: int, width: int) -> Parts:
    """The tile at word ``at`` when it is tile ``tag``, else nothing."""
    if state[at] != tag:
        return empty()
    if width == NARROW:
        return (1.0, 0.0, 0.0, 0.0, np.nan, np.nan, floats[at + 2], state[at + 1])
    return (
        floats[at + 3], floats[at + 4], floats[at + 5], floats[at + 6], floats[at + 7], floats[at + 8],
        floats[at + 2], state[at + 1],
    )  # fmt: skip


@_compiled
def _store(state: np.ndarray, floats: np.ndarray, at: int, tag: int, width: int, a: Parts) -> None:
    state[at] = tag
    state[at + 1] = a[7]
    floats[at + 2] = a[6]
    if width == WIDE:
        floats[at + 3] = a[0]
        floats[at + 4] = a[1]
        floats[at + 5] = a[2]
        floats[at + 6] = a[3]
        floats[at + 7] = a[4]
        floats[at + 8] = a[5]


@_compiled
def _from_raw(state: np.ndarray, floats: np.ndarray, program: np.ndarray, series: int, tag: int, until: int) -> Parts:
    """Tile ``tag`` of a series folded again: its settled part, then its raw events up to time ``until``."""
    a = _load(state, floats, program[series + S_SETTLED], tag, program[series + S_WIDTH])
    hop = program[series + S_HOP]
    row = 2 + program[P_FIELDS]
    first = program[P_FIXED] + state[START] * row
    for at in range(first, first + state[COUNT] * row, row):
        if state[at] > until:
            break
        value = floats[at + 2 + program[series + S_FIELD]]
        if state[at] // hop == tag and not np.isnan(value):
            a = update(a, value, state[at])
    return a


@_compiled
def _settle(state: np.ndarray, floats: np.ndarray, program: np.ndarray) -> None:
    """Moves raw events that nothing can precede any more into the settled part of their tiles."""
    row = 2 + program[P_FIELDS]
    while state[COUNT] > 0:
        at = program[P_FIXED] + state[START] * row
        if state[at] >= state[NEWEST] - program[P_REACH]:
            break
        for s in range(program[P_SERIES]):
            series = P_HEADER + s * S_ROW
            value = floats[at + 2 + program[series + S_FIELD]]
            if np.isnan(value):
                continue
            tag = state[at] // program[series + S_HOP]
            settled, width = program[series + S_SETTLED], program[series + S_WIDTH]
            a = update(_load(state, floats, settled, tag, width), value, state[at])
            _store(state, floats, settled, tag, width, a)
        state[START] += 1
        state[COUNT] -= 1


@_compiled
def _insert(
    state: np.ndarray, floats: np.ndarray, program: np.ndarray, time: int, order: int, values: np.ndarray
) -> None:
    """Puts one event in its canonical place and folds the tiles that it touches.

    ``state`` must have room for one more raw event behind the last.
    """
    if state[SEEN] > 0 and time < state[NEWEST] - program[P_REACH]:
        state[UNPLACED] += 1
        return
    row = 2 + program[P_FIELDS]
    first = program[P_FIXED] + state[START] * row
    end = first + state[COUNT] * row
    at = end
    while at > first and (state[at - row] > time or (state[at - row] == time and state[at - row + 1] > order)):
        for word in range(row):
            state[at + word] = state[at - row + word]
        at -= row
    state[at] = time
    state[at + 1] = order
    for field in range(program[P_FIELDS]):
        floats[at + 2 + field] = values[field]
    state[COUNT] += 1
    state[SEEN] += 1
    for s in range(program[P_SERIES]):
        series = P_HEADER + s * S_ROW
        value = values[program[series + S_FIELD]]
        if np.isnan(value):
            continue
        tag = time // program[series + S_HOP]
        width = program[series + S_WIDTH]
        tile = program[series + S_TILES] + (tag % program[series + S_RING]) * width
        if state[tile] > tag:
            continue  # the ring has gone round: no read can reach this tile any more
        if at == end:
            a = update(_load(state, floats, tile, tag, width), value, time)
        else:
            a = _from_raw(state, floats, program, series, tag, 1 << 62)
        _store(state, floats, tile, tag, width, a)
    if state[SEEN] == 1 or time > state[NEWEST]:
        state[NEWEST] = time
    _settle(state, floats, program)


@_compiled
def apply(state: np.ndarray, program: np.ndarray, times: np.ndarray, orders: np.ndarray, values: np.ndarray) -> None:
    """Applies events (times, orders int64[m], values float64[m, fields]) to ``state``, which must have room.

    In whatever order and however split events arrive, the state becomes the same function of their set.
    """
    floats = state.view(np.float64)
    for i in range(times.shape[0]):
        _insert(state, floats, program, times[i], orders[i], values[i])


@_compiled
def _judge(
    value: float,
    newest: int,
    now: int,
    ttl: int,
    i: int,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray,
) -> None:
    values[i] = value
    age[i] = (now - newest) / 1e6 if newest != EMPTY else np.nan
    if np.isnan(value):
        status[i] = MISSING
    elif newest == EMPTY or now - newest > ttl:
        status[i] = STALE
    else:
        status[i] = FRESH


@_compiled
def _read(
    state: np.ndarray,
    floats: np.ndarray,
    program: np.ndarray,
    now: int,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray,
) -> None:
    windows = P_HEADER + program[P_SERIES] * S_ROW
    lags = windows + program[P_WINDOWS] * W_ROW
    for w in range(windows, lags, W_ROW):
        series = P_HEADER + program[w + W_SERIES] * S_ROW
        ring, tiles, n = program[series + S_RING], program[series + S_TILES], program[w + W_TILES]
        k = now // program[series + S_HOP]
        block = (k // n) * n
        suffix, prefix = empty(), empty()
        for tag in range(block - 1, k - n - 1, -1):
            suffix = merge(_load(state, floats, tiles + (tag % ring) * WIDE, tag, WIDE), suffix)
        for tag in range(block, k):
            prefix = merge(prefix, _load(state, floats, tiles + (tag % ring) * WIDE, tag, WIDE))
        if now >= state[NEWEST]:
            head = _load(state, floats, tiles + (k % ring) * WIDE, k, WIDE)
        else:
            head = _from_raw(state, floats, program, series, k, now)
        whole = merge(merge(suffix, prefix), head)
        for f in range(program[w + W_FOLDS]):
            value = finish(program[w + W_CODES + f], whole)
            _judge(value, whole[7], now, program[P_TTL], program[w + W_OUT] + f, values, status, age)
    for at in range(lags, lags + program[P_LAGS] * L_ROW, L_ROW):
        series = P_HEADER + program[at + L_SERIES] * S_ROW
        tag = now // program[series + S_HOP] - program[at + L_TILES]
        tile = program[series + S_TILES] + (tag % program[series + S_RING]) * NARROW
        found = _load(state, floats, tile, tag, NARROW)
        _judge(found[6], found[7], now, 1 << 62, program[at + L_OUT], values, status, age)


@_compiled
def read(
    state: np.ndarray, program: np.ndarray, now: int, values: np.ndarray, status: np.ndarray, age: np.ndarray
) -> bool:
    """Fills one vector of stored features as of ``now``; False when the state has moved on too far for that.

    values, age (seconds) float64[features], status uint8[features].
    """
    if state[SEEN] > 0 and now < state[NEWEST] - program[P_REACH]:
        return False
    _read(state, state.view(np.float64), program, now, values, status, age)
    return True


@_compiled
def sweep(
    state: np.ndarray,
    program: np.ndarray,
    times: np.ndarray,
    orders: np.ndarray,
    values: np.ndarray,
    cuts: np.ndarray,
    moments: np.ndarray,
    answers: np.ndarray,
    status: np.ndarray,
    age: np.ndarray,
) -> int:
    """Applies one entity's events in the order they became known and reads in between.

    Read q is taken at time ``moments[q]`` after the first ``cuts[q]`` events; ``cuts`` ascend. Returns the
    first read that the state had moved past, or -1.
    """
    row = 2 + program[P_FIELDS]
    floats = state.view(np.float64)
    done = 0
    for q in range(cuts.shape[0]):
        while done < cuts[q]:
            end = program[P_FIXED] + (state[START] + state[COUNT]) * row
            if end + row > state.shape[0]:
                state = grown(state, program)
                floats = state.view(np.float64)
            _insert(state, floats, program, times[done], orders[done], values[done])
            done += 1
        if state[SEEN] > 0 and moments[q] < state[NEWEST] - program[P_REACH]:
            return q
        _read(state, floats, program, moments[q], answers[q], status[q], age[q])
    return -1


@_compiled
def grown(state: np.ndarray, program: np.ndarray) -> np.ndarray:
    """A copy of ``state`` with its raw events moved to the front and room for at least as many again."""
    row = 2 + program[P_FIELDS]
    fixed, start, count = program[P_FIXED], state[START], state[COUNT]
    larger = np.zeros(fixed + (2 * count + 16) * row, np.int64)
    for word in range(fixed):  # loops, because numba compiles an assignment of slices for five seconds
        larger[word] = state[word]
    for word in range(count * row):
        larger[fixed + word] = state[fixed + start * row + word]
    larger[START] = 0
    return larger
