"""Entity state in Redis, for several nodes: all keys of one view of one use case lie in one hash slot.

The entities are one hash, together with their head; a rebuild fills another, and ``current`` names the one in force.
So a read is one HMGET, whose head and entities are of one moment, and a change is one script, which compares the head
with the one that the change was made from.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import redis

from cluster.redis_server import RedisServer
from pipelines.features.state import StateError
from pipelines.features.stores import Blob, Rebuild, Snapshot, StateUnavailable, StoreFull, T, Transaction

_HEAD = b"head"  # the names of entities are preceded by "="
_READ_S = 1.0  # a gateway's event loop waits for it, and answers nobody else meanwhile
_CHUNK_BYTES = 4 << 20  # of a rebuild, sent at once

# In all scripts the name of a hash is an argument beside its key, because ``current`` holds names.
# KEYS: current, the hash. ARGV: the name that current must have ('' for none), the hash's name, the head that it must
# have ('' for none), its new head, then entities and their states. Returns whether it was as it must be.
_CHANGE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if (redis.call('HGET', KEYS[2], 'head') or '') ~= ARGV[3] then return 0 end
if ARGV[1] == '' then redis.call('SET', KEYS[1], ARGV[2]) end
redis.call('HSET', KEYS[2], 'head', ARGV[4])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
"""
# KEYS: building, the hash of a rebuild. ARGV: that one's name. A hash that is in force is no longer being built.
_DISCARD = """
if redis.call('SREM', KEYS[1], ARGV[1]) == 1 then redis.call('UNLINK', KEYS[2]) end
"""
# KEYS: building, the new hash. ARGV: its name, then entities and their states. Returns whether it may still be filled.
_FILL = """
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 0 then return 0 end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
"""
# KEYS: current, the hash in force, building, the new hash, notes. ARGV: the name that current must have ('' for none),
# the new name, the head in force ('' for none), the new head, the generation, its note.
# Returns 1 when done, 0 when the head in force is another, -1 when another rebuild has begun.
_PUBLISH = """
local current = redis.call('GET', KEYS[1]) or ''
if current == ARGV[2] then return 1 end  -- asked again, because the answer was lost
if redis.call('SISMEMBER', KEYS[3], ARGV[2]) == 0 then return -1 end
if current ~= ARGV[1] or (redis.call('HGET', KEYS[2], 'head') or '') ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[4], 'head', ARGV[4])
redis.call('HSET', KEYS[5], ARGV[5], ARGV[6])
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SREM', KEYS[3], ARGV[2])
redis.call('UNLINK', KEYS[2])
return 1
"""


class RedisStore:
    """The ``Store`` of ``name`` (use case and view) in the Redis server at ``url``, for processes of any node."""

    records_at_once = 1_000  # one change is one script, and all its states are in memory

    def __init__(self, url: str, name: str) -> None:
        self._server, self._reads = RedisServer(url), RedisServer(url, answer_s=_READ_S)
        self.client = self._server.client
        self._slot = f"{{tidegate:{name}}}:".encode()
        self.where = f"{self._server.where} {self._slot.decode()}"
        scripts = map(self._server.script, (_CHANGE, _DISCARD, _FILL, _PUBLISH))
        self.change_script, self.discard_script, self.fill_script, self.publish_script = scripts
        self._name = b""  # of the hash that was in force when it was last looked at

    @contextmanager
    def reading(self, entities: Sequence[str] = ()) -> Iterator[Snapshot]:
        """See ``Store``; one round trip, and two more after a rebuild."""
        seen = self.look([_field(entity) for entity in entities])
        yield Snapshot(seen.head, seen.blobs)

    def change(self, make: Callable[[Transaction], T]) -> T:
        """See ``Store``."""
        while True:
            before = self.look([])
            transaction = _Change(self, before)
            try:
                made = make(transaction)
            except StateError:
                # What was found wrong may follow from a head that another writer has moved on since.
                if self.look([]).same_as(before):
                    raise
                continue
            if transaction.store():
                return made

    @contextmanager
    def rebuilding(self) -> Iterator[Rebuild]:
        """See ``Store``; while it lasts, others go on changing the entities that readers see."""
        building = self.key(b"building")
        with self.asking():
            left: Any = self.client.smembers(building)
            for name in left:
                self.discard_script([building, self.hash_of(name)], [name])
        rebuild = _Rebuild(self, self.look([], to_rebuild=True))
        with self.asking():
            self.client.sadd(building, rebuild.name)
        try:
            yield rebuild
            if not rebuild.published:
                raise RuntimeError(f"the rebuild of {self.where} ended without being published")
        finally:
            if not rebuild.published:
                with self.asking():
                    self.discard_script([building, self.hash_of(rebuild.name)], [rebuild.name])

    def note(self, generation: int) -> bytes | None:
        """See ``Store``."""
        with self.asking():
            found: bytes | None = self.client.hget(self.key(b"notes"), str(generation))
        return found

    def count(self) -> int:
        """See ``Store``."""
        while name := self.look([]).name:
            with self.asking():
                fields: Any = self.client.hlen(self.hash_of(name))
            if fields:  # none when a rebuild has taken the hash away since the look
                return int(fields) - 1
        return 0

    def names(self) -> list[str]:
        """See ``Store``; none is left out."""
        while name := self.look([]).name:
            with self.asking():
                fields: Any = self.client.hkeys(self.hash_of(name))
            if fields:
                return sorted(field[1:].decode() for field in fields if field != _HEAD)
        return []

    def close(self) -> None:
        """See ``Store``."""
        self._server.close()
        self._reads.close()

    def key(self, name: bytes) -> bytes:
        """A key of the view's slot."""
        return self._slot + name

    def hash_of(self, name: bytes) -> bytes:
        """The key of a hash of entities."""
        return self._slot + b"entities:" + name

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Turns the server's errors into those of a store."""
        try:
            yield
        except redis.OutOfMemoryError:
            raise StoreFull(
                f"the server of {self.where} has used its maxmemory: give it more, or put fewer entities or shorter "
                "windows there"
            ) from None
        except redis.RedisError as error:
            raise StateUnavailable(f"the state in {self.where} does not answer: {error}") from error

    def look(self, fields: list[bytes], *, to_rebuild: bool = False) -> _Look:
        """The head and these fields of the hash in force, of one moment.

        Raises ``StateError`` when the hash is lost, which is as good as a new store to who is about to rebuild it.
        """
        asked = [_HEAD, *fields]
        with self.asking():
            while True:
                name = self._name
                if name:
                    found: Any = self._reads.client.hmget(self.hash_of(name), asked)
                    if found[0] is not None:
                        return _Look(found[0], found[1:], name)
                self._name = self._reads.client.get(self.key(b"current")) or b""
                if not self._name or (self._name == name and to_rebuild):
                    return _Look(None, [None] * len(fields), self._name)
                if self._name == name:
                    raise StateError(
                        f"{self.where} has lost its entities: look whether the server evicts keys, then rebuild the "
                        "state with `python -m pipelines.backfill USECASE --materialize`"
                    )


