"""From what a source holds (Arrow columns, CSV text, JSON values) to a typed table in contract order.

A value that cannot be read as its field's type becomes null and is remembered as malformed, with its rule;
nothing is coerced beyond what ``from_arrow``, ``from_text`` and ``from_records`` say.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import rules
from pipelines.contracts.events import INSTANT, arrow_type, contract_schema, to_microseconds
from pipelines.spec import Contract, Field, FieldType

_FLOAT_TEXT = r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:nan|inf|infinity))"
_TEXT: dict[FieldType, tuple[str, Callable[[str], Any]]] = {
    FieldType.FLOAT: (_FLOAT_TEXT, float),
    FieldType.INTEGER: (r"-?[0-9]+", lambda text: int(text) if len(text) < 1000 else None),
    FieldType.BOOLEAN: (r"(?i:true|false)|[01]", lambda text: text.lower() in ("true", "1")),
    FieldType.DECIMAL: (rules.DECIMAL_TEXT, str),
    FieldType.TIMESTAMP: (rules.INSTANT_TEXT, rules.instant),
}
_KINDS: dict[FieldType, set[type]] = {
    FieldType.STRING: {str},
    FieldType.FLOAT: {float},
    FieldType.INTEGER: {int},
    FieldType.BOOLEAN: {bool},
    FieldType.DECIMAL: set(),
    FieldType.TIMESTAMP: set(),
}
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)


class AmbiguousColumns(ValueError):
    """Several columns have one name, so no row can be read."""


@dataclass(frozen=True)
class Broken:
    """Rows (ascending indices, int64) that break one rule."""

    rule: str
    rows: np.ndarray


@dataclass(frozen=True)
class Parsed:
    """A typed table of the contract's schema, what was wrong already, and the original rows.

    ``malformed`` gives for a field the mask (bool[n]) of values that are null in the table because they could
    not be read; ``broken`` the rules those and the rows' unknown names break; ``unreadable`` the mask of rows
    of which no field exists. ``raw`` gives the original records of some rows as JSON.
    """

    table: pa.Table
    malformed: Mapping[str, np.ndarray]
    broken: tuple[Broken, ...]
    unreadable: np.ndarray | None
    raw: Callable[[np.ndarray], list[str]]


def from_arrow(contract: Contract, table: pa.Table) -> Parsed:
    """Reads typed columns: any width of integer or float, decimals for floats, timestamps with a zone.

    Strings are read as instants or decimals where the contract wants one, never as other numbers; no float is a
    decimal. A list with a null in it is none. A column of another type
    breaks ``type`` in every row that is not null. A field whose metadata names another unit than the contract
    breaks ``unit`` in every row, an extra column ``unknown``.
    """
    _unambiguous(table)
    everywhere = [
        rules.rule_id(field.name, rules.UNIT)
        for field in contract.fields
        if field.name in table.column_names and _other_unit(field, table.schema.field(field.name))
    ]
    return _assemble(contract, table, _typed, everywhere)


def from_text(contract: Contract, table: pa.Table) -> Parsed:
    """Reads strings as CSV means them: null (an empty cell), numbers, true/false/1/0, RFC 3339, lists as JSON."""
    return _assemble(contract, table, _text, [])


def from_records(contract: Contract, records: Sequence[Any]) -> Parsed:
    """Reads JSON values: a boolean is no number, a float is no integer, an absent key is a null.

    An element that is no object is unreadable; it breaks ``row.unreadable`` and nothing else.
    """
    unreadable = np.fromiter((not isinstance(r, dict) for r in records), dtype=bool, count=len(records))
    rows = [r if isinstance(r, dict) else {} for r in records] if unreadable.any() else records
    columns: list[pa.Array] = []
    malformed: dict[str, np.ndarray] = {}
    broken: list[Broken] = []
    for field in contract.fields:
        column, bad = _values(field, [row.get(field.name) for row in rows])
        columns.append(column)
        _note(field, bad, malformed, broken)
    known = {field.name for field in contract.fields}
    extra: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if not row.keys() <= known:
            for rule in {rules.unknown_id(key) for key in row.keys() - known}:
                extra.setdefault(rule, []).append(place)
    broken += [Broken(rule, np.array(places, dtype=np.int64)) for rule, places in extra.items()]
    if unreadable.any():
        broken.append(Broken(rules.ROW_UNREADABLE, np.flatnonzero(unreadable)))
    return Parsed(
        table=pa.Table.from_arrays(columns, schema=contract_schema(contract)),
        malformed=malformed,
        broken=tuple(broken),
        unreadable=unreadable if unreadable.any() else None,
        raw=lambda places: [rules.as_json(records[i]) for i in places],
    )


def _assemble(
    contract: Contract,
    table: pa.Table,
    read: Callable[[Field, pa.Array], tuple[pa.Array, np.ndarray | None]],
    everywhere: list[str],
) -> Parsed:
    _unambiguous(table)
    names = table.column_names
    columns: list[pa.Array] = []
    malformed: dict[str, np.ndarray] = {}
    broken: list[Broken] = []
    for field, target in zip(contract.fields, contract_schema(contract), strict=True):
        if field.name not in names:
            columns.append(pa.nulls(table.num_rows, target.type))
            continue
        column, bad = read(field, _flat(table.column(field.name)))
        columns.append(column)
        _note(field, bad, malformed, broken)
    known = {field.name for field in contract.fields}
    everywhere = everywhere + [rules.unknown_id(name) for name in names if name not in known]
    if everywhere and table.num_rows:
        rows = np.arange(table.num_rows, dtype=np.int64)
        broken += [Broken(rule, rows) for rule in sorted(set(everywhere))]
    return Parsed(
        table=pa.Table.from_arrays(columns, schema=contract_schema(contract)),
        malformed=malformed,
        broken=tuple(broken),
        unreadable=None,
        raw=lambda places: _table_rows(contract, table, places),
    )


def _unambiguous(table: pa.Table) -> None:
    names = table.column_names
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise AmbiguousColumns(f"the source has several columns named {twice}: keep one of each")


def _note(field: Field, bad: np.ndarray | None, malformed: dict[str, np.ndarray], broken: list[Broken]) -> None:
    if bad is not None and bad.any():
        malformed[field.name] = bad
        broken.append(Broken(rules.rule_id(field.name, rules.TYPE), np.flatnonzero(bad)))


def _typed(field: Field, column: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _typed(field, column.dictionary_decode())
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    whole = pa.types.is_integer(kind)
    if pa.types.is_null(kind):
        return pa.nulls(len(column), arrow_type(field)), None
    if field.type is FieldType.STRING and text:
        return column.cast(pa.string()), None
    if field.type is FieldType.FLOAT and (whole or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return column.cast(pa.float64(), safe=False), None
    if field.type is FieldType.INTEGER and whole:
        if kind != pa.uint64():
            return column.cast(pa.int64()), None
        return _keep(column, pc.less_equal(column, pa.scalar(rules.INT64_MAX, pa.uint64())), pa.int64())
    if field.type is FieldType.BOOLEAN and pa.types.is_boolean(kind):
        return column, None
    if field.type in (FieldType.TIMESTAMP, FieldType.DECIMAL) and text:
        return _text(field, column.cast(pa.string()))
    if field.type is FieldType.DECIMAL and (whole or pa.types.is_decimal(kind)):
        return _values(field, column.to_pylist())
    if field.type is FieldType.TIMESTAMP and pa.types.is_timestamp(kind) and kind.tz is not None:
        return _instants(column)
    if field.type is FieldType.LIST and any(is_list(kind) for is_list in _LISTS):
        values, _ = _typed(field.item, pc.list_flatten(column))
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        return _lists(field, values, lengths, _mask(column.is_null()))
    return pa.nulls(len(column), arrow_type(field)), _mask(column.is_valid())


def _lists(field: Field, values: pa.Array, lengths: np.ndarray, null: np.ndarray) -> tuple[pa.Array, np.ndarray | None]:
    """Lists of those ``lengths``, 0 where they are ``null``; one with a value that could not be read is bad."""
    bad = np.zeros(len(lengths), dtype=bool)
    if values.null_count:
        places = np.repeat(np.arange(len(lengths)), lengths)
        bad[places[_mask(values.is_null())]] = True
        values, lengths = values.filter(pa.array(~bad[places])), np.where(bad, 0, lengths)
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(ends, values, arrow_type(field), mask=pa.array(null | bad)), bad


def _instants(column: pa.TimestampArray) -> tuple[pa.Array, np.ndarray | None]:
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
    counts = column.cast(pa.int64())
    if per_second == 10**6 and len(counts):  # the ends tell of nearly every column that all of it fits
        # What stands where a null is may be anything: it costs the slower look.
        ends = np.frombuffer(counts.buffers()[1], np.int64, len(counts), 8 * counts.offset)
        if ends.min() >= rules.EARLIEST_US and ends.max() <= rules.LATEST_US:
            return column.cast(INSTANT), None
    fits = pc.and_(
        pc.greater_equal(
            counts, -(-rules.EARLIEST_US * per_second // 10**6) if per_second <= 10**6 else rules.INT64_MIN
        ),
        pc.less_equal(counts, rules.LATEST_US * per_second // 10**6 if per_second <= 10**6 else rules.INT64_MAX),
    )
    if per_second == 10**9:  # finer than microseconds cannot be kept; the rest lies within the years 1677 to 2262
        fits = pc.equal(pc.multiply(pc.divide(counts, 1000), 1000), counts)
    return _keep(column, fits, INSTANT)


def _text(field: Field, column: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    if field.type is FieldType.STRING:
        return column, None
    if field.type is FieldType.LIST:
        return _values(field, [None if text is None else _json(text) for text in column.to_pylist()])
    pattern, parse = _TEXT[field.type]
    fits = pc.match_substring_regex(column, rf"\A(?:{pattern})\z")
    try:
        if field.type is FieldType.DECIMAL:  # Arrow rounds what does not fit
            raise pa.ArrowInvalid
        return _keep(column, fits, arrow_type(field), instants=field.type is FieldType.TIMESTAMP)
    except pa.ArrowInvalid:  # text of the right shape that is no value (30 February, 20 digits): one by one
        values = [parse(v) if ok else None for v, ok in zip(column.to_pylist(), fits.to_pylist(), strict=True)]
        typed, _ = _values(field, values)
        return typed, _mask(pc.and_(column.is_valid(), typed.is_null()))


def _keep(
    column: pa.Array, fits: pa.BooleanArray, kind: pa.DataType, *, instants: bool = False
) -> tuple[pa.Array, np.ndarray | None]:
    """Casts the values that fit; the others become null and bad. Nulls stay nulls."""
    if pc.all(fits, skip_nulls=True, min_count=0).as_py():
        typed, bad = column.cast(kind), None
    else:
        typed = pc.if_else(fits, column, pa.scalar(None, column.type)).cast(kind)
        bad = _mask(pc.and_(column.is_valid(), pc.invert(fits)))
    if instants:
        extent = pc.min_max(typed.cast(pa.int64())).as_py()
        if extent["min"] is not None and not rules.EARLIEST_US <= extent["min"] <= extent["max"] <= rules.LATEST_US:
            raise pa.ArrowInvalid("an instant outside of the years 1000 to 9999")
    return typed, bad


def _values(field: Field, values: list[Any]) -> tuple[pa.Array, np.ndarray | None]:
    """One column of JSON values; values of exactly the right Python types take the fast way."""
    if field.type is FieldType.LIST:
        return _value_lists(field, values)
    kinds = set(map(type, values))
    kinds.discard(type(None))
    if kinds <= _KINDS[field.type]:
        try:
            return pa.array(values, arrow_type(field)), None
        except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):
            pass  # a huge integer or a lone surrogate: find out which below
    convert = partial(rules.decimal, field) if field.type is FieldType.DECIMAL else _CONVERT[field.type]
    typed: list[Any] = [None if value is None else convert(value) for value in values]
    bad = np.fromiter(
        (t is None and v is not None for t, v in zip(typed, values, strict=True)),
        dtype=bool,
        count=len(values),
    )
    if field.type is FieldType.TIMESTAMP:
        moments = [None if t is None else to_microseconds(t) for t in typed]
        return pa.array(moments, pa.int64()).cast(INSTANT), bad
    return pa.array(typed, arrow_type(field)), bad


def _value_lists(field: Field, values: list[Any]) -> tuple[pa.Array, np.ndarray | None]:
    lists = [value if isinstance(value, list) else [] for value in values]
    flat, _ = _values(field.item, list(itertools.chain.from_iterable(lists)))
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    none = np.fromiter((not isinstance(value, list) for value in values), bool, len(values))
    column, bad = _lists(field, flat, lengths, none)
    other = np.fromiter((value is not None for value in values), bool, len(values)) & none
    return column, other if bad is None else bad | other


def _json(text: str) -> Any:
    """What JSON text says, and what is no list to anybody where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if found is None else found


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer that no double reaches
        return None


