"""Point-in-time join: to each request the latest row of its entity, as it was known then.

No other room joins tables by time; windows and lags of the past are ``pipelines.features.sweep``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.events import INSTANT
from pipelines.features.kernels import asof, checks
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
    _check(requests, rows, entity, time, columns, known_at, order)
    codes, names = _codes(rows.column(entity))
    asked = pc.fill_null(pc.index_in(requests.column(entity), value_set=names), -1).to_numpy()
    moments, present = _instants(requests.column(time))
    asked = np.where(present, asked, -1).astype(np.int64)
    times, dated = _instants(rows.column(time))
    known = None if known_at is None else _instants(rows.column(known_at))
    kept = (codes >= 0) & dated if known is None else (codes >= 0) & dated & known[1]
    orders = np.arange(rows.num_rows) if order is None else rows.column(order).to_numpy()
    places = None if kept.all() else np.flatnonzero(kept)
    if places is not None:
        codes, times, orders = codes[places], times[places], orders[places]
    sorted_, *_ = checks.survey(codes, times, orders, times, 0, 0)
    if not sorted_:
        by = np.lexsort((orders, times, codes))
        codes, times = codes[by], times[by]
        places = by if places is None else places[by]
    knowledge = None
    if known is not None:
        knowledge = known[0] if places is None else known[0][places]
    edges = np.searchsorted(codes, np.arange(len(names) + 1))
    ttl_us = _FOREVER if ttl is None else microseconds(ttl)
    found = asof.latest(edges, times, knowledge, asked, moments, moments, ttl_us)
    if places is not None and len(places):
        found = np.where(found >= 0, places[found], -1)
    picked = rows.select(list(columns)).take(pa.array(found, mask=found < 0))
    for name in columns:
        requests = requests.append_column(picked.schema.field(name).with_nullable(True), picked.column(name))
    return requests


def _check(
    requests: pa.Table,
    rows: pa.Table,
    entity: str,
    time: str,
    columns: Sequence[str],
    known_at: str | None,
    order: str | None,
) -> None:
    wanted = [entity, time, *columns, *(name for name in (known_at, order) if name)]
    for what, table, names in (("requests", requests, [entity, time]), ("rows", rows, wanted)):
        if missing := [name for name in names if name not in table.column_names]:
            raise ValueError(f"the {what} of a point-in-time join lack {missing}; they have {table.column_names}")
    if twice := [name for name in columns if name in requests.column_names]:
        raise ValueError(f"requests and rows of a point-in-time join both have {twice}: rename them in one of the two")
    if requests.schema.field(entity).type != rows.schema.field(entity).type:
        kinds = (requests.schema.field(entity).type, rows.schema.field(entity).type)
        raise ValueError(f"{entity!r} is {kinds[0]} in the requests of a point-in-time join and {kinds[1]} in its rows")


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """int64[n] places in the distinct names, -1 for null."""
    encoded = column.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return codes, encoded.dictionary


def _instants(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds int64[n] of timestamps, and which of them are not null, bool[n]."""
    if not pa.types.is_timestamp(column.type):
        raise ValueError(f"the times of a point-in-time join must be timestamps, not {column.type}")
    if column.type.unit == "ns":
        column = pc.floor_temporal(column, unit="microsecond")
    zoned = column if column.type.tz else pc.assume_timezone(column, "UTC")
    present = column.is_valid().to_numpy()
    found: np.ndarray = pc.fill_null(zoned.cast(INSTANT).cast(pa.int64()), 0).to_numpy()
    return found, present
