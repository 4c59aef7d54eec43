"""A gate passes on evidence only: not by chance, not by silence, not for want of data."""

from __future__ import annotations

import json
import math
from datetime import timedelta

import numpy as np
import pytest

from pipelines.spec import Gate
from pipelines.validation.gates import GateResult, judge_gate
from pipelines.validation.metrics import accuracy, accuracy_by
from pipelines.validation.report import Report

HOUR = 3_600_000_000
WEEK = 7 * 24


def rows(weeks: int, error: float, seed: int = 0, baseline_error: float = 1.0) -> dict[str, np.ndarray]:
    """Hourly outcomes around 100 with answers and a baseline that err by so much on average."""
    rng = np.random.default_rng(seed)
    n = weeks * WEEK
    actual = 100 + rng.normal(size=n)
    return {
        "time_us": np.arange(n, dtype=np.int64) * HOUR,
        "actual": actual,
        "predicted": actual + error * rng.standard_exponential(n),
        "baseline": actual + baseline_error * rng.standard_exponential(n),
    }


def judge(data: dict[str, np.ndarray], **options: object) -> GateResult:
    gate = Gate(**{"name": "gate", "metric": "mae", "baseline": "column", "resamples": 200, **options})
    return judge_gate(gate, **data)


def test_a_clearly_better_model_passes_and_a_clearly_worse_one_does_not() -> None:
    better, worse = judge(rows(8, 0.5)), judge(rows(8, 1.5))
    assert better.passed
    assert better.upper < 0.6
    assert better.blocks == 8
    assert not worse.passed
    assert "above 1" in worse.reason


def test_the_limit_is_on_the_upper_end_and_not_on_the_estimate() -> None:
    result = judge(rows(8, 0.97, seed=3))
    assert result.ratio < 1 < result.upper
    assert not result.passed


def test_a_model_as_good_as_the_baseline_passes_by_chance_only_rarely() -> None:
    passed = sum(judge(rows(8, 1.0, seed=seed)).passed for seed in range(300))
    assert passed / 300 <= 0.08


def test_a_stricter_limit_is_kept() -> None:
    assert judge(rows(8, 0.8), max_ratio=0.9).passed
    assert not judge(rows(8, 0.8), max_ratio=0.75).passed


def test_two_blocks_are_inconclusive_however_good_the_model() -> None:
    result = judge(rows(2, 0.01), block=timedelta(days=7))
    assert not result.passed
    assert result.reason.startswith("inconclusive")
    assert "2 blocks" in result.reason
    assert math.isnan(result.ratio)
    assert judge(rows(2, 0.01), block=timedelta(days=1)).passed


def test_silence_on_a_hard_row_fails_the_gate() -> None:
    data = rows(8, 0.1)
    data["predicted"][17] = np.nan
    result = judge(data)
    assert not result.passed
    assert "no finite answer on 1 of" in result.reason


def test_rows_without_a_baseline_are_left_out_of_both_sides_and_counted() -> None:
    data = rows(8, 0.5)
    whole = judge(data)
    data["baseline"][:100] = np.nan
    data["predicted"][:100] = 1e9
    part = judge(data)
    assert (part.left_out, part.rows) == (100, whole.rows - 100)
    assert part.passed
    assert part.model_metric == pytest.approx(whole.model_metric, rel=0.1)


def test_no_rows_at_all_are_inconclusive() -> None:
    data = {name: values[:0] for name, values in rows(8, 0.5).items()}
    assert judge(data).reason.startswith("inconclusive")


def test_a_relative_metric_of_a_zero_outcome_is_inconclusive() -> None:
    data = rows(8, 0.5)
    data["actual"][3] = 0.0
    assert "undefined on 1 rows" in judge(data, metric="mape").reason
    assert judge(data, metric="mae").passed


def test_a_perfect_baseline_is_inconclusive_and_no_division_by_zero() -> None:
    data = rows(8, 0.5)
    data["baseline"] = data["actual"].copy()
    assert "no error at all" in judge(data).reason


def test_rmse_is_compared_as_rmse() -> None:
    data = rows(8, 0.5)
    result = judge(data, metric="rmse")
    error, base = data["predicted"] - data["actual"], data["baseline"] - data["actual"]
    wanted = np.sqrt(np.mean(error**2) / np.mean(base**2))
    assert result.ratio == pytest.approx(wanted)
    assert result.model_metric / result.baseline_metric == pytest.approx(wanted)
    assert result.lower <= result.ratio <= result.upper


def report(gates: tuple[GateResult, ...]) -> Report:
    actual = np.array([10.0, 10.0, 20.0, 20.0])
    value = np.array([11.0, 9.0, 20.0, 30.0])
    figures = (actual, value, value - 2, value + 2)
    return Report(accuracy(*figures), accuracy_by(["a", "a", "b", "b"], *figures), gates, 0.9)


def test_accuracy_shows_the_entity_that_the_average_hides() -> None:
    found = report((judge(rows(8, 0.5)),))
    assert found.test.mae == pytest.approx(3.0)
    assert found.test.bias == pytest.approx(2.5)
    assert found.test.coverage == 0.75
    assert found.by_entity["a"].coverage == 1.0
    assert found.by_entity["b"].coverage == 0.5
    assert "lowest coverage: b 50.0%" in found.text()


def test_a_report_passes_only_when_every_one_of_its_gates_did() -> None:
    good, bad = judge(rows(8, 0.5)), judge(rows(2, 0.5))
    assert report((good,)).passed
    assert not report((good, bad)).passed
    assert not report(()).passed
    assert "not passed" in report(()).text()


def test_a_report_is_valid_json_even_where_a_figure_could_not_be_taken() -> None:
    document = json.loads(json.dumps(report((judge(rows(2, 0.5)),)).to_json(), allow_nan=False))
    assert document["gates"][0]["ratio"] is None
    assert document["passed"] is False
