"""The durable log of ingest: what every log promises, and the one of a single node, in an LMDB environment.

It promises that a record whose transaction has returned survives any crash and stands in its stream
exactly once, at one place: sequences start at 1 and have no gaps. ``cluster.redis_log`` is the log of several nodes.
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import lmdb

from cluster.disk import disk_refuses
from cluster.identities import Identities

FORMAT = 1
_STREAM = struct.Struct("<BIQQq")  # format, stream id, last, trimmed, last known_at
_KEY = struct.Struct(">IQ")  # stream id, sequence: big-endian, so keys sort as numbers
_HEAD = struct.Struct("<Bq")  # format, known_at

# What the file grows by: as a share of its pages, at most a second of busy ingest.
_ROOM_SHARE, _MOST_ROOM = 4, 8 << 20

Sequences = list[int | None]


class LogFull(RuntimeError):
    """The log cannot take more: its map is full, or too many records wait to be written."""


class LogUnavailable(ConnectionError):
    """The log's server or disk does not answer or refuses; whether it took this call's records may not be known."""


class Record(NamedTuple):  # as LogRecord: one is made for every event, and a tuple is made fastest
    """What goes in. Two records of one stream with the same ``identity`` are one; None is never compared.

    A log on a disk is faster when identities that come together have most of their first eight bytes in common.
    """

    identity: bytes | None
    value: bytes


class LogRecord(NamedTuple):
    """What comes out. ``known_at_us`` never decreases along a stream."""

    sequence: int
    known_at_us: int
    value: bytes


class LogTransaction(Protocol):
    """One atomic write; made by ``Log.transaction``. What its calls return is filled in when its block ends."""

    def append(self, stream: str, records: Sequence[Record]) -> Sequences:
        """Append in order and return each record's sequence, None for one whose identity is remembered.

        An identity seen earlier in this transaction counts as remembered. Wrong types raise ``TypeError``
        before anything of this call is written.
        """

    def remember(self, stream: str, identities: Sequence[bytes]) -> list[bool]:
        """Take note of identities that came in another way (a bulk load); which of them were new."""


class Log(Protocol):
    """Named streams of records, kept until ``trim``. Threads may share the object.

    Identities are remembered for at least ``remember_us`` and at most one and a half times that. ``where`` names the
    log's place in messages. A log on a server raises ``LogUnavailable`` from any call when the server does not answer,
    one on a disk from calls that write when the disk is full or broken.
    """

    where: str
    remember_us: int

    def transaction(self, now_us: int) -> AbstractContextManager[LogTransaction]:
        """All appends of the block, or none of them; durable when the block has ended without an error.

        ``now_us`` becomes the records' ``known_at_us``, unless their stream has a later one. Raises ``LogFull`` when
        the log cannot take them.
        """

    def read(self, stream: str, after: int, limit: int | None = None) -> list[LogRecord]:
        """Up to ``limit`` kept records with a sequence above ``after``, in order."""

    def last(self, stream: str) -> int:
        """The highest sequence ever given in the stream; 0 when it is new."""

    def first(self, stream: str) -> int:
        """The lowest sequence that has not been trimmed; ``last + 1`` when nothing is kept."""

    def pending(self, stream: str) -> int:
        """How many records are kept."""

    def trim(self, stream: str, through: int) -> None:
        """Forget the records up to and including ``through``; their sequences and identities stay taken."""

    def close(self) -> None:
        """Let go of files and connections; the object is of no use afterwards."""


@dataclass
class _Stream:
    id: int = 0
    last: int = 0
    trimmed: int = 0
    known_at: int = 0


class DurableLog:
    """The ``Log`` below the directory ``path``, for the processes of one node; one object per process and path.

    ``map_bytes`` bounds the file, which grows as it is used. A forked child must open its own.
    """

    def __init__(self, path: Path | str, *, remember_us: int, map_bytes: int = 4 << 30) -> None:
        self.path = Path(path)
        self.where = str(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.map_bytes = map_bytes
        self.remember_us = remember_us
        databases = 2 + Identities.DATABASES
        self._env = lmdb.open(str(self.path), map_size=map_bytes, max_dbs=databases, max_readers=1024)
        self._env.reader_check()  # slots of processes that were killed while reading
        self._meta = self._env.open_db(b"streams")
        self._records = self._env.open_db(b"records")
        self._identities = Identities(self._env, remember_us)
        self._page_bytes = self._env.stat()["psize"]

    @contextmanager
    def transaction(self, now_us: int) -> Iterator[Transaction]:
        """See ``Log``; one fsync at the end of the block. Holds the node's only writer lock: keep the block short."""
        with self._writing() as txn:
            self._make_room()
            transaction = Transaction(self, txn, now_us)
            yield transaction
            transaction._finish()

    def read(self, stream: str, after: int, limit: int | None = None) -> list[LogRecord]:
        """See ``Log``."""
        with self._env.begin() as txn:
            state = self._stream(txn, stream) or _Stream()
            start = max(after, state.trimmed) + 1
            stop = state.last if limit is None else min(state.last, start + limit - 1)
            if start > stop:
                return []
            found = []
            cursor = txn.cursor(self._records)
            cursor.set_range(_KEY.pack(state.id, start))
            for sequence, blob in zip(range(start, stop + 1), cursor.iternext(keys=False), strict=False):
                version, known_at = _HEAD.unpack_from(blob)
                if version != FORMAT:
                    check_format(version, f"record {sequence} of stream {stream!r} in {self.path}")
                found.append(LogRecord(sequence, known_at, blob[_HEAD.size :]))
            return found

    def last(self, stream: str) -> int:
        """See ``Log``."""
        return self._look(stream).last

    def first(self, stream: str) -> int:
        """See ``Log``."""
        return self._look(stream).trimmed + 1

    def pending(self, stream: str) -> int:
        """See ``Log``."""
        state = self._look(stream)
        return state.last - state.trimmed

    def trim(self, stream: str, through: int) -> None:
        """See ``Log``."""
        with self._writing() as txn:
            state = self._stream(txn, stream) or _Stream()
            if through > state.last:
                raise trimmed_beyond_end(stream, state.last, through)
            for sequence in range(state.trimmed + 1, through + 1):
                txn.delete(_KEY.pack(state.id, sequence), db=self._records)
            if through > state.trimmed:
                state.trimmed = through
                self._put_stream(txn, stream, state)

    def close(self) -> None:
        """See ``Log``."""
        self._env.close()

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._env.begin(write=True) as txn:
                yield txn
        except lmdb.MapFullError:
            raise LogFull(
                f"the log {self.path} has used its {self.map_bytes} bytes: let it drain, or open it with more"
            ) from None
        except lmdb.Error as error:
            if not disk_refuses(error):
                raise
            raise LogUnavailable(
                f"the disk refuses the log {self.path}: {error}. Make room there, or let the log drain, and send again"
            ) from error

    def _make_room(self) -> None:
        """Writes zeros behind the file's pages when few are left, under the writer lock.

        An fsync of pages that the file already has costs less than one that must also record that the file grew.
        """
        used = (self._env.info()["last_pgno"] + 1) * self._page_bytes
        room = min(used // _ROOM_SHARE, _MOST_ROOM)
        file_name = self.path / "data.mdb"
        end = file_name.stat().st_size
        zeros = min(room, self.map_bytes - end)
        if end - used >= room // 4 or zeros <= 0:
            return
        with file_name.open("ab", buffering=0) as file:
            try:
                file.write(bytes(zeros))
            except OSError as error:
                # Room only saves time: the pages that were trimmed may be enough, and LMDB says when they are not.
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise

    def _look(self, stream: str) -> _Stream:
        with self._env.begin() as txn:
            return self._stream(txn, stream) or _Stream()

    def _stream(self, txn: lmdb.Transaction, stream: str) -> _Stream | None:
        blob = txn.get(stream_key(stream), db=self._meta)
        if blob is None:
            return None
        check_format(blob[0], f"the entry of stream {stream!r} in {self.path}")
        return _Stream(*_STREAM.unpack(blob)[1:])

    def _put_stream(self, txn: lmdb.Transaction, stream: str, state: _Stream) -> None:
        blob = _STREAM.pack(FORMAT, state.id, state.last, state.trimmed, state.known_at)
        txn.put(stream_key(stream), blob, db=self._meta)


class Transaction:
    """The ``LogTransaction`` of LMDB; its answers are there at once."""

    def __init__(self, log: DurableLog, txn: lmdb.Transaction, now_us: int) -> None:
        self._log = log
        self._txn = txn
        self._now = now_us
        self._states: dict[str, _Stream] = {}
        self._remembering = log._identities.at(txn, now_us)

    def append(self, stream: str, records: Sequence[Record]) -> Sequences:
        """See ``LogTransaction``."""
        check_records(stream, records)
        state = self._state(stream)
        known_at = max(self._now, state.known_at)
        head = _HEAD.pack(FORMAT, known_at)
        new = iter(self._remembering.add(state.id, [r.identity for r in records if r.identity is not None]))
        kept = [record.identity is None or next(new) for record in records]
        if any(kept):
            state.known_at = known_at
        number = itertools.count(state.last + 1)
        sequences: Sequences = [next(number) if keep else None for keep in kept]
        state.last += sum(kept)
        self._txn.cursor(self._log._records).putmulti(
            [
                (_KEY.pack(state.id, sequence), head + record.value)
                for record, sequence in zip(records, sequences, strict=True)
                if sequence is not None
            ]
        )
        return sequences

    def remember(self, stream: str, identities: Sequence[bytes]) -> list[bool]:
        """See ``LogTransaction``."""
        state = self._state(stream)
        return self._remembering.add(state.id, identities)

    def _state(self, stream: str) -> _Stream:
        if stream not in self._states:
            found = self._log._stream(self._txn, stream)
            if found is None:
                found = _Stream(id=self._txn.stat(self._log._meta)["entries"] + 1)
                self._log._put_stream(self._txn, stream, found)
            self._states[stream] = found
        return self._states[stream]

    def _finish(self) -> None:
        for stream, state in self._states.items():
            self._log._put_stream(self._txn, stream, state)


def stream_key(stream: str) -> bytes:
    """The name of a stream as bytes; ``ValueError`` when it is empty or too long."""
    key = stream.encode()
    if not 0 < len(key) <= 400:  # LMDB's keys have at most 511 bytes
        raise ValueError(f"the name of a stream has 1 to 400 bytes, not {len(key)}: {stream[:50]!r}")
    return key


def check_records(stream: str, records: Sequence[Record]) -> None:
    """Raises ``TypeError`` unless every identity and value is bytes."""
    for record in records:
        identity = record.identity
        if not isinstance(record.value, bytes) or not (identity is None or isinstance(identity, bytes)):
            raise TypeError(f"stream {stream!r}: identity and value of a record must be bytes, not {record!r}")


def trimmed_beyond_end(stream: str, last: int, through: int) -> ValueError:
    """The error of a trim beyond a stream's last sequence."""
    return ValueError(f"stream {stream!r} ends at {last}: it cannot be trimmed to {through}")


def check_format(version: int, what: str) -> None:
    """Raises ``ValueError``, naming ``what``, unless it has the format that this code reads."""
    if version != FORMAT:
        raise ValueError(
            f"{what} has format {version}; this code reads format {FORMAT}: drain the log with the code that wrote it"
        )
