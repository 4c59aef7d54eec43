"""Windows and lags of the past: one pass over an entity's events, at a cost that does not grow with the window.

Events stand in canonical order and each has a number ``known``; a read at ``moment`` with ``bound`` sees the events
with time <= moment and known <= bound. Tiles and their running merges hold everything up to the moment; as long as
all of it was known, a read is two merges. What was not known then is found by the running maximum of ``known``: only
tiles that hold such events, or come after them, are folded again without them. Association and operations are those
of ``reads``, so the values are equal to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.features.kernels import decay, distinct, families, moments, trend
from pipelines.features.kernels.compiled import compiled, inner
from pipelines.features.kernels.families import empty, load, merge, store, update
from pipelines.features.kernels.layout import (
    EMPTY,
    L_OUT,
    L_ROW,
    L_SERIES,
    L_TILES,
    P_HEADER,
    P_LAGS,
    P_SERIES,
    P_WINDOWS,
    S_FAMILY,
    S_FIELD,
    S_HALF_LIFE,
    S_HOP,
    S_ROW,
    S_WIDTH,
    W_ROW,
    W_SERIES,
    W_TILES,
)
from pipelines.features.kernels.reads import finish_window, judge

# Columns of the list of a block's tiles that have events: tag, its events, the largest ``known`` up to its end.
_TAG, _FIRST, _LAST, _KNOWN, _LISTED = 0, 1, 2, 3, 4


@inner
def _fold_known(
    like: Any, times: np.ndarray, column: np.ndarray, known: np.ndarray, bound: int, first: int, last: int
) -> Any:
    """The fold of the events [first, last) that were known."""
    a = empty(like)
    for i in range(first, last):
        if known[i] <= bound:
            a = update(a, column[i], times[i])
    return a


@inner
def _suffixes(like: Any, tiles: np.ndarray, suffixes: np.ndarray, count: int, width: int) -> None:
    """suffix[j] = tile[j] and all later tiles of its block."""
    tile_floats, suffix_floats = tiles.view(np.float64), suffixes.view(np.float64)
    a = empty(like)
    for j in range(count - 1, -1, -1):
        a = merge(load(like, tiles, tile_floats, j * width), a)
        store(a, suffixes, suffix_floats, j * width)


@inner
def _known_base(
    like: Any,
    times: np.ndarray,
    column: np.ndarray,
    known: np.ndarray,
    bound: int,
    width: int,
    before: np.ndarray,
    before_tiles: np.ndarray,
    suffixes: np.ndarray,
    low: int,
    p: int,
    block: np.ndarray,
    prefixes: np.ndarray,
    c: int,
) -> Any:
    """Suffix and prefix of the closed tiles, without the events that were not known."""
    suffix, prefix = empty(like), empty(like)
    if low < p:
        if before[p - 1, _KNOWN] <= bound:
            suffix = load(like, suffixes, suffixes.view(np.float64), low * width)
        else:
            for j in range(p - 1, low - 1, -1):
                if before[j, _KNOWN] <= bound:
                    tile = load(like, before_tiles, before_tiles.view(np.float64), j * width)
                else:
                    tile = _fold_known(like, times, column, known, bound, before[j, _FIRST], before[j, _LAST])
                suffix = merge(tile, suffix)
    whole = c
    while whole > 0 and block[whole - 1, _KNOWN] > bound:
        whole -= 1
    if whole > 0:
        prefix = load(like, prefixes, prefixes.view(np.float64), (whole - 1) * width)
    for j in range(whole, c):
        tile = _fold_known(like, times, column, known, bound, block[j, _FIRST], block[j, _LAST])
        prefix = merge(prefix, tile)
    return merge(suffix, prefix)


@inner
def _window(
    like: Any,
    program: np.ndarray,
    w: int,
    times: np.ndarray,
    column: np.ndarray,
    known: np.ndarray,
    moments: np.ndarray,
    bounds: np.ndarray,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray,
) -> None:
    series = P_HEADER + program[w + W_SERIES] * S_ROW
    hop, n, width = program[series + S_HOP], program[w + W_TILES], program[series + S_WIDTH] - 1
    m, reads = times.shape[0], moments.shape[0]
    if reads == 0:
        return
    rows = min(n, m)
    block, before = np.empty((rows, _LISTED), np.int64), np.empty((rows, _LISTED), np.int64)
    tiles, before_tiles = np.empty(rows * width, np.int64), np.empty(rows * width, np.int64)
    prefixes, suffixes = np.empty(rows * width, np.int64), np.empty(rows * width, np.int64)
    c = p = low = 0

    tag = moments[0] // hop  # of the open tile
    here = tag // n  # its block
    at = np.searchsorted(times, (here - 1) * n * hop)  # nothing earlier is in any window
    if at < m and times[at] < tag * hop:
        tag = times[at] // hop
        here = tag // n
    end = (tag + 1) * hop
    first, latest = at, EMPTY
    head, prefix, base = empty(like), empty(like), empty(like)
    for q in range(reads):
        now, bound = moments[q], bounds[q]
        moved = q == 0
        while now >= end:  # close the open tile
            moved = True
            while at < m and times[at] < end:
                head = update(head, column[at], times[at])
                latest = max(latest, known[at])
                at += 1
            if at > first:
                prefix = merge(prefix, head)
                block[c, _TAG], block[c, _FIRST], block[c, _LAST], block[c, _KNOWN] = tag, first, at, latest
                store(head, tiles, tiles.view(np.float64), c * width)
                store(prefix, prefixes, prefixes.view(np.float64), c * width)
                c += 1
            # The next tile is that of the read, or of the next event when that is earlier.
            tag = now // hop
            if at < m and times[at] < tag * hop:
                tag = times[at] // hop
            end = (tag + 1) * hop
            first, head = at, empty(like)
            if tag // n != here:
                p = 0
                if tag // n == here + 1:
                    block, before = before, block
                    tiles, before_tiles = before_tiles, tiles
                    p = c
                    _suffixes(like, before_tiles, suffixes, p, width)
                here, c, low, prefix = tag // n, 0, 0, empty(like)
        if moved:
            while low < p and before[low, _TAG] < tag - n:
                low += 1
            if low < p:
                base = merge(load(like, suffixes, suffixes.view(np.float64), low * width), prefix)
            else:
                base = merge(empty(like), prefix)
        while at < m and times[at] <= now:
            head = update(head, column[at], times[at])
            latest = max(latest, known[at])
            at += 1
        if latest <= bound:
            whole = merge(base, head)
        else:
            closed = _known_base(
                like, times, column, known, bound, width, before, before_tiles, suffixes, low, p, block, prefixes, c
            )
            whole = merge(closed, _fold_known(like, times, column, known, bound, first, at))
        finish_window(whole, program, w, now, values[q], status[q], age[q])


@inner
def _lag(
    program: np.ndarray,
    lag: int,
    times: np.ndarray,
    column: np.ndarray,
    known: np.ndarray,
    moments: np.ndarray,
    bounds: np.ndarray,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray,
) -> None:
    hop, m, at = program[P_HEADER + program[lag + L_SERIES] * S_ROW + S_HOP], times.shape[0], 0
    for q in range(moments.shape[0]):
        tag = moments[q] // hop - program[lag + L_TILES]
        begin = tag * hop
        if q == 0:
            at = np.searchsorted(times, begin + hop)
        while at < m and times[at] < begin + hop:
            at += 1
        value, newest = np.nan, EMPTY
        i = at - 1
        while i >= 0 and times[i] >= begin:
            if known[i] <= bounds[q] and not np.isnan(column[i]):
                value, newest = column[i], times[i]
                break
            i -= 1
        judge(value, newest, moments[q], 1 << 62, program[lag + L_OUT], values[q], status[q], age[q])


@compiled
def roll(
    program: np.ndarray,
    others: bool | None,
    times: np.ndarray,
    columns: np.ndarray,
    known: np.ndarray,
    event_edges: np.ndarray,
    moments: np.ndarray,
    bounds: np.ndarray,
    read_edges: np.ndarray,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray,
) -> None:
    """Reads the stored features of many entities.

    Entity e has the events [event_edges[e], event_edges[e + 1]) in canonical order (times, known int64[m], columns
    float64[fields, m]) and the reads [read_edges[e], read_edges[e + 1]) with ascending moments (moments, bounds
    int64[q]). Fills values, age (seconds) float64[q, features] and status uint8[q, features]; ``others`` as in
    ``tiles.apply``.
    """
    windows = P_HEADER + program[P_SERIES] * S_ROW
    lags = windows + program[P_WINDOWS] * W_ROW
    for e in range(event_edges.shape[0] - 1):
        i, j, q, r = event_edges[e], event_edges[e + 1], read_edges[e], read_edges[e + 1]
        t, k, at, b = times[i:j], known[i:j], moments[q:r], bounds[q:r]
        v, s, a = values[q:r], status[q:r], age[q:r]
        for w in range(windows, lags, W_ROW):
            series = P_HEADER + program[w + W_SERIES] * S_ROW
            x, family = columns[program[series + S_FIELD], i:j], program[series + S_FAMILY]
            if family == families.MOMENTS:
                _window(_MOMENTS, program, w, t, x, k, at, b, v, s, a)
            elif others is not None:
                if family == families.TREND:
                    _window(trend.NOTHING, program, w, t, x, k, at, b, v, s, a)
                elif family == families.DECAY:
                    like = decay.Decay(0.0, 0.0, program[series + S_HALF_LIFE], EMPTY)
                    _window(like, program, w, t, x, k, at, b, v, s, a)
                else:
                    _window(distinct.nothing(), program, w, t, x, k, at, b, v, s, a)
        for lag in range(lags, lags + program[P_LAGS] * L_ROW, L_ROW):
            series = P_HEADER + program[lag + L_SERIES] * S_ROW
            _lag(program, lag, t, columns[program[series + S_FIELD], i:j], k, at, b, v, s, a)


_MOMENTS = moments.NOTHING  # the argument of ``roll`` hides the module