class _Look(NamedTuple):
    """A ``Snapshot`` of the hash ``name``, which is empty for a new store."""

    head: bytes | None
    blobs: Sequence[Blob | None]
    name: bytes

    def same_as(self, other: _Look) -> bool:
        return (self.name, self.head) == (other.name, other.head)


class _Change:
    """The ``Transaction`` of Redis: keeps what is put, and stores it if the head is still the one it began with."""

    def __init__(self, store: RedisStore, before: _Look) -> None:
        self.head = before.head
        self._store = store
        self._before = before
        self._puts: dict[str, Blob] = {}
        self._new_head: bytes | None = None

    def get(self, entities: Sequence[str]) -> list[Blob | None]:
        # What another writer has changed since this began may come along: then this change is not stored.
        unknown = [entity for entity in entities if entity not in self._puts]
        found = self._store.look([_field(entity) for entity in unknown])
        stored = dict(zip(unknown, found.blobs, strict=True))
        return [self._puts[entity] if entity in self._puts else stored[entity] for entity in entities]

    def put(self, entities: Sequence[str], blobs: Sequence[Blob]) -> None:
        self._puts.update(zip(entities, blobs, strict=True))

    def put_head(self, head: bytes) -> None:
        self._new_head = head

    def store(self) -> bool:
        """Whether it could be stored, or there was nothing to store."""
        if self._new_head is None:
            return True
        store, before = self._store, self._before
        name = before.name or _new_name()
        arguments: list[Any] = [before.name, name, before.head or b"", self._new_head]
        for entity, blob in self._puts.items():
            arguments += (_field(entity), blob)
        with store.asking():
            return bool(store.change_script([store.key(b"current"), store.hash_of(name)], arguments))


class _Rebuild:
    """The ``Rebuild`` of Redis: fills a hash that nobody reads yet, some megabytes at a time."""

    def __init__(self, store: RedisStore, before: _Look) -> None:
        self.name = _new_name()
        self.head = before.head
        self.published = False
        self._store = store
        self._present = before
        self._puts: dict[str, Blob] = {}
        self._bytes = 0

    def get(self, entities: Sequence[str]) -> list[bytes | None]:
        self._send()
        if not entities:
            return []
        with self._store.asking():
            key = self._store.hash_of(self.name)
            found: list[bytes | None] = self._store.client.hmget(key, [_field(entity) for entity in entities])
        return found

    def put(self, entities: Sequence[str], blobs: Sequence[Blob]) -> None:
        for entity, blob in zip(entities, blobs, strict=True):
            self._puts[entity] = blob
            self._bytes += len(blob)
            if self._bytes >= _CHUNK_BYTES:
                self._send()

    def present(self) -> bytes | None:
        self._present = self._store.look([], to_rebuild=True)
        return self._present.head

    def publish(self, head: bytes, generation: int, note: bytes) -> bool:
        self._send()
        store, present = self._store, self._present
        keys = [store.key(b"current"), store.hash_of(present.name), store.key(b"building"), store.hash_of(self.name)]
        keys.append(store.key(b"notes"))
        with store.asking():
            arguments = [present.name, self.name, present.head or b"", head, generation, note]
            done = store.publish_script(keys, arguments)
        if done < 0:
            raise self._superseded()
        self.published = done == 1
        return self.published

    def _send(self) -> None:
        if not self._puts:
            return
        arguments: list[Any] = [self.name]
        for entity, blob in self._puts.items():
            arguments += (_field(entity), blob)
        self._puts, self._bytes = {}, 0
        with self._store.asking():
            keys = [self._store.key(b"building"), self._store.hash_of(self.name)]
            filled = self._store.fill_script(keys, arguments)
        if not filled:
            raise self._superseded()

    def _superseded(self) -> StateError:
        return StateError(f"another rebuild of {self._store.where} has begun since this one, which therefore ends")


def _new_name() -> bytes:
    return secrets.token_hex(8).encode()


def _field(entity: str) -> bytes:
    return b"=" + entity.encode()
