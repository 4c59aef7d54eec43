"""Whether what the champion is shown still comes from the world that it was trained on, one series at a time.

Seasons are taken out, and a window is held against how far past windows lay from what their own past had led one to
expect. No figure is averaged over series: one broken sensor of fifty shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipelines.features.localtime import local_microseconds
from pipelines.spec import DriftRule
from pipelines.spec.base import DAY_US

_HOUR_US = 3_600_000_000
_YEAR_DAYS = 365.2425
_HARMONICS = ((1.0, 3), (7.0, 3), (_YEAR_DAYS, 2))
"""Periods in days, and how many harmonics of each are fitted."""
_GRID = (np.arange(200) + 0.5) / 200
"""The quantiles at which two distributions are compared."""
_LEAST_EXCESS = 0.1
"""In deviations: a history of windows that all lay equally far says nothing about how far they might."""
Finding = Literal["drifted", "holds", "inconclusive"]


@dataclass(frozen=True)
class Rows:
    """n rows of watched columns: ``time_us`` int64 [n], ``entity`` object [n], ``columns`` float64 [n] by name."""

    time_us: np.ndarray
    entity: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.time_us)


@dataclass(frozen=True)
class SeriesDrift:
    """One series. ``entity`` is None where all entities are one series.

    ``effect`` is the Wasserstein-1 distance of the window's residuals from the reference's, in deviations of these
    and with the sign of the shift; ``usual`` is its median over past windows and ``p_value`` how seldom past windows
    lay that far. ``missing`` is the share of missing values in the window less that in the reference. Figures that
    could not be taken are NaN.
    """

    column: str
    entity: str | None
    finding: Finding
    reason: str
    effect: float
    usual: float
    p_value: float
    missing: float
    rows: int


@dataclass(frozen=True)
class Drift:
    """The verdict on a window: drifted if any series has, inconclusive only if every one is; all ``series``."""

    finding: Finding
    series: tuple[SeriesDrift, ...]

    @property
    def drifted(self) -> tuple[SeriesDrift, ...]:
        """The series that have drifted, the largest effect first; those found by missing values come last."""
        found = [one for one in self.series if one.finding == "drifted"]
        return tuple(sorted(found, key=lambda one: -abs(one.effect) if math.isfinite(one.effect) else math.inf))


def judge_drift(rule: DriftRule, reference: Rows, window: Rows, *, now_us: int, zone: str | None = None) -> Drift:
    """Holds the ``rule.days`` before ``now_us`` of ``window`` against ``reference``, what the champion was trained on.

    The reference's windows are each judged by what lay before them, with the same gap as there is now between the end
    of the reference and the window; how seldom distances as large as the window's came is its p-value (``_tail``).
    Benjamini and Hochberg 1995, "Controlling the false discovery rate", decides over all series (they are positively
    dependent). With ``rule.by_entity`` values are thinned to one an entity and hour, so that an hour in which many
    ask weighs no more. Seasons run on the wall clock of ``zone`` (None: UTC).
    """
    start = now_us - rule.days * DAY_US
    found = []
    for column in rule.columns:
        for entity, past, present in _series(rule, reference, window, column, start, now_us):
            found.append(_measure(rule, column, entity, past, present, start, zone))
    return _decide(rule, found)


@dataclass(frozen=True)
class _Values:
    time_us: np.ndarray
    value: np.ndarray


def _series(
    rule: DriftRule, reference: Rows, window: Rows, column: str, start: int, end: int
) -> Iterator[tuple[str | None, _Values, _Values]]:
    """Each series of ``column``: its entity, reference values and window values."""

    def values(rows: Rows, mask: np.ndarray) -> _Values:
        time, value = rows.time_us[mask], rows.columns[column][mask]
        order = np.argsort(time, kind="stable")
        time, value = time[order], value[order]
        if rule.by_entity:
            _, first = np.unique(time // _HOUR_US, return_index=True)
            time, value = time[first], value[first]
        return _Values(time, value)

    recent = (window.time_us >= start) & (window.time_us < end)
    # What was trained on lies before the window; a reference that reaches into it would hide a drift.
    before = reference.time_us < start
    if not rule.by_entity:
        yield None, values(reference, before), values(window, recent)
        return
    for entity in sorted({*reference.entity[before].tolist(), *window.entity[recent].tolist()}):
        past, present = before & (reference.entity == entity), recent & (window.entity == entity)
        yield entity, values(reference, past), values(window, present)


def _measure(
    rule: DriftRule, column: str, entity: str | None, past: _Values, present: _Values, start: int, zone: str | None
) -> SeriesDrift:
    finite, there = np.isfinite(past.value), np.isfinite(present.value)
    missing = float((~there).mean() - (~finite).mean()) if len(there) and len(finite) else math.nan

    def verdict(
        finding: Finding, reason: str, effect: float = math.nan, usual: float = math.nan, p: float = math.nan
    ) -> SeriesDrift:
        return SeriesDrift(column, entity, finding, reason, effect, usual, p, missing, int(there.sum()))

    if len(there) >= rule.rows and missing >= rule.missing:
        return verdict("drifted", f"the share of missing values rose by {missing:.0%}")
    if there.sum() < rule.rows:
        return verdict("inconclusive", f"{int(there.sum())} values in the window; {rule.rows} are needed")
    season = _Season.of(past.time_us[finite], zone)
    if season is None:
        return verdict("inconclusive", "the reference does not span two weeks")
    series = _Residuals(season, past.time_us[finite], past.value[finite])
    length, gap = rule.days * DAY_US, max(0, start - int(past.time_us[finite][-1]))
    usual = np.array([abs(one) for one in series.past(length, gap, rule.rows)])
    if len(usual) < rule.windows:
        return verdict(
            "inconclusive", f"the reference holds {len(usual)} past windows to compare with; {rule.windows} are needed"
        )
    effect = series.distance(len(past.time_us[finite]), present.time_us[there], present.value[there])
    return verdict("holds", "", effect, float(np.median(usual)), _tail(usual, abs(effect)))


def _tail(usual: np.ndarray, distance: float) -> float:
    """How seldom a distance at least this large comes, from past ones: half of them lie above the median, and beyond
    it they are taken to fall off exponentially (peaks over a threshold with shape 0; Pickands 1975, "Statistical
    inference using extreme order statistics").
    """
    median = float(np.median(usual))
    excess = max(float((usual[usual >= median] - median).mean()), _LEAST_EXCESS)
    return min(1.0, 0.5 * math.exp((median - distance) / excess)) if distance > median else 1.0


@dataclass(frozen=True)
class _Season:
    """Harmonics of the periods that a history is long enough for; ``least_us`` is what a fit needs."""

    zone: str | None
    periods: tuple[tuple[float, int], ...]
    least_us: int

    @classmethod
    def of(cls, time_us: np.ndarray, zone: str | None) -> _Season | None:
        """The seasons of a history; None when it does not even hold two weeks."""
        span = (time_us[-1] - time_us[0]) / DAY_US if len(time_us) else 0.0
        if span < 14:
            return None
        # A year is fitted only where past windows, too, have a whole year before them.
        periods = tuple((period, count) for period, count in _HARMONICS if span >= 1.25 * period or period < 8)
        return cls(zone, periods, round(max(14.0, max(period for period, _ in periods)) * DAY_US))

    def design(self, time_us: np.ndarray) -> np.ndarray:
        """float64 [n, 1 + 2 · harmonics]."""
        local = local_microseconds(self.zone, time_us) if self.zone else time_us
        days = local / DAY_US
        turns = [2 * np.pi * days * k / period for period, count in self.periods for k in range(1, count + 1)]
        return np.stack([np.ones(len(days)), *(f(turn) for turn in turns for f in (np.sin, np.cos))], axis=1)


class _Residuals:
    """A history in order of time, whose prefixes are fitted one after the other at the cost of what is new in each."""

    def __init__(self, season: _Season, time_us: np.ndarray, value: np.ndarray) -> None:
        self._season, self._time, self._value = season, time_us, value
        self._design = season.design(time_us)
        width = self._design.shape[1]
        self._gram, self._moment, self._summed = np.zeros((width, width)), np.zeros(width), 0

    def past(self, length: int, gap: int, rows: int) -> Iterator[float]:
        """The distance of every past window (half overlapping, each a ``gap`` after what it is compared with)."""
        edge = int(self._time[0]) + self._season.least_us + gap
        while edge + length <= self._time[-1]:
            begin, end, fitted = np.searchsorted(self._time, (edge, edge + length, edge - gap))
            if end - begin >= rows and fitted >= rows:
                yield self.distance(int(fitted), self._time[begin:end], self._value[begin:end])
            edge += length // 2

    def distance(self, fitted: int, time_us: np.ndarray, value: np.ndarray) -> float:
        """Wasserstein-1 between the residuals of a window and of the first ``fitted`` values, around the seasons of
        these and in their deviations; ``fitted`` must not fall from call to call.
        """
        new = self._design[self._summed : fitted]
        # Not `@`: for products this small BLAS would start threads that cost more than they do.
        self._gram += np.einsum("ni,nj->ij", new, new)
        self._moment += np.einsum("ni,n->i", new, self._value[self._summed : fitted])
        self._summed = fitted
        weights, *_ = np.linalg.lstsq(self._gram, self._moment, rcond=1e-10)
        before = self._value[:fitted] - np.einsum("ni,i->n", self._design[:fitted], weights)
        apart = np.quantile(value - np.einsum("ni,i->n", self._season.design(time_us), weights), _GRID) - np.quantile(
            before, _GRID
        )
        deviation = float(before.std())
        scale = deviation if deviation > 1e-12 * max(1.0, float(np.abs(self._value).max())) else 1.0
        return float(np.copysign(np.abs(apart).mean(), apart.mean()) / scale)


def _decide(rule: DriftRule, found: list[SeriesDrift]) -> Drift:
    tested = sorted((one for one in found if math.isfinite(one.p_value)), key=lambda one: one.p_value)
    passed = [rank for rank, one in enumerate(tested, start=1) if one.p_value <= rule.alpha * rank / len(tested)]
    limit = tested[max(passed) - 1].p_value if passed else -1.0

    def judged(one: SeriesDrift) -> SeriesDrift:
        if not math.isfinite(one.p_value):
            return one
        drifted = one.p_value <= limit and abs(one.effect) >= rule.effect
        reason = f"{one.effect:+.2f} deviations; past windows lay {one.usual:.2f} apart (p {one.p_value:.2g})"
        return replace(one, finding="drifted" if drifted else "holds", reason=reason)

    series = tuple(judged(one) for one in found)
    findings = {one.finding for one in series}
    whole: Finding = "drifted" if "drifted" in findings else "holds" if "holds" in findings else "inconclusive"
    return Drift(whole, series)
