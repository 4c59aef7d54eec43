"""Where entity state is kept: an LMDB environment that all processes of one node read and write.

Writes are not fsynced, because the ingest log is the truth: after a crash of a process the file is whole, and
after a restart of the machine, when pages may be torn, the store comes up empty and is rebuilt from table and
log.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import lmdb

from pipelines.features.state import StateError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StoreFull(StateError):
    """The store's map is full."""


class Transaction:
    """One consistent view of a store; changes of a writing one become visible all at once."""

    def __init__(self, store: Store, txn: lmdb.Transaction) -> None:
        self._store = store
        self._txn = txn

    def get(self, entity: str) -> memoryview | None:
        """The entity's state; the buffer is valid until the transaction ends or writes."""
        found = self._txn.get(_key(entity), db=self._store.entities)
        return None if found is None else memoryview(found)

    def put(self, entity: str, blob: bytes) -> None:
        """Replaces the entity's state."""
        self._txn.put(_key(entity), blob, db=self._store.entities)

    def count(self) -> int:
        """How many entities have state."""
        return int(self._txn.stat(self._store.entities)["entries"])

    def names(self) -> list[str]:
        """Every entity that has state, ascending; those whose names are kept by their hash are left out."""
        keys = self._txn.cursor(db=self._store.entities).iternext(keys=True, values=False)
        return [bytes(key[1:]).decode() for key in keys if key[:1] == b"="]

    def clear(self) -> None:
        """Forgets every entity."""
        self._txn.drop(self._store.entities, delete=False)

    def note(self, name: bytes) -> bytes | None:
        """A small value kept beside the entities."""
        found = self._txn.get(name, db=self._store.notes)
        return None if found is None else bytes(found)

    def put_note(self, name: bytes, value: bytes) -> None:
        """Replaces a small value."""
        self._txn.put(name, value, db=self._store.notes)


class Store:
    """State by entity below ``path``; open it once per process. ``map_bytes`` bounds the file, which grows as
    used.
    """

    def __init__(self, path: Path | str, *, map_bytes: int = 64 << 30) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.map_bytes = map_bytes
        _forget_other_boots(self.path)
        self._env = lmdb.open(str(self.path), map_size=map_bytes, max_dbs=2, max_readers=1024, sync=False)
        self._env.reader_check()  # slots of processes that were killed while reading
        self.entities = self._env.open_db(b"entities")
        self.notes = self._env.open_db(b"notes")

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """A snapshot; it never waits for a writer."""
        with self._env.begin(buffers=True) as txn:
            yield Transaction(self, txn)

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """All changes of the block or none; holds the node's only writer lock. Raises ``StoreFull``."""
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                yield Transaction(self, txn)
        except lmdb.MapFullError:
            raise StoreFull(
                f"the state in {self.path} has used its {self.map_bytes} bytes: open it with more, or put "
                "fewer "
                "entities or shorter windows on this node"
            ) from None

    def close(self) -> None:
        """Releases the files; the object is of no use afterwards."""
        self._env.close()


def _key(entity: str) -> bytes:
    name = entity.encode()
    # LMDB's keys have at most 511 bytes; a longer name goes by its hash, marked so that it meets no other
    # name.
    return b"=" + name if len(name) <= 500 else b"#" + blake2b(name, digest_size=32).digest()


def _forget_other_boots(path: Path) -> None:
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
    with (path / "boot").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read() == boot and boot:
            return
        for name in ("data.mdb", "lock.mdb"):
            (path / name).unlink(missing_ok=True)
        file.truncate(0)
        file.write(boot)
