"""Expressions over the fields of one row, as Python writes them, read once and checked before anything is computed.

``rain == 0 or humidity >= 30``; ``ended - started <= 3600``; ``low is None or low <= high``; ``len(code) == 5``;
``kind in ("a", "b")``. They mean what SQL's CHECK means: what is compared with a null is unknown, ``and``, ``or`` and
``not`` follow Kleene, and a row breaks a rule only where it is false. Numbers are computed as 64-bit floats, a
difference of two instants is in seconds, and a division by zero is an infinity or NaN, which no comparison holds for
(but ``!=``).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

MAX_LENGTH, _MAX_NODES = 1_000, 200


class Kind(StrEnum):
    """What an expression yields."""

    NUMBER = "a number"
    TEXT = "text"
    INSTANT = "an instant"
    EXACT = "a decimal"
    LIST = "a list"
    TRUTH = "true or false"


@dataclass(frozen=True)
class Column:
    """The value of a field."""

    name: str
    kind: Kind


@dataclass(frozen=True)
class Constant:
    """A number, text, or truth."""

    value: float | str | bool
    kind: Kind


@dataclass(frozen=True)
class Arithmetic:
    """``+``, ``-``, ``*`` or ``/`` of two numbers; ``-`` of two instants."""

    operator: Literal["+", "-", "*", "/"]
    left: Node
    right: Node
    kind: Kind = Kind.NUMBER


@dataclass(frozen=True)
class Call:
    """``abs`` of a number, its negative, or the ``len`` of text, in code points, or of a list."""

    function: Literal["abs", "neg", "len"]
    of: Node
    kind: Kind = Kind.NUMBER


@dataclass(frozen=True)
class Compared:
    """A comparison of two values of one kind."""

    operator: Literal["<", "<=", ">", ">=", "==", "!="]
    left: Node
    right: Node
    kind: Kind = Kind.TRUTH


@dataclass(frozen=True)
class Among:
    """Whether a value is one of some constants."""

    of: Node
    values: tuple[float | str, ...]
    kind: Kind = Kind.TRUTH


@dataclass(frozen=True)
class IsNull:
    """Whether a field has no value; never unknown."""

    column: Column
    kind: Kind = Kind.TRUTH


@dataclass(frozen=True)
class Logic:
    """``and`` or ``or`` of some truths."""

    operator: Literal["and", "or"]
    parts: tuple[Node, ...]
    kind: Kind = Kind.TRUTH


@dataclass(frozen=True)
class Not:
    """The opposite of a truth."""

    of: Node
    kind: Kind = Kind.TRUTH


Node = Column | Constant | Arithmetic | Call | Compared | Among | IsNull | Logic | Not

_ARITHMETIC: dict[type[ast.operator], Literal["+", "-", "*", "/"]] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/",
}  # fmt: skip
_COMPARED: dict[type[ast.cmpop], Literal["<", "<=", ">", ">=", "==", "!="]] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip


def parse(text: str, kinds: Mapping[str, Kind]) -> Node:
    """The tree of a condition over fields of those kinds; raises ``ValueError`` that says where it cannot be read."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"an expression has at most {MAX_LENGTH} characters: make two rules of it")
    try:
        found = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is no expression: {error}") from error
    if sum(1 for _ in ast.walk(found)) > _MAX_NODES:
        raise ValueError(f"an expression has at most {_MAX_NODES} parts: make two rules of it")
    reader = _Reader(text.strip(), kinds)
    node = reader.read(found.body)
    reader.want(node, Kind.TRUTH, found.body)
    if not columns(node):
        raise ValueError(f"{text!r} names no field: it is the same for every row")
    return node


def columns(node: Node) -> frozenset[str]:
    """The fields that a tree looks at."""
    match node:
        case Column(name):
            return frozenset((name,))
        case Constant():
            return frozenset()
        case Arithmetic(_, left, right) | Compared(_, left, right):
            return columns(left) | columns(right)
        case Call(_, of) | Among(of) | Not(of):
            return columns(of)
        case IsNull(column):
            return frozenset((column.name,))
        case Logic(_, parts):
            return frozenset().union(*map(columns, parts))


def _is_truth(node: ast.expr) -> bool:
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return negated or isinstance(node, ast.Compare | ast.BoolOp)


