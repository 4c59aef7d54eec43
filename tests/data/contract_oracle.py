"""The contract's row rules in the plainest Python, and generators of contracts and records."""

from __future__ import annotations

import ast
import math
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pipelines.spec import Contract, Field, FieldType, Rule, Severity

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOW_US = (NOW - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)

ORDER = (
    *("missing", "type", "finite", "minimum", "maximum", "min_length", "max_length"),
    *("pattern", "allowed", "min_items", "max_items"),
)
_ZONED = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[T ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(?:(Z)|([+-])([0-9]{2}):([0-9]{2}))"
)


def moment(value: Any) -> datetime | None:
    """RFC 3339 put together by hand, of the years that are kept."""
    found = _moment(value)
    return found if found is not None and found.year >= 1000 else None


def _moment(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else None
    found = _ZONED.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    fraction = (found[7] or "").ljust(9, "0")
    hours, minutes = int(found[10] or 0), int(found[11] or 0)
    if int(found[1]) < 1000 or fraction[6:] != "000" or hours > 23 or minutes > 59:
        return None
    try:
        naive = datetime(*(int(found[i]) for i in range(1, 7)), int(fraction[:6]), tzinfo=UTC)
        offset = timedelta(hours=hours, minutes=minutes)
        return naive + offset if found[9] == "-" else naive - offset
    except (ValueError, OverflowError):
        return None


def typed(field: Field, value: Any) -> Any:
    """The value as the field's type; None when it is none."""
    if field.type is FieldType.TIMESTAMP:
        return moment(value)
    if field.type is FieldType.STRING:
        return value if isinstance(value, str) and not re.search("[\ud800-\udfff]", value) else None
    if field.type is FieldType.BOOLEAN:
        return value if value is True or value is False else None
    if field.type is FieldType.DECIMAL:
        return exact(field, value)
    if field.type is FieldType.LIST:
        found = [typed(alone(field), one) for one in value] if isinstance(value, list) else [None]
        return None if any(one is None for one in found) else found
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if field.type is FieldType.INTEGER:
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    try:
        return float(value)
    except OverflowError:
        return None


def alone(field: Field) -> Field:
    """A field that is to a value what a list is to its values."""
    limits = ("minimum", "maximum", "min_length", "max_length", "pattern", "allowed")
    return Field(name=field.name, type=field.items, **{name: getattr(field, name) for name in limits})


def exact(field: Field, value: Any) -> Decimal | None:
    """A decimal by its digits, written down by hand."""
    if isinstance(value, Decimal):
        value = format(value, "f") if value.is_finite() else None
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**60 else None
    found = re.fullmatch(r"(-?)([0-9]{1,60})(?:\.([0-9]{1,60}))?", value) if isinstance(value, str) else None
    if found is None:
        return None
    whole, behind = found[2].lstrip("0"), (found[3] or "").rstrip("0")
    if len(behind) > field.scale or len(whole) > field.precision - field.scale:
        return None
    digits = f"{whole or '0'}.{behind.ljust(field.scale, '0')}".rstrip(".")
    return Decimal(digits if not re.search("[1-9]", digits) else found[1] + digits)


def field_rules(contract: Contract, field: Field, value: Any) -> list[str]:
    if value is None:
        return [] if field.nullable else ["missing"]
    value = typed(field, value)
    if value is None:
        return ["type"]
    if field.type is FieldType.LIST:
        broken = {rule for one in value for rule in field_rules(contract, alone(field), one)}
        broken |= {"min_items"} if field.min_items is not None and len(value) < field.min_items else set()
        broken |= {"max_items"} if field.max_items is not None and len(value) > field.max_items else set()
        return [rule for rule in ORDER if rule in broken]
    if isinstance(value, float) and not math.isfinite(value):
        return ["finite"]
    broken = []
    low, high = field.minimum, field.maximum
    if field.type is FieldType.DECIMAL:
        low, high = (None if limit is None else Decimal(str(limit)) for limit in (low, high))
    if low is not None and value < low:
        broken.append("minimum")
    if high is not None and value > high:
        broken.append("maximum")
    if field.min_length is not None and len(value) < field.min_length:
        broken.append("min_length")
    if field.max_length is not None and len(value) > field.max_length:
        broken.append("max_length")
    if field.pattern is not None and not re.fullmatch(field.pattern, value):
        broken.append("pattern")
    if field.allowed is not None and value not in field.allowed:
        broken.append("allowed")
    if field.name == contract.time and value > NOW + contract.future:
        broken.append("future")
    return broken


def all_rules(contract: Contract, record: Any) -> list[str]:
    """Every rule that a record breaks, in contract order, then the unknown keys by the alphabet."""
    if not isinstance(record, dict):
        return ["row.unreadable"]
    broken = [f"{f.name}.{r}" for f in contract.fields for r in field_rules(contract, f, record.get(f.name))]
    row = {f.name: typed(f, record.get(f.name)) for f in contract.fields}
    broken += [
        f"rule:{rule.name}"
        for rule in contract.rules
        if truth(ast.parse(rule.check.strip(), mode="eval").body, row) is False
    ]
    names = {f.name for f in contract.fields}
    unknown = {f"{key}.unknown".encode("utf-8", "backslashreplace").decode() for key in record if key not in names}
    return broken + sorted(unknown)


def warns(contract: Contract, rule: str) -> bool:
    """Whether a rule refuses no row."""
    return any(rule == f"{f.name}.{kind}" for f in contract.fields for kind in f.warn) or any(
        rule == f"rule:{r.name}" and r.severity == "warn" for r in contract.rules
    )


def record_rules(contract: Contract, record: Any) -> list[str]:
    """Those of ``all_rules`` for which the row is refused."""
    return [rule for rule in all_rules(contract, record) if not warns(contract, rule)]


def truth(node: ast.expr, row: dict[str, Any]) -> Any:
    """The value of an expression by Python's own tree, None for unknown; numbers by NumPy's scalars."""
    match node:
        case ast.Name(id=name):
            value = row[name]
            return np.float64(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        case ast.Constant(value=value):
            return np.float64(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        case ast.UnaryOp(op=ast.Not(), operand=of):
            found = truth(of, row)
            return None if found is None else not found
        case ast.UnaryOp(operand=of):
            found = truth(of, row)
            return None if found is None else -found
        case ast.Call(func=ast.Name(id=name), args=[of]):
            found = truth(of, row)
            return None if found is None else np.float64(len(found)) if name == "len" else np.abs(found)
        case ast.BoolOp(op=word, values=values):
            found = [truth(value, row) for value in values]
            decisive = isinstance(word, ast.Or)
            return decisive if decisive in found else None if None in found else not decisive
        case ast.BinOp(left=left, op=sign, right=right):
            one, other = truth(left, row), truth(right, row)
            if one is None or other is None:
                return None
            if isinstance(one, datetime):
                return np.float64((one - other) // timedelta(microseconds=1)) / np.float64(1e6)
            with np.errstate(all="ignore"):
                return {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide}[type(sign)](
                    one, other
                )
        case ast.Compare(left=left, ops=signs, comparators=rest):
            sides = [left, *rest]
            pairs = [_compared(sides[i], sign, sides[i + 1], row) for i, sign in enumerate(signs)]
            return False if False in pairs else None if None in pairs else True
    raise AssertionError(node)


def _compared(left: ast.expr, sign: ast.cmpop, right: ast.expr, row: dict[str, Any]) -> bool | None:
    one = truth(left, row)
    if isinstance(sign, ast.Is | ast.IsNot):
        return (one is None) == isinstance(sign, ast.Is)
    if one is None:
        return None
    if isinstance(sign, ast.In | ast.NotIn):
        held = any(bool(one == truth(element, row)) for element in right.elts)
        return held == isinstance(sign, ast.In)
    other = truth(right, row)
    if other is None:
        return None
    return bool(
        {ast.Lt: one.__lt__, ast.LtE: one.__le__, ast.Gt: one.__gt__, ast.GtE: one.__ge__}[type(sign)](other)
        if not isinstance(sign, ast.Eq | ast.NotEq)
        else (one == other) == isinstance(sign, ast.Eq)
    )


_numbers = st.one_of(
    st.integers(-5, 15),
    st.floats(-5, 15),
    st.sampled_from([0.0, -0.0, 9.999, 10.0, 10**400, -(10**400), 2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 2**53 + 1]),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324]),
)
_texts = st.one_of(
    st.sampled_from(["a", "b", "a1", "a\n", "٣", "é", "", "A", "b2", "\ud800", "nan", "1", "true"]),
    st.text(max_size=4),
)
INSTANTS = (
    "2026-02-30T00:00:00Z", "2024-02-29T00:00:00Z", "2026-13-01T00:00:00Z", "2026-01-01T24:00:00Z",
    "9999-12-31T23:30:00-01:00", "0999-01-01T00:00:00Z", "1000-01-01T00:00:00+01:00",
    "2026-01-01T00:00:60Z", "2026-01-01", "2026-01-01T00:00Z", "２026-01-01T00:00:00Z",
    "2026-03-01T12:00:00Z\n", "2026-03-01T12:00:00Z", "2026-03-01T12:00:00.000001Z", "2026-03-01T13:00:00Z",
    "2026-01-01T00:00:00.5Z", "2026-01-01T00:00:00.123456000Z", "2026-01-01T00:00:00.1234567Z",
    "2026-01-01T00:00:00.1234560000Z", "2026-01-01 00:00:00+05:30", "2026-01-01T00:00:00+24:00",
    "2026-01-01T00:00:00-23:59", "2026-01-01T00:00:00", "2026-01-01t00:00:00z", "2026-01-01T00:00:00+0100",
)  # fmt: skip
_offsets = st.sampled_from(["Z", "+00:00", "-00:00", "+05:30", "-23:59", "+24:00", "+01:60", "z", "", "+0100"])
_times = st.one_of(
    st.builds(
        lambda when, sep, fraction, offset: when.strftime("%Y-%m-%d").rjust(10, "0") + sep
        + when.strftime("%H:%M:%S") + fraction + offset,
        st.datetimes(datetime(2026, 2, 26), datetime(2026, 3, 3)),
        st.sampled_from(["T", " ", "t", "T "]),
        st.sampled_from(["", ".5", ".123456", ".123456000", ".1234567", ".", ".1234560000"]),
        _offsets,
    ),
    st.sampled_from(INSTANTS),
    st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1)),
    st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC)),
)  # fmt: skip
_single = st.one_of(st.none(), st.booleans(), _numbers, _texts, _times, st.just({"a": 1}))
_junk = st.one_of(_single, st.lists(_single, max_size=3))
ITEMS = (FieldType.STRING, FieldType.FLOAT, FieldType.INTEGER, FieldType.BOOLEAN)
_VALUES = {
    FieldType.STRING: _texts,
    FieldType.FLOAT: _numbers,
    FieldType.INTEGER: _numbers,
    FieldType.BOOLEAN: st.booleans(),
    FieldType.DECIMAL: st.one_of(
        st.integers(-20, 20),
        st.sampled_from(["1.5", "-0.25", "9.999", "10.00", "-0.0", "007", "1e3", "1.", ".5", "+1", " 1", "1.500", "٣"]),
        st.sampled_from(["9" * 38, "9" * 39, "0" * 70, "1." + "0" * 59 + "1", "nan", "Infinity", "1_0"]),
        st.decimals(-1000, 1000, places=2),
        st.sampled_from([Decimal("NaN"), Decimal("1E+2"), Decimal("1E-2"), Decimal("1E+400"), Decimal("-0.00")]),
    ),
    FieldType.TIMESTAMP: _times,
}


