"""The folds: what each computes, of nothing, of one value, of parts; and that they stay right where sums fail."""

from __future__ import annotations

import math
from statistics import fmean, linear_regression, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from pipelines.features.kernels import decay, distinct, families, latest, moments, trend
from pipelines.features.kernels.layout import EMPTY
from pipelines.spec import Fold
from tests.data import oracle

SECOND = 1_000_000
HALF_LIFE = 7 * SECOND
MOMENTS, TREND = moments.NOTHING, trend.NOTHING
DECAY = decay.Decay(0.0, 0.0, HALF_LIFE, EMPTY)
DISTINCT = np.array([EMPTY, *[0] * (distinct.WIDTH - 1)])
FOLDS = {
    Fold.COUNT: (MOMENTS, moments.C_COUNT),
    Fold.SUM: (MOMENTS, moments.C_SUM),
    Fold.MEAN: (MOMENTS, moments.C_MEAN),
    Fold.MIN: (MOMENTS, moments.C_MIN),
    Fold.MAX: (MOMENTS, moments.C_MAX),
    Fold.STD: (MOMENTS, moments.C_STD),
    Fold.FIRST: (MOMENTS, moments.C_FIRST),
    Fold.LAST: (MOMENTS, moments.C_LAST),
    Fold.DELTA: (MOMENTS, moments.C_DELTA),
    Fold.MISSING: (MOMENTS, moments.C_MISSING),
    Fold.SINCE: (MOMENTS, moments.C_SINCE),
    Fold.SLOPE: (TREND, trend.C_SLOPE),
    Fold.EWM: (DECAY, decay.C_EWM),
    Fold.DISTINCT: (DISTINCT, distinct.C_DISTINCT),
}
VALUES = st.one_of(st.floats(-1e12, 1e12, allow_nan=False), st.just(math.nan), st.sampled_from([0.0, -0.0, 1.0]))
NUMBERS = st.lists(VALUES, max_size=30)


@njit
def compiled(like, code, left, right, step, now):  # the fold of left, followed by that of right
    a, b, words = families.empty(like), families.empty(like), np.zeros(80, np.int64)
    for i in range(left.shape[0]):
        a = families.update(a, left[i], i * step)
    for i in range(right.shape[0]):
        b = families.update(b, right[i], (left.shape[0] + i) * step)
    families.store(families.merge(a, b), words, words.view(np.float64), 3)  # as through a stored tile
    whole = families.load(like, words, words.view(np.float64), 3)
    return families.finish(code, whole, now), families.newest(whole)


@njit
def halved(times):
    return decay.halved(times)


def value(fold: Fold, left: list[float], right: list[float] = [], step: int = SECOND) -> float:  # noqa: B006
    like, code = FOLDS[fold]
    now = (len(left) + len(right)) * step
    return compiled(like, code, np.array(left, np.float64), np.array(right, np.float64), step, now)[0]


def plain(left: list[float], right: list[float], step: int) -> oracle.Part:
    parts = [oracle.Part(HALF_LIFE), oracle.Part(HALF_LIFE)]
    for time, number in enumerate([*left, *right]):
        parts[time >= len(left)].update(number, time * step)
    return oracle.merge(*parts)


@given(NUMBERS, NUMBERS, st.sampled_from([0, 1, SECOND, 3600 * SECOND, 10**15]))
@settings(max_examples=200, deadline=None)
def test_compiled_folds_equal_plain_python_to_the_last_bit(left: list[float], right: list[float], step: int) -> None:
    part, now = plain(left, right, step), (len(left) + len(right)) * step
    for fold, (like, code) in FOLDS.items():
        got, newest = compiled(like, code, np.array(left), np.array(right), step, now)
        expected = oracle.finish(fold, part, now)
        assert np.float64(got).tobytes() == np.float64(expected).tobytes() or (math.isnan(got) and math.isnan(expected))
        assert newest == (EMPTY if part.newest is None else part.newest)


@given(NUMBERS)
@settings(max_examples=100, deadline=None)
def test_nothing_is_the_identity_of_merge(values: list[float]) -> None:
    for fold in FOLDS:
        assert np.array_equal(value(fold, values, []), value(fold, [], values), equal_nan=True)


