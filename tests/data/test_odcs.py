"""Contracts as documents of the Open Data Contract Standard: nothing is lost, and nothing is taken that is not kept."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import usecases
from pipelines.contracts.odcs import NotReadable, from_odcs, to_odcs
from pipelines.spec import (
    Contract,
    Distribution,
    Field,
    Freshness,
    LoadRule,
    Monotone,
    NullShare,
    References,
    ServiceLevel,
    Severity,
    Silence,
    Unique,
    Volume,
)
from tests.data import contract_oracle as oracle
from tests.data.test_evolution import OLD

SEVERITIES = st.sampled_from([Severity.WARN, Severity.REFUSE])


def load_rules(contract: Contract) -> st.SearchStrategy[tuple[LoadRule, ...]]:
    numbers = [f.name for f in contract.fields if f.type.value in ("float64", "int64")]
    spans = st.timedeltas(timedelta(microseconds=1), timedelta(days=900))
    bounds = st.tuples(st.floats(-1e9, 0), st.floats(0, 1e9))
    kinds: list[st.SearchStrategy[Any]] = [
        st.builds(Volume, minimum=st.none() | st.integers(0, 9), history=st.integers(3, 9), severity=SEVERITIES),
        st.builds(Freshness, max_age=spans, severity=SEVERITIES),
        st.builds(Silence, every=spans, severity=SEVERITIES),
        st.just(Unique(fields=("who", "at"))),
        st.just(References(field="who", source="aqua.profile", column="district")),
        st.builds(NullShare, field=st.sampled_from([f.name for f in contract.fields]), maximum=st.floats(0, 1)),
    ]
    if numbers:
        named = st.sampled_from(numbers)
        kinds += [st.builds(Distribution, field=named, mean=bounds, std=st.none() | bounds)]
        kinds += [st.builds(Monotone, field=named, severity=SEVERITIES)]
    return st.lists(st.one_of(kinds), max_size=4, unique_by=lambda rule: rule.id).map(tuple)


def service_levels(contract: Contract) -> st.SearchStrategy[tuple[ServiceLevel, ...]]:
    level = st.builds(
        ServiceLevel,
        name=st.sampled_from(["latency", "retention", "freshness", "timeToRepair"]),
        value=st.integers(0, 99) | st.floats(0, 1) | st.booleans() | st.sampled_from(["09:00-17:00", "4", "true", ""]),
        unit=st.none() | st.sampled_from(["h", "d", "%"]),
        element=st.none() | st.sampled_from([field.name for field in contract.fields]),
        description=st.sampled_from(["", "on working days"]),
    )
    return st.lists(level, max_size=3, unique_by=lambda found: (found.name, found.element)).map(tuple)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_contract_is_the_same_after_its_document_was_read(data) -> None:
    drawn = data.draw(oracle.contracts())
    parts = {"load_rules": data.draw(load_rules(drawn)), "sla": data.draw(service_levels(drawn))}
    contract = Contract(**{**dict(drawn), **parts})
    assert from_odcs(to_odcs(contract)) == contract


@pytest.mark.parametrize("contract", [OLD, *(usecases.load(name).contract for name in usecases.names())])
def test_the_contracts_of_pages_are_the_same_after_their_documents_were_read(contract) -> None:
    assert from_odcs(to_odcs(contract)) == contract


def test_what_the_standard_has_is_said_in_its_words() -> None:
    document = yaml.safe_load(to_odcs(OLD))
    assert (document["kind"], document["apiVersion"], document["version"]) == ("DataContract", "v3.1.0", "1.2.3")
    assert document["team"] == {"name": "water"}
    (table,) = document["schema"]
    columns = {column["name"]: column for column in table["properties"]}
    meter, flow, kind = columns["meter"], columns["flow"], columns["kind"]
    assert (meter["primaryKey"], meter["primaryKeyPosition"], meter["required"]) == (True, 1, True)
    assert meter["logicalTypeOptions"] == {"pattern": "m[0-9]+"}
    assert meter["examples"] == ["m1"]
    assert (flow["logicalType"], flow["logicalTypeOptions"]) == ("number", {"minimum": 0.0, "maximum": 100.0})
    assert kind["quality"][0]["arguments"] == {"validValues": ["a", "b"]}
    assert "required" not in kind
    assert [rule["name"] for rule in table["quality"]] == ["busy", "warm", "load_volume", "load_freshness"]
    assert document["slaProperties"] == [
        {"property": "latency", "value": 15, "unit": "min", "element": "readings.at"},
        {"property": "timeToRepair", "value": 4, "unit": "h"},
        {"property": "freshness", "value": 3600.0, "unit": "s", "element": "readings.at", "driver": "tidegate"},
    ]


HUGE = f"decimal({'9' * 5_000})"
FOREIGN = """
apiVersion: v3.1.0
kind: DataContract
id: orders
name: orders
version: 2.0.0
status: active
team: {name: sales}
schema:
- name: orders
  properties:
  - {name: customer, logicalType: string, required: true, primaryKey: true, primaryKeyPosition: 1}
  - {name: ordered_at, logicalType: timestamp, required: true, primaryKey: true, primaryKeyPosition: 2}
  - {name: amount, logicalType: number, logicalTypeOptions: {minimum: 0}}