def values_of(field: Field) -> st.SearchStrategy[Any]:
    """Mostly values of a field's type."""
    if field.items is None:
        return _VALUES[field.type]
    values = _VALUES[field.items]
    return st.lists(values, max_size=3) | st.lists(values | _single, max_size=3)


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    """A contract of an entity, a time and up to four more fields with any limits."""
    extra = []
    for place in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(list(FieldType)))
        limits: dict[str, Any] = {}
        digits: dict[str, Any] = {}
        single = kind
        if kind is FieldType.LIST:
            single = draw(st.sampled_from(ITEMS))
            digits = {"items": single}
        if kind is FieldType.DECIMAL:
            scale = draw(st.integers(0, 3))
            digits = {"precision": scale + draw(st.integers(0 if scale else 1, 35)), "scale": scale}
        if single in (FieldType.FLOAT, FieldType.INTEGER, FieldType.DECIMAL):
            low, high = draw(st.sampled_from([None, 0.0, 0.5, -1e300, 2.0**63])), None
            high = draw(st.sampled_from([None, 10.0, 9.5, 1e300]))
            if low is not None and high is not None and low > high:
                high = None
            limits = {"minimum": low, "maximum": high}
        if single is FieldType.STRING:
            limits = {
                "min_length": draw(st.sampled_from([None, None, 1, 2])),
                "max_length": draw(st.sampled_from([None, None, 2, 3])),
                "pattern": draw(st.sampled_from([None, r"[a-z]\d?", r"\w*", ".", "a|b2"])),
                "allowed": draw(st.sampled_from([None, ("a", "b"), ("٣",), ()])),
            }
        if kind is FieldType.LIST:
            limits |= {
                "min_items": draw(st.sampled_from([None, None, 1, 2])),
                "max_items": draw(st.sampled_from([None, None, 2, 3])),
            }
        limits["warn"] = tuple(
            name for name, limit in limits.items() if limit is not None and draw(st.integers(0, 3)) == 0
        )
        extra.append(Field(name=f"f{place}", type=kind, nullable=draw(st.booleans()), **digits, **limits))
    fields = [Field(name="who", type=FieldType.STRING), Field(name="at", type=FieldType.TIMESTAMP), *extra]
    return Contract(
        name="generated",
        version="1.0.0",
        owner="tests",
        fields=tuple(draw(st.permutations(fields))),
        entity="who",
        time="at",
        key=("who", "at"),
        future=draw(st.sampled_from([timedelta(0), timedelta(hours=1), timedelta(microseconds=1)])),
        rules=tuple(
            Rule(name=f"r{place}", check=draw(conditions(fields)), severity=draw(st.sampled_from(Severity)))
            for place in range(draw(st.integers(0, 2)))
        ),
    )


