"""Slowly changing dimensions: facts about a key as of the request, from state and, for the past, from their table.

State is a projection of the dimension's own log and keeps the rows of each key, those that are still to come included.
Both sides look a row up by one rule, and a row's numbers are taken as they are, so a value made of the past equals the
served one bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.contracts.events import EVENT_ID, KNOWN_AT
from pipelines.features.found import NEVER_STALE, Found
from pipelines.features.kernels import asof, layout
from pipelines.features.projection import unpack
from pipelines.features.rows_state import RowsState, by_key
from pipelines.features.state import StateError
from pipelines.features.stores import open_store
from pipelines.features.windows import event_orders, instants, numbers
from pipelines.spec import Dimension, UseCase
from pipelines.spec.base import microseconds

MOST_ROWS = 1_000  # of a key that state keeps, the latest of all
_TIME, _KNOWN, _ORDER, _COLUMNS = 0, 1, 2, 3  # words of a row


def ttl_of(dimension: Dimension) -> int:
    """The age in microseconds above which its values are STALE."""
    return NEVER_STALE if dimension.ttl is None else microseconds(dimension.ttl)


def look_up(
    dimension: Dimension, rows: pa.Table, known: np.ndarray, keys: Sequence[str | None], times: np.ndarray,
    bounds: np.ndarray,
) -> Found:  # fmt: skip
    """What a state would have given for ``keys`` [q] at ``times`` int64[q] (us), from rows of the dimension's table.

    A request sees the rows whose ``known`` number, int64 by row, is at most its bound, int64[q].
    """
    contract = dimension.contract
    encoded = rows.column(contract.entity).combine_chunks().dictionary_encode()
    code = {name: place for place, name in enumerate(encoded.dictionary.to_pylist())}
    codes, moments = encoded.indices.to_numpy(zero_copy_only=False), instants(rows, contract.time)
    order = np.lexsort((event_orders(rows.column(EVENT_ID)), instants(rows, KNOWN_AT), moments, codes))
    asked = np.fromiter((-1 if key is None else code.get(key, -1) for key in keys), np.int64, len(keys))
    edges = np.searchsorted(codes[order], np.arange(len(code) + 1))
    places = asof.latest(edges, moments[order], known[order], asked, times, bounds, layout.NEVER)
    found = np.append(order, -1)[places]
    values = np.empty((len(dimension.columns), len(keys)))
    for turn, name in enumerate(dimension.columns):
        values[turn] = np.append(numbers(rows.column(name)), np.nan)[found]
    return Found(values, np.append(moments, layout.EMPTY)[found])


class DimensionState(RowsState):
    """The rows of one use case's dimension by key, below a directory or in a Redis server as entity state is.

    Of a key the ``MOST_ROWS`` latest are kept; its note is 1 when there were more.
    """

    def __init__(self, place: Path | str, use_case: UseCase, dimension: Dimension, view: str) -> None:
        """``view`` is the fingerprint of the view that ``dimension`` belongs to."""
        self.dimension = dimension
        self.source = use_case.source(dimension)
        store = open_store(place, use_case.name, f"{view}-dimension-{dimension.name}")
        super().__init__(store, use_case.name, dimension.contract, _COLUMNS + len(dimension.columns), 0)

    def prepare(self, rows: pa.Table) -> list[tuple[str, np.ndarray]]:
        """See ``Projection``: every key with its rows; a row counts however late it became known."""
        encoded = rows.column(self.contract.entity).combine_chunks().dictionary_encode()
        made = np.empty((rows.num_rows, _COLUMNS + len(self.dimension.columns)), np.int64)
        made[:, _TIME] = instants(rows, self.contract.time)
        made[:, _KNOWN] = instants(rows, KNOWN_AT)
        made[:, _ORDER] = event_orders(rows.column(EVENT_ID))
        for place, name in enumerate(self.dimension.columns, start=_COLUMNS):
            made[:, place] = numbers(rows.column(name)).view(np.int64)
        return by_key(encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False), made)

    def kept(self, note: int, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """See ``RowsState``."""
        rows = rows[np.lexsort((rows[:, _ORDER], rows[:, _KNOWN], rows[:, _TIME]))]
        return note or int(len(rows) > MOST_ROWS), rows[-MOST_ROWS:]

    def read(self, keys: Sequence[str | None], now_us: int) -> tuple[Found, tuple[int, int]]:
        """What holds for ``keys`` [n] at ``now_us``, and the (generation, sequence) it was found in.

        All are from one snapshot; nothing holds for None. Raises ``StateError`` when ``now_us`` lies before all the
        rows that state keeps of a key, but there were more.
        """
        values = np.full((len(self.dimension.columns), len(keys)), np.nan)
        newest = np.full(len(keys), layout.EMPTY)
        asked = [place for place, key in enumerate(keys) if key is not None]
        with self.store.reading([key for key in keys if key is not None]) as snapshot:
            head = unpack(snapshot.head)
            for place, blob in zip(asked, snapshot.blobs, strict=True):
                if blob is None:
                    continue
                left_out, words = self.opened(blob)
                row = int(np.searchsorted(words[:, _TIME], now_us, side="right")) - 1
                if row >= 0:
                    newest[place], values[:, place] = words[row, _TIME], words[row, _COLUMNS:].view(np.float64)
                elif left_out:
                    raise StateError(
                        f"{keys[place]!r} has more than {MOST_ROWS} rows after {now_us} us in dimension "
                        f"{self.source.name!r}, and earlier ones are not kept: check the clocks of this node"
                    )
        return Found(values, newest), (head.generation, head.applied)