def test_finished_values_are_what_their_names_say() -> None:
    values, step = [3.0, -1.5, math.nan, 7.25, 2.0, 2.0], SECOND // 4
    given = [v for v in values if not math.isnan(v)]
    times = [0.0, 0.25, 0.75, 1.0, 1.25]
    weights = [2.0 ** (-(1.25 - t) / 7) for t in times]
    expected = {
        Fold.COUNT: 5.0,
        Fold.SUM: 12.75,
        Fold.MEAN: fmean(given),
        Fold.MIN: -1.5,
        Fold.MAX: 7.25,
        Fold.STD: stdev(given),
        Fold.FIRST: 3.0,
        Fold.LAST: 2.0,
        Fold.DELTA: -1.0,
        Fold.MISSING: 1 / 6,
        Fold.SINCE: 0.25,
        Fold.SLOPE: linear_regression(times, given).slope,
        Fold.EWM: sum(w * v for w, v in zip(weights, given, strict=True)) / sum(weights),
        Fold.DISTINCT: 4.0,
    }
    for split in range(len(values) + 1):
        got = {fold: value(fold, values[:split], values[split:], step) for fold in Fold}
        assert got == pytest.approx(expected, rel=1e-14)


def test_of_nothing_counts_and_sums_are_zero_and_the_rest_missing() -> None:
    got = {fold: value(fold, []) for fold in Fold}
    assert [got.pop(fold) for fold in (Fold.COUNT, Fold.SUM, Fold.DISTINCT)] == [0.0, 0.0, 0.0]
    assert all(math.isnan(found) for found in got.values())


def test_of_nulls_only_the_share_missing_is_known() -> None:
    got = {fold: value(fold, [math.nan], [math.nan, math.nan]) for fold in Fold}
    assert got.pop(Fold.MISSING) == 1.0
    assert [got.pop(fold) for fold in (Fold.COUNT, Fold.SUM, Fold.DISTINCT)] == [0.0, 0.0, 0.0]
    assert all(math.isnan(found) for found in got.values())


def test_the_spread_of_one_value_is_missing_and_of_equal_ones_zero() -> None:
    assert math.isnan(value(Fold.STD, [4.2]))
    assert value(Fold.STD, [0.1] * 7, [0.1] * 11) == 0.0


def test_a_slope_needs_two_times() -> None:
    assert math.isnan(value(Fold.SLOPE, [4.2]))
    assert math.isnan(value(Fold.SLOPE, [4.2, 5.2], [6.2], step=0))
    assert value(Fold.SLOPE, [4.0], [6.0]) == 2.0


def test_spread_and_slope_survive_a_mean_a_million_times_larger() -> None:
    values = [1e9 + offset for offset in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert value(Fold.STD, values[:2], values[2:]) == pytest.approx(stdev([1.0, 2.0, 3.0, 4.0, 5.0]), rel=1e-9)
    assert value(Fold.SLOPE, values[:2], values[2:]) == pytest.approx(1.0, rel=1e-9)


def test_different_values_are_counted_exactly_below_64_and_estimated_beyond() -> None:
    few = [float(i % 63) for i in range(500)]
    assert value(Fold.DISTINCT, few[:200], few[200:]) == 63.0
    errors = []
    for seed in range(40):
        many = np.random.default_rng(seed).normal(size=5000).tolist()
        errors.append(value(Fold.DISTINCT, many[:1000], many[500:]) / 5000 - 1)
    assert abs(fmean(errors)) < 3 * 0.13 / math.sqrt(40)
    assert 0.08 < stdev(errors) < 0.19


@given(st.floats(0, 1100))
@settings(max_examples=300, deadline=None)
def test_a_half_life_halves(times: float) -> None:
    assert halved(times) == pytest.approx(2.0**-times, rel=1e-15, abs=1e-320)
    assert halved(math.floor(times)) == (2.0 ** -math.floor(times) if times < 1070 else 0.0)


def test_the_value_of_a_lag_is_the_last() -> None:
    found = compiled(latest.NOTHING, 0, np.array([1.0, 2.0]), np.array([3.0, math.nan]), SECOND, 0)
    assert found == (3.0, 2 * SECOND)
    assert math.isnan(compiled(latest.NOTHING, 0, np.array([]), np.array([]), SECOND, 0)[0])