def conditions(fields: list[Field], depth: int = 2) -> st.SearchStrategy[str]:
    """Conditions over some of the fields, as text."""
    named = {kind: [f.name for f in fields if f.type is kind] for kind in FieldType}
    numbers = [*named[FieldType.FLOAT], *named[FieldType.INTEGER]]
    texts, instants, truths = named[FieldType.STRING], named[FieldType.TIMESTAMP], named[FieldType.BOOLEAN]
    sign, equal = st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.sampled_from(["==", "!="])
    constant = st.sampled_from(["0", "1", "2.5", "-1", "1e308", "9007199254740993", "0.0"])
    words = st.sampled_from(['"a"', '"b2"', '""', '"٣"'])
    number = constant | st.sampled_from([f"len({name})" for name in [*texts, *named[FieldType.LIST]]])
    if numbers:
        number |= st.sampled_from(numbers) | st.sampled_from([f"abs({name})" for name in numbers])
        number |= st.sampled_from([f"-{name}" for name in numbers])
    number |= st.sampled_from([f"({a} - {b})" for a in instants for b in instants])
    number |= st.builds("({} {} {})".format, number, st.sampled_from("+-*/"), number)
    either = [
        st.builds("{} {} {}".format, number, sign, number).filter(lambda text: any(f.name in text for f in fields)),
        st.builds("{} {} {} {} {}".format, number, sign, number, sign, st.sampled_from([f"len({t})" for t in texts])),
        st.builds("{} {} {}".format, st.sampled_from(texts), equal, words | st.sampled_from(texts)),
        st.builds("{} {} ({}, {})".format, st.sampled_from(texts), st.sampled_from(["in", "not in"]), words, words),
        st.builds("{} {} {}".format, st.sampled_from(instants), sign, st.sampled_from(instants)),
        st.builds("{} is {}".format, st.sampled_from([f.name for f in fields]), st.sampled_from(["None", "not None"])),
    ]
    if numbers:
        either.append(
            st.builds(
                "{} {} ({}, {})".format, st.sampled_from(numbers), st.sampled_from(["in", "not in"]), constant, constant
            )
        )
    if truths:
        either += [st.sampled_from(truths), st.builds("{} {} True".format, st.sampled_from(truths), equal)]
    simple = st.one_of(either)
    if depth == 0:
        return simple
    inner = conditions(fields, depth - 1)
    return st.one_of(
        simple,
        st.builds("not ({})".format, inner),
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or"]), inner),
    )


