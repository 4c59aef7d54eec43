"""The online side of features: entity state as a projection of the ingest log, and its bound reader.

State carries the log sequence it has applied, changed together with the values, so whatever process is
killed at whatever time, the gap is replayed and no event is applied twice. Where state and log are kept, in LMDB or in
Redis, is decided here by the settings and known to nothing above.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.log import DurableLog, Log
from cluster.settings import Settings
from pipelines.contracts.events import SEQUENCE, decode_events
from pipelines.features.served import Status
from pipelines.features.state import StateError, apply_events, read_into, vectors, words
from pipelines.features.stores import Rebuild, Transaction, open_store
from pipelines.features.windows import EventColumns, Plan, compile_plan, eligible, event_columns, take
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds

__all__ = ["NO_TABLE", "BoundReader", "OnlineState", "Read", "Status", "open_log", "open_state"]

NO_TABLE = -1  # the table version of generation 0, which was never materialized
_HEAD = struct.Struct("<BQQQ")  # format, applied sequence, generation, events that could not be placed
_FORMAT = 1
_VERSION = struct.Struct("<q")
_WORDS_AT_ONCE = 4 << 20  # of states that are changed by one call of a kernel


@dataclass(frozen=True, slots=True)
class Read:
    """Stored features of n entities: values, age_s float64[n, s] (seconds), status uint8[n, s], known
    bool[n].

    All come from one snapshot: the state of ``generation`` with every log record up to ``sequence``. An
    entity that is not ``known`` has the features of an empty state.
    """

    values: np.ndarray
    status: np.ndarray
    age_s: np.ndarray
    sequence: int
    generation: int
    known: np.ndarray


@dataclass(frozen=True, slots=True)
class _Head:
    applied: int = 0
    generation: int = 0
    unplaced: int = 0


def state_path(settings: Settings, use_case: UseCase) -> Path:
    """The directory of the use case's state on this node."""
    return settings.state_dir / use_case.name / "views"


def log_path(settings: Settings, use_case: UseCase) -> Path:
    """The directory of the use case's ingest log on this node."""
    return settings.state_dir / use_case.name / "log"


def open_log(settings: Settings, use_case: UseCase) -> Log:
    """The use case's ingest log. Its ids are remembered for as long as an event can reach state."""
    contract = use_case.contract
    lasting = microseconds(contract.lateness + contract.future) + 60_000_000
    remember_us = max(settings.remember_seconds * 1_000_000, lasting)
    if settings.state_url is None:
        return DurableLog(log_path(settings, use_case), remember_us=remember_us)
    from cluster.redis_log import RedisLog

    durability = settings.state_durability
    return RedisLog(
        settings.state_url,
        use_case.name,
        remember_us=remember_us,
        durability=durability,
        most_pending=settings.log_rows,
    )


def open_state(settings: Settings, use_case: UseCase) -> OnlineState:
    """The state of the use case's present view."""
    return OnlineState(settings.state_url or state_path(settings, use_case), use_case)


