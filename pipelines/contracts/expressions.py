"""Rules between fields, computed for many rows by Arrow and for one row by Python: the same truths, to the last bit."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.events import to_microseconds
from pipelines.spec.expression import (
    Among,
    Arithmetic,
    Call,
    Column,
    Compared,
    Constant,
    IsNull,
    Kind,
    Logic,
    Node,
    Not,
)

Row = Mapping[str, Any]
_CALLS: dict[str, Callable[[Any], Any]] = {"abs": abs, "neg": operator.neg, "len": lambda text: float(len(text))}
_MICROSECONDS = 1e6
_ARROW_ARITHMETIC = {"+": pc.add, "-": pc.subtract, "*": pc.multiply, "/": pc.divide}
_ARROW_COMPARED = {
    "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal, "==": pc.equal, "!=": pc.not_equal,
}  # fmt: skip
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


def broken(node: Node, table: pa.Table) -> np.ndarray:
    """bool[n]: the rows of typed columns in which the condition is false."""
    truth = _many(node, table)
    if isinstance(truth, pa.Scalar):
        return np.full(table.num_rows, truth.as_py() is False)
    if isinstance(truth, pa.ChunkedArray):
        truth = truth.combine_chunks()
    if not truth.null_count and pc.all(truth).as_py() is not False:
        return np.zeros(table.num_rows, dtype=bool)
    mask: np.ndarray = pc.invert(truth.fill_null(True)).to_numpy(zero_copy_only=False)
    return mask


def _many(node: Node, table: pa.Table) -> Any:
    match node:
        case Column(name, kind):
            column = table.column(name)
            column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
            if kind is Kind.NUMBER:
                return column.cast(pa.float64(), safe=False)
            return column.cast(pa.int64()) if kind is Kind.INSTANT else column
        case Constant(value, kind):
            return pa.scalar(value, pa.float64() if kind is Kind.NUMBER else None)
        case Arithmetic(sign, left, right):
            one, other = _many(left, table), _many(right, table)
            if left.kind is Kind.INSTANT:
                return pc.divide(pc.subtract(one, other).cast(pa.float64(), safe=False), _MICROSECONDS)
            return _ARROW_ARITHMETIC[sign](one, other)
        case Call("len", of):
            length = pc.list_value_length if of.kind is Kind.LIST else pc.utf8_length
            return length(_many(of, table)).cast(pa.float64())
        case Call("abs", of):
            return pc.abs(_many(of, table))
        case Call("neg", of):
            return pc.negate(_many(of, table))
        case Compared(sign, left, right):
            return _ARROW_COMPARED[sign](_many(left, table), _many(right, table))
        case Among(of, values):
            found = _many(of, table)
            if of.kind is Kind.NUMBER:
                # Arrow tells the zeros apart.
                found, values = pc.add(found, 0.0), tuple(float(value) + 0.0 for value in values)
            held = pc.is_in(found, value_set=pa.array(values, found.type))
            return pc.if_else(pc.is_null(found), pa.scalar(None, pa.bool_()), held)
        case IsNull(column):
            return pc.is_null(table.column(column.name).combine_chunks())
        case Not(of):
            return pc.invert(_many(of, table))
        case Logic(word, parts):
            join = pc.and_kleene if word == "and" else pc.or_kleene
            truth = _many(parts[0], table)
            for part in parts[1:]:
                truth = join(truth, _many(part, table))
            return truth


def holds(node: Node) -> Callable[[Row], bool | None]:
    """Compiles the condition for one typed row: true, false, or None for unknown.

    A field that the row has not is null; an instant is an aware datetime.
    """
    return _one(node)


def _one(node: Node) -> Callable[[Row], Any]:
    match node:
        case Column(name, kind):
            return _column(name, kind)
        case Constant(value):
            return lambda row: value
        case Arithmetic(sign, left, right):
            return _arithmetic(sign, _one(left), _one(right), instants=left.kind is Kind.INSTANT)
        case Call(function, of):
            apply, inner = _CALLS[function], _one(of)
            return lambda row: None if (found := inner(row)) is None else apply(found)
        case Compared(sign, left, right):
            one, other, compare = _one(left), _one(right), _COMPARED[sign]

            def compared(row: Row) -> bool | None:
                a, b = one(row), other(row)
                return None if a is None or b is None else compare(a, b)

            return compared
        case Among(of, values):
            inner, known = _one(of), frozenset(values)
            return lambda row: None if (found := inner(row)) is None else found in known
        case IsNull(column):
            name = column.name
            return lambda row: row.get(name) is None
        case Not(of):
            inner = _one(of)
            return lambda row: None if (found := inner(row)) is None else not found
        case Logic(word, parts):
            return _logic(tuple(map(_one, parts)), decisive=word == "or")


def _column(name: str, kind: Kind) -> Callable[[Row], Any]:
    if kind is Kind.NUMBER:
        return lambda row: None if (found := row.get(name)) is None else float(found)
    if kind is Kind.INSTANT:
        return lambda row: None if (found := row.get(name)) is None else to_microseconds(found)
    return lambda row: row.get(name)


def _arithmetic(
    sign: str, left: Callable[[Row], Any], right: Callable[[Row], Any], *, instants: bool
) -> Callable[[Row], Any]:
    apply = _seconds_between if instants else _SCALAR[sign]

    def both(row: Row) -> Any:
        a, b = left(row), right(row)
        return None if a is None or b is None else apply(a, b)

    return both


def _seconds_between(a: int, b: int) -> float:
    return float(a - b) / _MICROSECONDS


def _divided(a: float, b: float) -> float:
    """IEEE 754's quotient, where Python raises."""
    if b:
        return a / b
    if a == 0 or math.isnan(a):
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


_SCALAR: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": _divided,
}  # fmt: skip


def _logic(parts: tuple[Callable[[Row], bool | None], ...], *, decisive: bool) -> Callable[[Row], bool | None]:
    """Kleene's ``or`` where true decides, and his ``and`` where false does."""

    def joined(row: Row) -> bool | None:
        found: bool | None = not decisive
        for part in parts:
            truth = part(row)
            if truth is decisive:
                return decisive
            if truth is None:
                found = None
        return found

    return joined