def records(contract: Contract) -> st.SearchStrategy[Any]:
    """Mostly plausible records, with absent keys, nulls, other types and unknown names."""
    fields = {f.name: st.one_of(values_of(f), values_of(f), values_of(f), _junk) for f in contract.fields}
    known = st.fixed_dictionaries({}, optional=fields) | st.fixed_dictionaries(fields)
    extra = st.dictionaries(st.sampled_from(["x", "\ud800", "zz.missing", "é", ""]), _junk, max_size=2)
    return st.one_of(
        known,
        known,
        known,
        st.builds(lambda a, b: {**b, **a}, known, extra),
        st.sampled_from([None, 1, [1], "{}"]),
    )


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 10, 11, -0.0, 0.5, 0.499, 9.5, 9.75, 10.0, 1.0, 10**400, -(10**400),
    2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 2**53 + 1, 2**1024 - 2**970, 2**1024 - 2**970 - 1,
    Decimal("9.75"), Decimal("9.751"), Decimal("1E+2"), Decimal("NaN"), Decimal("-0"), "9.75", "-0.50", "10.000", "1e1",
    math.nan, math.inf, -math.inf, 1e308, 5e-324, "", "a", "b", "b2", "a1", "a\n", "A", "٣", "a٣", "é",
    "\ud800", "nan", "1", "true", [], {"a": 1}, ["a"], ["b", "é"], [1, 2], [1.5, 11], [-1, math.nan], [True], [None],
    [0.75, None], ["a", 1], [[]], [2**63], [1, -(2**63)], ["\ud800"], ["b"] * 4, [0] * 3, [math.inf, 99], *INSTANTS,
    NOW, NOW + timedelta(microseconds=1),
    NOW.replace(tzinfo=None), datetime(2026, 1, 1, 0, 0, 0, 1, UTC),
)  # fmt: skip


