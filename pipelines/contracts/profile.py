"""What a contract's load rules need to know of rows, as sums that parts of a load can be added up from in any order.

Moments are merged by Chan, Golub and LeVeque's formula (1979). Rows of one entity are never in two parts, so what
happens between an entity's events is known within a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.spec import Contract, Distribution, Monotone, NullShare, References, Silence, Unique
from pipelines.spec.base import microseconds

WORST = 5
"""So many of the worst are named."""


@dataclass(frozen=True)
class Moments:
    """Of the values of one number: how many, their mean, and the sum of squared differences from it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def plus(self, other: Moments) -> Moments:
        """Those of both together."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart * apart * (self.count * other.count / count)
        return Moments(count, mean, squares)

    @property
    def std(self) -> float:
        """The standard deviation of the values as a sample; NaN of fewer than two."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan


@dataclass(frozen=True)
class Found:
    """How often something was found, and the worst cases: (how bad, entity), the worst first."""

    count: int = 0
    worst: tuple[tuple[float, str], ...] = ()

    def plus(self, other: Found) -> Found:
        """Both together."""
        return Found(self.count + other.count, tuple(sorted(self.worst + other.worst, reverse=True)[:WORST]))


@dataclass(frozen=True)
class Digests:
    """64-bit digests of what rows have to differ in, uint64 ascending, and how often one came again."""

    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    repeated: int = 0

    def plus(self, other: Digests) -> Digests:
        """Both together."""
        both = np.concatenate([self.seen, other.seen])
        seen = np.unique(both)
        return Digests(seen, self.repeated + other.repeated + len(both) - len(seen))


@dataclass(frozen=True)
class Values:
    """The different values of a field."""

    seen: frozenset[Any] = frozenset()

    def plus(self, other: Values) -> Values:
        """Both together."""
        return Values(self.seen | other.seen)


@dataclass(frozen=True)
class Profile:
    """Sums over rows: nulls and moments by field, descents by field (in the field's unit), gaps (seconds), digests and
    values by rule.
    """

    rows: int = 0
    newest_us: int | None = None
    nulls: dict[str, int] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    descents: dict[str, Found] = field(default_factory=dict)
    gaps: dict[str, Found] = field(default_factory=dict)
    digests: dict[str, Digests] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)

    def plus(self, other: Profile) -> Profile:
        """Both together."""
        newest = [moment for moment in (self.newest_us, other.newest_us) if moment is not None]
        return Profile(
            rows=self.rows + other.rows,
            newest_us=max(newest, default=None),
            nulls={n: self.nulls.get(n, 0) + other.nulls.get(n, 0) for n in {**self.nulls, **other.nulls}},
            moments=_merged(self.moments, other.moments, Moments()),
            descents=_merged(self.descents, other.descents, Found()),
            gaps=_merged(self.gaps, other.gaps, Found()),
            digests=_merged(self.digests, other.digests, Digests()),
            values=_merged(self.values, other.values, Values()),
        )


def merged(profiles: Iterable[Profile]) -> Profile:
    """All together."""
    return reduce(Profile.plus, profiles, Profile())


@dataclass(frozen=True)
class Earlier:
    """Rows that the table had: entity and time of those of some entities from ``known_for`` before ``first_us``, the
    event time of the first row of a load, up to its last.
    """

    table: pa.Table
    first_us: int


def expects(contract: Contract) -> timedelta | None:
    """For how long before a load its rules ask what was in the table; None when they do not."""
    return max((r.known_for for r in contract.load_rules if isinstance(r, Silence) and r.known_for), default=None)


def profiled(contract: Contract, table: pa.Table, last_us: int, earlier: Earlier | None = None) -> Profile:
    """What the contract's load rules need of typed rows, all those of their entities; ``last_us`` is the event time
    of the last row of the whole load. ``earlier`` is what the table has of these entities, and of others that did not
    come, if the contract ``expects`` them.
    """
    profile = _of_rows(contract, table, last_us) if contract.load_rules and table.num_rows else Profile()
    if earlier is not None:
        for rule in contract.load_rules:
            if isinstance(rule, Silence) and rule.known_for is not None:
                profile.gaps[rule.id] = _silences(contract, rule, rule.known_for, table, earlier, last_us)
    return profile


