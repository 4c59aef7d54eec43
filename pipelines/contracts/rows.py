"""The contract's row rules compiled to Arrow: a clean column costs a pass, a bad row gets all its rules.

For every record the verdict and the rule ids are those of ``pipelines.contracts.requests``.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import expressions, rules
from pipelines.contracts.parsing import Broken, Parsed, from_arrow, from_records, from_text
from pipelines.contracts.texts import distinct_texts
from pipelines.spec import Contract, Field, FieldType, Severity

__all__ = ["Broken", "Parsed", "RowVerdict", "check", "from_arrow", "from_records", "from_text"]


_THREADED_ROWS = 200_000


@dataclass(frozen=True)
class RowVerdict:
    """``accepted`` is bool[n]; ``broken`` the broken rules in contract order, each with its rows; ``warned`` those that
    refuse none.
    """

    accepted: np.ndarray
    broken: tuple[Broken, ...]
    warned: tuple[Broken, ...] = ()

    def rules_of(self, row: int) -> tuple[str, ...]:
        """Every rule that one row breaks, in contract order."""
        found = []
        for broken in self.broken:
            place = np.searchsorted(broken.rows, row)
            if place < len(broken.rows) and broken.rows[place] == row:
                found.append(broken.rule)
        return tuple(found)

    def rules_column(self) -> pa.ListArray:
        """The rules of every refused row, in row order: list<string>, one element a refused row."""
        if not self.broken:
            return pa.array([], pa.list_(pa.string()))
        rows = np.concatenate([broken.rows for broken in self.broken])
        codes = np.repeat(np.arange(len(self.broken)), [len(broken.rows) for broken in self.broken])
        order = np.argsort(rows, kind="stable")  # stable: contract order within a row
        _, counts = np.unique(rows, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        names = pa.array([broken.rule for broken in self.broken], pa.string())
        return pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(codes[order])))


def check(contract: Contract, parsed: Parsed, now_us: int) -> RowVerdict:
    """Judges every row against the clock's time ``now_us``: none may be later than that plus ``future``."""
    found = list(parsed.broken)

    def judged(field: Field) -> list[Broken]:
        return _of_field(contract, field, parsed.table.column(field.name), parsed.malformed.get(field.name), now_us)

    if parsed.table.num_rows < _THREADED_ROWS:
        of_fields = list(map(judged, contract.fields))
    else:  # what judges a column lets others run
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            longest_first = sorted(contract.fields, key=lambda field: field.type is not FieldType.STRING)
            of_fields = list(pool.map(judged, longest_first))
    found += itertools.chain.from_iterable(of_fields)
    for between in contract.rules:
        mask = expressions.broken(contract.condition(between), parsed.table)
        if mask.any():
            found.append(Broken(rules.between(between), np.flatnonzero(mask)))
    if parsed.unreadable is not None:  # a row without fields breaks no field's rule
        found = [
            b if b.rule == rules.ROW_UNREADABLE else Broken(b.rule, b.rows[~parsed.unreadable[b.rows]]) for b in found
        ]
    severities = rules.severities(contract)
    by_rule = {b.rule: b for b in found if len(b.rows)}
    accepted = np.ones(parsed.table.num_rows, dtype=bool)
    broken, warned = [], []
    for name in rules.in_order(contract, by_rule):
        if severities.get(name) is Severity.WARN:
            warned.append(by_rule[name])
        else:
            broken.append(by_rule[name])
            accepted[by_rule[name].rows] = False
    return RowVerdict(accepted, tuple(broken), tuple(warned))


def _of_field(
    contract: Contract, field: Field, column: pa.ChunkedArray, malformed: np.ndarray | None, now_us: int
) -> list[Broken]:
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    judged = _field_rules(contract, field, whole, malformed, now_us)
    return [Broken(rules.rule_id(field.name, rule), np.flatnonzero(mask)) for rule, mask in judged if mask.any()]


