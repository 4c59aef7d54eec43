"""From the durable log to the Delta tables: every record once, whichever process dies when.

The table's marker says through which sequence a stream is committed; the log is trimmed only after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.database import Database
from cluster.log import Log, LogRecord
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts import enforce, events, leases, rules
from pipelines.contracts.datasets import unique_keys
from pipelines.features.served import OUTCOME_SCHEMA, SERVED_SCHEMA, outcomes_table, predictions_table
from pipelines.spec import EventSource

EVENTS, QUARANTINE, PREDICTIONS, OUTCOMES = "events", "quarantine", "predictions", "outcomes"
LOAD_ID = "drain"


@dataclass(frozen=True)
class Drained:
    """Rows committed by stream, events refused as duplicates of bulk-loaded ones, and table versions."""

    rows: dict[str, int]
    duplicates: int
    versions: dict[str, int]

    @property
    def total(self) -> int:
        """Rows of all streams."""
        return sum(self.rows.values())


def _nothing() -> None:
    """The check of a caller that needs none."""


def drain(
    source: EventSource,
    log: Log,
    tables: Tables,
    settings: Settings,
    *,
    stop_at: Mapping[str, int] | None = None,
    before_commit: Callable[[], None] = _nothing,
) -> Drained:
    """Moves what every stream holds to its table, then trims the log.

    A stream named in ``stop_at`` is moved through that sequence only: what state has not applied yet must stay in
    the log.

    At most ``settings.drain_rows`` records go into one commit. An event whose id the table already has from a
    bulk load goes to the quarantine with ``key.duplicate``. The caller holds the lease: see ``drain_once``;
    ``before_commit`` may raise to stop it. Raises ``ValueError`` for a record that is not of its stream's form;
    nothing after it is drained.
    """
    names = {
        EVENTS: enforce.events_table(source),
        QUARANTINE: enforce.quarantine_table(source),
        PREDICTIONS: predictions_table(source),
        OUTCOMES: outcomes_table(source),
    }
    schemas = {QUARANTINE: events.QUARANTINE_SCHEMA, PREDICTIONS: SERVED_SCHEMA, OUTCOMES: OUTCOME_SCHEMA}
    rows, versions, duplicates = dict.fromkeys(names, 0), {}, 0
    for stream, name in names.items():
        through = min(log.last(stream), (stop_at or {}).get(stream, log.last(stream)))
        if through < log.first(stream):
            continue
        if stream == EVENTS:
            tables.ensure(name, events.events_schema(source.contract), [events.BUCKET], grows=True)
            tables.ensure(names[QUARANTINE], events.QUARANTINE_SCHEMA)
        else:
            tables.ensure(name, schemas[stream], grows=stream == PREDICTIONS)
        done = tables.marker(name, f"drain/{stream}") or 0
        if done >= log.first(stream):  # an earlier drain died between its commit and its trim
            if stream == EVENTS:
                duplicates += _recover(source, log, tables, done)
            log.trim(stream, done)
        while done < through:
            records = log.read(stream, done, min(settings.drain_rows, through - done))
            if not records:
                break
            last = records[-1].sequence
            looked = tables.version(name)
            if stream == EVENTS:
                table = _event_rows(source, log, settings, records)
                keep = _new(source, tables, table, looked)
                table = table.filter(pa.array(keep))
            else:
                table = _decode(schemas[stream], stream, records)
            before_commit()
            of_events = stream == EVENTS
            after = looked if of_events else None
            appended = tables.append(name, table, f"drain/{stream}", last, partial=of_events, after=after)
            versions[stream] = appended.version
            rows[stream] += table.num_rows
            if stream == EVENTS:
                duplicates += _refuse(source, tables, [r for r, new in zip(records, keep, strict=True) if not new])
            log.trim(stream, last)
            done = last
    return Drained({stream: count for stream, count in rows.items() if count}, duplicates, versions)


def drain_once(
    source: EventSource,
    log: Log,
    tables: Tables,
    database: Database,
    settings: Settings,
    holder: str,
    *,
    stop_at: Callable[[], Mapping[str, int]] = dict,
) -> Drained | None:
    """``drain`` under the lease of the use case; None, and nothing done, while another holds it.

    ``stop_at`` is asked under the lease: a rebuild of state holds it too, so what one has published is known by then.
    """
    if not leases.try_events(database, source, holder):
        return None
    with leases.events_lease(database, source, holder) as still_held:
        return drain(source, log, tables, settings, stop_at=stop_at(), before_commit=still_held)


def _event_rows(source: EventSource, log: Log, settings: Settings, records: Sequence[LogRecord]) -> pa.Table:
    return events.decode_events(
        source.contract,
        [record.value for record in records],
        [record.known_at_us for record in records],
        [record.sequence for record in records],
        load_id=LOAD_ID,
        buckets=settings.buckets,
        layouts=lambda: events.layouts_of(log),
        whole=True,
    )


def _new(source: EventSource, tables: Tables, rows: pa.Table, version: int) -> np.ndarray:
    """bool[n]: which rows' event ids the table does not have at that version."""
    contract, span = source.contract, None
    if contract.time in contract.key:
        extent = pc.min_max(rows.column(contract.time))
        span = (pc.field(contract.time) >= extent["min"]) & (pc.field(contract.time) <= extent["max"])
    held = tables.read(
        enforce.events_table(source),
        version=version,
        columns=[events.EVENT_ID],
        filter=span,
        partition={events.BUCKET: pc.unique(rows.column(events.BUCKET)).to_pylist()},
    )
    return unique_keys(rows.column(events.EVENT_ID).combine_chunks(), held.column(events.EVENT_ID))


