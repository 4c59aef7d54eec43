"""What a load as a whole has to be: parts add up to the whole however they are cut, and each rule finds its fault."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.contracts.datasets import Finding, findings
from pipelines.contracts.events import INSTANT, to_microseconds
from pipelines.contracts.profile import Earlier, Profile, merged, profiled
from pipelines.spec import (
    Contract,
    Distribution,
    Field,
    FieldType,
    Freshness,
    LoadRule,
    Monotone,
    NullShare,
    References,
    Severity,
    Silence,
    Unique,
    Volume,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SILENCE = Silence(every=5 * MINUTE)
UNIQUE = Unique(fields=("at", "total"))
PLACES = References(field="meter", source="meters.places", column="meter")
ALL = (
    Volume(minimum=1), Freshness(max_age=MINUTE), NullShare(field="total", maximum=0.1), Monotone(field="total"),
    Distribution(field="total", mean=(0, 1)), SILENCE, UNIQUE, PLACES,
)  # fmt: skip


def contract(*rules: LoadRule) -> Contract:
    fields = (
        Field(name="meter", type=FieldType.STRING),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="total", type=FieldType.FLOAT, nullable=True),
    )
    return Contract(
        name="meters", version="1.0.0", owner="o", fields=fields, entity="meter", time="at", key=("meter", "at"),
        load_rules=rules,
    )  # fmt: skip


def known_meters(rule: References) -> frozenset[str] | None:
    return frozenset(("a", "b")) if rule.source == "meters.places" else None


Row = tuple[str, datetime, float | None]


def table(rows: Sequence[Row]) -> pa.Table:
    meters, times, totals = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table({
        "meter": pa.array(meters, pa.string()), "at": pa.array(times, INSTANT), "total": pa.array(totals, pa.float64())
    })  # fmt: skip


def last_of(rows: Sequence[Row]) -> int:
    return max((to_microseconds(row[1]) for row in rows), default=0)


def broken(rows: Sequence[Row], *rules: LoadRule, history: Sequence[int] = (), parts: int = 1) -> list[Finding]:
    given_contract = contract(*rules)
    meters = sorted({row[0] for row in rows})
    split = [[row for row in rows if meters.index(row[0]) % parts == i] for i in range(parts)]
    whole = merged(profiled(given_contract, table(part), last_of(rows)) for part in split)
    return findings(given_contract, whole, history, to_microseconds(NOW), known_meters)


def naive(rows: Sequence[Row]) -> dict[str, Any]:
    """The same by a loop over each entity's events."""
    last = max(row[1] for row in rows)
    fell, gaps = [], []
    for meter in {row[0] for row in rows}:
        mine = sorted((row for row in rows if row[0] == meter), key=lambda row: row[1])
        known = [row for row in mine if row[2] is not None]
        fell += [(a[2] - b[2], meter) for a, b in pairwise(known) if b[2] < a[2]]
        ends = [*(row[1] for row in mine[1:]), last]
        waited = [((b - row[1]).total_seconds(), meter) for row, b in zip(mine, ends, strict=True)]
        gaps += [(s, m) for s, m in waited if s > SILENCE.every.total_seconds()]
    values = [row[2] for row in rows if row[2] is not None]
    return {
        "rows": len(rows), "newest": to_microseconds(last), "nulls": len(rows) - len(values), "values": values,
        "fell": sorted(fell, reverse=True), "gaps": sorted(gaps, reverse=True),
    }  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 60)), min_size=1, unique=True), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_who_is_expected_is_silent_from_its_last_event_in_the_table_on(events, known_minutes) -> None:
    """Events of the last twenty minutes are the load, those before, and some between, are in the table."""
    start = NOW - 20 * MINUTE
    rows: list[Row] = [(meter, NOW - minutes * MINUTE, None) for meter, minutes in events]
    load = [row for row in rows if row[1] >= start and row[0] != "c"]
    before = [row for row in rows if row not in load]
    if not load:
        return
    rule = Silence(every=5 * MINUTE, known_for=known_minutes * MINUTE)
    first, last = min(row[1] for row in load), max(row[1] for row in load)
    held = [row for row in before if row[1] <= last]
    found = []
    for part in ("ace", "bd"):  # two buckets, of which one may have no row
        mine, theirs = ([row for row in some if row[0] in part] for some in (load, held))
        earlier = Earlier(table(theirs).select(["meter", "at"]), to_microseconds(first))
        found.append(profiled(contract(rule), table(mine), to_microseconds(last), earlier))
    gaps = merged(found).gaps[rule.id]
    expected = []
    for meter in "abcde":
        since = first - known_minutes * MINUTE
        times = sorted((r[1], r in load) for r in [*load, *held] if r[0] == meter and r[1] >= since)
        for (one, _), (other, new) in pairwise([*times, (last, True)] if times else []):
            if new and other - one > rule.every:
                expected.append(((other - one).total_seconds(), meter))
    assert (gaps.count, list(gaps.worst)) == (len(expected), sorted(expected, reverse=True)[:5])