def _to_integer(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and rules.is_int64(value) else None


_CONVERT: dict[FieldType, Callable[[Any], Any]] = {
    FieldType.STRING: lambda value: value if isinstance(value, str) and rules.is_text(value) else None,
    FieldType.FLOAT: _to_float,
    FieldType.INTEGER: _to_integer,
    FieldType.BOOLEAN: lambda value: value if isinstance(value, bool) else None,
    FieldType.TIMESTAMP: rules.instant,
}


def _other_unit(field: Field, given: pa.Field) -> bool:
    declared = (given.metadata or {}).get(b"unit")
    return declared is not None and field.unit is not None and declared != field.unit.encode()


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _mask(values: pa.BooleanArray) -> np.ndarray:
    mask: np.ndarray = values.fill_null(False).to_numpy(zero_copy_only=False)
    return mask


def _table_rows(contract: Contract, table: pa.Table, places: np.ndarray) -> list[str]:
    exact = {field.name for field in contract.fields if field.type is FieldType.DECIMAL}
    taken = table.take(pa.array(places, pa.int64()))
    shown = []
    for name, column in zip(taken.column_names, taken.columns, strict=True):
        if pa.types.is_timestamp(column.type) and column.type.tz is not None:
            column = column.cast(pa.timestamp(column.type.unit, "UTC"))  # text with another offset is none of RFC 3339
        if pa.types.is_temporal(column.type):  # as text: Python cannot hold every moment that Arrow can
            column = column.cast(pa.string())
        elif pa.types.is_decimal(column.type) and name not in exact:  # as the number that it is read as
            column = column.cast(pa.float64(), safe=False)
        shown.append(_nested(column) if pa.types.is_nested(column.type) else column.to_pylist())
    names = taken.column_names
    return [rules.as_json(dict(zip(names, row, strict=True))) for row in zip(*shown, strict=True)]


def _nested(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column that no contract has, as far as Python can hold them."""
    found = []
    for value in column:
        try:
            found.append(value.as_py())
        except (OverflowError, ValueError):  # a moment beyond year 9999, say, or no text
            found.append(f"a {value.type} that cannot be shown")
    return found
