"""Entity state in an LMDB environment that all processes of one node read and write.

Writes are not fsynced, because the ingest log is the truth: after a crash of a process the file is whole, and
after a restart of the machine, when pages may be torn, the store comes up empty and is rebuilt from table and
log.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from pathlib import Path

import lmdb

from cluster.disk import disk_refuses
from pipelines.features.state import StateError
from pipelines.features.stores import Blob, Rebuild, Snapshot, StateUnavailable, StoreFull, T, Transaction

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HEAD = b"head"


class LmdbStore:
    """The ``Store`` below ``path``, for one node. ``map_bytes`` bounds the file, which grows as used."""

    records_at_once = 20_000

    def __init__(self, path: Path | str, *, map_bytes: int = 64 << 30) -> None:
        self.path = Path(path)
        self.where = str(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.map_bytes = map_bytes
        _forget_other_boots(self.path)
        try:
            self._env = lmdb.open(str(self.path), map_size=map_bytes, max_dbs=2, max_readers=1024, sync=False)
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
            raise StateError(
                f"what lies in {self.path} is no state ({error}): move it away, which loses nothing that table and log "
                "do not have, and rebuild the state with `python -m pipelines.backfill USECASE --materialize`"
            ) from error
        self._env.reader_check()  # slots of processes that were killed while reading
        self._entities = self._env.open_db(b"entities")
        self._notes = self._env.open_db(b"notes")

    def reading(self, entities: Sequence[str] = ()) -> AbstractContextManager[Snapshot]:
        """See ``Store``; blobs are buffers in the file."""
        return _Reading(self, entities)

    def change(self, make: Callable[[Transaction], T]) -> T:
        """See ``Store``; it holds the node's only writer lock, so ``make`` is called once."""
        with self._writing() as txn:
            return make(_Writing(self, txn))

    @contextmanager
    def rebuilding(self) -> Iterator[Rebuild]:
        """See ``Store``; it holds the node's only writer lock to the end."""
        with self._writing() as txn:
            rebuild = _Writing(self, txn)
            txn.drop(self._entities, delete=False)
            yield rebuild
            if not rebuild.published:
                raise RuntimeError(f"the rebuild of {self.where} ended without being published")

    def note(self, generation: int) -> bytes | None:
        """See ``Store``."""
        with self._env.begin() as txn:
            found: bytes | None = txn.get(_generation(generation), db=self._notes)
        return found

    def count(self) -> int:
        """See ``Store``."""
        with self._env.begin() as txn:
            return int(txn.stat(self._entities)["entries"])

    def names(self) -> list[str]:
        """See ``Store``; longer names are kept by their hash."""
        with self._env.begin() as txn:
            keys = txn.cursor(db=self._entities).iternext(keys=True, values=False)
            return [bytes(key[1:]).decode() for key in keys if key[:1] == b"="]

    def close(self) -> None:
        """See ``Store``."""
        self._env.close()

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                yield txn
        except lmdb.MapFullError:
            raise StoreFull(
                f"the state in {self.path} has used its {self.map_bytes} bytes: open it with more, or put "
                "fewer entities or shorter windows on this node"
            ) from None
        except lmdb.Error as error:
            if not disk_refuses(error):
                raise
            raise StateUnavailable(
                f"the disk refuses the state in {self.path}: {error}. Make room there; events that the log has taken "
                "are applied then"
            ) from error

    def _head(self, txn: lmdb.Transaction) -> bytes | None:
        found = txn.get(_HEAD, db=self._notes)
        return None if found is None else bytes(found)

    def _get(self, txn: lmdb.Transaction, entities: Sequence[str]) -> Iterator[Blob | None]:
        return (txn.get(_key(entity), db=self._entities) for entity in entities)


class _Reading(AbstractContextManager[Snapshot]):
    """A snapshot; not a generator, because every request pays for it."""

    __slots__ = ("_entities", "_store", "_txn")

    def __init__(self, store: LmdbStore, entities: Sequence[str]) -> None:
        self._store, self._entities = store, entities

    def __enter__(self) -> Snapshot:
        store = self._store
        self._txn = txn = store._env.begin(buffers=True)
        return Snapshot(store._head(txn), store._get(txn, self._entities))

    def __exit__(self, *_: object) -> None:
        self._txn.abort()


class _Writing:
    """Both the ``Transaction`` and the ``Rebuild`` of LMDB, whose own transaction is atomic."""

    def __init__(self, store: LmdbStore, txn: lmdb.Transaction) -> None:
        self._store = store
        self._txn = txn
        self.head = store._head(txn)
        self.published = False

    def get(self, entities: Sequence[str]) -> list[Blob | None]:
        keys = [_key(entity) for entity in entities]
        found: dict[bytes, Blob] = {bytes(key): blob for key, blob in self._cursor().getmulti(keys)}
        return [found.get(key) for key in keys]

    def put(self, entities: Sequence[str], blobs: Sequence[Blob]) -> None:
        self._cursor().putmulti([(_key(entity), blob) for entity, blob in zip(entities, blobs, strict=True)])

    def _cursor(self) -> lmdb.Cursor:
        return self._txn.cursor(db=self._store._entities)

    def put_head(self, head: bytes) -> None:
        self._txn.put(_HEAD, head, db=self._store._notes)

    def present(self) -> bytes | None:
        return self.head

    def publish(self, head: bytes, generation: int, note: bytes) -> bool:
        self._txn.put(_generation(generation), note, db=self._store._notes)
        self.put_head(head)
        self.published = True
        return True


def _generation(generation: int) -> bytes:
    return b"generation/%d" % generation


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