ROWS = st.lists(
    st.tuples(
        st.sampled_from("abcde"),
        st.integers(0, 40).map(lambda minutes: NOW - minutes * MINUTE),
        st.none() | st.integers(-5, 5).map(float) | st.floats(-1e6, 1e6),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda row: row[:2],
)


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_parts_in_any_order_add_up_to_what_a_loop_over_all_rows_finds(rows, random) -> None:
    everything, given_contract = naive(rows), contract(*ALL)
    meters = sorted({row[0] for row in rows})
    places = {meter: random.randrange(3) for meter in meters}
    parts = [[row for row in rows if places[row[0]] == i] for i in range(3)]
    random.shuffle(parts)
    found = merged(profiled(given_contract, table(part), last_of(rows)) for part in parts)
    assert (found.rows, found.newest_us) == (everything["rows"], everything["newest"])
    assert found.nulls == {"total": everything["nulls"]}
    fell, gaps = found.descents["total"], found.gaps[SILENCE.id]
    assert (fell.count, list(fell.worst)) == (len(everything["fell"]), everything["fell"][:5])
    assert (gaps.count, list(gaps.worst)) == (len(everything["gaps"]), everything["gaps"][:5])
    values, moments = everything["values"], found.moments["total"]
    assert moments.count == len(values)
    if values:
        scale = max(map(abs, values)) + 1e-9
        assert math.isclose(moments.mean, statistics.fmean(values), rel_tol=1e-9, abs_tol=1e-9 * scale)
    if len(values) > 1:
        assert math.isclose(moments.std, statistics.stdev(values), rel_tol=1e-6, abs_tol=1e-9 * scale)
    pairs = [row[1:] for row in rows if row[2] is not None]
    assert found.digests[UNIQUE.id].repeated == len(pairs) - len({(at, str(total)) for at, total in pairs})
    assert found.values[PLACES.id].seen == {row[0] for row in rows}
    assert repr(merged([Profile(), found, Profile()])) == repr(found)


def every(minutes: int, count: int, meter: str = "a", total: float | None = 1.0) -> list[Row]:
    return [(meter, NOW - (count - 1 - i) * minutes * MINUTE, total) for i in range(count)]


GOOD = every(1, 10)


@pytest.mark.parametrize(
    ("rule", "rows", "history", "said"),
    [
        (Volume(minimum=11), GOOD, (), "10 rows are fewer than 11"),
        (Volume(maximum=9), GOOD, (), "10 rows are more than 9"),
        (Volume(history=5), GOOD, (100, 1, 100, 100), "10 rows are not between 0.5 and 2 times 100, the median of the "
         "last 4 loads"),
        (Volume(history=3), GOOD, (10, 10, 4, 4, 4), "10 rows are not between 0.5 and 2 times 4, the median of the "
         "last 3 loads"),
        (Freshness(max_age=MINUTE), [("a", NOW - MINUTE - timedelta(microseconds=1), 1.0)], (),
         "the newest event is 0:01:00.000001 old, and at most 0:01:00 is allowed"),
        (Freshness(max_age=MINUTE), [], (), "there is no row, so nothing is fresh"),
        (NullShare(field="total", maximum=0.1), [*every(1, 8), *every(1, 2, "b", None)], (),
         "20.0% of total are null, and at most 10.0% may be"),
        (Distribution(field="total", mean=(2, 3)), GOOD, (), "the mean of total is 1, and must lie between 2 and 3"),
        (Distribution(field="total", std=(1, 3)), GOOD, (), "the std of total is 0, and must lie between 1 and 3"),
        (Monotone(field="total"), [*GOOD, ("a", NOW + MINUTE, None), ("a", NOW + 2 * MINUTE, 0.25)], (),
         "total fell 1 times, by most 0.75 (a)"),
        (SILENCE, [*every(1, 10), ("b", NOW - 6 * MINUTE, 1.0)], (), "1 gaps exceed 0:05:00, the longest 360 s (b)"),
        (Unique(fields=("at", "total")), [*every(1, 4), *every(1, 6, "b"), ("c", NOW, 1.0)], (),
         "5 rows repeat the at, total of another"),
        (PLACES, [*GOOD, ("c", NOW, 1.0), ("x", NOW, 1.0)], (),
         "2 values of meter are not among those of meter of meters.places: 'c', 'x'"),
        (References(field="meter", source="nowhere", column="meter"), GOOD, (),
         "there is no column 'meter' of events of 'nowhere' that meter could refer to"),
        (SILENCE, every(6, 2), (), "1 gaps exceed 0:05:00, the longest 360 s (a)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("severity", [Severity.WARN, Severity.REFUSE])
def test_each_rule_finds_its_fault_and_says_what_was_measured(rule, rows, history, said, severity) -> None:
    rule = rule.model_copy(update={"severity": severity})
    assert broken(rows, rule, history=history, parts=2) == [Finding(rule.id, said, severity is Severity.REFUSE)]


@pytest.mark.parametrize(
    ("rule", "rows", "history"),
    [
        (Volume(minimum=10, maximum=10), GOOD, ()),
        (Volume(history=5), GOOD, (100, 100)),
        (Volume(history=5), GOOD, (5, 20, 20, 5)),
        (Volume(history=5), GOOD, (1_000, 10, 10, 10, 10, 10)),
        (Freshness(max_age=MINUTE), [("a", NOW - MINUTE, 1.0)], ()),
        (NullShare(field="total", maximum=0.2), [*every(1, 8), *every(1, 2, "b", None)], ()),
        (NullShare(field="total", maximum=0.0), [], ()),
        (Distribution(field="total", mean=(1, 1), std=(0, 0)), GOOD, ()),
        (Distribution(field="total", mean=(5, 6), std=(5, 6)), every(1, 3, "a", None), ()),
        (Monotone(field="total"), [("a", NOW, 5.0), ("b", NOW + MINUTE, 1.0), ("a", NOW + MINUTE, 5.0)], ()),
        (Unique(fields=("at", "total")), [*every(1, 3), ("b", NOW, None), ("c", NOW, None), ("d", NOW, 2.0)], ()),
        (PLACES, [*GOOD, *every(1, 2, "b")], ()),
        (SILENCE, [*every(5, 3), ("b", NOW - 5 * MINUTE, 1.0)], ()),
    ],
)
def test_what_lies_on_a_limit_or_cannot_be_judged_breaks_nothing(rule, rows, history) -> None:
    assert broken(rows, rule, history=history, parts=2) == []


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ((NullShare(field="flow", maximum=0),), "null_share names 'flow'"),
        ((Monotone(field="meter"),), "monotone needs a number, and 'meter' is none"),
        ((Distribution(field="at", mean=(0, 1)),), "distribution needs a number"),
        ((Unique(fields=("meter", "flow")),), "unique names 'flow'"),
        ((References(field="flow", source="x", column="y"),), "references names 'flow'"),
        ((Volume(minimum=1), Volume(maximum=2)), "has a load rule twice"),
    ],
)
def test_a_load_rule_that_does_not_fit_its_contract_is_refused(rules, reason) -> None:
    with pytest.raises(ValidationError, match=reason):
        contract(*rules)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Volume(), "needs a minimum, a maximum or a history"),
        (lambda: Volume(minimum=2, maximum=1), "exceeds maximum"),
        (lambda: Volume(history=3, ratio=(2, 1)), "the lower one first"),
        (lambda: Volume(history=2), "greater than or equal to 3"),
        (lambda: Distribution(field="x"), "needs bounds"),
        (lambda: Distribution(field="x", std=(2, 1)), "lower bound first"),
        (lambda: Freshness(max_age=timedelta(0)), "greater than 0"),
        (lambda: Volume(minimum=1, severity="reject"), "warn"),
    ],
)
def test_a_load_rule_that_says_nothing_is_refused(make, reason) -> None:
    with pytest.raises(ValidationError, match=reason):
        make()


def test_large_whole_numbers_fall_by_one() -> None:
    numbers = Contract(
        name="meters", version="1.0.0", owner="o", entity="meter", time="at", key=("meter", "at"),
        fields=(
            Field(name="meter", type=FieldType.STRING),
            Field(name="at", type=FieldType.TIMESTAMP),
            Field(name="total", type=FieldType.INTEGER, nullable=True),
        ),
        load_rules=(Monotone(field="total"),),
    )  # fmt: skip
    rows = table([("a", NOW, 0.0), ("a", NOW + MINUTE, 0.0), ("a", NOW + 2 * MINUTE, 0.0)])
    rows = rows.set_column(2, "total", pa.array([2**53 + 1, None, 2**53]))
    assert profiled(numbers, rows, 0).descents["total"].count == 1
