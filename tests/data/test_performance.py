"""The champion's error by day, and the verdict of decay: on evidence only, and seldom without cause."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from pipelines.contracts.events import INSTANT
from pipelines.features.served import OUTCOME_SCHEMA, SERVED_SCHEMA
from pipelines.monitoring.performance import (
    DAY_US,
    Answers,
    Decay,
    Reference,
    champion_answers,
    judge_decay,
)
from pipelines.spec import DecayRule

HOUR_US = 3_600_000_000
RULE = DecayRule(days=14, min_days=7, outcomes=100, resamples=300)
NOW = 1000 * DAY_US + 26 * HOUR_US  # with a horizon of a day and an hour's grace, day 999 is the last complete one
PROMISED = Reference(1.0, {"a": 1.0, "b": 4.0})


def served(*rows: dict[str, object]) -> pa.Table:
    usual = {**dict.fromkeys(SERVED_SCHEMA.names), "variant": "champion", "model_version": "3", "entity": "a"}
    columns = {name: [{**usual, **row}[name] for row in rows] for name in SERVED_SCHEMA.names}
    columns["_time"] = pa.array(columns["_time"], pa.int64()).cast(INSTANT)
    return pa.table(columns, schema=SERVED_SCHEMA)


def reported(*rows: tuple[str, float | None, int]) -> pa.Table:
    ids, values, at = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {"prediction_id": list(ids), "value": list(values), "at": pa.array(at, pa.int64()).cast(INSTANT)},
        schema=OUTCOME_SCHEMA,
    )


def answers(errors: np.ndarray, *, last_day: int = 999, per_day: int = 24, entity: object = "a") -> Answers:
    """Hourly answers of which the last lies on ``last_day``, each with its absolute error."""
    n = len(errors)
    time = (last_day + 1) * DAY_US + (np.arange(n) - n) * (DAY_US // per_day)
    entities = np.array([entity] * n, dtype=object) if isinstance(entity, str) else entity
    versions = np.array(["3"] * n, dtype=object)
    actual = np.full(n, 10.0)
    return Answers(time, entities, versions, actual + errors, actual - 1, actual + 1, actual)


def judge(given: Answers, rule: DecayRule = RULE, now_us: int = NOW, version: str = "3") -> Decay:
    return judge_decay(rule, given, version=version, reference=PROMISED, horizon_us=DAY_US, now_us=now_us)


def errors(days: int, mean: float, seed: int = 0) -> np.ndarray:
    """Hourly absolute errors whose level wanders from day to day, as real ones do."""
    rng = np.random.default_rng(seed)
    level, levels = 0.0, []
    for _ in range(days):
        level = 0.7 * level + 0.1 * rng.normal()
        levels.append(math.exp(level - 0.01))
    return mean * np.repeat(levels, 24) * rng.exponential(size=24 * days)


def test_answers_meet_their_latest_outcome_and_only_the_champions_count() -> None:
    day = 5 * DAY_US
    predictions = served(
        {"prediction_id": "late", "_time": day + 9, "value": 3.0, "lower": 2.0, "upper": 4.0},
        {"prediction_id": "early", "_time": day, "value": 1.0, "lower": 0.0, "upper": 2.0},
        {"prediction_id": "early", "_time": day, "value": 1.0, "lower": 0.0, "upper": 2.0},
        {"prediction_id": "tried", "_time": day, "value": 99.0, "variant": "challenger", "model_version": "4"},
        {"prediction_id": "silent", "_time": day + 1, "value": None},
        {"prediction_id": "open", "_time": day + 2, "value": 7.0},
    )
    outcomes = reported(
        ("early", 5.0, day), ("early", 1.5, day + 3), ("early", 77.0, day + 100), ("tried", 1.0, day),
        ("late", 7.0, day + 20), ("silent", 1.0, day), ("nobody", 1.0, day),
    )  # fmt: skip
    found = champion_answers(predictions, outcomes, now_us=day + 50)
    assert found.time_us.tolist() == [day, day + 1, day + 2, day + 9]
    assert found.actual[[0, 1, 3]].tolist() == [1.5, 1.0, 7.0]
    assert found.matured.tolist() == [True, False, False, True]


def test_errors_well_above_the_promise_are_decay_with_their_numbers() -> None:
    found = judge(answers(errors(30, 1.6)))
    assert found.finding == "decayed"
    assert found.lower > RULE.ratio
    assert found.ratio == pytest.approx(found.error / found.promised)
    assert 1.3 < found.ratio < 1.9
    assert (found.days, found.first_day, found.last_day, found.answers) == (14, 986, 999, 14 * 24)


def test_errors_as_promised_hold_however_often_one_looks() -> None:
    """A whole year looked at every day, ten times over."""
    alarms = 0
    for seed in range(10):
        year = answers(errors(365, 1.0, seed), last_day=1364)
        alarms += any(judge(year, now_us=NOW + day * DAY_US).finding == "decayed" for day in range(15, 365, 3))
    assert alarms == 0


def test_a_slightly_larger_error_within_the_limit_holds() -> None:
    found = judge(answers(errors(14, 1.1, seed=1)))
    assert found.finding == "holds"
    assert found.lower <= RULE.ratio


def test_a_change_in_who_asks_is_no_decay() -> None:
    who = np.array(["a"] * (24 * 16) + ["b"] * (24 * 14), dtype=object)
    sizes = np.concatenate([errors(16, 1.0), errors(14, 4.0, seed=2)])  # b was promised 4, and keeps to it
    found = judge(answers(sizes, entity=who))
    assert found.error > 3
    assert found.finding == "holds"


@pytest.mark.parametrize(
    ("given", "rule", "said"),
    [
        (answers(errors(3, 9.0)), RULE, "on 3 of the last 14"),
        (answers(errors(14, 9.0)), DecayRule(outcomes=500), "336 matured answers"),
        (answers(errors(14, 9.0), last_day=980), RULE, "0 matured answers"),
    ],
)
def test_little_evidence_is_inconclusive_however_bad_it_looks(given: Answers, rule: DecayRule, said: str) -> None:
    found = judge(given, rule)
    assert found.finding == "inconclusive"
    assert said in found.reason
    assert math.isnan(found.ratio)


def test_outcomes_for_a_part_of_the_answers_do_not_stand_for_the_rest() -> None:
    given = answers(errors(14, 9.0))
    given.actual[np.arange(len(given)) % 3 > 0] = np.nan
    found = judge(given)
    assert found.finding == "inconclusive"
    assert "112 of 336" in found.reason


def test_another_versions_answers_and_unfinished_days_are_not_this_ones() -> None:
    given = answers(np.concatenate([errors(14, 1.0), errors(3, 50.0)]), last_day=1002)
    given.version[: 24 * 5] = "2"
    found = judge(given)
    assert found.finding == "holds"  # the days after 999 are not complete yet
    assert found.answers == 9 * 24
    assert judge(given, version="4").finding == "inconclusive"


def test_a_promise_that_cannot_be_kept_to_is_inconclusive() -> None:
    given = answers(errors(14, 9.0))
    nothing = Reference(math.nan, {})
    found = judge_decay(RULE, given, version="3", reference=nothing, horizon_us=DAY_US, now_us=NOW)
    assert found.finding == "inconclusive"
    assert judge(given, DecayRule(grace=timedelta(days=1), outcomes=100)).last_day == 998
