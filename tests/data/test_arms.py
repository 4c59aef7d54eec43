"""The arms of an A/B test against a naive count, and the confidence sequences that compare them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.features.served import OUTCOME_SCHEMA
from pipelines.spec import ABTest, Assignment, Goal, Measure, Variant
from pipelines.statistics.asymptotic import Sample, difference
from pipelines.validation.arms import summarise

TEST = ABTest(variants=(Variant(version="2", share=0.3), Variant(version="3", share=0.3)))


def changed(**changes: object) -> ABTest:
    return ABTest.model_validate({**TEST.model_dump(), **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"variants": []}, "at least 1 item"),
        ({"variants": [{"version": "2", "share": 0.3}, {"version": "2", "share": 0.3}]}, "each version is one variant"),
        ({"variants": [{"version": "2", "share": 0.5}, {"version": "3", "share": 0.5}]}, "less than a hundredth"),
        ({"goal": "higher"}, "a higher loss is no goal"),
        ({"time": "P9D", "patience": "P9D"}, "can show nothing"),
        ({"variants": [{"version": "0", "share": 0.3}]}, "should match pattern"),
        ({"shares": 3}, "Extra inputs are not permitted"),
    ],
)
def test_a_test_that_can_tell_nothing_is_refused(changes, told) -> None:
    with pytest.raises(ValidationError, match=told):
        changed(**changes)


def test_the_champion_has_what_the_variants_leave_and_each_comparison_its_part_of_the_error() -> None:
    assert TEST.champion_share == pytest.approx(0.4)
    assert TEST.versions == ("2", "3")
    assert TEST.alpha == pytest.approx(0.025)


numbers = st.sampled_from([0.0, 1.0, 2.5, -3.0, 100.0, 1e101, math.nan, math.inf, None])
rows = st.lists(
    st.tuples(
        st.sampled_from(["p1", "p2", "p3", "p4", "p5", "p6"]),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["1", "2", "3", None]),
        numbers,
    ),
    max_size=6,
    unique_by=lambda row: row[0],
)
reports = st.lists(
    st.tuples(st.sampled_from(["p1", "p2", "p3", "p4", "p5", "p6", "other"]), numbers, st.integers(0, 9)), max_size=12
)


def naive(logged, outcomes, test: ABTest) -> dict[str, tuple[int, int, float]]:
    """Predictions, units and the mean of units of each arm, one row at a time."""
    first = {name: value for name, value, _ in sorted(outcomes, key=lambda row: -row[2])}
    units = defaultdict(lambda: defaultdict(list))
    for name, unit, assigned, answer in logged:
        if assigned is None or name not in first or first[name] is None:
            continue
        value = first[name]
        if test.measure is Measure.LOSS:
            value = math.nan if answer is None else abs(answer - value)
        if abs(value) <= 1e100:
            units[assigned][unit].append(value)
    return {
        version: (
            sum(map(len, held.values())),
            len(held),
            statistics.fmean(statistics.fmean(values) for values in held.values()),
        )
        for version, held in units.items()
    }


@given(rows, reports, st.sampled_from(Measure))
@settings(max_examples=300, deadline=None)
def test_arms_are_what_counting_row_by_row_makes_of_them(logged, outcomes, measure) -> None:
    outcomes = [(name, value, 10 * at + place) for place, (name, value, at) in enumerate(outcomes)]
    test = changed(measure=measure)
    names = ("prediction_id", "unit", "assigned", "value")
    table = pa.table(
        {
            name: pa.array([row[place] for row in logged], pa.float64() if name == "value" else pa.string())
            for place, name in enumerate(names)
        }
    )
    columns = [[row[place] for row in outcomes] for place in range(3)]
    known = pa.table(dict(zip(OUTCOME_SCHEMA.names, columns, strict=True)), OUTCOME_SCHEMA)
    found = summarise(table, known, test)
    assert [arm.version for arm in found] == sorted(arm.version for arm in found)
    wanted = naive(logged, outcomes, test)
    assert {arm.version: (arm.predictions, arm.sample.units) for arm in found} == {
        version: given[:2] for version, given in wanted.items()
    }
    for arm in found:
        assert arm.sample.mean == pytest.approx(wanted[arm.version][2])


def test_the_variance_is_that_between_units_and_not_of_their_predictions() -> None:
    table = pa.table(
        {
            "prediction_id": ["a1", "a2", "b1"],
            "unit": ["a", "a", "b"],
            "assigned": ["2", "2", "2"],
            "value": [0.0, 0.0, 0.0],
        }
    )
    known = pa.table({"prediction_id": ["a1", "a2", "b1"], "value": [1.0, 3.0, 6.0], "at": [1, 1, 1]}, OUTCOME_SCHEMA)
    (arm,) = summarise(table, known, TEST)
    assert (arm.predictions, arm.sample) == (3, Sample(2, 4.0, 8.0))


def test_the_half_width_is_that_of_the_formula() -> None:
    rate = (-2 * math.log(0.05) + math.log(1 - 2 * math.log(0.05))) / 1000
    spread, grown = 9 / 300 + 9 / 100, 400 * rate + 1
    wanted = math.sqrt(spread) * math.sqrt(2 * grown / (400 * rate) * math.log(math.sqrt(grown) / 0.05))
    found, half = difference(Sample(300, 5.0, 4.0), Sample(100, 3.0, 9.0), 0.05, 1000)
    assert (found, half) == (2.0, pytest.approx(wanted, rel=1e-12))
    assert difference(Sample(1, 5.0, 0.0), Sample(100, 3.0, 9.0), 0.05, 1000) == (2.0, math.inf)
    with pytest.raises(ValueError, match="alpha must lie between"):
        difference(Sample(9, 5.0, 1.0), Sample(9, 3.0, 9.0), 1.0, 1000)


@pytest.mark.parametrize("draw", ["normal", "skewed", "rare"])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_an_interval_that_is_looked_at_after_every_unit_seldom_ever_misses(draw, share) -> None:
    """From a hundred units of the smaller arm on, at 5 %: of 1,000 runs of 10,000 units at most 5 % and four standard
    errors miss.
    """
    rng = np.random.default_rng(7)
    runs, units, first, missed = 1_000, 10_000, round(100 / share), 0
    for _ in range(runs):
        values = {
            "normal": rng.normal(size=units),
            "skewed": rng.lognormal(sigma=1.0, size=units),
            "rare": (rng.random(units) < 0.1).astype(float),
        }[draw]
        treated = rng.random(units) < share
        looks = np.arange(first, units)
        sides = []
        for here in (treated, ~treated):
            count = np.cumsum(here)[looks]
            mean = np.cumsum(values * here)[looks] / count
            square = np.cumsum(values**2 * here)[looks] / count
            sides.append((count, mean, (square - mean**2) * count / (count - 1)))
        worst = np.argmax(np.abs(sides[0][1] - sides[1][1]) / np.sqrt(sum(s[2] / s[0] for s in sides)))
        for look in {int(worst), len(looks) - 1}:
            one, other = (Sample(int(c[look]), float(m[look]), float(v[look])) for c, m, v in sides)
            found, half = difference(one, other, 0.05, 2_000)
            if abs(found) > half:
                missed += 1
                break
    assert missed / runs <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)
    assert missed < runs


@pytest.mark.parametrize("rate", [0.001, 0.01])
def test_what_is_so_rare_that_a_small_arm_has_not_seen_it_yet_makes_no_winner(rate) -> None:
    """At a share of a twentieth, from a thousand units of it on: of 200 runs of 60,000 units, a look every 2 %."""
    rng, missed = np.random.default_rng(11), 0
    for _ in range(200):
        values, treated = (rng.random(60_000) < rate).astype(float), rng.random(60_000) < 0.05
        for look in np.geomspace(20_000, 60_000, 56).astype(int):
            one, other = (values[:look][side[:look]] for side in (treated, ~treated))
            samples = [Sample(len(v), float(v.mean()), float(v.var(ddof=1))) for v in (one, other)]
            found, half = difference(*samples, 0.05, 2_000)
            if abs(found) > half:
                missed += 1
                break
    assert missed / 200 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


def test_a_difference_of_a_fifth_of_the_spread_is_seen_where_the_test_was_planned() -> None:
    seen = [difference(Sample(n, 0.2, 1.0), Sample(n, 0.0, 1.0), 0.05, 2_000) for n in (100, 1_000)]
    assert [abs(found) > half for found, half in seen] == [False, True]


def test_goals_and_units_have_the_names_that_a_definition_in_json_uses() -> None:
    given = {
        "variants": [{"version": "2", "share": 0.5}],
        "unit": "instance",
        "measure": "outcome",
        "goal": "higher",
        "time": "P1D",
    }
    test = ABTest.model_validate(given)
    assert (test.unit, test.measure, test.goal) == (Assignment.INSTANCE, Measure.OUTCOME, Goal.HIGHER)
