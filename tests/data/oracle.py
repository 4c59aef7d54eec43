"""The naive oracle of features: plain Python, straight from the event set, without state, rings or NumPy.

It says what a stored feature *is*; every kernel must equal it to the last bit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

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
class Part:
    """Everything that any fold needs of the values of a part of time, and how many were null."""

    half_life: int | None
    n: float = 0.0
    total: float = 0.0
    # Sums of differences from the first value, and of their squares.
    sum1: float = 0.0
    sum2: float = 0.0
    low: float = NAN
    high: float = NAN
    first: float = NAN
    last: float = NAN
    nulls: float = 0.0
    origin: int | None = None
    newest: int | None = None
    # The line: mean value and mean seconds after the origin, squared and mixed deviations.
    mean: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    mixed: float = 0.0
    # The decayed weights and values as of the newest.
    weight: float = 0.0
    weighted: float = 0.0
    different: frozenset[int] = frozenset()

    def update(self, value: float | None, time: int) -> None:
        if value is None or math.isnan(value):
            self.nulls += 1
            return
        if self.origin is None or self.newest is None:
            self.origin = self.newest = time
            self.low = self.high = self.first = value
        self.n += 1
        self.total += value
        self.sum1 += value - self.first
        self.sum2 += (value - self.first) * (value - self.first)
        self.mean += (value - self.mean) / self.n
        after = (time - self.origin) / 1e6 - self.seconds
        self.seconds += after / self.n
        self.squares += after * ((time - self.origin) / 1e6 - self.seconds)
        self.mixed += after * (value - self.mean)
        if self.half_life is not None:
            left = halved((time - self.newest) / self.half_life)
            self.weight, self.weighted = self.weight * left + 1, self.weighted * left + value
        self.low = value if value < self.low else self.low
        self.high = value if value > self.high else self.high
        self.different |= {hashed(value)}
        self.last, self.newest = value, time


def halved(times: float) -> float:
    """2 ** -times by its Taylor series around the next whole number, in the kernels' order of operations."""
    if times >= 1070:
        return 0.0
    y = 1.0
    for k in range(13, 0, -1):
        y = 1.0 + (round(times) - times) * 0.6931471805599453 * y / k
    return math.ldexp(y, -round(times))


def hashed(value: float) -> int:
    """The finaliser of SplitMix64 on the bits of a float, less the last bit."""
    (x,) = struct.unpack("<Q", struct.pack("<d", value + 0.0))
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1


def merge(a: Part, b: Part) -> Part:
    if b.n == 0 or b.newest is None or b.origin is None:
        return replace(a, nulls=a.nulls + b.nulls)
    if a.n == 0 or a.newest is None or a.origin is None:
        return replace(b, nulls=a.nulls + b.nulls)
    n, share = a.n + b.n, b.n / (a.n + b.n)
    delta = b.mean - a.mean
    after = (b.origin - a.origin) / 1e6 + b.seconds - a.seconds
    left = halved((b.newest - a.newest) / a.half_life) if a.half_life else 0.0
    return Part(
        half_life=a.half_life,
        n=n,
        total=a.total + b.total,
        sum1=a.sum1 + (b.sum1 + b.n * (b.first - a.first)),
        sum2=a.sum2 + (b.sum2 + (b.first - a.first) * (2 * b.sum1 + b.n * (b.first - a.first))),
        low=b.low if b.low < a.low else a.low,
        high=b.high if b.high > a.high else a.high,
        first=a.first,
        last=b.last,
        nulls=a.nulls + b.nulls,
        origin=a.origin,
        newest=b.newest,
        mean=a.mean + delta * share,
        seconds=a.seconds + after * share,
        squares=(a.squares + b.squares) + after * after * (a.n * share),
        mixed=(a.mixed + b.mixed) + after * delta * (a.n * share),
        weight=a.weight * left + b.weight,
        weighted=a.weighted * left + b.weighted,
        different=a.different | b.different,
    )


def finish(fold: Fold, part: Part, now: int) -> float:
    if fold is Fold.COUNT:
        return part.n
    if fold is Fold.SUM:
        return part.total
    if fold is Fold.DISTINCT:
        kept = sorted(part.different)[:64]
        return float(len(kept)) if len(kept) < 64 else float(round(63 / (kept[-1] / 2**63)))
    if fold is Fold.MISSING:
        return part.nulls / (part.n + part.nulls) if part.n + part.nulls else NAN
    if part.n == 0 or part.newest is None:
        return NAN
    if fold is Fold.STD:
        squares = part.sum2 - part.sum1 * (part.sum1 / part.n)
        return math.sqrt(max(squares, 0.0) / (part.n - 1)) if part.n >= 2 else NAN
    if fold is Fold.SLOPE:
        return part.mixed / part.squares if part.squares > 0 else NAN
    if fold is Fold.EWM:
        return part.weighted / part.weight
    return {
        Fold.MEAN: part.first + part.sum1 / part.n,
        Fold.MIN: part.low,
        Fold.MAX: part.high,
        Fold.FIRST: part.first,
        Fold.LAST: part.last,
        Fold.DELTA: part.last - part.first,
        Fold.SINCE: (now - part.newest) / 1e6,
    }[fold]


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

    def tile(name: str, hop: int, index: int, half_life: timedelta | None = None) -> Part:
        part = Part(microseconds(half_life) if half_life else None)
        for event in eligible:
            if event.time // hop == index:
                part.update(event.values.get(name), event.time)
        return part

    answer: list[tuple[float, int | None]] = []
    for window in view.windows:
        hop, n = microseconds(window.hop), window.tiles
        k = now // hop
        block = (k // n) * n  # the first tile of the block that holds the open tile
        suffix, prefix = Part(None), Part(None)
        for index in range(block - 1, k - n - 1, -1):
            suffix = merge(tile(window.field, hop, index, window.half_life), suffix)
        for index in range(block, k):
            prefix = merge(prefix, tile(window.field, hop, index, window.half_life))
        whole = merge(merge(suffix, prefix), tile(window.field, hop, k, window.half_life))
        answer += [(finish(fold, whole, now), whole.newest) for fold in window.folds]
    for lag in view.lags:
        hop = microseconds(lag.hop)
        found = tile(lag.field, hop, now // hop - lag.offset // lag.hop)
        answer.append((found.last, found.newest))
    return answer
