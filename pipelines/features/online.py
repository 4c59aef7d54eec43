"""The online side of features: state as a projection of the ingest log, and its bound reader.

Where state and log are kept, in LMDB or in Redis, is decided here by the settings and known to nothing above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cluster.log import DurableLog, Log
from cluster.settings import Settings
from pipelines.features.dimensions import DimensionState, ttl_of
from pipelines.features.found import Found, mark
from pipelines.features.neighbours import NeighbourState
from pipelines.features.projection import NO_TABLE, Projection, StateGap, unpack
from pipelines.features.served import Status
from pipelines.features.state import apply_events, read_into, vectors, words
from pipelines.features.stores import Rebuild, Transaction, open_store
from pipelines.features.windows import EventColumns, Plan, canonical, compile_plan, eligible, event_columns, take
from pipelines.spec import EventSource, UseCase
from pipelines.spec.base import microseconds

__all__ = ["NO_TABLE", "BoundReader", "OnlineState", "Read", "StateGap", "Status", "open_log", "open_state"]

_WORDS_AT_ONCE = 4 << 20  # of states that are changed by one call of a kernel


class Read(NamedTuple):
    """Stored features of n entities: values, age_s float64[n, s] (seconds), status uint8[n, s], known
    bool[n].

    The features of entities come from one snapshot: the state of ``generation`` with every log record up to
    ``sequence``. An entity that is not ``known`` has the features of an empty state. ``others`` are (generation,
    sequence) of the snapshots that the view's neighbours and then its dimensions come from, as far as they were read.
    """

    values: np.ndarray
    status: np.ndarray
    age_s: np.ndarray
    sequence: int
    generation: int
    known: np.ndarray
    others: tuple[tuple[int, int], ...] = ()


def state_path(settings: Settings, use_case: UseCase) -> Path:
    """The directory of the use case's state on this node."""
    return settings.state_dir / use_case.name / "views"


def log_path(settings: Settings, source: EventSource) -> Path:
    """The directory of the source's ingest log on this node."""
    return settings.state_dir / source.name / "log"


def open_log(settings: Settings, source: EventSource) -> Log:
    """The source's ingest log. Its ids are remembered for as long as an event can reach state."""
    contract = source.contract
    lasting = microseconds(contract.lateness + contract.future) + 60_000_000
    remember_us = max(settings.remember_seconds * 1_000_000, lasting)
    if settings.state_url is None:
        return DurableLog(log_path(settings, source), remember_us=remember_us)
    from cluster.redis_log import RedisLog

    durability = settings.state_durability
    return RedisLog(
        settings.state_url,
        source.name,
        remember_us=remember_us,
        durability=durability,
        most_pending=settings.log_rows,
    )


def open_state(settings: Settings, use_case: UseCase) -> OnlineState:
    """The state of the use case's present view."""
    return OnlineState(settings.state_url or state_path(settings, use_case), use_case)


class OnlineState(Projection[EventColumns]):
    """The state of a use case's view, that of the page it is given; one object per process.

    ``place`` is a directory, for LMDB, or the URL of a Redis server. Each view fingerprint has a store of its own
    there, so views of several versions live side by side. ``neighbours`` are states of their own, projected with it;
    ``dimensions`` are too, but each is projected from the log of its own source.
    """

    def __init__(self, place: Path | str, use_case: UseCase) -> None:
        self.use_case = use_case
        self.plan = compile_plan(use_case.view, use_case.contract)
        super().__init__(open_store(place, use_case.name, self.plan.fingerprint), use_case.name, use_case.contract)
        self.neighbours = tuple(
            NeighbourState(place, use_case, near, self.plan.fingerprint) for near in use_case.view.neighbours
        )
        self.dimensions = tuple(
            DimensionState(place, use_case, dimension, self.plan.fingerprint) for dimension in use_case.view.dimensions
        )

    @property
    def projections(self) -> tuple[Projection[Any], ...]:
        """All states that are made of the use case's events: this one and its neighbours."""
        return (self, *self.neighbours)

    @property
    def beside(self) -> tuple[NeighbourState | DimensionState, ...]:
        """The states that a read sees beside this one: neighbours, then dimensions."""
        return (*self.neighbours, *self.dimensions)

    @property
    def states(self) -> tuple[Projection[Any], ...]:
        """All states that a read sees: this one, its neighbours, its dimensions."""
        return (self, *self.beside)

    def project(self, log: Log, stream: str = "events") -> int:
        """See ``Projection``; the sequence through which all its states have applied the log."""
        return min([super().project(log, stream), *(near.project(log, stream) for near in self.neighbours)])

    def gap(self, log: Log, stream: str = "events") -> StateGap | None:
        """See ``Projection``; the first gap of any of its states."""
        found = (super().gap(log, stream), *(near.gap(log, stream) for near in self.neighbours))
        return next((gap for gap in found if gap is not None), None)

    def entities(self) -> int:
        """How many entities have state."""
        return self.store.count()

    def names(self) -> list[str]:
        """The entities that have state, ascending; some whose name exceeds 500 bytes may be left out."""
        return self.store.names()

    def bind(self) -> BoundReader:
        """A reader of this state."""
        return BoundReader(self)

    def close(self) -> None:
        """Releases files and connections."""
        super().close()
        for other in self.beside:
            other.close()

    def prepare(self, rows: pa.Table) -> EventColumns:
        """See ``Projection``: those rows that count, by entity and in canonical order."""
        columns = event_columns(self.plan, rows)
        counts = eligible(self.plan, columns)
        if not counts.all():
            columns = take(columns, np.flatnonzero(counts))
        return take(columns, canonical(columns))

    def apply(self, txn: Transaction | Rebuild, seen: EventColumns) -> int:
        """See ``Projection``."""
        unplaced = 0
        for first, last, names, edges in _parts(self.plan, seen):
            part = (seen.times[first:last], seen.orders[first:last], seen.values[first:last])
            states, late = apply_events(self.plan, txn.get(names), edges - first, *part)
            txn.put(names, states)
            unplaced += late
        return unplaced


