"""The request engine: typed values, helpful messages, and a compiled subset for predictions."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.contracts.events import to_microseconds
from pipelines.contracts.requests import check_record, compile_model
from pipelines.spec import Contract, Field, FieldType, Rule, Severity
from pipelines.usecases import aqua, prop

NOW_US = to_microseconds(datetime(2023, 1, 1, tzinfo=UTC))
READING: dict[str, Any] = {
    "district": "dma_1", "time": "2022-06-01T12:00:00+02:00", "inflow": 20, "temperature": 21.5, "rain": 0,
    "holiday": False,
}  # fmt: skip


def test_an_accepted_record_comes_back_typed_and_complete() -> None:
    typed, problems = check_record(compile_model(aqua.CONTRACT), READING, NOW_US)
    assert problems == []
    assert typed == {
        **READING, "time": datetime(2022, 6, 1, 10, tzinfo=UTC), "humidity": None, "windspeed": None,
    }  # fmt: skip
    assert typed is not None
    assert list(typed) == [field.name for field in aqua.CONTRACT.fields]
    assert isinstance(typed["inflow"], float)


def test_every_broken_rule_is_told_with_what_to_change() -> None:
    record = {**READING, "district": "west", "temperature": 99, "rain": None, "holiday": "no", "pressure": 3}
    typed, problems = check_record(compile_model(aqua.CONTRACT), record, NOW_US)
    assert typed is None
    assert [(p.field, p.rule) for p in problems] == [
        ("district", "district.pattern"), ("temperature", "temperature.maximum"), ("rain", "rain.missing"),
        ("holiday", "holiday.type"), ("pressure", "pressure.unknown"),
    ]  # fmt: skip
    assert [p.message for p in problems[:4]] == [
        "district must match 'dma_[0-9]{1,3}' as a whole, got \"west\"",
        "temperature must be at most 55.0 degC, got 99",
        "rain must be given and not null",
        'holiday must be true or false, got "no"',
    ]
    assert "there is no such field; there are ['district', 'time'" in problems[4].message


def test_the_future_is_judged_by_the_clock_that_is_given() -> None:
    model = compile_model(aqua.CONTRACT)
    record = {**READING, "time": "2023-01-01T00:00:00.000001Z"}
    assert [p.rule for p in check_record(model, record, NOW_US)[1]] == ["time.future"]
    assert check_record(model, record, NOW_US + 1)[1] == []
    both = check_record(model, {**record, "rain": -1}, NOW_US)[1]
    assert [p.rule for p in both] == ["time.future", "rain.minimum"]


def test_a_prediction_takes_the_entity_and_the_inputs_and_nothing_else() -> None:
    fields = [aqua.CONTRACT.entity, *aqua.VIEW.inputs]
    model = compile_model(aqua.CONTRACT, fields, "AquaInstance")
    instance = {"district": "dma_2", "temperature": 4, "rain": 0.5, "holiday": True}
    typed, problems = check_record(model, instance, 0)
    assert (typed, problems) == (instance, [])
    _, problems = check_record(model, {**instance, "time": "2030-01-01T00:00:00Z"}, 0)
    assert [p.rule for p in problems] == ["time.unknown"]
    with pytest.raises(KeyError, match="has no field 'pressure'"):
        compile_model(aqua.CONTRACT, ["pressure"])


def test_the_json_schema_describes_the_record() -> None:
    schema = compile_model(prop.CONTRACT, name="Sale").json_schema()
    assert schema["title"] == "Sale"
    assert schema["additionalProperties"] is False
    assert schema["properties"]["home_type"]["enum"] == ["sfr", "townhouse"]
    assert schema["properties"]["sale_id"]["pattern"] == r"^(?:[0-9]{4}\.\.[0-9]+)$"
    assert schema["properties"]["grade"] == {"maximum": 13, "minimum": 1, "title": "Grade", "type": "integer"}
    assert schema["properties"]["sold_at"]["format"] == "date-time"
    assert set(schema["required"]) == {field.name for field in prop.CONTRACT.fields}


@pytest.mark.parametrize("contract", [aqua.CONTRACT, prop.CONTRACT], ids=lambda contract: contract.name)
def test_the_example_of_a_contract_keeps_its_rules(contract: Contract) -> None:
    example = compile_model(contract).example()
    assert example is not None
    assert set(example) == {field.name for field in contract.fields}
    assert check_record(compile_model(contract), json.loads(json.dumps(example)), NOW_US)[1] == []


def test_a_pattern_without_an_example_has_none() -> None:
    fields = tuple(field.model_copy(update={"example": None}) for field in aqua.CONTRACT.fields)
    bare = aqua.CONTRACT.model_copy(update={"fields": fields})
    assert compile_model(bare).example() is None
    assert compile_model(bare, ["rain", "holiday"]).example() == {"rain": 1.0, "holiday": False}


@pytest.mark.parametrize("record", [None, 3, "text", [READING]])
def test_what_is_no_object_is_unreadable(record: Any) -> None:
    typed, problems = check_record(compile_model(aqua.CONTRACT), record, NOW_US)
    assert typed is None
    assert [p.rule for p in problems] == ["row.unreadable"]


def test_a_long_value_is_shown_short() -> None:
    _, problems = check_record(compile_model(aqua.CONTRACT), {**READING, "district": "x" * 10_000}, NOW_US)
    assert len(problems[0].message) < 150
    _, problems = check_record(compile_model(aqua.CONTRACT), {**READING, "x" * 10_000: 1}, NOW_US)
    assert len(problems[0].rule) < 150
    assert len(problems[0].field) < 150


def test_a_record_from_the_future_gets_the_rules_between_its_fields_as_well() -> None:
    fields = (Field(name="who", type=FieldType.STRING), Field(name="at", type=FieldType.TIMESTAMP))
    contract = Contract(
        name="c", version="1.0.0", owner="o", fields=fields, entity="who", time="at", key=("who",),
        rules=(Rule(name="short", check="len(who) < 2"), Rule(name="odd", check='who == "b"', severity=Severity.WARN)),
    )  # fmt: skip
    typed, problems = check_record(compile_model(contract), {"who": "aa", "at": "2100-01-01T00:00:00Z"}, 0)
    assert typed is None
    assert [problem.rule for problem in problems] == ["at.future", "rule:short"]
