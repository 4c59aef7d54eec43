"""What an event is once it has passed its contract: system columns, identity, order, bucket, wire form.

Every engine (bulk ingest, HTTP ingest, state, offline features) takes these from here, so an event has
one identity and one place wherever it came in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cluster.log import Log, Record
from pipelines.spec import Contract, Field, FieldType
from pipelines.spec.base import microseconds

EVENT_ID = "_event_id"
KNOWN_AT = "_known_at"
SEQUENCE = "_sequence"
LOAD_ID = "_load_id"
BUCKET = "_bucket"

LAYOUTS = "layouts"
"""The stream of a log that describes the records of its events; it is never trimmed."""
INSTANT = pa.timestamp("us", "UTC")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WIDENED = {"double": ("int64",)}
_ARROW = {
    FieldType.STRING: pa.string(),
    FieldType.FLOAT: pa.float64(),
    FieldType.INTEGER: pa.int64(),
    FieldType.BOOLEAN: pa.bool_(),
    FieldType.TIMESTAMP: INSTANT,
}


def arrow_type(field: Field) -> pa.DataType:
    """The Arrow type of a field's column."""
    if field.type is FieldType.DECIMAL:
        return pa.decimal128(field.precision or 38, field.scale or 0)
    if field.type is FieldType.LIST:
        return pa.list_(arrow_type(field.item))
    return _ARROW[field.type]


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
            pa.field(f.name, arrow_type(f), nullable=True, metadata={"unit": f.unit} if f.unit else None)
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


class OtherLayout(OSError):
    """A record of the log has fields that this code cannot tell, or must not lose; the message says what to do."""


@dataclass(frozen=True)
class Layout:
    """Which fields the values of a record in the log are of: their names, with their Arrow types, in order."""

    fields: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, contract: Contract) -> Layout:
        """That of records which are written under a contract."""
        return cls(tuple((field.name, str(arrow_type(field))) for field in contract.fields))

    @classmethod
    def read(cls, text: bytes) -> Layout:
        """What ``text`` wrote."""
        return cls(tuple((name, kind) for name, kind in orjson.loads(text)))

    @property
    def text(self) -> bytes:
        """Its form in the log."""
        return orjson.dumps(self.fields)

    @property
    def mark(self) -> int:
        """The number that its records begin with."""
        return xxhash.xxh32_intdigest(self.text)


def describe(contract: Contract, log: Log, now_us: int) -> None:
    """Writes into a log how its events are laid out under a contract; to be called before any of them is written.

    The last one that was described is the one in use, also where it was before: a field may have been taken back.
    """
    mine = Layout.of(contract)
    if layouts_of(log)[-1:] != [mine]:
        with log.transaction(now_us) as transaction:
            transaction.append(LAYOUTS, [Record(None, mine.text)])


def layouts_of(log: Log) -> list[Layout]:
    """Those that a log holds records of, in the order in which they came into use, the present one last."""
    return [Layout.read(record.value) for record in log.read(LAYOUTS, 0)]


def _laid_out(mine: Layout, rows: list[list[Any]], known: Sequence[Layout], *, whole: bool) -> list[list[Any]]:
    """The rows as one's own layout has them; ``known`` in the order in which they came into use."""
    order = {layout.mark: place for place, layout in enumerate(known)}
    takes: dict[int, list[int | None]] = {}

    def taken(mark: int) -> list[int | None]:
        if mark not in order:
            raise OtherLayout(f"records of the log have the layout {mark:08x}, which nothing in the log describes")
        theirs = known[order[mark]]
        places = {name: place for place, (name, _) in enumerate(theirs.fields)}
        kinds = dict(theirs.fields)
        for name, kind in mine.fields:
            if kinds.get(name, kind) not in (kind, *_WIDENED.get(kind, ())):
                raise OtherLayout(
                    f"records of the log have {name!r} as {kinds[name]}, and the contract has it as {kind}: deploy the "
                    "contract of before until the log is drained"
                )
        lost = sorted(kinds.keys() - dict(mine.fields).keys())
        if whole and lost and order[mark] > order.get(mine.mark, -1):
            raise OtherLayout(f"records of the log have {lost}, of a later contract: the code that has it drains them")
        return [places.get(name) for name, _ in mine.fields]

    found = []
    for row in rows:
        if isinstance(row[0], str):  # from before records had a mark: fields may have been added behind since then
            row = [mine.mark, *row, *[None] * (len(mine.fields) + 1 - len(row))]
        elif row[0] != mine.mark:
            places = takes.get(row[0]) or takes.setdefault(row[0], taken(row[0]))
            row = [mine.mark, row[1], *(None if place is None else row[place + 2] for place in places)]
        found.append(row)
    return found


