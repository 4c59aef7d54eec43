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

from pipelines.features.kernels import decay, distinct, families, latest, moments, trend
from pipelines.features.kernels.compiled import compiled, inner
from pipelines.features.kernels.families import empty, load, merge, store, update
from pipelines.features.kernels.layout import (
    EMPTY,
    L_OUT,
    L_ROW,
    L_SERIES,
    L_TILES,
    NEVER,
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
def _suffixes(like: Any, tiles: np.ndarray, merged: np.ndarray, first: int, count: int, width: int) -> None:
    """Makes merged[first + j] tile ``first + j`` and all later ones of its block."""
    words, merged_words = tiles.view(np.int64), merged.view(np.int64)
    a = empty(like)
    for j in range(first + count - 1, first - 1, -1):
        a = merge(load(like, words, tiles, j * width), a)
        store(a, merged_words, merged, j * width)


@inner
def _known_suffix(
    like: Any, times: np.ndarray, column: np.ndarray, known: np.ndarray, bound: int, width: int,
    listed: np.ndarray, tiles: np.ndarray, first: int, last: int,
) -> Any:  # fmt: skip
    """The listed tiles [first, last) of the previous block, without the events that were not known."""
    suffix = empty(like)
    for j in range(last - 1, first - 1, -1):
        if listed[j, _KNOWN] <= bound:
            tile = load(like, tiles.view(np.int64), tiles, j * width)
        else:
            tile = _fold_known(like, times, column, known, bound, listed[j, _FIRST], listed[j, _LAST])
        suffix = merge(tile, suffix)
    return suffix


@inner
def _known_prefix(
    like: Any, times: np.ndarray, column: np.ndarray, known: np.ndarray, bound: int, width: int,
    listed: np.ndarray, merged: np.ndarray, first: int, last: int,
) -> Any:  # fmt: skip
    """The listed tiles [first, last) of this block, without the events that were not known."""
    whole = last
    while whole > first and listed[whole - 1, _KNOWN] > bound:
        whole -= 1
    prefix = empty(like)
    if whole > first:
        prefix = load(like, merged.view(np.int64), merged, (whole - 1) * width)
    for j in range(whole, last):
        tile = _fold_known(like, times, column, known, bound, listed[j, _FIRST], listed[j, _LAST])
        prefix = merge(prefix, tile)
    return prefix


@inner
def _window(
    like: Any, program: np.ndarray, w: int, times: np.ndarray, column: np.ndarray, known: np.ndarray,
    moments: np.ndarray, bounds: np.ndarray, first_read: int, last_read: int,
    values: np.ndarray, status: np.ndarray, age: np.ndarray | None,
) -> None:  # fmt: skip
    """Fills the rows [first_read, last_read) of one window's features of one entity."""
    if first_read == last_read:
        return
    series = P_HEADER + program[w + W_SERIES] * S_ROW
    hop, n, width = program[series + S_HOP], program[w + W_TILES], program[series + S_WIDTH] - 1
    m = times.shape[0]
    rows = min(n, m)
    # Two blocks of tiles that have events, in turn in the lower and in the upper half: this block's with their running
    # merges from its begin, and those of the block before with theirs to its end. The arrays are never reassigned,
    # nor viewed in the loop, because numba would count references for each event.
    listed = np.empty((2 * rows, _LISTED), np.int64)
    tiles, merged = np.empty(2 * rows * width), np.empty(2 * rows * width)
    words, merged_words = tiles.view(np.int64), merged.view(np.int64)
    here, before = 0, rows  # where the two begin
    c = p = low = 0  # how many tiles each has, and the first of the previous block that is young enough

    tag = moments[first_read] // hop  # of the open tile
    at = np.searchsorted(times, (tag // n - 1) * n * hop)  # nothing earlier is in any window
    if at < m and times[at] < tag * hop:
        tag = times[at] // hop
    end = (tag + 1) * hop
    block_end = (tag // n + 1) * n
    first, newest_known = at, EMPTY
    head, prefix, base = empty(like), empty(like), empty(like)
    for q in range(first_read, last_read):
        now, bound = moments[q], bounds[q]
        moved = q == first_read
        while now >= end:  # close the open tile
            moved = True
            while at < m and times[at] < end:
                head = update(head, column[at], times[at])
                newest_known = max(newest_known, known[at])
                at += 1
            if at > first:
                prefix = merge(prefix, head)
                j = here + c
                listed[j, _TAG], listed[j, _FIRST], listed[j, _LAST], listed[j, _KNOWN] = tag, first, at, newest_known
                store(head, words, tiles, j * width)
                store(prefix, merged_words, merged, j * width)
                c += 1
            # The next tile is that of the read, or of the next event when that is earlier.
            target = times[at] if at < m and times[at] < now else now
            tag = tag + 1 if target < end + hop else target // hop
            end = (tag + 1) * hop
            first, head = at, empty(like)
            if tag >= block_end:  # should it be a later block than the next, none of these tiles is young enough
                here, before = before, here
                _suffixes(like, tiles, merged, before, c, width)
                block_end, p, c, low, prefix = (tag // n + 1) * n, c, 0, 0, empty(like)
        if moved:
            while low < p and listed[before + low, _TAG] < tag - n:
                low += 1
            base = prefix
            if low < p:
                base = merge(load(like, merged_words, merged, (before + low) * width), prefix)
        while at < m and times[at] <= now:
            head = update(head, column[at], times[at])
            newest_known = max(newest_known, known[at])
            at += 1
        if newest_known <= bound:
            whole = merge(base, head)
        else:
            suffix = empty(like)
            if low < p:
                if listed[before + p - 1, _KNOWN] <= bound:
                    suffix = load(like, merged_words, merged, (before + low) * width)
                else:
                    suffix = _known_suffix(
                        like, times, column, known, bound, width, listed, tiles, before + low, before + p
                    )
            closed = _known_prefix(like, times, column, known, bound, width, listed, merged, here, here + c)
            whole = merge(merge(suffix, closed), _fold_known(like, times, column, known, bound, first, at))
        finish_window(whole, program, w, now, values, status, age, q)


@inner
def _lag(
    program: np.ndarray,
    lag: int,
    times: np.ndarray,
    column: np.ndarray,
    known: np.ndarray,
    moments: np.ndarray,
    bounds: np.ndarray,
    first_read: int,
    last_read: int,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray | None,
) -> None:
    """Fills the rows [first_read, last_read) of one lag of one entity."""
    hop, m, at = program[P_HEADER + program[lag + L_SERIES] * S_ROW + S_HOP], times.shape[0], 0
    for q in range(first_read, last_read):
        begin = (moments[q] // hop - program[lag + L_TILES]) * hop
        if q == first_read:
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
        judge(value, newest, moments[q], NEVER, values, status, age, q, program[lag + L_OUT])


@compiled
def roll(
    program: np.ndarray,
    mixed: bool | None,
    times: np.ndarray,
    columns: np.ndarray,
    known: np.ndarray,
    event_edges: np.ndarray,
    moments: np.ndarray,
    bounds: np.ndarray,
    read_edges: np.ndarray,
    values: np.ndarray,
    status: np.ndarray,
    age: np.ndarray | None,
) -> None:
    """Reads the stored features of many entities.

    Entity e has the events [event_edges[e], event_edges[e + 1]) in canonical order (times, known int64[m], columns
    float64[fields, m]) and the reads [read_edges[e], read_edges[e + 1]) with ascending moments (moments, bounds
    int64[q]). Fills values, age (seconds) float64[features, q] and status uint8[q, features]; ``mixed`` as in
    ``reads.read``.
    """
    windows = P_HEADER + program[P_SERIES] * S_ROW
    lags = windows + program[P_WINDOWS] * W_ROW
    for e in range(event_edges.shape[0] - 1):
        i, j, q, r = event_edges[e], event_edges[e + 1], read_edges[e], read_edges[e + 1]
        t, k = times[i:j], known[i:j]
        for w in range(windows, lags, W_ROW):
            series = P_HEADER + program[w + W_SERIES] * S_ROW
            x, family = columns[program[series + S_FIELD], i:j], program[series + S_FAMILY]
            if family == families.MOMENTS:
                _window(_MOMENTS, program, w, t, x, k, moments, bounds, q, r, values, status, age)
            elif mixed is not None:
                if family == families.LATEST:
                    _window(latest.NOTHING, program, w, t, x, k, moments, bounds, q, r, values, status, age)
                elif family == families.TREND:
                    _window(trend.NOTHING, program, w, t, x, k, moments, bounds, q, r, values, status, age)
                elif family == families.DECAY:
                    like = decay.Decay(0.0, 0.0, program[series + S_HALF_LIFE], EMPTY)
                    _window(like, program, w, t, x, k, moments, bounds, q, r, values, status, age)
                else:
                    _window(distinct.nothing(), program, w, t, x, k, moments, bounds, q, r, values, status, age)
        for lag in range(lags, lags + program[P_LAGS] * L_ROW, L_ROW):
            series = P_HEADER + program[lag + L_SERIES] * S_ROW
            _lag(
                program, lag, t, columns[program[series + S_FIELD], i:j], k, moments, bounds, q, r, values, status, age
            )


_MOMENTS = moments.NOTHING  # the argument of ``roll`` hides the module
