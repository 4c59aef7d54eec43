"""What an event is once it has passed its contract: system columns, identity, order, bucket, wire form.

Every engine (bulk ingest, HTTP ingest, state, offline features) takes these from here, so an event has
one identity and one place wherever it came in.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.spec import Contract, FieldType
from pipelines.spec.base import microseconds

EVENT_ID = "_event_id"
KNOWN_AT = "_known_at"
SEQUENCE = "_sequence"
LOAD_ID = "_load_id"
BUCKET = "_bucket"

INSTANT = pa.timestamp("us", "UTC")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ARROW = {
    FieldType.STRING: pa.string(),
    FieldType.FLOAT: pa.float64(),
    FieldType.INTEGER: pa.int64(),
    FieldType.BOOLEAN: pa.bool_(),
    FieldType.TIMESTAMP: INSTANT,
}

QUARANTINE_SCHEMA = pa.schema(
    [
        (LOAD_ID, pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("contract", pa.string()),
        ("contract_version", pa.string()),
        ("rules", pa.list_(pa.string())),
        ("record", pa.string()),
        ("at", INSTANT),
    ]
)


def contract_schema(contract: Contract) -> pa.Schema:
    """The Arrow schema of the contract's own fields. A field's unit is kept in its metadata."""
    return pa.schema(
        [
            pa.field(f.name, _ARROW[f.type], nullable=True, metadata={"unit": f.unit} if f.unit else None)
            for f in contract.fields
        ]
    )


def events_schema(contract: Contract) -> pa.Schema:
    """The schema of the events table: the contract's fields, then the system columns.

    ``_known_at`` is when the event became known, ``_sequence`` its place in the ingest log (0 for a
    bulk load), ``_load_id`` the load or drain that wrote it, ``_bucket`` the partition of its entity.
    """
    fields = [pa.field(f.name, f.type) for f in contract_schema(contract)]
    system = [
        pa.field(EVENT_ID, pa.string()),
        pa.field(KNOWN_AT, INSTANT),
        pa.field(SEQUENCE, pa.int64()),
        pa.field(LOAD_ID, pa.string()),
        pa.field(BUCKET, pa.int32()),
    ]
    return pa.schema([*fields, *system])


def to_microseconds(moment: datetime) -> int:
    """Microseconds since the Unix epoch of an aware datetime, exactly."""
    return microseconds(moment - _EPOCH)


def from_microseconds(value: int) -> datetime:
    """The UTC datetime of microseconds since the Unix epoch, exactly."""
    return _EPOCH + timedelta(microseconds=value)


def event_id(contract: Contract, record: Mapping[str, Any]) -> str:
    """The identity of one event: its key fields joined by ``|``, a timestamp as microseconds since the epoch.

    A ``|`` or backslash inside a string is escaped by a backslash, so different keys never share an identity.
    """
    parts = []
    for name in contract.key:
        value = record[name]
        parts.append(str(to_microseconds(value)) if isinstance(value, datetime) else _text(value))
    return "|".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.replace("\\", "\\\\").replace("|", "\\|") if isinstance(value, str) else str(value)


def event_ids(contract: Contract, table: pa.Table) -> pa.Array:
    """``event_id`` of every row of a typed table."""
    columns = []
    for name in contract.key:
        column = table.column(name)
        if pa.types.is_timestamp(column.type):
            column = column.cast(INSTANT).cast(pa.int64())
        if pa.types.is_floating(column.type):  # Arrow and Python print floats differently
            column = pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string())
        elif pa.types.is_string(column.type):
            column = pc.replace_substring(pc.replace_substring(column, "\\", "\\\\"), "|", "\\|")
        columns.append(column.cast(pa.string()))
    joined = columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, "|")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def event_order(ids: Iterable[str]) -> np.ndarray:
    """int64 keys that break ties between events of one entity and one time: XXH3 of the event id.

    The canonical order of an entity's events is (event time, this key).
    """
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(i.encode()) for i in ids), dtype=np.uint64).view(np.int64)


def bucket_of(entity: str, buckets: int) -> int:
    """The partition of an entity: CRC-32 of its UTF-8 name modulo ``buckets``."""
    return zlib.crc32(entity.encode()) % buckets


def buckets_of(entities: pa.Array | pa.ChunkedArray, buckets: int) -> pa.Array:
    """``bucket_of`` of every row as int32; computed once per distinct entity."""
    if isinstance(entities, pa.ChunkedArray):
        entities = entities.combine_chunks()
    encoded = entities.dictionary_encode()
    known = np.array([bucket_of(e, buckets) for e in encoded.dictionary.to_pylist()], dtype=np.int32)
    return pa.array(known[encoded.indices.to_numpy(zero_copy_only=False)] if len(known) else known, pa.int32())


def encode_event(contract: Contract, record: Mapping[str, Any], identity: str | None = None) -> bytes:
    """The log's form of one accepted event: a JSON array of the event id and the fields in contract order.

    Timestamps are microseconds since the epoch. The contract's version is kept by the log's stream name. ``identity``
    is the event's id where the caller knows it already.
    """
    values: list[Any] = [event_id(contract, record) if identity is None else identity]
    for field in contract.fields:
        value = record.get(field.name)
        values.append(to_microseconds(value) if isinstance(value, datetime) else value)
    return orjson.dumps(values)


def decode_events(
    contract: Contract,
    blobs: Sequence[bytes],
    known_at: Sequence[int],
    sequences: Sequence[int],
    *,
    load_id: str,
    buckets: int,
) -> pa.Table:
    """The events table rows of log records; ``known_at`` in microseconds since the epoch."""
    rows = [orjson.loads(blob) for blob in blobs]
    schema = events_schema(contract)
    columns: list[pa.Array] = []
    for place, field in enumerate(contract.fields, start=1):
        values = [row[place] for row in rows]
        if field.type is FieldType.TIMESTAMP:
            columns.append(pa.array(values, pa.int64()).cast(INSTANT))
        else:
            columns.append(pa.array(values, _ARROW[field.type]))
    entities = columns[[f.name for f in contract.fields].index(contract.entity)]
    columns += [
        pa.array([row[0] for row in rows], pa.string()),
        pa.array(known_at, pa.int64()).cast(INSTANT),
        pa.array(sequences, pa.int64()),
        pa.array([load_id] * len(rows), pa.string()),
        buckets_of(entities, buckets),
    ]
    return pa.Table.from_arrays(columns, schema=schema)
