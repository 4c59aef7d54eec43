"""The naive oracle of features: plain Python, straight from the event set, without state, rings or NumPy.

It says what a stored feature *is*; every kernel must equal it to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pipelines.spec import Contract, FeatureView, Fold
from pipelines.spec.base import microseconds

NAN = math.nan


@dataclass(frozen=True)
class Event:
    time: int
    order: int
    known_at: int
    values: Mapping[str, float | None] = field(default_factory=dict)


@dataclass
class Moments:
    n: float = 0.0
    total: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    low: float = NAN
    high: float = NAN
    last: float = NAN
    newest: int | None = None

    def update(self, value: float, time: int) -> None:
        self.n += 1
        self.total += value
        delta = value - self.mean
        self.mean += delta / self.n
        self.m2 += delta * (value - self.mean)
        if self.n == 1 or value < self.low:
            self.low = value
        if self.n == 1 or value > self.high:
            self.high = value
        self.last, self.newest = value, time


def merge(a: Moments, b: Moments) -> Moments:
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n, delta = a.n + b.n, b.mean - a.mean
    return Moments(
        n=n,
        total=a.total + b.total,
        mean=a.mean + delta * (b.n / n),
        m2=(a.m2 + b.m2) + delta * delta * (a.n * b.n / n),
        low=b.low if b.low < a.low else a.low,
        high=b.high if b.high > a.high else a.high,
        last=b.last,
        newest=b.newest,
    )


def finish(fold: Fold, m: Moments) -> float:
    if fold is Fold.COUNT:
        return m.n
    if fold is Fold.SUM:
        return m.total
    if fold is Fold.STD:
        return math.sqrt(m.m2 / (m.n - 1)) if m.n >= 2 else NAN
    if m.n == 0:
        return NAN
    return {Fold.MEAN: m.mean, Fold.MIN: m.low, Fold.MAX: m.high, Fold.LAST: m.last}[fold]


def features(
    view: FeatureView, contract: Contract, events: Iterable[Event], now: int
) -> list[tuple[float, int | None]]:
    """(value, time of the newest contributing event) of every stored feature at ``now``, from all
    ``events``.
    """
    lateness = microseconds(contract.lateness)
    eligible = sorted(
        (e for e in events if e.known_at - e.time <= lateness and e.time <= now),
        key=lambda e: (e.time, e.order),
    )

    def tile(name: str, hop: int, index: int) -> Moments:
        moments = Moments()
        for event in eligible:
            value = event.values.get(name)
            if event.time // hop == index and value is not None and not math.isnan(value):
                moments.update(value, event.time)
        return moments

    answer: list[tuple[float, int | None]] = []
    for window in view.windows:
        hop, n = microseconds(window.hop), window.tiles
        k = now // hop
        block = (k // n) * n  # the first tile of the block that holds the open tile
        suffix, prefix = Moments(), Moments()
        for index in range(block - 1, k - n - 1, -1):
            suffix = merge(tile(window.field, hop, index), suffix)
        for index in range(block, k):
            prefix = merge(prefix, tile(window.field, hop, index))
        whole = merge(merge(suffix, prefix), tile(window.field, hop, k))
        answer += [(finish(fold, whole), whole.newest) for fold in window.folds]
    for lag in view.lags:
        hop = microseconds(lag.hop)
        found = tile(lag.field, hop, now // hop - lag.offset // lag.hop)
        answer.append((found.last, found.newest))
    return answer
