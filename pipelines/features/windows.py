"""Turns a feature view into the program that the compiled kernels follow, and names what it computes.

``pipelines.features.kernels.layout`` describes program and entity state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.contracts.events import EVENT_ID, INSTANT, KNOWN_AT, SEQUENCE, event_order
from pipelines.features import derived
from pipelines.features.kernels import decay, distinct, families, hashes, latest, layout, moments, trend
from pipelines.spec import Contract, FeatureView, Fold, UseCase, Window
from pipelines.spec.base import fingerprint, microseconds

# How far behind the newest event a read may be: between taking the time and reading, other processes apply
# events.
READ_BEHIND = timedelta(minutes=1)

# Part of every fingerprint: raised when the same definition computes other values.
_COMPUTES = 3

# Unsettled events that an entity keeps at most: every change writes them all again.
MAX_RAW_EVENTS = 100_000

# The family and the code of every fold.
_FOLDS = {
    Fold.COUNT: (families.MOMENTS, moments.C_COUNT),
    Fold.SUM: (families.MOMENTS, moments.C_SUM),
    Fold.MEAN: (families.MOMENTS, moments.C_MEAN),
    Fold.MIN: (families.MOMENTS, moments.C_MIN),
    Fold.MAX: (families.MOMENTS, moments.C_MAX),
    Fold.STD: (families.MOMENTS, moments.C_STD),
    Fold.FIRST: (families.MOMENTS, moments.C_FIRST),
    Fold.LAST: (families.MOMENTS, moments.C_LAST),
    Fold.DELTA: (families.MOMENTS, moments.C_DELTA),
    Fold.MISSING: (families.MOMENTS, moments.C_MISSING),
    Fold.SINCE: (families.MOMENTS, moments.C_SINCE),
    Fold.SLOPE: (families.TREND, trend.C_SLOPE),
    Fold.EWM: (families.DECAY, decay.C_EWM),
    Fold.DISTINCT: (families.DISTINCT, distinct.C_DISTINCT),
}
_LATEST = (families.LATEST, latest.C_LAST)  # of the last value alone, in a third of the room


@dataclass(frozen=True)
class _Series:
    """Tiles that windows and lags share: a field, a hop (us) and a family with its half-life (us, else 0)."""

    field: str
    hop: int
    family: int
    half_life: int = 0


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

    @cached_property
    def fixed_words(self) -> int:
        """Words of entity state before its raw events."""
        return int(self.program[layout.P_FIXED])

    @property
    def behind_us(self) -> int:
        """How long before a read an event may lie and still be seen by it."""
        spans = [*(w.length + w.hop for w in self.view.windows), *(lag.offset + lag.hop for lag in self.view.lags)]
        return microseconds(max(spans, default=timedelta(0)))

    @property
    def raw_words(self) -> int:
        """Words of one raw event."""
        return 2 + len(self.fields)

    @cached_property
    def others(self) -> bool | None:
        """What kernels that write state take to know whether it has families beyond LATEST and MOMENTS: None for no."""
        return None if set(self._families.tolist()) <= {families.LATEST, families.MOMENTS} else True

    @cached_property
    def mixed(self) -> bool | None:
        """What kernels that read take to know whether windows have families beyond MOMENTS: None for no."""
        begin = layout.P_HEADER + int(self.program[layout.P_SERIES]) * layout.S_ROW
        rows = self.program[begin:][: int(self.program[layout.P_WINDOWS]) * layout.W_ROW]
        read = self._families[rows[layout.W_SERIES :: layout.W_ROW]]
        return None if set(read.tolist()) <= {families.MOMENTS} else True

    @property
    def _families(self) -> np.ndarray:
        """The family of every series."""
        rows = self.program[layout.P_HEADER :][: int(self.program[layout.P_SERIES]) * layout.S_ROW]
        return rows[layout.S_FAMILY :: layout.S_ROW]

    @cached_property
    def empty_state(self) -> np.ndarray:
        """The state of an entity that nothing is known of; copy it before writing.

        It is left writable, because numba compiles a kernel once more for arrays that are not.
        """
        state = np.zeros(self.fixed_words, np.int64)
        state[layout.VERSION] = layout.FORMAT
        state[layout.NEWEST] = state[layout.FLOOR] = layout.EMPTY
        start = layout.P_HEADER
        for series in self.program[start : start + int(self.program[0]) * layout.S_ROW].reshape(-1, layout.S_ROW):
            ring, width, settled = (int(series[i]) for i in (layout.S_RING, layout.S_WIDTH, layout.S_SETTLED))
            state[settled : settled + (ring + 1) * width : width] = layout.EMPTY
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
    windows: list[tuple[_Series, int, list[int]]] = []
    for window in view.windows:
        places = [view.stored.index(window.feature(fold)) for fold in window.folds]
        codes = [_LATEST if window.folds == (Fold.LAST,) else _FOLDS[fold] for fold in window.folds]
        for family in dict.fromkeys(family for family, _ in codes):
            series = _Series(window.field, microseconds(window.hop), family, _half_life(window, family))
            outs = [-1] * layout.MOST_FOLDS
            for (its_family, code), at in zip(codes, places, strict=True):
                if its_family == family:
                    outs[code] = at
            windows.append((series, window.tiles, outs))
    lags = [
        (_Series(lag.field, microseconds(lag.hop), families.LATEST), lag.offset // lag.hop, place)
        for place, lag in enumerate(view.lags, start=len(view.of_entity) - len(view.lags))
    ]
    spans: dict[_Series, int] = {}
    for series, span in (*((w[0], w[1]) for w in windows), *((lag[0], lag[1]) for lag in lags)):
        spans[series] = max(spans.get(series, 0), span)

    words, series_rows = layout.HEADER, []
    for series, span in spans.items():
        ring = span + 2 + -(-microseconds(reach) // series.hop)  # the span behind any read, and every open tile
        width = 1 + families.WIDTHS[series.family]
        field = fields.index(series.field)
        series_rows.append([field, series.hop, ring, width, words, words + width, series.family, series.half_life])
        words += (ring + 1) * width
    index = {series: place for place, series in enumerate(spans)}
    window_rows = [[index[series], tiles, *outs] for series, tiles, outs in windows]
    lag_rows = [[index[series], tiles, out] for series, tiles, out in lags]

    header = [0] * layout.P_HEADER
    header[layout.P_SERIES], header[layout.P_WINDOWS] = len(series_rows), len(window_rows)
    header[layout.P_LAGS], header[layout.P_FIELDS] = len(lag_rows), len(fields)
    header[layout.P_REACH], header[layout.P_FIXED] = microseconds(reach), words
    header[layout.P_TTL], header[layout.P_MOST] = microseconds(view.ttl), MAX_RAW_EVENTS
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


def _computed(window: Window) -> tuple[str, int, int, list[str], int | None]:
    half_life = microseconds(window.half_life) if window.half_life else None
    return (
        window.field,
        microseconds(window.length),
        microseconds(window.hop),
        [str(f) for f in window.folds],
        half_life,
    )


def _half_life(window: Window, family: int) -> int:
    return microseconds(window.half_life) if family == families.DECAY and window.half_life is not None else 0


def view_fingerprint(view: FeatureView, contract: Contract) -> str:
    """Sixteen hexadecimal digits of what the view computes.

    Derived features count by the operations they do, so a comment or the name of a local variable changes
    nothing and a constant does. ``ttl`` changes statuses, not values, and is left out.
    """
    calendar = view.calendar
    return fingerprint(
        _COMPUTES,
        (contract.entity, contract.time, microseconds(contract.lateness), microseconds(contract.future)),
        [_computed(window) for window in view.windows],
        [(lag.field, microseconds(lag.offset), microseconds(lag.hop)) for lag in view.lags],
        view.inputs,
        (calendar.zone, microseconds(calendar.ahead), calendar.parts) if calendar else None,
        [(name, trace.text) for name, trace in derived.traces(view).items()],
        *(near.model_dump_json() for near in view.neighbours),
        *((d.name, d.key, d.columns, d.contract.entity, d.contract.time, d.contract.key) for d in view.dimensions),
    )


def pages(use_case: UseCase) -> dict[str, UseCase]:
    """The use case under each of its views by fingerprint, the present one first.

    Raises ``ValueError`` when two of them compute the same: they would share one state.
    """
    found = {view_fingerprint(use_case.view, use_case.contract): use_case}
    for view in use_case.kept:
        mark = view_fingerprint(view, use_case.contract)
        if mark in found:
            raise ValueError(
                f"use case {use_case.name!r}: the kept view {view.name!r} computes the same as "
                f"{found[mark].view.name!r} ({mark}): leave it out"
            )
        found[mark] = use_case.under(view)
    return found


def instants(table: pa.Table, name: str) -> np.ndarray:
    """A timestamp column as int64 microseconds since the Unix epoch."""
    found: np.ndarray = table.column(name).cast(INSTANT).cast(pa.int64()).to_numpy()
    return found


def event_columns(plan: Plan, events: pa.Table) -> EventColumns:
    """The columns of ``events`` (events table rows) that ``plan`` folds; a null value becomes NaN."""
    values = np.empty((events.num_rows, len(plan.fields)), dtype=np.float64)
    for place, name in enumerate(plan.fields):
        values[:, place] = numbers(events.column(name))
    encoded = events.column(plan.contract.entity).combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = sorted(found)
    place_of = {name: place for place, name in enumerate(names)}
    places = np.array([place_of[name] for name in found], dtype=np.int64)
    return EventColumns(
        names=tuple(names),
        entities=places[encoded.indices.to_numpy(zero_copy_only=False)],
        times=instants(events, plan.contract.time),
        orders=event_orders(events.column(EVENT_ID)),
        known_at=instants(events, KNOWN_AT),
        sequences=events.column(SEQUENCE).to_numpy(),
        values=values,
    )


def event_orders(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """``event_order`` of every id, int64[n], by a kernel for those of usual length."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    _, offsets, text = ids.buffers()
    made = np.zeros(len(ids), np.uint64)
    if text is not None and len(text) >= hashes.SHORTEST:
        # Eight bytes from every byte on: what the kernel takes out of the text needs no alignment.
        words = np.ndarray((len(text) - 7,), np.uint64, text, strides=(1,))
        hashes.xxh3(words, np.frombuffer(offsets, np.int32)[ids.offset :][: len(ids) + 1], hashes.SECRET, made)
    found = made.view(np.int64)
    rest = np.flatnonzero(found == 0)
    if len(rest):
        found[rest] = event_order(ids.take(pa.array(rest)).to_pylist())
    return found


