"""Every kind of change of a contract: how it is named, and whom it breaks, shown on rows that the contracts judge."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from pipelines.contracts.events import Layout, decode_events, encoder
from pipelines.contracts.evolution import KINDS, Breaks, diff, enough, required_version
from pipelines.contracts.requests import check_record, compile_model
from pipelines.spec import Contract, Field, FieldType, Freshness, NullShare, Rule, ServiceLevel, Severity, Volume

NOW_US = 1_700_000_000_000_000
LATENCY = ServiceLevel(name="latency", value=15, unit="min", element="at")
VOLUME, FRESH = Volume(minimum=10), Freshness(max_age=timedelta(hours=1), severity=Severity.WARN)
NULLS = NullShare(field="heat", maximum=0.5)
OLD = Contract(
    name="readings",
    version="1.2.3",
    owner="water",
    fields=(
        Field(name="meter", type=FieldType.STRING, pattern="m[0-9]+", example="m1"),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="flow", type=FieldType.FLOAT, minimum=0, maximum=100, unit="L/s"),
        Field(name="count", type=FieldType.INTEGER, minimum=0),
        Field(name="kind", type=FieldType.STRING, allowed=("a", "b"), nullable=True),
        Field(name="note", type=FieldType.STRING, nullable=True),
        Field(name="code", type=FieldType.STRING, nullable=True, min_length=2, max_length=4),
        Field(name="heat", type=FieldType.FLOAT, nullable=True, maximum=90, warn=("maximum",)),
        Field(name="cold", type=FieldType.FLOAT, nullable=True, minimum=0, refuse=("minimum",)),
        Field(name="cost", type=FieldType.DECIMAL, nullable=True, precision=6, scale=2),
        Field(name="tags", type=FieldType.LIST, items=FieldType.STRING, nullable=True, min_items=2, max_items=3),
        Field(name="open", type=FieldType.FLOAT),
        Field(name="peaks", type=FieldType.LIST, items=FieldType.FLOAT, nullable=True),
    ),
    entity="meter",
    time="at",
    key=("meter", "at"),
    delay=timedelta(minutes=5),
    future=timedelta(minutes=1),
    max_rejected_share=0.1,
    rules=(
        Rule(name="busy", check="count > 0 or flow == 0"),
        Rule(name="warm", check="cold <= heat", severity=Severity.WARN),
    ),
    load_rules=(VOLUME, FRESH),
    sla=(LATENCY, ServiceLevel(name="timeToRepair", value=4, unit="h")),
)
ROW = {
    "meter": "m1", "at": "2023-11-14T22:13:20Z", "flow": 5.0, "count": 3, "kind": "a", "note": None, "code": "abc",
    "heat": 50.0, "cold": 10.0, "cost": "12.50", "tags": ["a", "b"],
    "open": 1.5, "peaks": [2.5],
}  # fmt: skip


def field(name: str, **changes: Any) -> Contract:
    """The contract with one field changed."""
    fields = tuple(Field(**{**f.model_dump(), **changes}) if f.name == name else f for f in OLD.fields)
    return changed(fields=fields)


def changed(**changes: Any) -> Contract:
    return Contract(**{**{name: getattr(OLD, name) for name in Contract.model_fields}, **changes})


def ruled(**changes: Any) -> Contract:
    """The contract with one rule changed; None takes it away."""
    kept = [(rule, changes.get(rule.name, {})) for rule in OLD.rules]
    return changed(rules=tuple(rule.model_copy(update=change) for rule, change in kept if change is not None))


EXTRA = Field(name="extra", type=FieldType.STRING)
CASES: dict[str, tuple[Contract, str | None]] = {
    "field_added": (changed(fields=(*OLD.fields, EXTRA.model_copy(update={"nullable": True}))), "extra"),
    "required_field_added": (changed(fields=(*OLD.fields, EXTRA)), "extra"),
    "field_removed": (changed(fields=OLD.fields[:-1]), "peaks"),
    "fields_reordered": (changed(fields=(OLD.fields[1], OLD.fields[0], *OLD.fields[2:])), None),
    "type_widened": (field("count", type=FieldType.FLOAT), "count"),
    "type_narrowed": (field("open", type=FieldType.INTEGER), "open"),
    "type_changed": (field("open", type=FieldType.STRING), "open"),
    "precision_raised": (field("cost", precision=7), "cost"),
    "precision_lowered": (field("cost", precision=5), "cost"),
    "scale_changed": (field("cost", scale=3), "cost"),
    "null_allowed": (field("open", nullable=True), "open"),
    "null_forbidden": (field("note", nullable=False), "note"),
    "minimum_added": (field("open", minimum=0), "open"),
    "minimum_raised": (field("flow", minimum=1), "flow"),
    "minimum_lowered": (field("flow", minimum=-1), "flow"),
    "minimum_removed": (field("flow", minimum=None), "flow"),
    "maximum_added": (field("open", maximum=9), "open"),
    "maximum_lowered": (field("flow", maximum=99), "flow"),
    "maximum_raised": (field("flow", maximum=101), "flow"),
    "maximum_removed": (field("flow", maximum=None), "flow"),
    "min_length_added": (field("note", min_length=2), "note"),
    "min_length_raised": (field("code", min_length=3), "code"),
    "min_length_lowered": (field("code", min_length=1), "code"),
    "min_length_removed": (field("code", min_length=None), "code"),
    "max_length_added": (field("note", max_length=2), "note"),
    "max_length_lowered": (field("code", max_length=3), "code"),
    "max_length_raised": (field("code", max_length=5), "code"),
    "max_length_removed": (field("code", max_length=None), "code"),
    "items_changed": (field("peaks", items=FieldType.INTEGER), "peaks"),
    "min_items_added": (field("peaks", min_items=2), "peaks"),
    "min_items_raised": (field("tags", min_items=3), "tags"),
    "min_items_lowered": (field("tags", min_items=1), "tags"),
    "min_items_removed": (field("tags", min_items=None), "tags"),
    "max_items_added": (field("peaks", max_items=2), "peaks"),
    "max_items_lowered": (field("tags", max_items=2), "tags"),
    "max_items_raised": (field("tags", max_items=4), "tags"),
    "max_items_removed": (field("tags", max_items=None), "tags"),
    "pattern_added": (field("note", pattern="n.*"), "note"),
    "pattern_removed": (field("meter", pattern=None), "meter"),
    "pattern_changed": (field("meter", pattern="[mn][0-9]+"), "meter"),
    "allowed_introduced": (field("note", allowed=("x",)), "note"),
    "allowed_dropped": (field("kind", allowed=None), "kind"),
    "value_added": (field("kind", allowed=("a", "b", "c")), "kind"),
    "value_withdrawn": (field("kind", allowed=("a",)), "kind"),
    "unit_changed": (field("flow", unit="m3/h"), "flow"),
    "example_changed": (field("meter", example="m2"), "meter"),
    "field_description_changed": (field("flow", description="out of the plant"), "flow"),
    "entity_changed": (changed(entity="note", fields=field("note", nullable=False).fields), None),
    "time_changed": (
        changed(time="then", fields=(*OLD.fields, Field(name="then", type=FieldType.TIMESTAMP))),
        None,
    ),
    "key_changed": (changed(key=("meter", "at", "count")), None),
    "delay_changed": (changed(delay=timedelta(minutes=6)), None),
    "lateness_raised": (changed(lateness=timedelta(hours=2)), None),
    "lateness_lowered": (changed(lateness=timedelta(minutes=30)), None),
    "future_raised": (changed(future=timedelta(minutes=2)), None),
    "future_lowered": (changed(future=timedelta(0)), None),
    "rejected_share_raised": (changed(max_rejected_share=0.2), None),
    "rejected_share_lowered": (changed(max_rejected_share=0.05), None),
    "limit_softened": (field("flow", warn=("maximum",)), "flow"),
    "limit_hardened": (field("heat", warn=()), "heat"),
    "load_refused_for_it": (field("flow", refuse=("maximum",)), "flow"),
    "load_taken_despite_it": (field("cold", refuse=()), "cold"),
    "rule_added": (changed(rules=(*OLD.rules, Rule(name="new", check="open > 0"))), "rule new"),
    "warning_added": (
        changed(rules=(*OLD.rules, Rule(name="new", check="open > 0", severity=Severity.WARN))),
        "rule new",
    ),
    "rule_removed": (ruled(busy=None), "rule busy"),
    "warning_removed": (ruled(warm=None), "rule warm"),
    "rule_changed": (ruled(busy={"check": "count > 1 or flow <= 1"}), "rule busy"),
    "warning_changed": (ruled(warm={"check": "cold < heat"}), "rule warm"),
    "rule_softened": (ruled(busy={"severity": Severity.WARN}), "rule busy"),
    "rule_hardened": (ruled(warm={"severity": Severity.REJECT}), "rule warm"),
    "rule_description_changed": (ruled(busy={"description": "words"}), "rule busy"),
    "load_rule_added": (changed(load_rules=(VOLUME, FRESH, NULLS)), "rule heat.null_share"),
    "load_warning_added": (
        changed(load_rules=(VOLUME, FRESH, NULLS.model_copy(update={"severity": Severity.WARN}))),
        "rule heat.null_share",
    ),
    "load_rule_removed": (changed(load_rules=(FRESH,)), "rule load.volume"),
    "load_warning_removed": (changed(load_rules=(VOLUME,)), "rule load.freshness"),
    "load_rule_changed": (changed(load_rules=(Volume(minimum=11), FRESH)), "rule load.volume"),
    "load_warning_changed": (
        changed(load_rules=(VOLUME, FRESH.model_copy(update={"max_age": timedelta(hours=2)}))),
        "rule load.freshness",
    ),
    "load_rule_softened": (
        changed(load_rules=(VOLUME.model_copy(update={"severity": Severity.WARN}), FRESH)),
        "rule load.volume",
    ),
    "load_rule_hardened": (
        changed(load_rules=(VOLUME, FRESH.model_copy(update={"severity": Severity.REFUSE}))),
        "rule load.freshness",
    ),
    "service_level_added": (
        changed(sla=(*OLD.sla, ServiceLevel(name="availability", value=99.9, unit="%"))),
        "sla availability",
    ),
    "service_level_removed": (changed(sla=(LATENCY,)), "sla timeToRepair"),
    "service_level_changed": (
        changed(sla=(LATENCY.model_copy(update={"value": 60}), *OLD.sla[1:])),
        "sla latency of at",
    ),
    "owner_changed": (changed(owner="gas"), None),
    "description_changed": (changed(description="words"), None),
    "contract_renamed": (changed(name="others"), None),
}
BESIDE = {"entity_changed": {"null_forbidden"}, "time_changed": {"required_field_added"}}
"""What else those changes cannot be without."""


def test_every_kind_has_a_case_and_there_are_at_least_twenty_five() -> None:
    assert set(CASES) == set(KINDS)
    assert len(KINDS) >= 25


@pytest.mark.parametrize("kind", KINDS)
def test_each_change_is_named_alone_where_it_is_and_says_whom_it_breaks(kind) -> None:
    new, where = CASES[kind]
    found = {change.kind: change for change in diff(OLD, new)}
    assert set(found) == {kind, *BESIDE.get(kind, ())}
    assert found[kind].field == where
    text = str(found[kind])
    assert text.startswith(f"{where}: " if where else kind.replace("_", " "))
    assert ("compatible" in text) == (KINDS[kind][0] is Breaks.NOBODY) == (not found[kind].breaking)


def taken(contract: Contract, row: dict[str, Any]) -> bool:
    return check_record(compile_model(contract, name="c"), row, NOW_US)[0] is not None


# Per kind that judges rows: a row that only the old contract takes, one that only the new one takes.
ONLY_OLD = {
    "required_field_added": ROW,
    "field_removed": ROW,
    "type_narrowed": ROW,
    "type_changed": ROW,
    "null_forbidden": ROW,
    "precision_lowered": {**ROW, "cost": "1234.50"},
    "scale_changed": {**ROW, "cost": "1234.50"},
    "minimum_added": {**ROW, "open": -1.0},
    "minimum_raised": {**ROW, "flow": 0.5},
    "maximum_added": {**ROW, "open": 10.0},
    "maximum_lowered": {**ROW, "flow": 99.5},
    "min_length_added": {**ROW, "note": "x"},
    "min_length_raised": {**ROW, "code": "ab"},
    "max_length_added": {**ROW, "note": "other"},
    "max_length_lowered": {**ROW, "code": "abcd"},
    "items_changed": ROW,
    "min_items_added": ROW,
    "min_items_raised": ROW,
    "max_items_added": {**ROW, "peaks": [1.0, 2.0, 3.0]},
    "max_items_lowered": {**ROW, "tags": ["a", "b", "c"]},
    "limit_hardened": {**ROW, "heat": 91.0},
    "rule_added": {**ROW, "open": 0.0},
    "rule_changed": {**ROW, "count": 1},
    "rule_hardened": {**ROW, "cold": 60.0},
    "pattern_added": {**ROW, "note": "other"},
    "allowed_introduced": {**ROW, "note": "y"},
    "value_withdrawn": {**ROW, "kind": "b"},
    "future_lowered": {**ROW, "at": "2023-11-14T22:13:50Z"},
}
ONLY_NEW = {
    "type_widened": {**ROW, "count": 2.5},
    "null_allowed": {**ROW, "open": None},
    "precision_raised": {**ROW, "cost": "12345.50"},
    "scale_changed": {**ROW, "cost": "1.125"},
    "minimum_lowered": {**ROW, "flow": -0.5},
    "minimum_removed": {**ROW, "flow": -1e9},
    "maximum_raised": {**ROW, "flow": 100.5},
    "maximum_removed": {**ROW, "flow": 1e9},
    "min_length_lowered": {**ROW, "code": "a"},
    "min_length_removed": {**ROW, "code": ""},
    "max_length_raised": {**ROW, "code": "abcde"},
    "max_length_removed": {**ROW, "code": "abcdefgh"},
    "min_items_lowered": {**ROW, "tags": ["a"]},
    "min_items_removed": {**ROW, "tags": []},
    "max_items_raised": {**ROW, "tags": ["a"] * 4},
    "max_items_removed": {**ROW, "tags": ["a"] * 9},
    "limit_softened": {**ROW, "flow": 101.0},
    "rule_removed": {**ROW, "count": 0},
    "rule_changed": {**ROW, "count": 0, "flow": 0.5},
    "rule_softened": {**ROW, "count": 0},
    "pattern_removed": {**ROW, "meter": "?"},
    "pattern_changed": {**ROW, "meter": "n7"},
    "allowed_dropped": {**ROW, "kind": "z"},
    "value_added": {**ROW, "kind": "c"},
    "future_raised": {**ROW, "at": "2023-11-14T22:14:50Z"},
}


@pytest.mark.parametrize("kind", ONLY_OLD)
def test_what_breaks_writers_refuses_a_row_that_was_taken(kind) -> None:
    assert KINDS[kind][0] in (Breaks.WRITERS, Breaks.BOTH)
    assert taken(OLD, ONLY_OLD[kind])
    assert not taken(CASES[kind][0], ONLY_OLD[kind])


@pytest.mark.parametrize("kind", ONLY_NEW)
def test_what_breaks_readers_takes_a_row_that_was_refused(kind) -> None:
    assert KINDS[kind][0] in (Breaks.READERS, Breaks.BOTH)
    assert not taken(OLD, ONLY_NEW[kind])
    assert taken(CASES[kind][0], ONLY_NEW[kind])


@pytest.mark.parametrize("kind", [kind for kind, (breaks, _) in KINDS.items() if breaks is Breaks.NOBODY])
def test_what_breaks_nobody_takes_the_same_rows(kind) -> None:
    assert taken(CASES[kind][0], ROW)


def test_a_limit_that_only_warns_may_come_change_and_go() -> None:
    bare, other = field("heat", maximum=None, warn=()), field("heat", maximum=80)
    assert [change.kind for change in diff(bare, OLD)] == ["warning_added"]
    assert [change.kind for change in diff(OLD, bare)] == ["warning_removed"]
    assert [change.kind for change in diff(OLD, other)] == ["warning_changed"]
    assert [change.kind for change in diff(other, field("heat", warn=()))] == ["limit_hardened"]


def test_a_rule_for_which_loads_are_refused_is_named_as_such() -> None:
    strict = ruled(busy={"severity": Severity.REFUSE})
    assert [change.kind for change in diff(OLD, strict)] == ["load_refused_for_it"]
    assert [change.kind for change in diff(strict, OLD)] == ["load_taken_despite_it"]
    assert {change.kind for change in diff(ruled(busy=None), strict)} == {"rule_added", "load_refused_for_it"}


def test_a_change_of_a_rule_knows_the_fields_that_the_rule_reads() -> None:
    (one,) = diff(OLD, CASES["rule_changed"][0])
    assert one.reads == {"count", "flow"}
    (other,) = diff(OLD, CASES["load_rule_added"][0])
    assert other.reads == {"heat"}
    (third,) = diff(OLD, CASES["load_rule_changed"][0])
    assert third.reads == set()


def test_a_field_that_is_added_before_others_moves_them_and_a_key_is_one_of_an_order() -> None:
    extra = EXTRA.model_copy(update={"nullable": True})
    kinds = {change.kind for change in diff(OLD, changed(fields=(OLD.fields[0], extra, *OLD.fields[1:])))}
    assert kinds == {"field_added", "fields_reordered"}
    assert [change.kind for change in diff(OLD, changed(key=("at", "meter")))] == ["key_changed"]
    wide = field("count", type=FieldType.FLOAT)
    before, after = (c.model_copy(update={"key": ("meter", "at", "count")}) for c in (OLD, wide))
    assert [change.kind for change in diff(before, after)] == ["type_changed"], "its text is part of event ids"


def test_a_record_from_before_a_field_was_added_is_read_with_a_null_there() -> None:
    record = compile_model(OLD, name="c")
    given, problems = check_record(record, ROW, NOW_US)
    assert given is not None, problems
    wide = changed(fields=(*OLD.fields, EXTRA.model_copy(update={"nullable": True})))
    blob = encoder(OLD)(given)[2]
    known = [Layout.of(OLD)]
    rows = decode_events(wide, [blob], [NOW_US], [1], load_id="drain", buckets=1, layouts=lambda: known)
    assert rows.column("extra").to_pylist() == [None]
    assert rows.column("open").to_pylist() == [1.5]


def test_the_same_contract_has_no_changes_and_the_version_alone_is_none() -> None:
    assert diff(OLD, OLD) == ()
    assert diff(OLD, changed(version="2.0.0")) == ()


@pytest.mark.parametrize(
    ("kinds", "required"),
    [
        ((), "1.2.3"),
        (("owner_changed", "example_changed"), "1.2.4"),
        (("owner_changed", "field_added"), "1.3.0"),
        (("field_added", "value_added"), "2.0.0"),
        (("minimum_raised",), "2.0.0"),
    ],
)
def test_the_version_that_changes_need(kinds, required) -> None:
    changes = tuple(change for kind in kinds for change in diff(OLD, CASES[kind][0]))
    assert required_version(OLD.version, changes) == required


def test_versions_are_compared_as_numbers() -> None:
    assert enough("1.10.0", "1.9.0")
    assert enough("2.0.0", "2.0.0")
    assert not enough("1.9.9", "1.10.0")
