"""Drift is judged series by series around the season: real weather seldom alarms, one broken sensor is named."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import samples, usecases
from pipelines.monitoring.drift import Drift, Rows, SeriesDrift, judge_drift
from pipelines.spec import DriftRule
from pipelines.spec.base import DAY_US

RULE = DriftRule(columns=("temperature", "inflow"))
ZONE = "Europe/Rome"


@lru_cache(maxsize=1)
def real() -> Rows:
    """Hourly weather and inflow of four real districts, 2021-01 to 2023-03."""
    case = usecases.load("aqua")
    table = samples.rows(case)
    four = pa.array([f"dma_{number}" for number in (1, 2, 6, 7)])
    table = table.filter(pc.is_in(table.column("district"), four))
    return Rows(
        pc.cast(table.column("time"), pa.int64()).to_numpy(),
        np.array(table.column("district").to_pylist(), dtype=object),
        {name: pc.fill_null(table.column(name), np.nan).to_numpy() for name in RULE.columns},
    )


def end() -> int:
    return int(real().time_us.max())


def before(moment: int, only: str | None = None) -> Rows:
    rows = real()
    keep = (rows.time_us < moment) & ((rows.entity == only) if only else True)
    return Rows(rows.time_us[keep], rows.entity[keep], {name: values[keep] for name, values in rows.columns.items()})


def broken(entity: str, column: str, change: float) -> Rows:
    rows = real()
    values = rows.columns[column].copy()
    values[rows.entity == entity] += change
    return Rows(rows.time_us, rows.entity, {**rows.columns, column: values})


def judge(window: Rows, *, now_us: int, trained_to: int, rule: DriftRule = RULE, only: str | None = None) -> Drift:
    return judge_drift(rule, before(trained_to, only), window, now_us=now_us, zone=ZONE)


def test_real_seasons_seldom_alarm() -> None:
    """Twelve fortnights of the last half year, each against what a model trained two weeks before it had seen."""
    rule, rows = DriftRule(columns=("temperature",), by_entity=False), real()
    one = rows.entity == "dma_1"  # the districts share their weather
    window = Rows(rows.time_us[one], rows.entity[one], {"temperature": rows.columns["temperature"][one]})
    found = [
        judge(window, now_us=end() - k * 14 * DAY_US, trained_to=end() - (k + 2) * 14 * DAY_US, rule=rule, only="dma_1")
        for k in range(12)
    ]
    assert all(drift.finding != "inconclusive" for drift in found)
    assert sum(drift.finding == "drifted" for drift in found) <= 1
    swing = [abs(one.effect) for drift in found for one in drift.series]
    assert max(swing) > RULE.effect  # and not because nothing moved


def test_one_biased_sensor_of_many_is_found_and_named() -> None:
    trained = end() - 28 * DAY_US
    assert judge(real(), now_us=end(), trained_to=trained).finding == "holds"
    rows = real()
    bias = 4 * float(np.nanstd(rows.columns["inflow"][rows.entity == "dma_6"]))
    found = judge(broken("dma_6", "inflow", -bias), now_us=end(), trained_to=trained)
    assert found.finding == "drifted"
    assert [(one.column, one.entity) for one in found.drifted] == [("inflow", "dma_6")]
    assert found.drifted[0].effect < -2
    assert found.drifted[0].p_value < RULE.alpha / 8


def test_values_that_stop_coming_are_drift() -> None:
    rows = real()
    values = rows.columns["inflow"].copy()
    values[(rows.entity == "dma_2") & (rows.time_us > end() - 7 * DAY_US)] = np.nan
    gone = Rows(rows.time_us, rows.entity, {**rows.columns, "inflow": values})
    found = judge(gone, now_us=end(), trained_to=end() - 28 * DAY_US)
    assert [(one.column, one.entity) for one in found.drifted] == [("inflow", "dma_2")]
    assert "missing" in found.drifted[0].reason


def waves(days: int, shift: float = 0.0, since: int = 10**9, seed: int = 0, entities: int = 1) -> Rows:
    """Hourly values with a daily and weekly season and weather that lasts for days; ``shift`` from day ``since`` on."""
    rng = np.random.default_rng(seed)
    hour = np.tile(np.arange(24 * days), entities)
    who = np.repeat([f"s{number}" for number in range(entities)], 24 * days).astype(object)
    weather = np.concatenate([np.convolve(rng.normal(size=24 * days + 71), np.ones(72) / 8.5, "valid")] * entities)
    value = 5 * np.sin(2 * np.pi * hour / 24) + 2 * np.sin(2 * np.pi * hour / 168) + weather
    value = value + np.where(hour >= 24 * since, shift, 0.0) + 0.1 * rng.normal(size=len(hour))
    return Rows(hour.astype(np.int64) * 3_600_000_000, who, {"x": value})


def only(drift: Drift, entity: str | None = "s0") -> SeriesDrift:
    (found,) = (one for one in drift.series if one.entity == entity)
    return found


def test_a_shift_is_measured_in_deviations_with_its_sign() -> None:
    rule = DriftRule(columns=("x",), days=7)
    quiet, moved = waves(200), waves(200, shift=-4.0, since=193)
    past = Rows(*(part[: 24 * 190] for part in (quiet.time_us, quiet.entity)), {"x": quiet.columns["x"][: 24 * 190]})
    assert judge_drift(rule, past, quiet, now_us=200 * DAY_US).finding == "holds"
    found = judge_drift(rule, past, moved, now_us=200 * DAY_US)
    assert found.finding == "drifted"
    assert -6 < only(found).effect < -2.5
    assert only(found).usual < 1.2


def shifted(entities: int, count: int, shift: float) -> Rows:
    """``entities`` series of which ``count`` shift in the last week of 200 days."""
    rows = waves(200, entities=entities)
    late = (rows.time_us >= 193 * DAY_US) & np.isin(rows.entity, [f"s{number}" for number in range(count)])
    return Rows(rows.time_us, rows.entity, {"x": rows.columns["x"] + np.where(late, shift, 0.0)})


def test_one_series_of_many_must_stand_out_more_than_one_alone_and_many_together_need_not() -> None:
    """The same shift, whose p-value is just below alpha: among twelve series such a one comes by chance."""

    def found(entities: int, count: int, alpha: float) -> Drift:
        rule = DriftRule(columns=("x",), days=7, alpha=alpha)
        rows = shifted(entities, count, 2.0)
        return judge_drift(rule, rows, rows, now_us=200 * DAY_US)

    series = only(found(1, 1, 0.5))
    assert abs(series.effect) >= RULE.effect
    alpha = 1.2 * series.p_value
    assert found(1, 1, alpha).finding == "drifted"
    among = found(12, 1, alpha)
    assert only(among).p_value < alpha
    assert among.finding == "holds"
    together = found(12, 12, alpha)
    assert min(one.p_value for one in together.series) > alpha / 12
    assert len(together.drifted) == 12


def test_a_reference_that_reaches_into_the_window_does_not_hide_the_shift() -> None:
    rule = DriftRule(columns=("x",), days=7)
    moved = waves(200, shift=4.0, since=193)
    past = Rows(*(part[: 24 * 193] for part in (moved.time_us, moved.entity)), {"x": moved.columns["x"][: 24 * 193]})
    found = judge_drift(rule, moved, moved, now_us=200 * DAY_US)
    assert found.finding == "drifted"
    assert found == judge_drift(rule, past, moved, now_us=200 * DAY_US)


def test_many_who_ask_in_one_hour_weigh_no_more_than_one() -> None:
    rule = DriftRule(columns=("x",), days=7)
    rows = waves(200)
    repeated = np.where(np.arange(len(rows)) % 24 == 12, 50, 1)
    busy = Rows(
        *(np.repeat(part, repeated) for part in (rows.time_us, rows.entity)),
        {"x": np.repeat(rows.columns["x"], repeated)},
    )
    past = Rows(rows.time_us[: 24 * 190], rows.entity[: 24 * 190], {"x": rows.columns["x"][: 24 * 190]})
    one, many = (judge_drift(rule, past, window, now_us=200 * DAY_US) for window in (rows, busy))
    assert only(one).effect == only(many).effect


def test_little_evidence_is_inconclusive() -> None:
    rows = waves(200)
    short = judge_drift(DriftRule(columns=("x",)), waves(60), rows, now_us=200 * DAY_US)
    assert short.finding == "inconclusive"
    assert "past windows" in only(short).reason
    silent = judge_drift(DriftRule(columns=("x",)), rows, rows, now_us=230 * DAY_US)
    assert silent.finding == "inconclusive"
    assert "0 values in the window" in only(silent).reason
    assert math.isnan(only(silent).effect)
    nothing = Rows(rows.time_us[:0], rows.entity[:0], {"x": rows.columns["x"][:0]})
    assert judge_drift(DriftRule(columns=("x",)), nothing, rows, now_us=200 * DAY_US).finding == "inconclusive"
    pooled = judge_drift(DriftRule(columns=("x",), by_entity=False), rows, rows, now_us=200 * DAY_US)
    assert only(pooled, None).entity is None


@pytest.mark.parametrize("days", [3, 7])
def test_a_constant_series_does_not_divide_by_nothing(days: int) -> None:
    rows = waves(200)
    flat = Rows(rows.time_us, rows.entity, {"x": np.full(len(rows), 3.0)})
    assert judge_drift(DriftRule(columns=("x",), days=days), flat, flat, now_us=200 * DAY_US).finding == "holds"
