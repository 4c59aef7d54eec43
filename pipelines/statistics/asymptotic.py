"""Asymptotic confidence sequences: intervals for a difference of means that may be looked at after every unit.

Unlike the tests in ``sequential`` they hold in the limit of many units only, for values of any distribution with more
than two moments. They tell which of several versions is better; they never withdraw one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """Values of so many units: their mean, and their variance (that of the sample, over n - 1)."""

    units: int
    mean: float
    variance: float


def difference(treated: Sample, control: Sample, alpha: float, planned: int) -> tuple[float, float]:
    """The mean of ``treated`` less that of ``control``, and the half-width around it, infinite below two units of each.

    The probability that the interval ever, from a number of units on that grows without bound, misses the true
    difference tends to at most ``alpha``. It is tightest when there are ``planned`` units in both together. With n
    units and V = v (1/n1 + 1/n0) the variance of the estimated difference, the half-width is
    sqrt(V 2(nr+1)/(nr) ln(sqrt(nr+1)/alpha)), r = (-2 ln alpha + ln(1 - 2 ln alpha)) / planned (Waudby-Smith, Arbour,
    Sinha, Kennedy & Ramdas, arXiv 2103.06476, for one sample, where V is its variance over n). For v the larger of the
    two sample variances stands: where something is rare, the smaller arm may not have seen it yet, and its own variance
    would make it look certain.
    """
    if not 0.0 < alpha < 1.0 or planned < 1:
        raise ValueError(f"alpha must lie between 0 and 1, planned be at least 1; found {alpha} and {planned}")
    found = treated.mean - control.mean
    if treated.units < 2 or control.units < 2:
        return found, math.inf
    units = treated.units + control.units
    spread = max(treated.variance, control.variance) * (1 / treated.units + 1 / control.units)
    rate = (-2 * math.log(alpha) + math.log1p(-2 * math.log(alpha))) / planned
    grown = units * rate + 1
    return found, math.sqrt(spread * 2 * grown / (units * rate) * math.log(math.sqrt(grown) / alpha))