def every_field() -> list[Field]:
    """A field ``f`` of every type with every kind of limit, nullable and not."""
    limits: list[tuple[FieldType, dict[str, Any]]] = [(kind, {}) for kind in FieldType if kind is not FieldType.LIST]
    limits += [(FieldType.LIST, {"items": kind, **more}) for kind in ITEMS for more in ({}, {"min_items": 1})]
    limits.append((FieldType.LIST, {"items": FieldType.FLOAT, "minimum": 0.5, "maximum": 9.5, "max_items": 2}))
    limits.append((FieldType.LIST, {"items": FieldType.INTEGER, "minimum": 0.5, "max_items": 1, "min_items": 1}))
    limits.append((FieldType.LIST, {"items": FieldType.STRING, "pattern": r"[a-z]\d?", "allowed": ("b", "é", "A")}))
    for kind in (FieldType.FLOAT, FieldType.INTEGER):
        limits += [(kind, {"minimum": low}) for low in (0.0, 0.5, -1e300, 2.0**63, -math.inf)]
        limits += [(kind, {"maximum": high}) for high in (10.0, 9.5, 1e300, -(2.0**63))]
        limits.append((kind, {"minimum": 0.5, "maximum": 9.5}))
    for pattern in (r"[a-z]\d?", r"\w*", ".", "a|b2"):
        limits.append((FieldType.STRING, {"pattern": pattern}))
        limits.append((FieldType.STRING, {"pattern": pattern, "allowed": ("b", "é", "A")}))
    limits.append((FieldType.STRING, {"allowed": ()}))
    limits = [(kind, more) for kind, more in limits if kind is not FieldType.DECIMAL]
    for precision, scale in ((1, 0), (4, 2), (3, 3), (38, 0), (38, 4)):
        digits = {"precision": precision, "scale": scale}
        limits += [(FieldType.DECIMAL, {**digits, **more}) for more in ({}, {"minimum": 0.5, "maximum": 9.75})]
        limits += [(FieldType.DECIMAL, {**digits, **more}) for more in ({"minimum": 1e300}, {"maximum": -1e300})]
    limits += [
        (FieldType.STRING, more) for more in ({"min_length": 2}, {"max_length": 1}, {"min_length": 1, "max_length": 1})
    ]
    return [Field(name="f", type=kind, nullable=null, **more) for kind, more in limits for null in (False, True)]


def field_label(field: Field) -> str:
    return " ".join(str(value) for key, value in field.model_dump(exclude_defaults=True).items() if key != "name")


def contract_of(field: Field) -> Contract:
    """A contract of an entity ``who``, a time ``at`` and this field; a timestamp is its time itself."""
    fields = (Field(name="who", type=FieldType.STRING), Field(name="at", type=FieldType.TIMESTAMP), field)
    time = "f" if field.type is FieldType.TIMESTAMP and not field.nullable else "at"
    return Contract(name="one", version="1.0.0", owner="tests", fields=fields, entity="who", time=time, key=("who",))