def _silences(
    contract: Contract, rule: Silence, known_for: timedelta, table: pa.Table, earlier: Earlier, last_us: int
) -> Found:
    """Gaps that end in the load, between events of the load and of the table."""
    before = earlier.table.column(contract.time).cast(pa.int64()).to_numpy()
    since = earlier.first_us - microseconds(known_for)
    mine = table.column(contract.time).cast(pa.int64()).to_numpy()
    kept = earlier.table.column(contract.entity).filter(pa.array(before >= since))
    entities = pa.chunked_array([*table.column(contract.entity).chunks, *kept.chunks], pa.string())
    line = _Line.of(entities, np.concatenate([mine, before[before >= since]]))
    return line.gaps(rule.every.total_seconds(), last_us, np.arange(len(entities)) < len(mine))


def _of_rows(contract: Contract, table: pa.Table, last_us: int) -> Profile:
    times = table.column(contract.time).cast(pa.int64()).to_numpy()
    profile = Profile(rows=table.num_rows, newest_us=int(times.max()))
    between = any(isinstance(rule, Monotone | Silence) for rule in contract.load_rules)
    line = _Line.of(table.column(contract.entity), times) if between else None
    for rule in contract.load_rules:
        if isinstance(rule, NullShare):
            profile.nulls[rule.field] = table.column(rule.field).null_count
        elif isinstance(rule, Distribution):
            profile.moments[rule.field] = _moments(table.column(rule.field))
        elif isinstance(rule, Monotone) and line is not None:
            profile.descents[rule.field] = line.descents(table.column(rule.field))
        elif isinstance(rule, Silence) and line is not None:
            profile.gaps[rule.id] = line.gaps(rule.every.total_seconds(), last_us)
        elif isinstance(rule, Unique):
            profile.digests[rule.id] = _digests(table.select(list(rule.fields)))
        elif isinstance(rule, References):
            profile.values[rule.id] = Values(frozenset(pc.unique(table.column(rule.field)).drop_null().to_pylist()))
    return profile


Sums = TypeVar("Sums", Moments, Found, Digests, Values)


def _merged(one: dict[str, Sums], other: dict[str, Sums], nothing: Sums) -> dict[str, Sums]:
    return {name: one.get(name, nothing).plus(other.get(name, nothing)) for name in {**one, **other}}


def _digests(table: pa.Table) -> Digests:
    digest = xxhash.xxh3_64_intdigest
    rows = (row.values() for row in table.to_pylist())
    made = [digest(repr(tuple(row)).encode()) for row in rows if None not in row]
    seen = np.unique(np.array(made, dtype=np.uint64))
    return Digests(seen, len(made) - len(seen))


def _moments(column: pa.ChunkedArray) -> Moments:
    values = column.cast(pa.float64(), safe=False).drop_null().to_numpy()
    if not len(values):
        return Moments()
    mean = float(values.mean())
    return Moments(len(values), mean, float(np.square(values - mean).sum()))


@dataclass(frozen=True)
class _Line:
    """Rows by entity and time: their ``order``, ``entities`` [n] as codes in that order with their ``names``, and
    ``times`` [n] in that order.
    """

    order: np.ndarray
    entities: np.ndarray
    names: pa.Array
    times: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray, times: np.ndarray) -> _Line:
        encoded = column.combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        order = np.lexsort((times, codes))
        return cls(order, codes[order], encoded.dictionary, times[order])

    def descents(self, column: pa.ChunkedArray) -> Found:
        """Where a value is lower than the one before of its entity, if any; nulls are passed over."""
        there = column.is_valid().to_numpy()[self.order]
        values = column.fill_null(0).to_numpy()[self.order]  # whole numbers as they are: floats would round large ones
        values, entities = values[there], self.entities[there]
        fell = (entities[1:] == entities[:-1]) & (values[1:] < values[:-1])
        return self._found(entities[1:][fell], (values[:-1] - values[1:])[fell])

    def gaps(self, every_s: float, last_us: int, new: np.ndarray | None = None) -> Found:
        """Where an entity's next event, or the load's last one, comes too late after one.

        Of rows that are not all ``new`` (bool[n]), gaps between two others are older than the load.
        """
        same = self.entities[1:] == self.entities[:-1]
        following = np.append(np.where(same, self.times[1:], last_us), last_us)
        waited = (following - self.times) / 1e6
        late = waited > every_s
        if new is not None:
            ends = np.append(np.where(same, new[self.order][1:], True), True)
            late &= ends
        return self._found(self.entities[late], waited[late])

    def _found(self, entities: np.ndarray, how_bad: np.ndarray) -> Found:
        # Of equally bad ones those whose names come last, so that they are the same however a load is cut.
        names = pc.rank(self.names).to_numpy()[entities]
        worst = np.lexsort((names, how_bad))[::-1][:WORST]
        return Found(len(entities), tuple((float(how_bad[i]), self.names[int(entities[i])].as_py()) for i in worst))