def _field_rules(
    contract: Contract, field: Field, column: pa.Array, malformed: np.ndarray | None, now_us: int
) -> Iterator[tuple[str, np.ndarray]]:
    if column.null_count and not field.nullable:
        nulls = column.is_null().to_numpy(zero_copy_only=False)
        yield rules.MISSING, nulls if malformed is None else nulls & ~malformed
    if column.null_count == len(column):
        return
    if field.type in (FieldType.FLOAT, FieldType.INTEGER):
        yield from _number_rules(field, column)
    elif field.type is FieldType.DECIMAL:
        yield from _decimal_rules(field, column)
    elif field.type is FieldType.STRING:
        yield from _string_rules(field, column)
    elif field.type is FieldType.LIST:
        yield from _list_rules(field, column)
    elif field.name == contract.time:
        latest = rules.latest_us(contract, now_us)
        moments = column.cast(pa.int64())
        if pc.max(moments).as_py() > latest:
            yield rules.FUTURE, moments.fill_null(latest).to_numpy(zero_copy_only=False) > latest


def _number_rules(field: Field, column: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    low, high = rules.bounds(field)
    kind = np.int64 if field.type is FieldType.INTEGER else np.float64
    # What stands where a null is may be anything: it costs the slower look, and is not judged.
    values = np.frombuffer(column.buffers()[1], kind, len(column), 8 * column.offset)
    least, most = values.min(), values.max()  # of which a NaN makes one
    clean = field.type is FieldType.INTEGER or (np.isfinite(least) and np.isfinite(most))
    if clean and (low is None or least >= low) and (high is None or most <= high):
        return
    judged = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else np.ones(len(column), dtype=bool)
    if not clean:
        finite = np.isfinite(values)
        yield rules.FINITE, judged & ~finite
        judged = judged & finite
    if low is not None and not least >= low:
        yield rules.MINIMUM, judged & (values < low)
    if high is not None and not most <= high:
        yield rules.MAXIMUM, judged & (values > high)


def _decimal_rules(field: Field, column: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    wide = pa.decimal256(76, field.scale or 0)  # a limit may be a step outside of what the column can hold
    low, high = rules.decimal_bounds(field)
    for rule, limit, breaks in ((rules.MINIMUM, low, pc.less), (rules.MAXIMUM, high, pc.greater)):
        if limit is not None:
            yield (
                rule,
                breaks(column.cast(wide), pa.scalar(limit, wide)).fill_null(False).to_numpy(zero_copy_only=False),
            )


def _string_rules(field: Field, column: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    if (field.min_length, field.max_length, field.pattern, field.allowed) == (None, None, None, None):
        return
    # Python's own `re` on the distinct values: RE2 gives \d, \s and $ other meanings than requests.py has.
    short = distinct_texts(column)
    if short is None:
        encoded = column.dictionary_encode()
        short = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()
    codes, distinct = short
    for rule, bad in _bad_strings(field, distinct):
        if any(bad):
            mask = np.array(bad)[codes]
            yield rule, mask & column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else mask


def _list_rules(field: Field, column: pa.ListArray) -> Iterator[tuple[str, np.ndarray]]:
    """A list breaks what any value in it does."""
    values, places = pc.list_flatten(column), pc.list_parent_indices(column)
    judged = _string_rules if field.items is FieldType.STRING else _number_rules
    if len(values) and field.items is not FieldType.BOOLEAN:
        for rule, bad in judged(field.item, values):
            mask = np.zeros(len(column), dtype=bool)
            mask[places.to_numpy()[bad]] = True
            yield rule, mask
    lengths = pc.list_value_length(column)
    if field.min_items is not None:
        yield rules.MIN_ITEMS, pc.less(lengths, field.min_items).fill_null(False).to_numpy(zero_copy_only=False)
    if field.max_items is not None:
        yield rules.MAX_ITEMS, pc.greater(lengths, field.max_items).fill_null(False).to_numpy(zero_copy_only=False)


def _bad_strings(field: Field, distinct: list[str]) -> Iterator[tuple[str, list[bool]]]:
    if field.min_length is not None:
        yield rules.MIN_LENGTH, [len(value) < field.min_length for value in distinct]
    if field.max_length is not None:
        yield rules.MAX_LENGTH, [len(value) > field.max_length for value in distinct]
    if field.pattern is not None:
        matches = re.compile(field.pattern).fullmatch
        yield rules.PATTERN, [matches(value) is None for value in distinct]
    if field.allowed is not None:
        allowed = frozenset(field.allowed)
        yield rules.ALLOWED, [value not in allowed for value in distinct]
