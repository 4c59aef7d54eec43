"""The online side of features: entity state as a projection of the ingest log, and its bound reader.

State carries the log sequence it has applied, in one transaction with the values, so whatever process is
killed at whatever time, the gap is replayed and no event is applied twice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.log import DurableLog
from cluster.settings import Settings
from pipelines.contracts.events import SEQUENCE, decode_events
from pipelines.features.offline import by_entity, take
from pipelines.features.served import Status
from pipelines.features.state import EntityState, StateError, read_into, words
from pipelines.features.stores import Store, Transaction
from pipelines.features.windows import compile_plan, eligible, event_columns
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds

__all__ = ["NO_TABLE", "BoundReader", "OnlineState", "Read", "Status"]

NO_TABLE = -1  # the table version of generation 0, which was never materialized
_HEAD = struct.Struct("<BQQQ")  # format, applied sequence, generation, events that could not be placed
_FORMAT = 1
_CHUNK = 20_000
_VERSION = struct.Struct("<q")


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


def open_log(settings: Settings, use_case: UseCase) -> DurableLog:
    """The use case's ingest log on this node. Its ids are remembered for as long as an event can reach state."""
    contract = use_case.contract
    lasting = microseconds(contract.lateness + contract.future) + 60_000_000
    remember_us = max(settings.remember_seconds * 1_000_000, lasting)
    return DurableLog(log_path(settings, use_case), remember_us=remember_us)


class OnlineState:
    """The state of one use case's present view on this node; one object per process.

    Each view fingerprint has a store of its own below ``path``, so views of several versions live side by
    side.
    """

    def __init__(self, path: Path | str, use_case: UseCase, *, map_bytes: int = 64 << 30) -> None:
        self.use_case = use_case
        self.plan = compile_plan(use_case.view, use_case.contract)
        self.store = Store(Path(path) / self.plan.fingerprint, map_bytes=map_bytes)

    def project(self, log: DurableLog, stream: str = "events") -> int:
        """Applies every log record not yet applied and returns the last applied sequence.

        One write transaction; any process may call it at any time. Raises ``StateError`` when records that
        are missing here have left the log: then ``materialize`` rebuilds the state.
        """
        applied = self.applied()
        if log.last(stream) == applied:
            return applied  # without the writer lock, which other processes want
        with self.store.writing() as txn:
            head = self._advance(txn, _head(txn), log, stream)
            _put_head(txn, head)
        return head.applied

    def materialize(
        self,
        events: pa.Table | Iterable[pa.Table],
        table_version: int,
        log: DurableLog,
        stream: str = "events",
        drained: int = 0,
    ) -> int:
        """Rebuilds all state from the rows of one version of the events table and the log records after them.

        ``drained`` is the last sequence that left the log for that version; it may be higher than any row's, because a
        drained duplicate leaves no row. ``events`` is the whole table or parts of it, each with all rows of its
        entities. Readers see the old state or the new one. Returns the new generation, which remembers
        ``table_version``.
        """
        with self.store.writing() as txn:
            before = _head(txn)
            txn.clear()
            covered, unplaced = drained, 0
            for part in [events] if isinstance(events, pa.Table) else events:
                unplaced += self._apply(txn, part)
                covered = max(covered, pc.max(part.column(SEQUENCE)).as_py() or 0)
            generation = before.generation + 1
            txn.put_note(_generation(generation), _VERSION.pack(table_version))
            head = self._advance(txn, _Head(covered, generation, unplaced), log, stream)
            _put_head(txn, head)
        return generation

    def generation(self, generation: int) -> int:
        """The events table version that a generation was made from; ``NO_TABLE`` for generation 0."""
        if generation == 0:
            return NO_TABLE
        with self.store.reading() as txn:
            found = txn.note(_generation(generation))
        if found is None:
            raise StateError(f"state in {self.store.path} has no generation {generation}")
        return int(_VERSION.unpack(found)[0])

    def applied(self) -> int:
        """The last log sequence that the state has applied."""
        with self.store.reading() as txn:
            return _head(txn).applied

    def unplaced(self) -> int:
        """Events that came too late to be placed; above zero only when a clock went backwards."""
        with self.store.reading() as txn:
            return _head(txn).unplaced

    def entities(self) -> int:
        """How many entities have state."""
        with self.store.reading() as txn:
            return txn.count()

    def names(self) -> list[str]:
        """The entities that have state, ascending, without those whose name exceeds 500 bytes."""
        with self.store.reading() as txn:
            return txn.names()

    def position(self) -> tuple[int, int]:
        """(generation, last applied log sequence): while it stays the same, so does every entity's state."""
        with self.store.reading() as txn:
            head = _head(txn)
        return head.generation, head.applied

    def bind(self) -> BoundReader:
        """A reader of this state."""
        return BoundReader(self)

    def close(self) -> None:
        """Releases the files."""
        self.store.close()

    def _advance(self, txn: Transaction, head: _Head, log: DurableLog, stream: str) -> _Head:
        applied, unplaced = head.applied, head.unplaced
        if log.first(stream) > applied + 1 or log.last(stream) < applied:
            raise StateError(
                f"the state of {self.use_case.name!r} has log sequence {applied}, but the log {log.path} "
                "holds "
                f"{log.first(stream)} to {log.last(stream)}; rebuild the state from the newest events "
                "table with "
                f"`python -m pipelines.backfill {self.use_case.name} --materialize`"
            )
        while records := log.read(stream, applied, _CHUNK):
            rows = decode_events(
                self.use_case.contract,
                [record.value for record in records],
                [record.known_at_us for record in records],
                [record.sequence for record in records],
                load_id="",
                buckets=1,
            )
            unplaced += self._apply(txn, rows)
            applied = records[-1].sequence
        return _Head(applied, head.generation, unplaced)

    def _apply(self, txn: Transaction, rows: pa.Table) -> int:
        """Applies rows of the events table to the entities they name; how many could not be placed."""
        columns = event_columns(self.plan, rows)
        kept = np.flatnonzero(eligible(self.plan, columns))
        order = kept[np.lexsort((columns.orders[kept], columns.times[kept]))]
        unplaced = 0
        for entity, mine in by_entity(columns, order):
            blob = txn.get(entity)
            state = EntityState(self.plan) if blob is None else EntityState.from_bytes(self.plan, blob)
            before, seen = state.unplaced, take(columns, mine)
            state.apply(seen.times, seen.orders, seen.values)
            unplaced += state.unplaced - before
            txn.put(entity, state.to_bytes())
        return unplaced


