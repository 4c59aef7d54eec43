"""The identities that a log remembers for a declared time, in generations that are dropped whole."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import lmdb

_FORMAT = 2
_GENERATIONS = 3
_SLOT = struct.Struct("<Bqq")  # format, end of writing, time at which it may be forgotten
_CLOCK = struct.Struct("<Bq")  # format, latest time seen


class Identities:
    """Sets of identities in ``GENERATIONS + 1`` databases of one LMDB environment.

    A generation takes new identities for half of ``remember_us`` and is dropped ``remember_us`` after
    that, so an identity is remembered for at least ``remember_us`` and at most one and a half times that,
    and three generations are enough. A clock that goes back finds the latest time seen instead.
    """

    DATABASES = _GENERATIONS + 1

    def __init__(self, env: lmdb.Environment, remember_us: int) -> None:
        if remember_us <= 0:
            raise ValueError(f"remember_us must be positive, not {remember_us}")
        self._remember_us = remember_us
        self._span_us = -(-remember_us // (_GENERATIONS - 1))
        self._meta = env.open_db(b"generations")
        self._slots = [env.open_db(b"identities%d" % slot) for slot in range(_GENERATIONS)]

    def at(self, txn: lmdb.Transaction, now_us: int) -> Remembering:
        """The identities as of ``now_us`` inside one write transaction."""
        blob = txn.get(b"clock", db=self._meta)
        now = now_us if blob is None else max(now_us, _read(_CLOCK, blob)[0])
        txn.put(b"clock", _CLOCK.pack(_FORMAT, now), db=self._meta)
        alive, ends = self._drop_forgotten(txn, now)
        writing = [slot for slot in alive if now < ends[slot]]
        if writing:
            return Remembering(txn, [self._slots[s] for s in alive], self._slots[writing[-1]])
        free = [slot for slot in range(_GENERATIONS) if slot not in alive]
        # None is free only after remember_us was shortened: then the newest generation lives on.
        slot = free[0] if free else max(alive, key=lambda s: ends[s])
        end = (now // self._span_us + 1) * self._span_us
        txn.put(b"slot%d" % slot, _SLOT.pack(_FORMAT, end, end + self._remember_us), db=self._meta)
        return Remembering(txn, [self._slots[s] for s in sorted({*alive, slot})], self._slots[slot])

    def _drop_forgotten(self, txn: lmdb.Transaction, now: int) -> tuple[list[int], dict[int, int]]:
        alive, ends = [], {}
        for slot, database in enumerate(self._slots):
            blob = txn.get(b"slot%d" % slot, db=self._meta)
            if blob is None:
                continue
            end, forget = _read(_SLOT, blob)
            if now < forget:
                alive.append(slot)
                ends[slot] = end
            else:
                txn.drop(database, delete=False)
                txn.delete(b"slot%d" % slot, db=self._meta)
        return alive, ends


class Remembering:
    """What is remembered during one write transaction."""

    def __init__(self, txn: lmdb.Transaction, alive: list[lmdb._Database], active: lmdb._Database) -> None:
        self._txn = txn
        self._alive = alive
        self._active = active

    def add(self, namespace: int, identities: Sequence[bytes]) -> list[bool]:
        """Remember ``identities``; which of them were not remembered before, by an earlier one of them neither."""
        # 128 bits of BLAKE2b: keys of bounded size, and nobody can make two identities collide. What begins alike
        # lies together, so that identities of one time are written into a few pages; else each costs a page of its own.
        prefix, digest = namespace.to_bytes(4, "big"), hashlib.blake2b
        keys = [prefix + identity[:8] + digest(identity, digest_size=16).digest() for identity in identities]
        older = {
            key
            for database in self._alive
            if database is not self._active
            for key, _ in self._txn.cursor(database).getmulti(keys)
        }
        put, active = self._txn.put, self._active
        return [key not in older and put(key, b"", overwrite=False, db=active) for key in keys]


def _read(form: struct.Struct, blob: bytes | memoryview) -> tuple[int, ...]:
    if blob[0] != _FORMAT:
        raise ValueError(
            f"the log's identities have format {blob[0]}; this code reads format {_FORMAT}: "
            "drain the log with the code that wrote it and start a new one"
        )
    return form.unpack(blob)[1:]
