"""The sequential tests against computations of their own, and against their promise: few false alarms, early alarms."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.statistics.sequential import (
    GRID,
    bernoulli_log_e,
    mean_above_log_e,
    mean_below_log_e,
    rate_log_e,
    sample_ratio_log_e,
)

THRESHOLD = math.log(1 / 0.002)
weights = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5])
assignments = st.lists(st.tuples(weights, st.booleans()), max_size=40)


def direct_rate(events: list[tuple[float, bool]], tolerance: float) -> float:
    """The formula event by event in exact fractions, for the same grid of ratios."""
    low, high = 1.25 * (1 + tolerance), 50.0
    ratios = [low * (high / low) ** (k / (GRID - 1)) for k in range(GRID)]
    total = Fraction(0)
    for ratio in ratios:
        product = Fraction(1)
        for weight, challenger in events:
            w, r, d = Fraction(weight), Fraction(ratio), Fraction(tolerance)
            q, m = w * r / (1 + w * (r - 1)), w * (1 + d) / (1 + d * w)
            product *= q / m if challenger else (1 - q) / (1 - m)
        total += product
    mean = total / GRID
    return math.log(mean.numerator) - math.log(mean.denominator)


def direct_ratio(events: list[tuple[float, bool]]) -> float:
    """The mixture over odds that are r and 1/r times those declared, event by event in exact fractions."""
    raised = [Fraction(1.02 * (10.0 / 1.02) ** (k / (GRID - 1))) for k in range(GRID)]
    total = Fraction(0)
    for ratio in [*raised, *(1 / r for r in raised)]:
        product = Fraction(1)
        for weight, challenger in events:
            w = Fraction(weight)
            odds = ratio * w / (1 - w)
            product *= odds / (1 + odds) / w if challenger else 1 / (1 + odds) / (1 - w)
        total += product
    mean = total / (2 * GRID)
    return math.log(mean.numerator) - math.log(mean.denominator)


def direct_bernoulli(successes: int, trials: int, rate: float) -> float:
    """The mixture over odds of up to a hundred times those declared."""
    odds = [rate / (1 - rate) * 1.1 * (100 / 1.1) ** (k / (GRID - 1)) for k in range(GRID)]
    terms = [(o / (1 + o) / rate) ** successes * (1 / (1 + o) / (1 - rate)) ** (trials - successes) for o in odds]
    return math.log(math.fsum(terms) / GRID)


def direct_mean_below(values: list[float], bound: float) -> float:
    """The mean of the fortunes that bet each share of the grid on every value."""
    fortunes = []
    for k in range(GRID):
        bet = 0.04 + k * (0.95 - 0.04) / (GRID - 1)
        fortunes.append(math.prod(1 + bet * (bound - x) / (1 - bound) for x in values))
    return math.log(math.fsum(fortunes) / GRID)


def counts(events: list[tuple[float, bool]]) -> dict[float, tuple[int, int]]:
    found: dict[float, tuple[int, int]] = {}
    for weight, challenger in events:
        had = found.get(weight, (0, 0))
        found[weight] = (had[0] + challenger, had[1] + (not challenger))
    return found


@given(assignments, st.sampled_from([0.0, 0.25, 1.0]))
@settings(max_examples=60, deadline=None)
def test_the_rate_kernel_equals_the_product_written_out(events, tolerance):
    assert rate_log_e(counts(events), tolerance) == pytest.approx(direct_rate(events, tolerance), rel=1e-9, abs=1e-9)


@given(weights, st.floats(0, 2), st.floats(0, 1))
@settings(deadline=None)
def test_no_single_event_is_expected_to_raise_the_evidence_under_the_null(weight, tolerance, below):
    """E[e-value of one event] <= 1 for every probability up to the null's bound: the martingale property itself."""
    bound = weight * (1 + tolerance) / (1 + tolerance * weight)
    p = bound * below
    hit, miss = (math.exp(rate_log_e({weight: c}, tolerance)) for c in ((1, 0), (0, 1)))
    assert p * hit + (1 - p) * miss <= 1 + 1e-9


