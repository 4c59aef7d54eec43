"""Turns a feature view into the program that the compiled kernels follow, and names what it computes.

Entity state is one flat int64 vector: a header (format version, newest event time, where raw events start and
how many there are, events that came too late to place, events placed); for every series, that is every
(field, hop), the settled part of its last settled tile and a ring of tiles indexed ``tile % ring``; then the
raw events not yet settled, in canonical order, each as time, order and one float64 per field. Raw events are
kept for ``reach`` behind the newest one, because within it a late event may still arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.events import EVENT_ID, INSTANT, KNOWN_AT, SEQUENCE, event_order
from pipelines.features import derived, folds
from pipelines.spec import Contract, FeatureView, Fold
from pipelines.spec.base import fingerprint, microseconds

# How far behind the newest event a read may be: between taking the time and reading, other processes apply
# events.
READ_BEHIND = timedelta(minutes=1)

_CODES = {
    Fold.COUNT: folds.C_COUNT,
    Fold.SUM: folds.C_SUM,
    Fold.MEAN: folds.C_MEAN,
    Fold.MIN: folds.C_MIN,
    Fold.MAX: folds.C_MAX,
    Fold.STD: folds.C_STD,
    Fold.LAST: folds.C_LAST,
}


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled view. ``fields`` are the folded contract fields, ``features`` the names of the stored
    vector.
    """

    view: FeatureView
    contract: Contract
    fingerprint: str
    fields: tuple[str, ...]
    features: tuple[str, ...]
    lateness_us: int
    reach_us: int
    program: np.ndarray

    @property
    def fixed_words(self) -> int:
        """Words of entity state before its raw events."""
        return int(self.program[folds.P_FIXED])

    @property
    def raw_words(self) -> int:
        """Words of one raw event."""
        return 2 + len(self.fields)

    @cached_property
    def empty_state(self) -> np.ndarray:
        """The state of an entity that nothing is known of; copy it before writing.

        It is left writable, because numba compiles a kernel once more for arrays that are not.
        """
        state = np.zeros(self.fixed_words, np.int64)
        floats = state.view(np.float64)
        state[folds.VERSION], state[folds.NEWEST] = folds.FORMAT, folds.EMPTY
        start = folds.P_HEADER
        for series in self.program[start : start + int(self.program[0]) * folds.S_ROW].reshape(-1, folds.S_ROW):
            ring, width, settled = (int(series[i]) for i in (folds.S_RING, folds.S_WIDTH, folds.S_SETTLED))
            tiles = slice(settled, settled + (ring + 1) * width)
            state[tiles].reshape(-1, width)[:, :2] = folds.EMPTY
            floats[tiles].reshape(-1, width)[:, 2] = np.nan
        return state


@dataclass(frozen=True)
class EventColumns:
    """Rows of an events table as the kernels want them; times in microseconds, one row per event.

    ``entities`` int64[n] are places in ``names``, which ascend.
    """

    names: tuple[str, ...]
    entities: np.ndarray
    times: np.ndarray
    orders: np.ndarray
    known_at: np.ndarray
    sequences: np.ndarray
    values: np.ndarray


