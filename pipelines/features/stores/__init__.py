"""Where entity state is kept: by entity, under one head that says what has been applied to all of them.

A reader sees a head and the entities that belong to it. A writer changes entities and head together, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from pipelines.features.state import StateError

T = TypeVar("T")
Blob: TypeAlias = bytes | memoryview


class StoreFull(StateError):
    """The store has used all the room it was given."""


class StateUnavailable(StateError, ConnectionError):
    """The store's server or disk does not answer or refuses; state is as before the call, or as after it."""


class Snapshot(NamedTuple):
    """A head and entities of the same moment; valid inside the block that gave it.

    ``head`` is what was last given to ``put_head`` or ``publish``, None for a new store. ``blobs`` are the states of
    the entities asked for, in order, None for an unknown one; they can be gone through once.
    """

    head: bytes | None
    blobs: Iterable[Blob | None]


class Transaction(Protocol):
    """Changes to some entities and the head."""

    head: bytes | None

    def get(self, entities: Sequence[str]) -> Sequence[Blob | None]:
        """The entities' states, in order; valid until the next ``put``."""

    def put(self, entities: Sequence[str], blobs: Sequence[Blob]) -> None:
        """Replaces the entities' states, which stand in the same order."""

    def put_head(self, head: bytes) -> None:
        """Replaces the head: to be called once, when the entities are as it says."""


class Rebuild(Protocol):
    """A new set of entities, empty at first, that takes the old one's place when it is published."""

    head: bytes | None
    """The head when the rebuild began."""

    def get(self, entities: Sequence[str]) -> Sequence[Blob | None]:
        """As in ``Transaction``, of the new entities."""

    def put(self, entities: Sequence[str], blobs: Sequence[Blob]) -> None:
        """Sets new entities' states, which stand in the same order."""

    def present(self) -> bytes | None:
        """The head that readers see now: others may go on changing the old entities."""

    def publish(self, head: bytes, generation: int, note: bytes) -> bool:
        """Makes the new entities, under ``head``, the ones that readers see, and keeps ``note`` for ``generation``.

        False, with nothing changed, when readers no longer see the head that ``present`` last gave. Raises
        ``StateError`` when another rebuild has begun since this one.
        """


class Store(Protocol):
    """State by entity; open it once per process. Threads may share it.

    ``where`` names its place in messages; ``records_at_once`` is how many log records one change should apply. A store
    on a server raises ``StateUnavailable`` from any call when the server does not answer, one on a disk from calls that
    write when the disk is full or broken.
    """

    where: str
    records_at_once: int

    def reading(self, entities: Sequence[str] = ()) -> AbstractContextManager[Snapshot]:
        """A snapshot; it never waits for a writer."""

    def change(self, make: Callable[[Transaction], T]) -> T:
        """Calls ``make`` and stores what it put, all at once or, if it raises, not at all; returns what it returned.

        ``make`` is called again, with a new transaction, when another writer was faster, so all it does must be in
        the transaction. Raises ``StoreFull``.
        """

    def rebuilding(self) -> AbstractContextManager[Rebuild]:
        """A rebuild, which must be published before the block ends; if it is not, or the block raises, nothing changes.

        What a killed rebuild left is removed first. Raises ``StoreFull``.
        """

    def note(self, generation: int) -> bytes | None:
        """The note of a published generation."""

    def count(self) -> int:
        """How many entities have state."""

    def names(self) -> list[str]:
        """Every entity that has state, ascending; a store may leave out those whose name exceeds 500 bytes."""

    def close(self) -> None:
        """Lets go of files and connections; the object is of no use afterwards."""


def open_store(place: Path | str, name: str, fingerprint: str) -> Store:
    """The state of the view ``fingerprint`` of use case ``name``: in LMDB below a directory, or in Redis by URL."""
    if isinstance(place, str) and "://" in place:
        from pipelines.features.stores.redis import RedisStore

        return RedisStore(place, f"{name}:{fingerprint}")
    from pipelines.features.stores.lmdb import LmdbStore

    return LmdbStore(Path(place) / fingerprint)
