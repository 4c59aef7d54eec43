"""The nearest comparable events of a place: one search over a cell's points, for state and for the past alike.

A point is a row of int64 words: time (us), order, then float64 bits: longitude, latitude (degrees), the fields that
must match, those that must be similar, those that are folded. A cell is a square of degrees, so large that all points
within the radius of a place lie in the cells that ``around`` names. Distances are those of an equirectangular
projection at the request's own latitude, on a sphere of the Earth's mean radius.

Of two events at one distance the later comes first, and of one time the one with the smaller order, so what is chosen
and the order in which it is folded depend on no order of storage.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pipelines.features.kernels import moments
from pipelines.features.kernels.compiled import compiled, inner
from pipelines.features.kernels.layout import EMPTY

DEGREE_M = 111_195.08  # of a great circle: the mean radius of 6,371,008.8 m (IUGG)
MOST_CELLS = 128  # that ``around`` names: 3 rows of at most 26 at 85 degrees, and as many where they wrap
TIME, ORDER, LONGITUDE, LATITUDE, REST = 0, 1, 2, 3, 4
ASKED_LONGITUDE, ASKED_LATITUDE, ASKED_REST = 0, 1, 2


class Search(NamedTuple):
    """What is searched for: the radius in metres, the cells' side in degrees, the span in microseconds.

    ``matches`` fields must be equal, then each of the next ``factors`` float64[s] similar; ``fields`` follow.
    """

    radius: float
    step: float
    within: int
    matches: int
    factors: np.ndarray
    fields: int


class Found(NamedTuple):
    """The chosen events, nearest first: squared distances float64[k], times and orders int64[k], values [k, fields]."""

    squares: np.ndarray
    times: np.ndarray
    orders: np.ndarray
    values: np.ndarray


def nothing(k: int, fields: int) -> Found:
    """Room for ``k`` events."""
    return Found(np.empty(k), np.empty(k, np.int64), np.empty(k, np.int64), np.empty((k, fields)))


@compiled
def cell(longitude: float, latitude: float, step: float) -> int:
    """The number of the cell of a place in degrees."""
    columns = math.ceil(360.0 / step)
    return math.floor((latitude + 90.0) / step) * columns + math.floor((longitude + 180.0) / step) % columns


@compiled
def cells(points: np.ndarray, step: float) -> np.ndarray:
    """``cell`` of every point, int64[n]."""
    floats = points.view(np.float64)
    found = np.empty(len(points), np.int64)
    for i in range(len(points)):
        found[i] = cell(floats[i, LONGITUDE], floats[i, LATITUDE], step)
    return found


@compiled
def around(longitude: float, latitude: float, step: float, found: np.ndarray) -> int:
    """Writes the cells that hold all points within a radius of ``step`` degrees of a place; returns how many.

    ``found`` int64[MOST_CELLS]. No cell is named twice.
    """
    columns = math.ceil(360.0 / step)
    # A little more than the radius: a rounding error must not lose a point at its very edge.
    reach = step * 1.000001
    wide = reach / math.cos(math.radians(latitude))
    low, high = math.floor((longitude - wide + 180.0) / step), math.floor((longitude + wide + 180.0) / step)
    # Longitudes come again after 360 degrees, but whole cells do not.
    if longitude - wide < -180.0:
        low = math.floor((longitude - wide + 540.0) / step) - columns
    if longitude + wide >= 180.0:
        high = math.floor((longitude + wide - 180.0) / step) + columns
    high = min(high, low + columns - 1)
    count = 0
    for row in range(math.floor((latitude - reach + 90.0) / step), math.floor((latitude + reach + 90.0) / step) + 1):
        for column in range(low, high + 1):
            found[count] = row * columns + column % columns
            count += 1
    return count


@inner
def _consider(
    search: Search, asked: np.ndarray, cosine: float, words: np.ndarray, floats: np.ndarray, i: int,
    found: Found, count: int,
) -> int:  # fmt: skip
    """Takes point ``i`` among ``count`` found events when it is comparable and near enough; the new count."""
    east = floats[i, LONGITUDE] - asked[ASKED_LONGITUDE]
    if east > 180.0:
        east -= 360.0
    elif east < -180.0:
        east += 360.0
    east *= cosine
    north = floats[i, LATITUDE] - asked[ASKED_LATITUDE]
    square = (east * east + north * north) * (DEGREE_M * DEGREE_M)
    if not square <= search.radius * search.radius:
        return count
    for at in range(search.matches):
        if floats[i, REST + at] != asked[ASKED_REST + at]:
            return count
    for at in range(len(search.factors)):
        mine, other = asked[ASKED_REST + search.matches + at], floats[i, REST + search.matches + at]
        times = search.factors[at]
        if not (mine > 0.0 and other > 0.0 and other <= mine * times and mine <= other * times):
            return count
    time, order, folded = words[i, TIME], words[i, ORDER], REST + search.matches + len(search.factors)
    place = count
    while place > 0:
        before = place - 1
        nearer = square < found.squares[before] or (
            square == found.squares[before]
            and (time > found.times[before] or (time == found.times[before] and order < found.orders[before]))
        )
        if not nearer:
            break
        place = before
    if place == len(found.squares):
        return count
    count = min(count + 1, len(found.squares))
    for at in range(count - 1, place, -1):
        found.squares[at], found.times[at] = found.squares[at - 1], found.times[at - 1]
        found.orders[at] = found.orders[at - 1]
        for field in range(search.fields):
            found.values[at, field] = found.values[at - 1, field]
    found.squares[place], found.times[place], found.orders[place] = square, time, order
    for field in range(search.fields):
        found.values[place, field] = floats[i, folded + field]
    return count


@compiled
def scan(search: Search, asked: np.ndarray, now: int, points: np.ndarray, found: Found, count: int) -> int:
    """Takes what one cell's ``points`` int64[n, words] have for a place asked about at ``now``; the new count.

    asked float64[2 + matches + factors]: longitude, latitude, then the fields to compare.
    """
    floats = points.view(np.float64)
    cosine = math.cos(math.radians(asked[ASKED_LATITUDE]))
    for i in range(len(points)):
        if now - search.within < points[i, TIME] <= now:
            count = _consider(search, asked, cosine, points, floats, i, found, count)
    return count


@compiled
def finish(found: Found, count: int, codes: np.ndarray, values: np.ndarray) -> int:
    """Writes the features of ``count`` chosen events; the time of the newest of them, ``EMPTY`` of none.

    values float64[2 + fields * codes]: how many, their mean distance in metres, then the folds ``codes`` (of
    ``moments``) of each field.
    """
    newest, total = EMPTY, 0.0
    for i in range(count):
        newest = max(newest, found.times[i])
        total += math.sqrt(found.squares[i])
    values[0], values[1] = count, total / count  # NaN of none
    at = 2
    for field in range(found.values.shape[1]):
        folded = moments.NOTHING
        for i in range(count):
            folded = moments.update(folded, found.values[i, field], found.times[i])
        for code in codes:
            values[at] = moments.finish(code, folded, newest)
            at += 1
    return newest


@compiled
def sweep(
    search: Search, points: np.ndarray, known: np.ndarray, numbers: np.ndarray, edges: np.ndarray,
    asked: np.ndarray, times: np.ndarray, bounds: np.ndarray, found: Found, codes: np.ndarray,
    values: np.ndarray, newest: np.ndarray,
) -> None:  # fmt: skip
    """Features of many places: values float64[features, q], newest int64[q].

    points int64[n, words] stand by cell and time; cell ``numbers[c]``, ascending, has those from ``edges[c]`` to
    ``edges[c + 1]``. Row q of ``asked`` float64[q, 2 + …] is asked at ``times[q]`` of the points whose ``known``
    number is at most ``bounds[q]``.
    """
    floats = points.view(np.float64)
    near = np.empty(MOST_CELLS, np.int64)
    line = np.empty(values.shape[0])
    for q in range(len(asked)):
        count, now = 0, times[q]
        if not (np.isnan(asked[q, ASKED_LONGITUDE]) or np.isnan(asked[q, ASKED_LATITUDE])):
            cosine = math.cos(math.radians(asked[q, ASKED_LATITUDE]))
            for c in range(around(asked[q, ASKED_LONGITUDE], asked[q, ASKED_LATITUDE], search.step, near)):
                place = np.searchsorted(numbers, near[c])
                if place == len(numbers) or numbers[place] != near[c]:
                    continue
                first, last = edges[place], edges[place + 1]
                first += np.searchsorted(points[first:last, TIME], now - search.within + 1)
                while first < last and points[first, TIME] <= now:
                    if known[first] <= bounds[q]:
                        count = _consider(search, asked[q], cosine, points, floats, first, found, count)
                    first += 1
        newest[q] = finish(found, count, codes, line)
        values[:, q] = line
