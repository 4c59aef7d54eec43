"""The block bootstrap of a ratio of losses, and the conformal half-width, against simulations with known
truth.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.statistics.bootstrap import Interval, block_bootstrap_ratio
from pipelines.statistics.conformal import conformal_half_width


def losses(rng: np.random.Generator, blocks: int, rows: int, ratio: float) -> tuple[np.ndarray, ...]:
    """Losses that share a level within a block, as errors of one week do; the true ratio of means is
    ``ratio``.
    """
    level = rng.gamma(8.0, 1 / 8, size=(2, blocks, 1))
    model, baseline = level * rng.gamma(2.0, 0.5, size=(2, blocks, rows))
    return ratio * model.ravel(), baseline.ravel(), np.repeat(np.arange(blocks), rows)


def interval(rng: np.random.Generator, data: tuple[np.ndarray, ...], resamples: int = 400) -> Interval:
    return block_bootstrap_ratio(*data, resamples=resamples, confidence=0.95, rng=rng)


@pytest.mark.parametrize(("blocks", "at_least"), [(8, 0.87), (30, 0.91)])
def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says(blocks: int, at_least: float) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(600):
        found = interval(rng, losses(rng, blocks, 40, 0.8))
        held += found.lower <= 0.8 <= found.upper
    assert at_least <= held / 600 <= 0.985


def test_resampling_single_rows_would_be_far_too_sure_of_itself() -> None:
    rng = np.random.default_rng(2)
    model, baseline, blocks = losses(rng, 12, 200, 0.8)
    by_block = interval(rng, (model, baseline, blocks))
    by_row = interval(rng, (model, baseline, np.arange(len(model))))
    assert (by_block.upper - by_block.lower) > 2 * (by_row.upper - by_row.lower)


def test_each_resample_draws_one_block_fewer_so_that_its_variance_is_unbiased() -> None:
    rng = np.random.default_rng(3)
    model, baseline, blocks = losses(rng, 5, 1, 1.0)
    baseline = np.ones_like(model)
    found = block_bootstrap_ratio(model, baseline, blocks, resamples=200_000, confidence=0.6827, rng=rng)
    unbiased = model.std(ddof=1) / np.sqrt(len(model))
    assert (found.upper - found.lower) / 2 == pytest.approx(unbiased, rel=0.05)


def test_the_same_generator_state_gives_the_same_interval() -> None:
    data = losses(np.random.default_rng(4), 8, 10, 0.9)
    assert interval(np.random.default_rng(5), data) == interval(np.random.default_rng(5), data)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), factor=st.floats(0.01, 100), blocks=st.integers(2, 20))
def test_only_the_ratio_matters_and_neither_units_nor_block_names(seed: int, factor: float, blocks: int) -> None:
    model, baseline, ids = losses(np.random.default_rng(seed), blocks, 7, 0.7)
    one = interval(np.random.default_rng(seed), (model, baseline, ids), 50)
    other = interval(np.random.default_rng(seed), (factor * model, factor * baseline, ids * 3 - 50), 50)
    assert (other.lower, other.upper) == pytest.approx((one.lower, one.upper), rel=1e-9)
    assert one.lower <= one.upper
    assert one.estimate == pytest.approx(model.sum() / baseline.sum())


@pytest.mark.parametrize(
    ("model", "baseline", "blocks", "words"),
    [
        ([1, 1], [1, 1], [3, 3], "at least two blocks"),
        ([], [], [], "at least two blocks"),
        ([1, np.nan], [1, 1], [0, 1], "every model loss must be finite"),
        ([1, 1], [1, -1], [0, 1], "every baseline loss must be finite and not negative"),
        ([1, 1], [1, 0], [0, 1], "no loss in some block"),
        ([1, 1], [1, 1], [0], "vectors of one length"),
    ],
)
def test_what_cannot_be_resampled_is_refused(model: list, baseline: list, blocks: list, words: str) -> None:
    arrays = (np.array(model, float), np.array(baseline, float), np.array(blocks, np.int64))
    with pytest.raises(ValueError, match=words):
        interval(np.random.default_rng(0), arrays)


@pytest.mark.parametrize("rows", [20, 200])
def test_a_conformal_interval_covers_the_next_outcome_as_often_as_asked(rows: int) -> None:
    rng = np.random.default_rng(6)
    covered = [
        abs(rng.standard_cauchy()) <= conformal_half_width(np.abs(rng.standard_cauchy(rows)), 0.9) for _ in range(4000)
    ]
    assert 0.885 <= np.mean(covered) <= 0.9 + 1 / (rows + 1) + 0.012


def test_a_conformal_half_width_is_an_order_statistic() -> None:
    scores = np.arange(1.0, 100.0)
    assert conformal_half_width(scores, 0.9) == 90.0
    assert conformal_half_width(np.array([3.0, 1.0]), 0.9) == 3.0
    with pytest.raises(ValueError, match="needs finite scores"):
        conformal_half_width(np.array([1.0, np.nan]), 0.9)