@dataclass(frozen=True)
class _Reader:
    text: str
    kinds: Mapping[str, Kind]

    def read(self, node: ast.expr) -> Node:
        match node:
            case ast.Name(id=name):
                if name not in self.kinds:
                    raise self.error(node, f"there is no field {name!r} to be compared; there are {sorted(self.kinds)}")
                return Column(name, self.kinds[name])
            case ast.Constant(value=bool() as value):
                return Constant(value, Kind.TRUTH)
            case ast.Constant(value=int() | float() as number):
                return Constant(self.number(number, node), Kind.NUMBER)
            case ast.Constant(value=str() as value):
                if not value.isascii() and max(value) >= "\ud800" and any("\ud800" <= c <= "\udfff" for c in value):
                    raise self.error(node, "is no text: it has half of a character")
                return Constant(value, Kind.TEXT)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Call("neg", self.want(self.read(operand), Kind.NUMBER, operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Not(self.want(self.read(operand), Kind.TRUTH, operand))
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _ARITHMETIC:
                return self.arithmetic(node, left, _ARITHMETIC[type(operator)], right)
            case ast.BoolOp(op=operator, values=values):
                parts = tuple(self.want(self.read(value), Kind.TRUTH, value) for value in values)
                return Logic("and" if isinstance(operator, ast.And) else "or", parts)
            case ast.Call(func=ast.Name(id="abs" | "len" as name), args=[of], keywords=[]):
                found = self.read(of)
                if name == "len" and found.kind is Kind.LIST:
                    return Call("len", found)
                wanted = Kind.NUMBER if name == "abs" else Kind.TEXT
                return Call("abs" if name == "abs" else "len", self.want(found, wanted, of))
            case ast.Compare(left=left, ops=operators, comparators=rest):
                sides = [left, *rest]
                if any(map(_is_truth, sides[1:-1])):
                    # It would be read, and computed, twice, and again twice what lies in it.
                    raise self.error(node, "compares a comparison within a chain: make two rules of it")
                parts = tuple(
                    self.compared(node, sides[i], operator, sides[i + 1]) for i, operator in enumerate(operators)
                )
                return parts[0] if len(parts) == 1 else Logic("and", parts)
        raise self.error(
            node, "cannot be used: there are fields, constants, + - * /, abs, len, comparisons, in, and, or"
        )

    def arithmetic(
        self, node: ast.expr, left: ast.expr, operator: Literal["+", "-", "*", "/"], right: ast.expr
    ) -> Node:
        one, other = self.read(left), self.read(right)
        if operator == "-" and one.kind is other.kind is Kind.INSTANT:
            return Arithmetic(operator, one, other)
        return Arithmetic(operator, self.want(one, Kind.NUMBER, left), self.want(other, Kind.NUMBER, right))

    def compared(self, node: ast.expr, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Node:
        one = self.read(left)
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(one, Column) and isinstance(right, ast.Constant) and right.value is None):
                raise self.error(node, "compares by identity: that is for `field is None` and `field is not None`")
            return IsNull(one) if isinstance(operator, ast.Is) else Not(IsNull(one))
        if isinstance(operator, ast.In | ast.NotIn):
            found = Among(one, self.constants(one.kind, right))
            return found if isinstance(operator, ast.In) else Not(found)
        other = self.read(right)
        if one.kind is not other.kind:
            raise self.error(node, f"compares {one.kind} with {other.kind}")
        if one.kind in (Kind.EXACT, Kind.LIST):
            what = "decimals" if one.kind is Kind.EXACT else "lists"
            raise self.error(node, f"compares {what}: of these a rule can only say `is None` or `is not None`")
        if one.kind in (Kind.TRUTH, Kind.TEXT) and not isinstance(operator, ast.Eq | ast.NotEq):
            raise self.error(node, f"orders {one.kind}: such values can only be equal or not")
        return Compared(_COMPARED[type(operator)], one, other)

    def constants(self, kind: Kind, node: ast.expr) -> tuple[float | str, ...]:
        if not isinstance(node, ast.Tuple | ast.List | ast.Set) or kind not in (Kind.NUMBER, Kind.TEXT):
            raise self.error(node, 'must be constants: numbers or texts, as in `kind in ("a", "b")`')
        values: list[float | str] = []
        for element in node.elts:
            found = self.read(element)
            if isinstance(found, Call) and found.function == "neg" and isinstance(found.of, Constant):
                found = Constant(-float(found.of.value), Kind.NUMBER)
            if not isinstance(found, Constant) or found.kind is not kind:
                raise self.error(element, f"must be a constant of the kind that is looked for, {kind}")
            values.append(found.value)
        return tuple(values)

    def number(self, value: float, node: ast.expr) -> float:
        try:
            return float(value)
        except OverflowError as error:
            raise self.error(node, "is beyond what a 64-bit float holds") from error

    def want(self, node: Node, kind: Kind, place: ast.expr) -> Node:
        if node.kind is not kind:
            raise self.error(place, f"is {node.kind}, where {kind} is wanted")
        return node

    def error(self, node: ast.expr, what: str) -> ValueError:
        part = ast.get_source_segment(self.text, node) or self.text
        return ValueError(f"{part!r} in {self.text!r} {what}")
