"""Anytime-valid tests: each gives the logarithm of an e-value, evidence against its null hypothesis.

An e-value may be looked at after every event. By Ville's inequality it ever exceeds 1/alpha with probability at most
alpha while the null holds, so acting at ``log_e >= log(1/alpha)`` errs that seldom, whenever one stops. All of them
are mixtures over a fixed grid of alternatives, so they depend on counts alone, not on how counts came in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

GRID = 24
"""How many alternatives each mixture holds."""
_LARGEST_RATIO = 50.0
# As shares of the bet at which one value could cost everything. Evenly spaced: values that come once a day are few, and
# with few values it is the large bets that tell.
_SMALLEST_BET, _LARGEST_BET = 0.04, 0.95

Counts = Mapping[float, tuple[int, int]]
"""Events by the challenger's share at assignment: how many were the challenger's, how many the champion's."""


def rate_log_e(events: Counts, tolerance: float) -> float:
    """Evidence that the challenger's event rate exceeds (1 + ``tolerance``) times the champion's.

    Each event (an error, say) is conditioned on having happened. With w the challenger's share at assignment, it is
    the challenger's with probability at most m = w(1+d)/(1+dw) while the null holds, d being the tolerance; a rate r
    times the champion's makes it q(r) = wr/(1+w(r-1)). The e-value is the mean over r of the product of (q/m) for
    the challenger's events and (1-q)/(1-m) for the champion's (Lindon & Malek, arXiv 2011.03567). Outages that both
    share and changes of weight cancel. Events at a share of 0 or 1 say nothing and are left out.
    """
    if tolerance < 0:
        raise ValueError(f"the tolerated excess of a rate is at least 0, not {tolerance}")
    total = np.zeros(GRID)
    for weight, (challenger, champion) in events.items():
        if 0.0 < weight < 1.0:
            won, lost = rate_terms(weight, tolerance)
            total += challenger * won + champion * lost
    return _log_mean_exp(total)


@lru_cache(maxsize=1024)
def rate_terms(weight: float, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """What one event adds to the log of each product, float64[GRID]: of the challenger, of the champion."""
    ratios = np.geomspace(1.25 * (1 + tolerance), _LARGEST_RATIO, GRID)
    null = weight * (1 + tolerance) / (1 + tolerance * weight)
    return _terms(weight * ratios / (1 + weight * (ratios - 1)), null)


def sample_ratio_log_e(exposures: Counts) -> float:
    """Evidence that units were not assigned with the declared share, in either direction.

    The null is a point: each unit is the challenger's with probability w. The alternatives multiply the odds by r
    and 1/r.
    """
    total = np.zeros(2 * GRID)
    ratios = np.geomspace(1.02, 10.0, GRID)
    ratios = np.concatenate([ratios, 1 / ratios])
    for weight, (challenger, champion) in exposures.items():
        if 0.0 < weight < 1.0:
            won, lost = _terms(weight * ratios / (1 + weight * (ratios - 1)), weight)
            total += challenger * won + champion * lost
    return _log_mean_exp(total)


def bernoulli_log_e(successes: int, trials: int, rate: float) -> float:
    """Evidence that something happens with a probability above ``rate``, from ``successes`` in ``trials``."""
    if not 0.0 < rate < 1.0:
        raise ValueError(f"the declared rate must lie between 0 and 1, not {rate}")
    # Odds instead of probabilities, so that no alternative reaches 1.
    odds = rate / (1 - rate) * np.geomspace(1.1, 100.0, GRID)
    won, lost = _terms(odds / (1 + odds), rate)
    return _log_mean_exp(successes * won + (trials - successes) * lost)


def mean_below_log_e(values: Sequence[float] | np.ndarray, bound: float) -> float:
    """Evidence that values in [-1, 1] have a mean below ``bound``, whatever their distribution.

    A fortune that bets the share k of what it may on each value being below the bound is multiplied by
    1 + k (bound - x) / (1 - bound); while the mean of each value, given those before it, is at least the bound, it
    does not grow in expectation (Waudby-Smith & Ramdas, JRSS B 86, 2024). The e-value is the mean fortune over k.
    """
    if not -1.0 < bound < 1.0:
        raise ValueError(f"a bound on the mean of values in [-1, 1] must lie inside, not at {bound}")
    found = np.asarray(values, dtype=np.float64)
    if found.size and not (np.abs(found) <= 1.0).all():
        raise ValueError(f"values must lie in [-1, 1]; found {found.min()} to {found.max()}")
    bets = np.linspace(_SMALLEST_BET, _LARGEST_BET, GRID)
    return _log_mean_exp(np.log1p(np.outer(bets, (bound - found) / (1 - bound))).sum(axis=1))


def mean_above_log_e(values: Sequence[float] | np.ndarray, bound: float) -> float:
    """Evidence that values in [-1, 1] have a mean above ``bound``; see ``mean_below_log_e``."""
    return mean_below_log_e(-np.asarray(values, dtype=np.float64), -bound)


def _terms(alternative: np.ndarray, null: float) -> tuple[np.ndarray, np.ndarray]:
    return np.log(alternative / null), np.log1p(-alternative) - np.log1p(-null)


def _log_mean_exp(values: np.ndarray) -> float:
    top = float(values.max())
    return top + float(np.log(np.mean(np.exp(values - top))))
