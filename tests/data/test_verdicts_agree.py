"""Batch verdict = request verdict = the naive oracle's, for every record."""

from __future__ import annotations

import json
import os
from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import requests, rows
from pipelines.contracts.events import INSTANT, contract_schema
from pipelines.spec import Contract, Field, FieldType
from tests.data import contract_oracle as oracle

EXAMPLES = int(os.environ.get("EXAMPLES", "200"))
"""Contracts, each with up to eight records; ``EXAMPLES=10000`` for a long look."""


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_both_engines_break_the_same_rules_as_the_oracle(data: st.DataObject) -> None:
    contract = data.draw(oracle.contracts())
    records = data.draw(st.lists(oracle.records(contract), min_size=1, max_size=8))
    parsed = rows.from_records(contract, records)
    verdict = rows.check(contract, parsed, oracle.NOW_US)
    model = requests.compile_model(contract)
    listed = verdict.rules_column().to_pylist()
    warned = {(found.rule, row) for found in verdict.warned for row in found.rows.tolist()}
    for place, record in enumerate(records):
        expected = oracle.record_rules(contract, record)
        warnings = [rule for rule in oracle.all_rules(contract, record) if oracle.warns(contract, rule)]
        assert {rule for rule, row in warned if row == place} == set(warnings)
        assert list(verdict.rules_of(place)) == expected
        assert bool(verdict.accepted[place]) == (not expected)
        typed, problems = requests.check_record(model, record, oracle.NOW_US)
        assert [p.rule for p in problems] == (expected or warnings)
        assert all(p.message for p in problems)
        if expected:
            assert typed is None
            assert listed.pop(0) == expected
        else:  # both engines also read the same value
            assert _plain(typed) == _plain(parsed.table.slice(place, 1).to_pylist()[0])
    assert listed == []


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_typed_columns_are_judged_like_the_records_they_hold(data: st.DataObject) -> None:
    contract = data.draw(oracle.contracts())
    records = [
        {f.name: oracle.typed(f, record.get(f.name)) for f in contract.fields}
        for record in data.draw(st.lists(oracle.records(contract), min_size=1, max_size=8))
        if isinstance(record, dict)
    ]
    table = pa.Table.from_pylist(records, schema=contract_schema(contract))
    assert _rules(contract, rows.from_arrow(contract, table)) == [
        oracle.record_rules(contract, record) for record in records
    ]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_text_cells_are_judged_like_the_values_they_spell(data: st.DataObject) -> None:
    contract = data.draw(oracle.contracts())
    records = [
        {f.name: oracle.typed(f, record.get(f.name)) for f in contract.fields}
        for record in data.draw(st.lists(oracle.records(contract), min_size=1, max_size=8))
        if isinstance(record, dict)
    ]
    cells = {f.name: pa.array([_cell(r[f.name]) for r in records], pa.string()) for f in contract.fields}
    assert _rules(contract, rows.from_text(contract, pa.table(cells))) == [
        oracle.record_rules(contract, record) for record in records
    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_row_is_judged_alike_whatever_its_neighbours(data: st.DataObject) -> None:
    contract = data.draw(oracle.contracts())
    cell = st.one_of(
        st.none(),
        st.sampled_from(["1", "1.", "-.5", "1e999", "+1", " 1", "0x10", "007", "9" * 20, "9" * 5000, "nan", "-Inf"]),
        st.sampled_from(["true", "FALSE", "yes", "2026-02-30T00:00:00Z", "2026-02-27T00:00:00.123456000Z"]),
        st.sampled_from(["9999-12-31T23:30:00-01:00", "2026-02-27 00:00:00+01:00", "2026-02-27T00:00:00", "a\n"]),
    )
    columns = {f.name: data.draw(st.lists(cell, min_size=4, max_size=4)) for f in contract.fields}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    together = _rules(contract, rows.from_text(contract, table))
    alone = [_rules(contract, rows.from_text(contract, table.slice(place, 1)))[0] for place in range(4)]
    assert together == alone
    for field in contract.fields:
        if field.type in (FieldType.STRING, FieldType.TIMESTAMP):
            judged = [[r for r in found if r.startswith(f"{field.name}.")] for found in together]
            values = columns[field.name]
            assert judged == [
                [f"{field.name}.{r}" for r in oracle.field_rules(contract, field, value) if r not in field.warn]
                for value in values
            ]


@pytest.mark.parametrize("field", oracle.every_field(), ids=oracle.field_label)
def test_every_listed_value_is_judged_alike_by_all(field: Field) -> None:
    contract = oracle.contract_of(field)
    # Neither JSON nor a file gives Python's decimals where the contract has none.
    exact = field.type is FieldType.DECIMAL
    values = [value for value in oracle.VALUES if exact or not isinstance(value, Decimal)]
    records = [{"who": "a", "at": oracle.NOW, "f": value} for value in values]
    expected = [oracle.record_rules(contract, record) for record in records]
    assert _rules(contract, rows.from_records(contract, records)) == expected
    clean = [record for record, broken in zip(records, expected, strict=True) if not broken]
    assert rows.check(contract, rows.from_records(contract, clean), oracle.NOW_US).broken == ()
    model = requests.compile_model(contract)
    judged = [requests.check_record(model, record, oracle.NOW_US)[1] for record in records]
    assert [[p.rule for p in problems] for problems in judged] == expected
    typed = [oracle.typed(field, value) for value in values]
    columns = {"who": ["a"] * len(typed), "at": pa.array([oracle.NOW] * len(typed), INSTANT)}
    kind = contract_schema(contract).field("f").type
    table = pa.table({**columns, "f": pa.array(typed, kind)})
    expected = [oracle.record_rules(contract, {**record, "f": v}) for record, v in zip(records, typed, strict=True)]
    assert _rules(contract, rows.from_arrow(contract, table)) == expected
    if field.type is FieldType.TIMESTAMP:
        cells = [v if isinstance(v, str) and oracle.typed(WHO, v) is not None else None for v in values]
        expected = [oracle.record_rules(contract, {**r, "f": c}) for r, c in zip(records, cells, strict=True)]
    else:
        cells = [_cell(v) for v in typed]
    columns = {"who": ["a"] * len(typed), "at": [oracle.NOW.isoformat()] * len(typed)}
    table = pa.table({**columns, "f": pa.array(cells, pa.string())})
    assert _rules(contract, rows.from_text(contract, table)) == expected


def test_text_that_is_no_list_is_none_and_what_it_says_is_read() -> None:
    field = Field(name="f", type=FieldType.LIST, items=FieldType.FLOAT, nullable=True)
    cells = ["[1, 2.5]", "[]", None, "null", "1", "[1", "[" * 5_000, "[null]", '["1"]', '{"a": 1}', "[1e999]", "[NaN]"]
    columns = {"who": ["a"] * len(cells), "at": [oracle.NOW.isoformat()] * len(cells)}
    parsed = rows.from_text(oracle.contract_of(field), pa.table({**columns, "f": pa.array(cells, pa.string())}))
    assert parsed.table.column("f").to_pylist()[:4] == [[1.0, 2.5], [], None, None]
    broken = _rules(oracle.contract_of(field), parsed)
    assert broken == [*[[]] * 3, *[["f.type"]] * 7, *[["f.finite"]] * 2]


def test_a_list_says_what_is_wrong_with_which_values() -> None:
    field = Field(name="f", type=FieldType.LIST, items=FieldType.INTEGER, minimum=3, min_items=2)
    model = requests.compile_model(oracle.contract_of(field))
    wrong: dict[str, Any] = {"who": "a", "at": oracle.NOW, "f": [1]}
    messages = [p.message for p in requests.check_record(model, wrong, oracle.NOW_US)[1]]
    assert messages == ["every value of f must be at least 3.0, got [1]", "f must have at least 2 values, got [1]"]
    messages = [p.message for p in requests.check_record(model, {**wrong, "f": [None, 1]}, oracle.NOW_US)[1]]
    assert messages == ["f must be a list, and every value of it a whole number of 64 bits, got [null, 1]"]
    shown = model.json_schema()["properties"]["f"]
    assert (shown["type"], shown["minItems"]) == ("array", 2)
    assert shown["items"]["minimum"] == 3
    assert model.example() == {"who": "who", "at": "2000-01-01T00:00:00Z", "f": [3, 3]}


WHO = Field(name="who", type=FieldType.STRING)


def _rules(contract: Contract, parsed: rows.Parsed) -> list[list[str]]:
    verdict = rows.check(contract, parsed, oracle.NOW_US)
    return [list(verdict.rules_of(place)) for place in range(parsed.table.num_rows)]


def _cell(value: Any) -> str | None:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, list):
        return json.dumps(value)
    return None if value is None else str(value)


def _plain(record: dict[str, Any] | None) -> dict[str, str]:
    assert record is not None
    return {name: f"{type(value).__name__} {value!s}" for name, value in record.items()}