class BoundReader:
    """Reads stored features; made by ``OnlineState.bind``. Safe to share between threads."""

    def __init__(self, online: OnlineState) -> None:
        self._store, self._plan = online.store, online.plan
        view = online.plan.view
        self._beside = [(state, place) for state, (_, place) in zip(online.beside, view.beside, strict=True)]
        self._ttl_us = microseconds(view.ttl)
        self._entity = online.contract.entity

    def read(
        self,
        entities: Sequence[str],
        now_us: int,
        inputs: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    ) -> Read:
        """The stored features of ``entities`` at ``now_us``; those of each entity from one snapshot.

        ``inputs`` are those of the requests, by which neighbours and dimensions are found; without them (None) what
        takes more than the entity to be found is MISSING.
        """
        plan = self._plan
        values, status, age = vectors(plan, len(entities))
        known = np.zeros(len(entities), np.bool_)
        with self._store.reading(entities) as snapshot:
            head = unpack(snapshot.head)
            for place, blob in enumerate(snapshot.blobs):
                known[place] = blob is not None
                state = plan.empty_state if blob is None else words(plan, blob)
                read_into(plan, state, now_us, values, status, age, place)
        others = []
        for other, at in self._beside:
            found = self._find(other, entities, inputs, now_us)
            if found is None:
                values[at], status[:, at], age[at] = np.nan, Status.MISSING, np.nan
                continue
            values[at] = found[0].values
            mark(found[0], np.full(len(entities), now_us), self._ttl_of(other), status[:, at], age[at])
            others.append(found[1])
        return Read(values.T, status, age.T, head.applied, head.generation, known, tuple(others))

    def _find(
        self,
        other: NeighbourState | DimensionState,
        entities: Sequence[str],
        inputs: Mapping[str, Sequence[Any] | np.ndarray] | None,
        now_us: int,
    ) -> tuple[Found, tuple[int, int]] | None:
        if isinstance(other, DimensionState):
            if other.dimension.key == self._entity:
                return other.read(entities, now_us)
            return None if inputs is None else other.read(list(inputs[other.dimension.key]), now_us)
        return None if inputs is None else other.read(inputs, now_us)

    def _ttl_of(self, other: NeighbourState | DimensionState) -> int:
        return ttl_of(other.dimension) if isinstance(other, DimensionState) else self._ttl_us


def _parts(plan: Plan, seen: EventColumns) -> Iterator[tuple[int, int, list[str], np.ndarray]]:
    """Entities whose states and events fit into memory at once: first and last row, names, and where each one begins.

    ``seen`` stands by entity; ``edges`` int64[e + 1] are rows of ``seen``.
    """
    edges = np.searchsorted(seen.entities, np.arange(len(seen.names) + 1))
    present = np.flatnonzero(np.diff(edges))
    words = np.cumsum(plan.fixed_words + np.diff(edges)[present] * plan.raw_words)
    at = 0
    while at < len(present):
        upto = max(at + 1, int(np.searchsorted(words, (words[at - 1] if at else 0) + _WORDS_AT_ONCE)))
        chosen = present[at:upto]
        bounds = np.append(edges[chosen], edges[chosen[-1] + 1])
        yield int(bounds[0]), int(bounds[-1]), [seen.names[place] for place in chosen.tolist()], bounds
        at = upto