"""
NUMBER = "logicalType: number, logicalTypeOptions: {minimum: 0}"
TEAM = "team: {name: sales}\n"
ROLES = "customProperties: [{property: tidegate, value: {entity: customer, time: ordered_at}}]\n"


def test_a_document_from_elsewhere_is_a_contract_once_its_columns_have_roles() -> None:
    with pytest.raises(NotReadable, match="add the custom property 'tidegate'"):
        from_odcs(FOREIGN)
    contract = from_odcs(FOREIGN + ROLES)
    assert (contract.name, contract.owner, contract.key) == ("orders", "sales", ("customer", "ordered_at"))
    assert contract.field("amount").minimum == 0
    assert contract.field("amount").nullable


def test_an_array_from_elsewhere_is_a_list_whose_values_are_held_to_what_its_items_are() -> None:
    items = "items: {logicalType: number, logicalTypeOptions: {minimum: 0}}, logicalTypeOptions: {maxItems: 9}"
    found = from_odcs(FOREIGN.replace(NUMBER, f"logicalType: array, {items}") + ROLES).field("amount")
    wanted = {"type": "list", "items": "float64", "nullable": True, "minimum": 0, "max_items": 9}
    assert found == Field(name="amount", **wanted)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("team: {name: sales}\n", f"{TEAM}slaProperties: [{{property: latency}}]\n", "'latency' has no value"),
        (
            "team: {name: sales}\n",
            f"{TEAM}slaProperties: [{{property: latency, value: 4, element: orders.price}}]\n",
            "has no field 'price'",
        ),
        (
            "team: {name: sales}\n",
            f"{TEAM}slaProperties: [{{property: latency, value: 4, valueExt: 5}}]\n",
            "has no place for",
        ),
        ("logicalType: number", "logicalType: object", "'amount' is of logical type 'object'"),
        ("logicalType: number", "logicalType: array", "'amount' is an array: it needs items"),
        (
            "logicalType: number",
            "logicalType: array, items: {logicalType: string}",
            r"not enforced here: \['minimum'\]",
        ),
        (NUMBER, "logicalType: array, items: {logicalType: object}", "items of column 'amount' are of logical type"),
        (NUMBER, "logicalType: array, items: {logicalType: timestamp}", "a list needs items, one of string"),
        (NUMBER, "logicalType: array, unique: true, items: {logicalType: string}", "are not enforced here"),
        ("{minimum: 0}", "{multipleOf: 2}", r"options that are not enforced here: \['multipleOf'\]"),
        (
            "{minimum: 0}}",
            "{minimum: 0}, quality: [{type: sql, query: SELECT 1}]}",
            "a quality rule that is not enforced",
        ),
        ("- name: orders\n", "- name: more\n- name: orders\n", "describes 2 objects"),
        (
            "  properties:",
            "  quality: [{type: library, metric: rowCount, mustBe: 1}]\n  properties:",
            "not enforced here",
        ),
        ("{minimum: 0}", "{timezone: false}", "options that are not enforced here"),
        ("logicalType: number,", "logicalType: number, unique: true,", "options that are not enforced here"),
        (
            "{minimum: 0}}",
            "{minimum: 0}, quality: [{metric: invalidValues, mustBe: 0, arguments: {validValues: abc}}]}",
            "not enforced here",
        ),
        ("logicalType: number,", "logicalType: number, examples: [abc],", "describes no contract"),
        (
            "logicalType: number,",
            f"logicalType: number, physicalType: {HUGE!r},",
            "describes no contract",
        ),
        ("version: 2.0.0", "version: 2024-13-45", "is no document"),
        ("version: 2.0.0", "version: two", "describes no contract"),
        ("team: {name: sales}\n", "", "who owns it is not said"),
        ("kind: DataContract", "kind: DataContract\nunheard: of", "is no document of the Open Data Contract Standard"),
        ("schema:", "schema: [", "is no document of the Open Data Contract Standard"),
    ],
)
def test_what_is_not_enforced_here_is_refused_and_not_forgotten(old, new, words) -> None:
    assert old in FOREIGN
    with pytest.raises(NotReadable, match=words):
        from_odcs(FOREIGN.replace(old, new) + ROLES)
