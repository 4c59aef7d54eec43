"""State that is a projection of an ingest log: what a log's records make of a store, once each.

State carries the log sequence it has applied, changed together with the values, so whatever process is
killed at whatever time, the gap is replayed and no event is applied twice.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from cluster.log import Log
from pipelines.contracts.events import SEQUENCE, decode_events, layouts_of
from pipelines.features.state import StateError
from pipelines.features.stores import Rebuild, Store, Transaction
from pipelines.spec import Contract

T = TypeVar("T")
Prepared = TypeVar("Prepared")

NO_TABLE = -1  # the table version of generation 0, which was never materialized
_HEAD = struct.Struct("<BQQQ")  # format, applied sequence, generation, events that could not be placed
_FORMAT = 1
_VERSION = struct.Struct("<q")


class StateGap(StateError):
    """Records that a state has not applied have left the log; the message says what rebuilds it."""


class Head(NamedTuple):
    """What a state has applied: the log through ``applied``, on top of the rows that ``generation`` was made from."""

    applied: int = 0
    generation: int = 0
    unplaced: int = 0


class Projection(ABC, Generic[Prepared]):
    """The state in ``store`` of events under ``contract``; one object per process.

    ``use_case`` is the name of the page that the state belongs to, for messages.
    """

    def __init__(self, store: Store, use_case: str, contract: Contract) -> None:
        self.store = store
        self.contract = contract
        self._page = use_case

    @abstractmethod
    def prepare(self, rows: pa.Table) -> Prepared:
        """What ``apply`` wants of rows of the events table; any thread may ask, and the store is not looked at."""

    @abstractmethod
    def apply(self, txn: Transaction | Rebuild, seen: Prepared) -> int:
        """Applies what ``prepare`` made to what it touches; how many events could not be placed."""

    def project(self, log: Log, stream: str = "events") -> int:
        """Applies every log record not yet applied and returns the last applied sequence.

        Any process may call it at any time. Raises ``StateGap`` when records that are missing here have left the
        log: then ``materialize`` rebuilds the state.
        """

        def advance(txn: Transaction) -> int:
            before = unpack(txn.head)
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

    def gap(self, log: Log, stream: str = "events") -> StateGap | None:
        """What ``project`` would raise, without waiting for a writer; None when the log has what the state lacks."""
        return self._gap(self._present(), log, stream)

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
        entities; another thread makes and prepares the next part while one is applied. Readers see the old state or
        the new one, and the new one has applied all that the old one had. Returns the new generation, which remembers
        ``table_version``. Raises ``StateError`` when another rebuild was faster.
        """
        with self.store.rebuilding() as rebuild:
            before = unpack(rebuild.head)
            covered, unplaced = drained, 0
            parts = [events] if isinstance(events, pa.Table) else events
            for last, seen in _ahead((pc.max(part.column(SEQUENCE)).as_py(), self.prepare(part)) for part in parts):
                unplaced += self.apply(rebuild, seen)
                covered = max(covered, last or 0)
            head = Head(covered, before.generation + 1, unplaced)
            while True:
                while (further := self._advance(rebuild, head, log, stream)) != head:
                    head = further
                present = unpack(rebuild.present())
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

    def remembers(self, generation: int) -> bool:
        """Whether ``generation`` can tell: one of a state that was lost since cannot."""
        return generation == 0 or self.store.note(generation) is not None

    def applied(self) -> int:
        """The last log sequence that the state has applied."""
        return self._present().applied

    def unplaced(self) -> int:
        """Events that came when later ones were settled: of an entity that floods, or by a clock that went back."""
        return self._present().unplaced

    def position(self) -> tuple[int, int]:
        """(generation, last applied log sequence): while it stays the same, so does everything in the state."""
        head = self._present()
        return head.generation, head.applied

    def close(self) -> None:
        """Releases files and connections."""
        self.store.close()

    def _present(self) -> Head:
        with self.store.reading() as snapshot:
            return unpack(snapshot.head)

    def _advance(self, txn: Transaction | Rebuild, head: Head, log: Log, stream: str) -> Head:
        """Applies the next records of the log, if there are any."""
        if (gap := self._gap(head, log, stream)) is not None:
            raise gap
        records = log.read(stream, head.applied, self.store.records_at_once)
        if not records:
            return head
        rows = decode_events(
            self.contract,
            [record.value for record in records],
            [record.known_at_us for record in records],
            [record.sequence for record in records],
            load_id="",
            buckets=1,
            layouts=lambda: layouts_of(log),
        )
        return Head(records[-1].sequence, head.generation, head.unplaced + self.apply(txn, self.prepare(rows)))

    def _gap(self, head: Head, log: Log, stream: str) -> StateGap | None:
        first, last = log.first(stream), log.last(stream)
        if first <= head.applied + 1 and last >= head.applied:
            return None
        return StateGap(
            f"the state of {self._page!r} has log sequence {head.applied}, but the log {log.where} holds "
            f"{first} to {last}; rebuild the state from the newest events table with "
            f"`python -m pipelines.backfill {self._page} --materialize`"
        )


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """The items; while one is worked on, another thread makes the next."""
    making = iter(items)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(lambda: list(islice(making, 1)))
        while made := following.result():
            following = thread.submit(lambda: list(islice(making, 1)))
            yield made[0]


def unpack(found: bytes | None) -> Head:
    """The head of a snapshot; ``StateError`` when another format wrote it."""
    if found is None:
        return Head()
    if found[0] != _FORMAT:
        raise StateError(f"the state's head has format {found[0]}, this code reads {_FORMAT}: rebuild the state")
    return Head(*_HEAD.unpack(found)[1:])


def _pack(head: Head) -> bytes:
    return _HEAD.pack(_FORMAT, head.applied, head.generation, head.unplaced)
