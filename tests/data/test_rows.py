"""The batch engine on the kinds of input that JSON does not have, and its rules one by one."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.contracts import rows
from pipelines.contracts.datasets import Manifest, Tally, refusals, unique_keys
from pipelines.contracts.events import INSTANT, contract_schema
from pipelines.contracts.parsing import AmbiguousColumns
from pipelines.spec import Contract, Field, FieldType, Rule, Severity

NOW = datetime(2026, 3, 1, tzinfo=UTC)
NOW_US = (NOW - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
CONTRACT = Contract(
    name="c",
    version="1.0.0",
    owner="o",
    fields=(
        Field(name="who", type=FieldType.STRING, pattern="[a-z]+", allowed=("a", "b")),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="level", type=FieldType.FLOAT, nullable=True, minimum=0, maximum=10, unit="m"),
        Field(name="count", type=FieldType.INTEGER, nullable=True, minimum=-5),
        Field(name="open", type=FieldType.BOOLEAN, nullable=True),
    ),
    entity="who",
    time="at",
    key=("who", "at"),
)


def _judge(columns: dict[str, Any]) -> tuple[list[tuple[str, ...]], rows.Parsed]:
    count = len(next(iter(columns.values())))
    given = {"who": ["a"] * count, "at": pa.array([NOW] * count, INSTANT), **columns}
    parsed = rows.from_arrow(CONTRACT, pa.table(given))
    verdict = rows.check(CONTRACT, parsed, NOW_US)
    return [verdict.rules_of(row) for row in range(count)], parsed


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.decimal128(5, 2)])
def test_any_number_is_a_float(kind: pa.DataType) -> None:
    value = Decimal(3) if pa.types.is_decimal(kind) else np.float16(3) if kind == pa.float16() else 3
    found, parsed = _judge({"level": pa.array([value, None], kind)})
    assert found == [(), ()]
    assert parsed.table.column("level").to_pylist() == [3.0, None]


def test_an_unsigned_integer_beyond_64_bits_is_no_integer() -> None:
    found, parsed = _judge({"count": pa.array([2**63 - 1, 2**63, None], pa.uint64())})
    assert found == [(), ("count.type",), ()]
    assert parsed.table.column("count").to_pylist() == [2**63 - 1, None, None]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("level", pa.array(["1.5", None])),
        ("count", pa.array([1.0, None])),
        ("open", pa.array([1, None])),
        ("at", pa.array([datetime(2026, 1, 1), None], pa.timestamp("us"))),
        ("who", pa.array([1, None])),
        ("at", pa.array([datetime(2026, 1, 1).date(), None])),
    ],
)
def test_a_column_of_another_type_breaks_the_type_where_it_holds_something(name: str, values: pa.Array) -> None:
    found, _ = _judge({name: values})
    missing = () if CONTRACT.field(name).nullable else (f"{name}.missing",)
    assert found == [(f"{name}.type",), missing]


def test_instants_of_any_unit_and_zone_are_microseconds_of_utc() -> None:
    for unit in ("s", "ms", "us", "ns"):
        column = pa.array([NOW, None], pa.timestamp(unit, "Asia/Kolkata"))
        found, parsed = _judge({"at": column})
        assert found == [(), ("at.missing",)]
        assert parsed.table.column("at").to_pylist()[0] == NOW


def test_instants_that_microseconds_or_python_cannot_hold_break_the_type() -> None:
    found, _ = _judge({"at": pa.array([1001, -1001, 1000], pa.timestamp("ns", "UTC"))})
    assert found == [("at.type",), ("at.type",), ()]
    far = [253_402_300_799, 253_402_300_800, -30_610_224_000, -30_610_224_001]  # the years 1000 to 9999
    found, _ = _judge({"at": pa.array(far, pa.timestamp("s", "UTC"))})
    assert found == [("at.future",), ("at.type",), (), ("at.type",)]


def test_the_future_begins_a_microsecond_after_now() -> None:
    column = pa.array([NOW + timedelta(microseconds=1)], INSTANT)
    assert _judge({"at": column})[0] == [("at.future",)]
    assert _judge({"at": pa.array([NOW], INSTANT)})[0] == [()]


def test_dictionaries_and_large_strings_are_strings() -> None:
    assert _judge({"who": pa.array(["a", "c", "a"]).dictionary_encode()})[0] == [(), ("who.allowed",), ()]
    assert _judge({"who": pa.array(["b"], pa.large_string())})[0] == [()]
    assert _judge({"who": pa.array(["1"])})[0] == [("who.pattern", "who.allowed")]


def test_an_absent_column_is_null_or_missing() -> None:
    parsed = rows.from_arrow(CONTRACT, pa.table({"who": ["a", "b"]}))
    verdict = rows.check(CONTRACT, parsed, NOW_US)
    assert [verdict.rules_of(i) for i in range(2)] == [("at.missing",)] * 2
    assert parsed.table.schema == contract_schema(CONTRACT)


def test_another_unit_or_an_extra_column_refuses_every_row() -> None:
    level = pa.field("level", pa.float64(), metadata={"unit": "ft"})
    table = pa.table({"who": ["a"], "at": pa.array([NOW], INSTANT), "level": [11.0], "note": ["x"]})
    table = table.cast(table.schema.set(2, level))
    verdict = rows.check(CONTRACT, rows.from_arrow(CONTRACT, table), NOW_US)
    assert verdict.rules_of(0) == ("level.maximum", "level.unit", "note.unknown")
    same = table.drop_columns(["note"]).cast(pa.schema([*list(table.schema)[:2], level.with_metadata({"unit": "m"})]))
    assert rows.check(CONTRACT, rows.from_arrow(CONTRACT, same), NOW_US).rules_of(0) == ("level.maximum",)


def test_two_columns_of_one_name_cannot_be_read() -> None:
    with pytest.raises(AmbiguousColumns, match=r"several columns named \['who'\]"):
        rows.from_arrow(CONTRACT, pa.Table.from_arrays([pa.array(["a"])] * 2, names=["who", "who"]))


def test_a_refused_row_can_be_shown_as_it_came() -> None:
    _, parsed = _judge({"level": pa.array([1.0, float("nan")]), "at": pa.array([1, 2**62], pa.timestamp("s", "UTC"))})
    shown = [json.loads(text) for text in parsed.raw(np.array([1]))]
    assert shown[0]["who"] == "a"
    assert np.isnan(shown[0]["level"])
    parsed = rows.from_records(CONTRACT, [{"who": 10**30, "x": [1]}, "text"])
    assert [json.loads(text) for text in parsed.raw(np.array([0, 1]))] == [{"who": 10**30, "x": [1]}, "text"]


def test_no_rows_are_no_problem() -> None:
    verdict = rows.check(CONTRACT, rows.from_arrow(CONTRACT, contract_schema(CONTRACT).empty_table()), NOW_US)
    assert (len(verdict.accepted), verdict.broken, len(verdict.rules_column())) == (0, (), 0)
    assert rows.check(CONTRACT, rows.from_records(CONTRACT, []), NOW_US).broken == ()


def test_chunks_do_not_matter() -> None:
    pieces = [pa.table({"who": ["a"], "at": pa.array([NOW], INSTANT), "level": [v]}) for v in (1.0, 11.0, 2.0)]
    verdict = rows.check(CONTRACT, rows.from_arrow(CONTRACT, pa.concat_tables(pieces)), NOW_US)
    assert verdict.accepted.tolist() == [True, False, True]


def test_finite_values_whose_sum_overflows_are_finite() -> None:
    wide = CONTRACT.model_copy(update={"fields": (*CONTRACT.fields[:2], Field(name="level", type=FieldType.FLOAT))})
    table = pa.table({"who": ["a"] * 3, "at": pa.array([NOW] * 3, INSTANT), "level": [1e308, 1e308, 1e308]})
    assert rows.check(wide, rows.from_arrow(wide, table), NOW_US).accepted.all()


def test_the_first_row_of_a_key_is_kept_unless_the_key_is_taken() -> None:
    ids = pa.array(["x", "y", "x", "z", "y"])
    assert unique_keys(ids, pa.array([], pa.string())).tolist() == [True, True, False, True, False]
    assert unique_keys(ids, pa.array(["y"])).tolist() == [True, False, False, True, False]
    assert unique_keys(pa.array([], pa.string()), pa.array(["y"])).tolist() == []


def test_a_load_is_published_up_to_its_share_and_not_beyond() -> None:
    assert refusals(CONTRACT, Manifest(Tally(100, 95, 5))) == []
    assert refusals(CONTRACT, Manifest(Tally(100, 94, 6))) == ["6.0% of the rows are refused, and at most 5.0% may be"]
    assert refusals(CONTRACT, Manifest(Tally(0, 0, 0))) == []


def test_why_a_load_was_refused_is_told_alike_when_all_its_rows_are_in_quarantine() -> None:
    whole = Manifest(Tally(100, 0, 100), {"load.refused": 94, "x.maximum": 6})
    assert refusals(CONTRACT, whole) == ["6.0% of the rows are refused, and at most 5.0% may be"]


def test_a_row_that_breaks_a_rule_for_which_loads_are_refused_refuses_its_load() -> None:
    strict = CONTRACT.model_copy(update={"rules": (Rule(name="one", check="value > 0", severity=Severity.REFUSE),)})
    found = refusals(strict, Manifest(Tally(100, 99, 1), {"rule:one": 1}))
    assert found == ["1 rows break rule:one, for which a load is refused"]
