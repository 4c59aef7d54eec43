"""How events are put into entity state."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.features.kernels import decay, distinct, families, latest, moments, trend
from pipelines.features.kernels.compiled import compiled, inner
from pipelines.features.kernels.families import empty, load, store, update
from pipelines.features.kernels.layout import (
    COUNT,
    EMPTY,
    FLOOR,
    FLOOR_ORDER,
    NEWEST,
    P_FIELDS,
    P_FIXED,
    P_HEADER,
    P_MOST,
    P_REACH,
    P_SERIES,
    S_FAMILY,
    S_FIELD,
    S_HALF_LIFE,
    S_HOP,
    S_RING,
    S_ROW,
    S_SETTLED,
    S_TILES,
    S_WIDTH,
    SEEN,
    START,
    UNPLACED,
)

_FOREVER = 1 << 62


@inner
def load_tile(like: Any, state: np.ndarray, floats: np.ndarray, at: int, tag: int) -> Any:
    """The tile at word ``at`` when it is tile ``tag``, else nothing."""
    if state[at] != tag:
        return empty(like)
    return load(like, state, floats, at + 1)


@inner
def _first_raw(state: np.ndarray, program: np.ndarray, time: int) -> int:
    """The word of the first raw event that is not before ``time``, or that behind the last one."""
    row = 2 + program[P_FIELDS]
    first = program[P_FIXED] + state[START] * row
    low, high = 0, state[COUNT]
    while low < high:
        middle = (low + high) // 2
        if state[first + middle * row] < time:
            low = middle + 1
        else:
            high = middle
    found: int = first + low * row
    return found


@inner
def from_raw(
    like: Any, state: np.ndarray, floats: np.ndarray, program: np.ndarray, series: int, tag: int, until: int
) -> Any:
    """Tile ``tag`` of a series folded again: its settled part, then its raw events up to time ``until``."""
    a = load_tile(like, state, floats, program[series + S_SETTLED], tag)
    begin = tag * program[series + S_HOP]
    end = begin + program[series + S_HOP]
    row = 2 + program[P_FIELDS]
    last = program[P_FIXED] + (state[START] + state[COUNT]) * row
    for at in range(_first_raw(state, program, begin), last, row):
        if state[at] > until or state[at] >= end:
            break
        a = update(a, floats[at + 2 + program[series + S_FIELD]], state[at])
    return a


@inner
def _settle_into(
    like: Any, state: np.ndarray, floats: np.ndarray, program: np.ndarray, series: int, time: int, value: float
) -> None:
    tag, settled = time // program[series + S_HOP], program[series + S_SETTLED]
    a = update(load_tile(like, state, floats, settled, tag), value, time)
    state[settled] = tag
    store(a, state, floats, settled + 1)


@inner
def _settle(state: np.ndarray, floats: np.ndarray, program: np.ndarray, others: bool | None) -> None:
    """Moves raw events that nothing can precede any more, or that are too many, into what is settled of their tiles."""
    row = 2 + program[P_FIELDS]
    while state[COUNT] > 0:
        at = program[P_FIXED] + state[START] * row
        time = state[at]
        if time >= state[NEWEST] - program[P_REACH]:
            if state[COUNT] <= program[P_MOST]:
                break
            state[FLOOR], state[FLOOR_ORDER] = time, state[at + 1]
        for s in range(program[P_SERIES]):
            series = P_HEADER + s * S_ROW
            value = floats[at + 2 + program[series + S_FIELD]]
            family = program[series + S_FAMILY]
            if family == families.LATEST:
                _settle_into(latest.NOTHING, state, floats, program, series, time, value)
            elif family == families.MOMENTS:
                _settle_into(moments.NOTHING, state, floats, program, series, time, value)
            elif others is not None:
                if family == families.TREND:
                    _settle_into(trend.NOTHING, state, floats, program, series, time, value)
                elif family == families.DECAY:
                    like = decay.Decay(0.0, 0.0, program[series + S_HALF_LIFE], EMPTY)
                    _settle_into(like, state, floats, program, series, time, value)
                else:
                    _settle_into(distinct.nothing(), state, floats, program, series, time, value)
        state[START] += 1
        state[COUNT] -= 1
    if state[FLOOR] < state[NEWEST] - program[P_REACH]:
        state[FLOOR], state[FLOOR_ORDER] = EMPTY, 0  # what lateness allows is no earlier


@inner
def _placeable(state: np.ndarray, program: np.ndarray, time: int, order: int) -> bool:
    if state[SEEN] == 0:
        return True
    if time < state[NEWEST] - program[P_REACH] or time < state[FLOOR]:
        return False
    if time > state[FLOOR]:
        return True
    placeable: bool = order >= state[FLOOR_ORDER]
    return placeable


@inner
def _fold_merged(
    like: Any, state: np.ndarray, floats: np.ndarray, program: np.ndarray, series: int, times: np.ndarray,
    values: np.ndarray, between: int,
) -> None:  # fmt: skip
    """Folds the tiles that ordered events touch, each once. They are raw events already: the first ``between``
    of them before one that was there, whose tiles are folded again, and the others behind all of these.
    """
    hop, ring, width = program[series + S_HOP], program[series + S_RING], program[series + S_WIDTH]
    field, i = program[series + S_FIELD], 0
    while i < times.shape[0]:
        tag = times[i] // hop
        tile, end = program[series + S_TILES] + (tag % ring) * width, (tag + 1) * hop
        if i < between:
            a = from_raw(like, state, floats, program, series, tag, _FOREVER)
            while i < times.shape[0] and times[i] < end:
                i += 1
        else:
            a = load_tile(like, state, floats, tile, tag)
            while i < times.shape[0] and times[i] < end:
                a = update(a, values[i, field], times[i])
                i += 1
        if state[tile] <= tag:  # else the ring has gone round: no read can reach this tile any more
            state[tile] = tag
            store(a, state, floats, tile + 1)


@inner
def _merge(
    state: np.ndarray, floats: np.ndarray, program: np.ndarray, others: bool | None, times: np.ndarray,
    orders: np.ndarray, values: np.ndarray,
) -> None:  # fmt: skip
    """Puts ordered events in their canonical places and folds the tiles that they touch.

    ``state`` must have room for so many more raw events behind the last.
    """
    first = 0
    while first < times.shape[0] and not _placeable(state, program, times[first], orders[first]):
        first += 1
    state[UNPLACED] += first
    times, orders, values = times[first:], orders[first:], values[first:]
    count = times.shape[0]
    if count == 0:
        return
    row = 2 + program[P_FIELDS]
    begin = program[P_FIXED] + state[START] * row
    at = begin + (state[COUNT] - 1) * row
    to, between, i = at + count * row, 0, count - 1
    while i >= 0:
        if at >= begin and (state[at] > times[i] or (state[at] == times[i] and state[at + 1] > orders[i])):
            for word in range(row):
                state[to + word] = state[at + word]
            at -= row
            between = max(between, i + 1)
        else:
            state[to], state[to + 1] = times[i], orders[i]
            for field in range(program[P_FIELDS]):
                floats[to + 2 + field] = values[i, field]
            i -= 1
        to -= row
    state[COUNT] += count
    for s in range(program[P_SERIES]):
        series = P_HEADER + s * S_ROW
        family = program[series + S_FAMILY]
        if family == families.LATEST:
            _fold_merged(latest.NOTHING, state, floats, program, series, times, values, between)
        elif family == families.MOMENTS:
            _fold_merged(moments.NOTHING, state, floats, program, series, times, values, between)
        elif others is not None:
            if family == families.TREND:
                _fold_merged(trend.NOTHING, state, floats, program, series, times, values, between)
            elif family == families.DECAY:
                like = decay.Decay(0.0, 0.0, program[series + S_HALF_LIFE], EMPTY)
                _fold_merged(like, state, floats, program, series, times, values, between)
            else:
                _fold_merged(distinct.nothing(), state, floats, program, series, times, values, between)
    if state[SEEN] == 0 or times[count - 1] > state[NEWEST]:
        state[NEWEST] = times[count - 1]
    state[SEEN] += count
    _settle(state, floats, program, others)


@inner
def _fold_run(
    like: Any, state: np.ndarray, floats: np.ndarray, program: np.ndarray, series: int, times: np.ndarray,
    values: np.ndarray, settled: int,
) -> None:  # fmt: skip
    """What ``_fold_merged`` and ``_settle_into`` make of ordered events, each tile kept when it is whole.

    The first ``settled`` of the events are to be settled.
    """
    hop, ring, width = program[series + S_HOP], program[series + S_RING], program[series + S_WIDTH]
    field, at = program[series + S_FIELD], program[series + S_SETTLED]
    a, tag, tile, end = empty(like), EMPTY, 0, EMPTY
    for i in range(times.shape[0]):
        if times[i] >= end:
            if tag != EMPTY:
                state[tile] = tag
                store(a, state, floats, tile + 1)
            a, tag = empty(like), times[i] // hop
            tile, end = program[series + S_TILES] + (tag % ring) * width, (tag + 1) * hop
        a = update(a, values[i, field], times[i])
        if i == settled - 1:
            state[at] = tag
            store(a, state, floats, at + 1)
    state[tile] = tag
    store(a, state, floats, tile + 1)


@inner
def _begin(
    state: np.ndarray, floats: np.ndarray, program: np.ndarray, others: bool | None, times: np.ndarray,
    orders: np.ndarray, values: np.ndarray,
) -> None:  # fmt: skip
    """Puts ordered events into an empty state: what ``_merge`` of one after the other makes of it."""
    count = times.shape[0]
    settled, newest = count, times[count - 1]
    while settled > 0 and times[settled - 1] >= newest - program[P_REACH]:
        settled -= 1
    for s in range(program[P_SERIES]):
        series = P_HEADER + s * S_ROW
        family = program[series + S_FAMILY]
        if family == families.LATEST:
            _fold_run(latest.NOTHING, state, floats, program, series, times, values, settled)
        elif family == families.MOMENTS:
            _fold_run(moments.NOTHING, state, floats, program, series, times, values, settled)
        elif others is not None:
            if family == families.TREND:
                _fold_run(trend.NOTHING, state, floats, program, series, times, values, settled)
            elif family == families.DECAY:
                like = decay.Decay(0.0, 0.0, program[series + S_HALF_LIFE], EMPTY)
                _fold_run(like, state, floats, program, series, times, values, settled)
            else:
                _fold_run(distinct.nothing(), state, floats, program, series, times, values, settled)
    at = program[P_FIXED]
    for i in range(settled, count):
        state[at], state[at + 1] = times[i], orders[i]
        for field in range(program[P_FIELDS]):
            floats[at + 2 + field] = values[i, field]
        at += 2 + program[P_FIELDS]
    state[COUNT], state[SEEN], state[NEWEST] = count - settled, count, newest


@inner
def _ordered(times: np.ndarray, orders: np.ndarray) -> bool:
    for i in range(1, times.shape[0]):
        if times[i] < times[i - 1] or (times[i] == times[i - 1] and orders[i] < orders[i - 1]):
            return False
    return True


@compiled
def apply(
    states: np.ndarray, begins: np.ndarray, new: np.ndarray, nothing: np.ndarray, program: np.ndarray,
    others: bool | None, edges: np.ndarray, times: np.ndarray, orders: np.ndarray, values: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Applies events (times, orders int64[m], values float64[m, fields]) to many entities; how many words each state
    then has, int64[e].

    Entity e has the words from ``begins[e]`` to ``begins[e + 1]`` of ``states``, room for its events included, and the
    events [edges[e], edges[e + 1]). Where it is ``new``, its state is made from ``nothing``. In whatever order and
    however split events arrive, a state becomes the same function of their set. ``others`` is None for a program
    without families beyond LATEST and MOMENTS: their code is then not even compiled.
    """
    lengths = np.empty(new.shape[0], np.int64)
    floats = states.view(np.float64)
    row = 2 + program[P_FIELDS]
    for e in range(new.shape[0]):
        state, its_floats = states[begins[e] : begins[e + 1]], floats[begins[e] : begins[e + 1]]
        i, j = edges[e], edges[e + 1]
        if new[e]:
            state[: nothing.shape[0]] = nothing
            if i < j <= i + program[P_MOST] and _ordered(times[i:j], orders[i:j]):
                _begin(state, its_floats, program, others, times[i:j], orders[i:j], values[i:j])
                i = j
        step = j - i if _ordered(times[i:j], orders[i:j]) else 1
        for k in range(i, j, max(step, 1)):
            _merge(state, its_floats, program, others, times[k : k + step], orders[k : k + step], values[k : k + step])
        first = program[P_FIXED] + state[START] * row
        for word in range(state[COUNT] * row):  # the unsettled to where stored bytes have them
            state[program[P_FIXED] + word] = state[first + word]
        state[START] = 0
        lengths[e] = program[P_FIXED] + state[COUNT] * row
    return lengths