def canonical(columns: EventColumns) -> np.ndarray:
    """The rows by entity and, within it, in the canonical order of events: int64[n]."""
    by_time = np.argsort(columns.times, kind="stable")
    # Of 16 bits numpy counts instead of comparing.
    entities = columns.entities.astype(np.min_scalar_type(len(columns.names)))[by_time]
    rows = by_time[np.argsort(entities, kind="stable")]
    entities, times = columns.entities[rows], columns.times[rows]
    if np.any((entities[1:] == entities[:-1]) & (times[1:] == times[:-1])):
        rows = np.lexsort((columns.orders, columns.times, columns.entities))
    return rows


def number_of(value: Any) -> float:
    """One value as ``numbers`` has it."""
    if isinstance(value, str):
        return float(xxhash.xxh3_64_intdigest(value.encode()) >> 11)
    return np.nan if value is None else float(value)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column as float64, NaN for null; a string as 53 bits of its XXH3, which is all that is asked of it."""
    if not pa.types.is_string(column.type):
        # Unchecked: an integer beyond 2**53 is rounded, as Python does.
        found: np.ndarray = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy()
        return found
    encoded = column.combine_chunks().dictionary_encode()
    hashes = [number_of(text) for text in encoded.dictionary.to_pylist()]
    places = pc.fill_null(encoded.indices, len(hashes)).to_numpy(zero_copy_only=False)
    hashed: np.ndarray = np.array([*hashes, np.nan])[places]
    return hashed


def take(columns: EventColumns, rows: np.ndarray) -> EventColumns:
    """The given rows, in the given order."""
    return replace(
        columns,
        entities=columns.entities[rows],
        times=columns.times[rows],
        orders=columns.orders[rows],
        known_at=columns.known_at[rows],
        sequences=columns.sequences[rows],
        values=columns.values[rows],
    )


def eligible(plan: Plan, columns: EventColumns) -> np.ndarray:
    """Which events count for features, bool[n]: those known within the contract's lateness."""
    counts: np.ndarray = columns.known_at - columns.times <= plan.lateness_us
    return counts
