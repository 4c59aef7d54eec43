"""Conditions between fields: what can be said, how it is refused, and what is unknown where something is missing."""

from __future__ import annotations

import ast
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from pipelines.contracts.events import INSTANT
from pipelines.contracts.expressions import broken, holds
from pipelines.spec.expression import Kind, columns, parse
from tests.data.contract_oracle import truth

KINDS = {
    "a": Kind.NUMBER, "b": Kind.NUMBER, "s": Kind.TEXT, "t": Kind.TEXT, "on": Kind.TRUTH, "up": Kind.TRUTH,
    "began": Kind.INSTANT, "ended": Kind.INSTANT,
}  # fmt: skip
TYPES = {Kind.NUMBER: pa.float64(), Kind.TEXT: pa.string(), Kind.TRUTH: pa.bool_(), Kind.INSTANT: INSTANT}
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ROW = {"a": 1.0, "b": 2.0, "s": "x", "t": "yy", "on": True, "up": False, "began": NOON, "ended": NOON}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], TYPES[kind]) for name, kind in KINDS.items()})


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        ("a < b", {}, True),
        ("a < b < 2", {}, False),
        ("a + b == 3 and not up", {}, True),
        ("a < b", {"b": None}, None),
        ("a < b or on", {"b": None}, True),
        ("a < b or up", {"b": None}, None),
        ("a > b and up", {"a": None}, False),
        ("not (a < b)", {"a": None}, None),
        ("b is None or a < b", {"b": None}, True),
        ("b is not None", {"b": None}, False),
        ("a / 0 > 1e308", {}, True),
        ("-a / 0 < -1e308", {}, True),
        ("a / -0.0 < 0", {}, True),
        ("(a - a) / (b - b) == (a - a) / (b - b)", {}, False),
        ("a != a", {"a": float("nan")}, True),
        ("a in (0, 1)", {}, True),
        ("a in (0, 1)", {"a": -0.0}, True),
        ("a not in (0, 1)", {"a": None}, None),
        ("a in (0, 1)", {"a": None}, None),
        ("s in ('x',)", {"s": None}, None),
        ("a in (-1, 1)", {"a": -1.0}, True),
        ("a in (-0.0, 5)", {"a": 0.0}, True),
        ("a < b < 3 and -1 < -a < 0", {}, False),
        ("s in ('x', 'y') and len(t) == 2", {}, True),
        ("len(s) == 1", {"s": "\U0001f600"}, True),
        ("s != t", {"t": "x"}, False),
        ("on == up", {"up": True}, True),
        ("ended - began <= 3600", {"ended": NOON + timedelta(hours=1)}, True),
        ("ended - began <= 3600", {"ended": NOON + timedelta(hours=1, microseconds=1)}, False),
        ("ended >= began", {"ended": NOON - timedelta(microseconds=1)}, False),
        ("abs(a - b) * 2 <= 2", {}, True),
        ("on", {"on": None}, None),
    ],
)
def test_a_condition_is_judged_alike_by_columns_by_rows_and_by_the_oracle(text, row, expected) -> None:
    whole, node = {**ROW, **row}, parse(text, KINDS)
    assert truth(ast.parse(text, mode="eval").body, whole) is expected
    assert holds(node)(whole) is expected
    assert broken(node, table([whole, ROW]))[0] == (expected is False)
    assert broken(node, table([whole])).tolist() == [expected is False]
    assert broken(node, table([])).tolist() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a <", "is no expression"),
        ("c < 1", "there is no field 'c'"),
        ("a + b", "is a number, where true or false is wanted"),
        ("a < s", "compares a number with text"),
        ("s < t", "orders text"),
        ("on < up", "orders true or false"),
        ("began + ended > 0", "is an instant, where a number is wanted"),
        ("ended - a > 0", "is an instant, where a number is wanted"),
        ("a ** 2 > 1", "cannot be used"),
        ("a % 2 == 0", "cannot be used"),
        ("round(a) == 1", "cannot be used"),
        ("abs(a, b) == 1", "cannot be used"),
        ("len(a) == 1", "is a number, where text is wanted"),
        ("abs(s) == 1", "is text, where a number is wanted"),
        ("s.upper() == 'X'", "cannot be used"),
        ("__import__('os').system('x')", "cannot be used"),
        ("[x for x in (1, 2)]", "cannot be used"),
        ("a is 1", "compares by identity"),
        ("(a + b) is None", "compares by identity"),
        ("a in (1, 'x')", "must be a constant of the kind that is looked for"),
        ("a in b", "must be constants"),
        ("on in (True, False)", "must be constants"),
        ("a == 1" + "0" * 400, "is beyond what a 64-bit float holds"),
        ("a == None", "cannot be used"),
        ("1 < 2", "names no field"),
        ("a < 1 if on else up", "cannot be used"),
        ("on == (on == up) == on", "compares a comparison within a chain"),
        ("on == (not up) == on", "compares a comparison within a chain"),
        ('s == "\\ud800"', "half of a character"),
        ("not a", "is a number, where true or false is wanted"),
        ("a and on", "is a number, where true or false is wanted"),
        ("on or " * 200 + "up", "at most"),
        ("(" * 300 + "a" + ")" * 300 + " < 1", "is no expression"),
        ("+".join(["a"] * 150) + " < 1", "at most 200 parts"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_the_part_that_is_wrong(text, words) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text, KINDS)


def test_the_fields_of_a_condition_are_known() -> None:
    assert columns(parse("a < 1 or s in ('x',) and not (ended - began > abs(-b)) or on is None", KINDS)) == {
        "a", "b", "s", "began", "ended", "on",
    }  # fmt: skip
