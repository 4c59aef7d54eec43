"""The folds: what each computes, of nothing, of one value, of parts; and that they stay right where sums
fail.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features import folds
from tests.data import oracle
from tests.data.oracle import Moments

CODES = {
    "count": folds.C_COUNT,
    "sum": folds.C_SUM,
    "mean": folds.C_MEAN,
    "min": folds.C_MIN,
    "max": folds.C_MAX,
    "std": folds.C_STD,
    "last": folds.C_LAST,
}
NUMBERS = st.lists(st.floats(-1e12, 1e12, allow_nan=False), max_size=30)


def fold_of(values: list[float]):
    a = folds.empty()
    for time, value in enumerate(values):
        a = folds.update(a, value, time)
    return a


def moments_of(values: list[float]) -> Moments:
    m = Moments()
    for time, value in enumerate(values):
        m.update(value, time)
    return m


def bits(*values: float) -> bytes:
    return np.array(values, np.float64).tobytes()


@given(NUMBERS, NUMBERS)
@settings(max_examples=200, deadline=None)
def test_compiled_folds_equal_plain_python_to_the_last_bit(left: list[float], right: list[float]) -> None:
    compiled = folds.merge(fold_of(left), fold_of(right))
    plain = oracle.merge(moments_of(left), moments_of(right))
    expected = (plain.n, plain.total, plain.mean, plain.m2, plain.low, plain.high, plain.last)
    assert bits(*compiled[:7]) == bits(*expected)
    assert compiled[7] == (folds.EMPTY if plain.newest is None else plain.newest)


@given(NUMBERS)
@settings(max_examples=100, deadline=None)
def test_nothing_is_the_identity_of_merge(values: list[float]) -> None:
    whole = fold_of(values)
    for merged in (folds.merge(whole, folds.empty()), folds.merge(folds.empty(), whole)):
        assert bits(*merged[:7]) == bits(*whole[:7])


def test_finished_values_are_what_their_names_say() -> None:
    values = [3.0, -1.5, 7.25, 2.0, 2.0]
    a = fold_of(values)
    got = {name: folds.finish(code, a) for name, code in CODES.items()}
    assert (got["count"], got["sum"], got["min"], got["max"], got["last"]) == (5.0, 12.75, -1.5, 7.25, 2.0)
    assert got["mean"] == pytest.approx(fmean(values), rel=1e-15)
    assert got["std"] == pytest.approx(stdev(values), rel=1e-15)


def test_of_nothing_count_and_sum_are_zero_and_the_rest_missing() -> None:
    got = {name: folds.finish(code, folds.empty()) for name, code in CODES.items()}
    assert (got.pop("count"), got.pop("sum")) == (0.0, 0.0)
    assert all(math.isnan(value) for value in got.values())


def test_the_spread_of_one_value_is_missing_and_of_equal_ones_zero() -> None:
    assert math.isnan(folds.finish(folds.C_STD, fold_of([4.2])))
    equal = folds.merge(fold_of([0.1] * 7), fold_of([0.1] * 11))
    assert folds.finish(folds.C_STD, equal) == 0.0


def test_the_spread_survives_a_mean_a_million_times_larger() -> None:
    values = [1e9 + offset for offset in (1.0, 2.0, 3.0, 4.0, 5.0)]
    merged = folds.merge(fold_of(values[:2]), fold_of(values[2:]))
    assert folds.finish(folds.C_STD, merged) == pytest.approx(stdev([1.0, 2.0, 3.0, 4.0, 5.0]), rel=1e-9)