class BoundReader:
    """Reads stored features; made by ``OnlineState.bind``. Safe to share between threads."""

    def __init__(self, online: OnlineState) -> None:
        self._store, self._plan = online.store, online.plan

    def read(self, entities: Sequence[str], now_us: int) -> Read:
        """The stored features of ``entities`` at ``now_us``, all from one snapshot."""
        plan, shape = self._plan, (len(entities), len(self._plan.features))
        values, status, age = np.empty(shape), np.empty(shape, np.uint8), np.empty(shape)
        known = np.zeros(len(entities), np.bool_)
        with self._store.reading() as txn:
            head = _head(txn)
            for place, entity in enumerate(entities):
                blob = txn.get(entity)
                known[place] = blob is not None
                state = plan.empty_state if blob is None else words(plan, blob)
                read_into(plan, state, now_us, values[place], status[place], age[place])
        return Read(values, status, age, head.applied, head.generation, known)


def _head(txn: Transaction) -> _Head:
    found = txn.note(b"head")
    if found is None:
        return _Head()
    if found[0] != _FORMAT:
        raise StateError(f"the state's head has format {found[0]}, this code reads {_FORMAT}: rebuild the state")
    return _Head(*_HEAD.unpack(found)[1:])


def _put_head(txn: Transaction, head: _Head) -> None:
    txn.put_note(b"head", _HEAD.pack(_FORMAT, head.applied, head.generation, head.unplaced))


def _generation(generation: int) -> bytes:
    return b"generation/" + str(generation).encode()