@given(st.floats(0.01, 0.9))
@settings(deadline=None)
def test_the_other_kernels_expect_no_growth_under_their_nulls_either(rate):
    hit, miss = (math.exp(bernoulli_log_e(k, 1, rate)) for k in (1, 0))
    assert rate * hit + (1 - rate) * miss <= 1 + 1e-9
    hit, miss = (math.exp(sample_ratio_log_e({rate: c})) for c in ((1, 0), (0, 1)))
    assert rate * hit + (1 - rate) * miss == pytest.approx(1)
    low, high = (math.exp(mean_below_log_e([x], rate)) for x in (-1.0, 1.0))
    share = (1 + rate) / 2  # of ones, so that the mean is the bound
    assert (1 - share) * low + share * high == pytest.approx(1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(-0.9, 0.9))
@settings(deadline=None)
def test_the_mean_kernel_equals_the_fortunes_written_out(values, bound):
    assert mean_below_log_e(values, bound) == pytest.approx(direct_mean_below(values, bound), abs=1e-9)
    assert mean_above_log_e([-x for x in values], -bound) == pytest.approx(mean_below_log_e(values, bound))


def test_bernoulli_equals_the_mixture_written_out():
    assert bernoulli_log_e(7, 30, 0.1) == pytest.approx(direct_bernoulli(7, 30, 0.1))


@given(assignments)
@settings(max_examples=60, deadline=None)
def test_the_sample_ratio_equals_the_mixture_written_out(events):
    assert sample_ratio_log_e(counts(events)) == pytest.approx(direct_ratio(events), rel=1e-9, abs=1e-9)


def test_a_sample_ratio_tells_in_both_directions():
    for weight, many, few in ((0.1, (220, 1000), (40, 1000)), (0.5, (300, 200), (200, 300))):
        fits = (round(1000 * weight), round(1000 * (1 - weight)))
        assert sample_ratio_log_e({weight: fits}) < 0
        assert min(sample_ratio_log_e({weight: odd}) for odd in (many, few)) > THRESHOLD


def runs(rng: np.random.Generator, count: int, events: int, p: float, weight: float, look) -> int:
    """In how many of ``count`` runs the evidence ever reaches the threshold within ``events`` events."""
    alarms = 0
    for _ in range(count):
        hits = np.cumsum(rng.random(events) < p)
        alarms += any(look(int(hits[n]), n + 1 - int(hits[n])) >= THRESHOLD for n in range(0, events, 5))
    return alarms


def test_an_equal_rate_seldom_alarms_however_often_one_looks():
    rng = np.random.default_rng(1)
    assert runs(rng, 400, 300, 0.1, 0.1, lambda c, s: rate_log_e({0.1: (c, s)}, 0.25)) <= 4
    assert runs(rng, 400, 300, 0.1, 0.1, lambda c, s: sample_ratio_log_e({0.1: (c, s)})) <= 4
    assert runs(rng, 400, 300, 0.1, 0.1, lambda c, s: bernoulli_log_e(c, c + s, 0.1)) <= 4


def test_a_tenfold_rate_alarms_soon():
    """At weight 0.1 a rate ten times the champion's makes more than half of all errors the challenger's."""
    rng = np.random.default_rng(2)
    share = 0.1 * 10 / (1 + 0.1 * 9)
    assert runs(rng, 100, 40, share, 0.1, lambda c, s: rate_log_e({0.1: (c, s)}, 0.25)) >= 98


def test_a_shared_outage_is_no_evidence_against_the_challenger():
    assert rate_log_e({0.1: (1000, 9000), 0.5: (5000, 5000)}, 0.25) < 0


def test_counts_at_a_share_of_nothing_or_all_say_nothing():
    assert rate_log_e({0.0: (0, 50), 1.0: (50, 0)}, 0.25) == 0.0
    assert sample_ratio_log_e({0.0: (0, 50), 1.0: (50, 0)}) == 0.0


def test_values_outside_the_bounds_are_refused():
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        mean_below_log_e([0.1, 1.2], 0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bernoulli_log_e(1, 2, 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        rate_log_e({}, -0.1)