def compile_plan(view: FeatureView, contract: Contract) -> Plan:
    """The program of a view over a contract's events. Pure; the derived features are checked on the way."""
    fields = tuple(dict.fromkeys([*(w.field for w in view.windows), *(lag.field for lag in view.lags)]))
    reach = contract.lateness + contract.future + READ_BEHIND
    spans: dict[tuple[str, int, int], int] = {}
    for window in view.windows:
        key = (window.field, microseconds(window.hop), folds.WIDE)
        spans[key] = max(spans.get(key, 0), window.tiles)
    for lag in view.lags:
        key = (lag.field, microseconds(lag.hop), folds.NARROW)
        spans[key] = max(spans.get(key, 0), lag.offset // lag.hop)

    words, series_rows = folds.HEADER, []
    for (name, hop, width), span in spans.items():
        ring = span + 2 + -(-microseconds(reach) // hop)  # the span behind any read, and every open tile
        series_rows.append([fields.index(name), hop, ring, width, words, words + width])
        words += (ring + 1) * width
    index = {key: place for place, key in enumerate(spans)}

    out, window_rows, lag_rows = 0, [], []
    for window in view.windows:
        codes = [_CODES[fold] for fold in window.folds]
        place = index[window.field, microseconds(window.hop), folds.WIDE]
        padding = [0] * (folds.W_ROW - folds.W_CODES - len(codes))
        window_rows.append([place, window.tiles, out, len(codes), *codes, *padding])
        out += len(codes)
    for lag in view.lags:
        lag_rows.append([index[lag.field, microseconds(lag.hop), folds.NARROW], lag.offset // lag.hop, out])
        out += 1

    header = [0] * folds.P_HEADER
    header[folds.P_SERIES], header[folds.P_WINDOWS] = len(series_rows), len(window_rows)
    header[folds.P_LAGS], header[folds.P_FIELDS] = len(lag_rows), len(fields)
    header[folds.P_REACH], header[folds.P_FIXED] = microseconds(reach), words
    header[folds.P_TTL] = microseconds(view.ttl)
    rows = (word for row in (*series_rows, *window_rows, *lag_rows) for word in row)
    return Plan(
        view=view,
        contract=contract,
        fingerprint=view_fingerprint(view, contract),
        fields=fields,
        features=view.stored,
        lateness_us=microseconds(contract.lateness),
        reach_us=microseconds(reach),
        program=np.array([*header, *rows], dtype=np.int64),
    )


def view_fingerprint(view: FeatureView, contract: Contract) -> str:
    """Sixteen hexadecimal digits of what the view computes and how its state is laid out.

    Derived features count by the operations they do, so a comment or the name of a local variable changes
    nothing and a constant does. ``ttl`` changes statuses, not values, and is left out.
    """
    calendar = view.calendar
    return fingerprint(
        folds.FORMAT,
        (contract.entity, contract.time, microseconds(contract.lateness), microseconds(contract.future)),
        [(w.field, microseconds(w.length), microseconds(w.hop), [str(f) for f in w.folds]) for w in view.windows],
        [(lag.field, microseconds(lag.offset), microseconds(lag.hop)) for lag in view.lags],
        view.inputs,
        (calendar.zone, microseconds(calendar.ahead), calendar.parts) if calendar else None,
        [(name, trace.text) for name, trace in derived.traces(view).items()],
    )


def instants(table: pa.Table, name: str) -> np.ndarray:
    """A timestamp column as int64 microseconds since the Unix epoch."""
    found: np.ndarray = table.column(name).cast(INSTANT).cast(pa.int64()).to_numpy()
    return found


def event_columns(plan: Plan, events: pa.Table) -> EventColumns:
    """The columns of ``events`` (events table rows) that ``plan`` folds; a null value becomes NaN."""
    values = np.empty((events.num_rows, len(plan.fields)), dtype=np.float64)
    for place, name in enumerate(plan.fields):
        column = pc.fill_null(events.column(name).cast(pa.float64()), np.nan)
        values[:, place] = column.to_numpy()
    encoded = events.column(plan.contract.entity).combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = sorted(found)
    place_of = {name: place for place, name in enumerate(names)}
    places = np.array([place_of[name] for name in found], dtype=np.int64)
    return EventColumns(
        names=tuple(names),
        entities=places[encoded.indices.to_numpy(zero_copy_only=False)],
        times=instants(events, plan.contract.time),
        orders=event_order(events.column(EVENT_ID).to_pylist()),
        known_at=instants(events, KNOWN_AT),
        sequences=events.column(SEQUENCE).to_numpy(),
        values=values,
    )


def eligible(plan: Plan, columns: EventColumns) -> np.ndarray:
    """Which events count for features, bool[n]: those known within the contract's lateness."""
    counts: np.ndarray = columns.known_at - columns.times <= plan.lateness_us
    return counts