class OnlineState:
    """The state of one use case's present view; one object per process.

    ``place`` is a directory, for LMDB, or the URL of a Redis server. Each view fingerprint has a store of its own
    there, so views of several versions live side by side.
    """

    def __init__(self, place: Path | str, use_case: UseCase) -> None:
        self.use_case = use_case
        self.plan = compile_plan(use_case.view, use_case.contract)
        self.store = open_store(place, use_case.name, self.plan.fingerprint)

    def project(self, log: Log, stream: str = "events") -> int:
        """Applies every log record not yet applied and returns the last applied sequence.

        Any process may call it at any time. Raises ``StateError`` when records that are missing here have left the
        log: then ``materialize`` rebuilds the state.
        """

        def advance(txn: Transaction) -> int:
            before = _head(txn.head)
            head = self._advance(txn, before, log, stream)
            if head != before:
                txn.put_head(_pack(head))
            return head.applied

        applied, last = self.applied(), log.last(stream)
        if applied == last:
            return applied  # without the writer lock, which other processes want
        while (applied := self.store.change(advance)) < last:
            pass
        return applied

    def materialize(
        self,
        events: pa.Table | Iterable[pa.Table],
        table_version: int,
        log: Log,
        stream: str = "events",
        drained: int = 0,
    ) -> int:
        """Rebuilds all state from the rows of one version of the events table and the log records after them.

        ``drained`` is the last sequence that left the log for that version; it may be higher than any row's, because a
        drained duplicate leaves no row. ``events`` is the whole table or parts of it, each with all rows of its
        entities. Readers see the old state or the new one, and the new one has applied all that the old one had.
        Returns the new generation, which remembers ``table_version``. Raises ``StateError`` when another rebuild was
        faster.
        """
        with self.store.rebuilding() as rebuild:
            before = _head(rebuild.head)
            covered, unplaced = drained, 0
            for part in [events] if isinstance(events, pa.Table) else events:
                unplaced += self._apply(rebuild, part)
                covered = max(covered, pc.max(part.column(SEQUENCE)).as_py() or 0)
            head = _Head(covered, before.generation + 1, unplaced)
            while True:
                while (further := self._advance(rebuild, head, log, stream)) != head:
                    head = further
                present = _head(rebuild.present())
                if present.generation != before.generation:
                    raise StateError(f"another rebuild of {self.store.where} was published since this one began")
                # A state that nobody has changed since may be ahead: it was made from a log that is no more.
                if present.applied > head.applied and present != before:
                    continue
                if rebuild.publish(_pack(head), head.generation, _VERSION.pack(table_version)):
                    return head.generation

    def generation(self, generation: int) -> int:
        """The events table version that a generation was made from; ``NO_TABLE`` for generation 0."""
        if generation == 0:
            return NO_TABLE
        found = self.store.note(generation)
        if found is None:
            raise StateError(f"state in {self.store.where} has no generation {generation}")
        return int(_VERSION.unpack(found)[0])

    def applied(self) -> int:
        """The last log sequence that the state has applied."""
        return self._present().applied

    def unplaced(self) -> int:
        """Events that came too late to be placed; above zero only when a clock went backwards."""
        return self._present().unplaced

    def entities(self) -> int:
        """How many entities have state."""
        return self.store.count()

    def names(self) -> list[str]:
        """The entities that have state, ascending; some whose name exceeds 500 bytes may be left out."""
        return self.store.names()

    def position(self) -> tuple[int, int]:
        """(generation, last applied log sequence): while it stays the same, so does every entity's state."""
        head = self._present()
        return head.generation, head.applied

    def bind(self) -> BoundReader:
        """A reader of this state."""
        return BoundReader(self)

    def close(self) -> None:
        """Releases files and connections."""
        self.store.close()

    def _present(self) -> _Head:
        with self.store.reading() as snapshot:
            return _head(snapshot.head)

    def _advance(self, txn: Transaction | Rebuild, head: _Head, log: Log, stream: str) -> _Head:
        """Applies the next records of the log, if there are any."""
        first, last = log.first(stream), log.last(stream)
        if first > head.applied + 1 or last < head.applied:
            raise StateError(
                f"the state of {self.use_case.name!r} has log sequence {head.applied}, but the log {log.where} holds "
                f"{first} to {last}; rebuild the state from the newest events table with "
                f"`python -m pipelines.backfill {self.use_case.name} --materialize`"
            )
        records = log.read(stream, head.applied, self.store.records_at_once)
        if not records:
            return head
        rows = decode_events(
            self.use_case.contract,
            [record.value for record in records],
            [record.known_at_us for record in records],
            [record.sequence for record in records],
            load_id="",
            buckets=1,
        )
        return _Head(records[-1].sequence, head.generation, head.unplaced + self._apply(txn, rows))

    def _apply(self, txn: Transaction | Rebuild, rows: pa.Table) -> int:
        """Applies rows of the events table to the entities they name; how many could not be placed."""
        columns = event_columns(self.plan, rows)
        kept = np.flatnonzero(eligible(self.plan, columns))
        order = np.lexsort((columns.orders[kept], columns.times[kept], columns.entities[kept]))
        seen, unplaced = take(columns, kept[order]), 0
        for first, last, names, edges in _parts(self.plan, seen):
            part = (seen.times[first:last], seen.orders[first:last], seen.values[first:last])
            states, late = apply_events(self.plan, list(txn.get(names)), edges - first, *part)
            for name, state in zip(names, states, strict=True):
                txn.put(name, state)
            unplaced += late
        return unplaced


class BoundReader:
    """Reads stored features; made by ``OnlineState.bind``. Safe to share between threads."""

    def __init__(self, online: OnlineState) -> None:
        self._store, self._plan = online.store, online.plan

    def read(self, entities: Sequence[str], now_us: int) -> Read:
        """The stored features of ``entities`` at ``now_us``, all from one snapshot."""
        plan = self._plan
        values, status, age = vectors(plan, len(entities))
        known = np.zeros(len(entities), np.bool_)
        with self._store.reading(entities) as snapshot:
            head = _head(snapshot.head)
            for place, blob in enumerate(snapshot.blobs):
                known[place] = blob is not None
                state = plan.empty_state if blob is None else words(plan, blob)
                read_into(plan, state, now_us, values, status, age, place)
        return Read(values.T, status, age.T, head.applied, head.generation, known)


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


def _head(found: bytes | None) -> _Head:
    if found is None:
        return _Head()
    if found[0] != _FORMAT:
        raise StateError(f"the state's head has format {found[0]}, this code reads {_FORMAT}: rebuild the state")
    return _Head(*_HEAD.unpack(found)[1:])


def _pack(head: _Head) -> bytes:
    return _HEAD.pack(_FORMAT, head.applied, head.generation, head.unplaced)
