"""Spatial neighbours: features of the nearest comparable events, from state and, for the past, from the events table.

State keeps the points of every cell of the map for as long as a search may want them. It is a projection of the events
log of its own, because a point belongs to no entity; the search is the kernel that goes through the past too, so a
value made there equals the served one bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.contracts.events import EVENT_ID, KNOWN_AT, SEQUENCE
from pipelines.features.found import Found
from pipelines.features.kernels import layout, moments, nearest
from pipelines.features.projection import unpack
from pipelines.features.rows_state import RowsState, by_key
from pipelines.features.state import StateError
from pipelines.features.stores import open_store
from pipelines.features.windows import READ_BEHIND, event_orders, instants, number_of, numbers
from pipelines.spec import Contract, Fold, Neighbours, UseCase
from pipelines.spec.base import microseconds

_CODES = {
    Fold.SUM: moments.C_SUM,
    Fold.MEAN: moments.C_MEAN,
    Fold.MIN: moments.C_MIN,
    Fold.MAX: moments.C_MAX,
    Fold.STD: moments.C_STD,
}


@dataclass(frozen=True, eq=False)
class Searcher:
    """Neighbours as the kernels want them; ``behind_us`` is how far behind a cell's newest event a read may be."""

    near: Neighbours
    search: nearest.Search
    codes: np.ndarray
    behind_us: int

    @property
    def words(self) -> int:
        """Words of one point."""
        return nearest.REST + self.search.matches + len(self.search.factors) + self.search.fields

    def room(self) -> nearest.Found:
        """Room for what a search finds."""
        return nearest.nothing(self.near.k, self.search.fields)


def searcher(near: Neighbours, contract: Contract) -> Searcher:
    """Compiles ``near``."""
    search = nearest.Search(
        near.radius,
        near.radius / nearest.DEGREE_M,
        microseconds(near.within),
        len(near.match),
        np.array([times for _, times in near.similar], np.float64),
        len(near.fields),
    )
    codes = np.array([_CODES[fold] for fold in near.folds], np.int64)
    return Searcher(near, search, codes, microseconds(contract.lateness + contract.future + READ_BEHIND))


@dataclass(frozen=True, eq=False)
class Points:
    """The events of a table that can be anybody's neighbours: points int64[n, words], their cells int64[n].

    ``rows`` int64[n] are their rows in that table.
    """

    points: np.ndarray
    cells: np.ndarray
    rows: np.ndarray


def columns_of(contract: Contract, neighbours: Iterable[Neighbours]) -> list[str]:
    """The columns of the events table that ``points_of`` reads."""
    fields = [name for near in neighbours for name in (*near.asked, *near.fields)]
    return list(dict.fromkeys([contract.time, *fields, EVENT_ID, KNOWN_AT, SEQUENCE]))


def points_of(find: Searcher, contract: Contract, events: pa.Table) -> Points:
    """The points of ``events``: those that count for features and have a place."""
    times = instants(events, contract.time)
    floats = [numbers(events.column(name)) for name in (*find.near.asked, *find.near.fields)]
    counts = instants(events, KNOWN_AT) - times <= microseconds(contract.lateness)
    rows = np.flatnonzero(counts & ~np.isnan(floats[0]) & ~np.isnan(floats[1]))
    points = np.empty((len(rows), find.words), np.int64)
    points[:, nearest.TIME] = times[rows]
    points[:, nearest.ORDER] = event_orders(events.column(EVENT_ID).take(pa.array(rows)))
    for place, values in enumerate(floats, start=nearest.LONGITUDE):
        points[:, place] = values[rows].view(np.int64)
    return Points(points, nearest.cells(points, find.search.step), rows)


def asked_of(near: Neighbours, inputs: Mapping[str, Sequence[Any] | np.ndarray | pa.ChunkedArray]) -> np.ndarray:
    """float64[n, 2 + matches + similar] of requests' inputs, one sequence of n per input that ``near`` compares by.

    Raises ``ValueError`` naming an input that is not there.
    """
    if missing := [name for name in near.asked if name not in inputs]:
        raise ValueError(f"neighbours {near.name!r} are searched for by {list(near.asked)}; {missing} were not given")
    columns = []
    for values in (inputs[name] for name in near.asked):
        if isinstance(values, pa.ChunkedArray):
            columns.append(numbers(values))
        else:
            columns.append(np.array([number_of(value) for value in values], np.float64))
    return np.column_stack(columns)