def event_id(contract: Contract, record: Mapping[str, Any]) -> str:
    """The id of one event; see ``encoder``."""
    return encoder(contract)(record)[0]


def encode_event(contract: Contract, record: Mapping[str, Any]) -> bytes:
    """The log's form of one accepted event; see ``encoder``."""
    return encoder(contract)(record)[2]


def encoder(contract: Contract) -> Callable[[Mapping[str, Any]], tuple[str, bytes, bytes]]:
    """Compiles the function that gives an accepted record's event id, its identity in the log and its form there.

    The id is the key fields joined by ``|``; a ``|`` or backslash inside a string is escaped by a backslash, so
    different keys never share an id. The identity is that of ``log_identities``. The form is a JSON array of the mark
    of the contract's ``Layout``, the id, and the fields in contract order. Timestamps are microseconds since the epoch
    in both, and decimals are text.
    """
    mark = Layout.of(contract).mark
    names = [field.name for field in contract.fields]
    instants = [place for place, field in enumerate(contract.fields) if field.type is FieldType.TIMESTAMP]
    decimals = [place for place, field in enumerate(contract.fields) if field.type is FieldType.DECIMAL]
    key = [names.index(name) for name in contract.key]
    time = names.index(contract.time) if contract.time in contract.key else None

    def encode(record: Mapping[str, Any]) -> tuple[str, bytes, bytes]:
        values = [record.get(name) for name in names]
        for place in instants:
            moment = values[place]
            if moment is not None:
                values[place] = to_microseconds(moment)
        for place in decimals:
            if values[place] is not None:
                values[place] = format(values[place], "f")
        found = "|".join([_text(values[place]) for place in key])
        return found, _log_identity(found, None if time is None else values[time]), orjson.dumps([mark, found, *values])

    return encode


def log_identities(contract: Contract, events: pa.Table) -> list[bytes]:
    """What the log knows rows of the events table by: their ids, behind their time if that is part of the key.

    So identities of one time lie together in the log, and the same event has the same one.
    """
    ids = events.column(EVENT_ID).to_pylist()
    if contract.time not in contract.key:
        return [_log_identity(found, None) for found in ids]
    times = events.column(contract.time).cast(INSTANT).cast(pa.int64()).to_pylist()
    return [_log_identity(found, time) for found, time in zip(ids, times, strict=True)]


def _log_identity(found: str, time_us: int | None) -> bytes:
    name = found.encode()
    return name if time_us is None else (time_us + (1 << 63)).to_bytes(8, "big") + name


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
    if buckets == 1:
        return pa.array(np.zeros(len(entities), np.int32))
    encoded = entities.dictionary_encode()
    known = np.array([bucket_of(e, buckets) for e in encoded.dictionary.to_pylist()], dtype=np.int32)
    return pa.array(known[encoded.indices.to_numpy(zero_copy_only=False)] if len(known) else known, pa.int32())


def decode_events(
    contract: Contract,
    blobs: Sequence[bytes],
    known_at: Sequence[int],
    sequences: Sequence[int],
    *,
    load_id: str,
    buckets: int,
    layouts: Callable[[], Sequence[Layout]] = tuple,
    whole: bool = False,
) -> pa.Table:
    """The events table rows of log records; ``known_at`` in microseconds since the epoch.

    ``layouts`` gives those of the log, asked for when a record has another than the contract's: its values are found by
    their names, those of fields that the contract no longer has are left out, and of fields that it has now are null.
    With ``whole``, nothing is left out of a record that was written under a later contract. Raises ``OtherLayout``.
    """
    rows = orjson.loads(b"[" + b",".join(blobs) + b"]")
    mine = Layout.of(contract)
    if any(row[0] != mine.mark for row in rows):
        rows = _laid_out(mine, rows, layouts(), whole=whole)
    _, ids, *values = zip(*rows, strict=True) if rows else [()] * (len(contract.fields) + 2)
    columns: list[pa.Array] = []
    for field, found in zip(contract.fields, values, strict=True):
        if field.type is FieldType.TIMESTAMP:
            columns.append(pa.array(found, pa.int64()).cast(INSTANT))
        elif field.type is FieldType.DECIMAL:
            columns.append(pa.array([None if v is None else Decimal(v) for v in found], arrow_type(field)))
        else:
            columns.append(pa.array(found, arrow_type(field)))
    entities = columns[[f.name for f in contract.fields].index(contract.entity)]
    columns += [
        pa.array(ids, pa.string()),
        pa.array(known_at, pa.int64()).cast(INSTANT),
        pa.array(sequences, pa.int64()),
        pa.repeat(pa.scalar(load_id, pa.string()), len(rows)),
        buckets_of(entities, buckets),
    ]
    return pa.Table.from_arrays(columns, schema=events_schema(contract))
