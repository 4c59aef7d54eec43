"""Point-in-time join: to each request the latest row of its entity, as it was known then.

No other room looks rows up by time: ``bucketed_join`` does it with tables on disk by what is here, and windows and lags
of the past are ``sweep``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.events import INSTANT
from pipelines.features.kernels import asof
from pipelines.spec.base import microseconds

_FOREVER = 1 << 62


def join_latest(
    requests: pa.Table,
    rows: pa.Table,
    *,
    entity: str,
    time: str,
    columns: Sequence[str],
    ttl: timedelta | None = None,
    known_at: str | None = None,
    order: str | None = None,
) -> pa.Table:
    """``requests``, row for row, with ``columns`` of the row of ``rows`` that each sees; null where it sees none.

    A request sees of the rows with its ``entity`` those with ``time`` up to and including its own, known by then
    (``known_at``; None: at once) and at most ``ttl`` old, and of these the latest; among rows of one time the one with
    the greatest ``order`` (int64; None: the last in the table). A null entity or time sees nothing and is not seen.
    Times are timestamps of any unit; those without a zone are taken as UTC. Raises ``ValueError`` when a table lacks a
    column or both have one of the same name.
    """
    rule = AsOf(entity, time, ttl, known_at, order)
    check_joinable(requests.schema, rows.schema, rule, columns)
    return with_columns(requests, rows.select(list(columns)), places_seen(requests, rows, rule))


@dataclass(frozen=True)
class AsOf:
    """Which row a request sees, in the words of ``join_latest``."""

    entity: str
    time: str
    ttl: timedelta | None = None
    known_at: str | None = None
    order: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of the rows that decide which one is seen."""
        return (self.entity, self.time, *(name for name in (self.known_at, self.order) if name))

    @property
    def ttl_us(self) -> int:
        """Microseconds after which a row is seen no more."""
        return _FOREVER if self.ttl is None else microseconds(self.ttl)


def places_seen(requests: pa.Table, rows: pa.Table, rule: AsOf) -> np.ndarray:
    """Places int64[q] in ``rows`` of the row that each request sees, -1 for none."""
    codes, names = entity_codes(rows.column(rule.entity))
    times, dated = times_of(rows.column(rule.time))
    known_at = None
    if rule.known_at is not None:
        known_at, known = times_of(rows.column(rule.known_at))
        dated = dated & known
    if not dated.all():
        codes = np.where(dated, codes, -1)
    orders = None if rule.order is None else rows.column(rule.order).cast(pa.int64()).to_numpy()
    places = None
    if asof.standing(codes, times, orders):
        edges = np.searchsorted(codes, np.arange(len(names) + 1))
    else:
        by_time = np.argsort(times, kind="stable") if orders is None else np.lexsort((orders, times))
        edges, places = by_code(codes, len(names), by_time)
        times = times[places]
        known_at = None if known_at is None else known_at[places]
    asked, asked_names = entity_codes(requests.column(rule.entity))
    theirs = pc.fill_null(pc.index_in(asked_names, value_set=names), -1).cast(pa.int64()).to_numpy()
    moments, present = times_of(requests.column(rule.time))
    asked = np.where(present, np.append(theirs, -1)[asked], -1)
    found: np.ndarray = asof.latest(edges, times, known_at, asked, moments, moments, rule.ttl_us)
    return found if places is None else np.append(places, -1)[found]


def with_columns(requests: pa.Table, rows: pa.Table, found: np.ndarray) -> pa.Table:
    """``requests`` with the columns of ``rows`` at the places int64[q], null where that is -1."""
    picked = rows.take(pa.array(found, mask=found < 0))
    for field, column in zip(picked.schema, picked.columns, strict=True):
        requests = requests.append_column(field.with_nullable(True), column)
    return requests


def check_joinable(requests: pa.Schema, rows: pa.Schema, rule: AsOf, columns: Sequence[str]) -> None:
    """Raises ``ValueError`` when tables of these schemas cannot be joined, naming the columns."""
    wanted = [*rule.reads, *columns]
    for what, schema, names in (("requests", requests, [rule.entity, rule.time]), ("rows", rows, wanted)):
        if missing := [name for name in names if name not in schema.names]:
            raise ValueError(f"the {what} of a point-in-time join lack {missing}; they have {schema.names}")
    if twice := [name for name in columns if name in requests.names]:
        raise ValueError(f"requests and rows of a point-in-time join both have {twice}: rename them in one of the two")
    kinds = [_value_type(schema.field(rule.entity).type) for schema in (requests, rows)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{rule.entity!r} is {kinds[0]} in the requests of a point-in-time join and {kinds[1]} in its rows"
        )


def by_code(codes: np.ndarray, count: int, places: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``places`` (None: all) of codes int64[m] below ``count`` by code, and where each code begins, int64[count + 1].

    Places of one code keep their order; those with a negative code are left out.
    """
    places = np.arange(len(codes)) if places is None else places
    edges = np.cumsum([0, *np.bincount(codes + 1, minlength=count + 1)[1:]])
    return edges, asof.by_entity(edges, codes, places)


def entity_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Entities as places int64[n] in their distinct names, -1 for null, and those names."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    held = column.unify_dictionaries().combine_chunks()
    codes = _filled(held.indices)
    distinct = held.dictionary.dictionary_encode()
    if len(distinct.dictionary) < len(held.dictionary):  # one that was handed in may hold a name twice, or null
        codes = np.append(_filled(distinct.indices), -1)[codes]
    return codes, distinct.dictionary


def times_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds int64[n] of timestamps, and which of them are not null, bool[n]."""
    if not pa.types.is_timestamp(column.type):
        raise ValueError(f"the times of a point-in-time join must be timestamps, not {column.type}")
    if column.type.unit == "ns":
        column = pc.floor_temporal(column, unit="microsecond")
    zoned = column if column.type.tz else pc.assume_timezone(column, "UTC")
    present = column.is_valid().to_numpy()
    found: np.ndarray = pc.fill_null(zoned.cast(INSTANT).cast(pa.int64()), 0).to_numpy()
    return found, present


def _filled(indices: pa.Array) -> np.ndarray:
    found: np.ndarray = pc.fill_null(indices, -1).to_numpy().astype(np.int64)
    return found


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