def search_past(
    find: Searcher, points: Points, known: np.ndarray, asked: np.ndarray, times: np.ndarray, bounds: np.ndarray
) -> Found:
    """What a state would have found for requests ``asked`` (``asked_of``) at ``times`` int64[q] (us).

    A request sees the points whose ``known`` number, int64 by row of their table, is at most its bound, int64[q].
    """
    order = np.lexsort((points.points[:, nearest.TIME], points.cells))
    cells = points.cells[order]
    named, edges = np.unique(cells, return_index=True)
    values = np.empty((len(find.near.features), len(asked)))
    newest = np.empty(len(asked), np.int64)
    nearest.sweep(
        find.search, points.points[order], known[points.rows[order]], named, np.append(edges, len(cells)),
        np.ascontiguousarray(asked), times, bounds, find.room(), find.codes, values, newest,
    )  # fmt: skip
    return Found(values, newest)


class NeighbourState(RowsState):
    """The points of one use case's neighbours by cell, below a directory or in a Redis server as entity state is.

    A cell keeps ``within`` and ``behind_us`` behind its newest event, whose time is its note; each change writes a cell
    anew, so cells are for events as frequent as sales and not as readings.
    """

    def __init__(self, place: Path | str, use_case: UseCase, near: Neighbours, view: str) -> None:
        """``view`` is the fingerprint of the view that ``near`` belongs to, as states of entities are kept by it."""
        self.find = searcher(near, use_case.contract)
        self._keep_us = self.find.search.within + self.find.behind_us
        store = open_store(place, use_case.name, f"{view}-near-{near.name}")
        super().__init__(store, use_case.name, use_case.contract, self.find.words, layout.EMPTY)
        # So that no request waits for the compiler: a made-up place is near no event.
        point = np.frombuffer(bytes(8 * self.find.words), np.int64).reshape(1, -1)
        nearest.scan(self.find.search, np.zeros(len(near.asked)), 0, point, self.find.room(), 0)

    def prepare(self, rows: pa.Table) -> list[tuple[str, np.ndarray]]:
        """See ``Projection``: every cell with its points."""
        found = points_of(self.find, self.contract, rows)
        cells, codes = np.unique(found.cells, return_inverse=True)
        return by_key([str(number) for number in cells.tolist()], codes, found.points)

    def kept(self, note: int, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """See ``RowsState``."""
        times = rows[:, nearest.TIME]
        newest = max(note, int(times.max()))
        return newest, rows[times > newest - self._keep_us]

    def read(self, inputs: Mapping[str, Sequence[Any] | np.ndarray], now_us: int) -> tuple[Found, tuple[int, int]]:
        """What is found for requests with ``inputs`` at ``now_us``, and the (generation, sequence) it was found in.

        All are from one snapshot. Raises ``StateError`` when ``now_us`` is too far behind the events.
        """
        find = self.find
        asked = asked_of(find.near, inputs)
        around = np.empty(nearest.MOST_CELLS, np.int64)
        cells: list[list[str]] = []
        for place in asked:
            unplaced = np.isnan(place[:2]).any()
            count = 0 if unplaced else nearest.around(place[0], place[1], find.search.step, around)
            cells.append([str(number) for number in around[:count].tolist()])
        chosen, line = find.room(), np.empty(len(find.near.features))
        values, newest = np.empty((len(line), len(asked))), np.empty(len(asked), np.int64)
        with self.store.reading([name for names in cells for name in names]) as snapshot:
            head, blobs = unpack(snapshot.head), iter(snapshot.blobs)
            for row, names in enumerate(cells):
                count = 0
                for _ in names:
                    blob = next(blobs)
                    if blob is not None:
                        points = self._seen_at(now_us, *self.opened(blob))
                        count = nearest.scan(find.search, asked[row], now_us, points, chosen, count)
                newest[row] = nearest.finish(chosen, count, find.codes, line)
                values[:, row] = line
        return Found(values, newest), (head.generation, head.applied)

    def _seen_at(self, now_us: int, newest: int, points: np.ndarray) -> np.ndarray:
        if now_us < newest - self.find.behind_us:
            raise StateError(
                f"neighbours were asked for at {now_us} us, but an event at {newest} us is known, and only "
                f"{self.find.behind_us / 1e6:g} s behind it are kept; check the clocks of this node"
            )
        return points