def _recover(source: EventSource, log: Log, tables: Tables, done: int) -> int:
    """Quarantines the records up to ``done`` that are not in the table: they were refused as duplicates."""
    records = log.read(EVENTS, 0, done - log.first(EVENTS) + 1)
    shown = (pc.field(events.SEQUENCE) >= records[0].sequence) & (pc.field(events.SEQUENCE) <= done)
    held = tables.read(enforce.events_table(source), columns=[events.SEQUENCE], filter=shown)
    committed = set(held.column(events.SEQUENCE).to_pylist())
    return _refuse(source, tables, [record for record in records if record.sequence not in committed])


def _refuse(source: EventSource, tables: Tables, records: Sequence[LogRecord]) -> int:
    """Quarantines records as duplicates, once; how many there are."""
    if not records:
        return 0
    rows = enforce.quarantined(
        source.contract,
        load_id=LOAD_ID,
        sources=["http"] * len(records),
        positions=np.array([record.sequence for record in records]),
        rules_column=pa.array([[rules.KEY_DUPLICATE]] * len(records), pa.list_(pa.string())),
        records=[record.value.decode() for record in records],
        at_us=max(record.known_at_us for record in records),
    )
    tables.append(enforce.quarantine_table(source), rows, "drain/events/duplicates", records[-1].sequence)
    return len(records)


def _decode(schema: pa.Schema, stream: str, records: Sequence[LogRecord]) -> pa.Table:
    values: list[dict[str, Any]] = [orjson.loads(record.value) for record in records]
    for record, value in zip(records, values, strict=True):
        if not isinstance(value, dict) or not value.keys() <= set(schema.names):
            raise ValueError(
                f"record {record.sequence} of stream {stream!r} must be an object of {schema.names}, "
                f"not {record.value[:200]!r}"
            )
    columns = []
    for field in schema:
        cells = [value.get(field.name) for value in values]
        if pa.types.is_timestamp(field.type):
            columns.append(pa.array(cells, pa.int64()).cast(field.type))
        else:
            columns.append(pa.array(cells, field.type))
    return pa.Table.from_arrays(columns, schema=schema)
