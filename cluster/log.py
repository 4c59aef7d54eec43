"""The durable log of ingest: what every log promises, and the one of a single node, in an LMDB environment.

It promises that a record whose transaction has returned survives any crash and stands in its stream
exactly once, at one place: sequences start at 1 and have no gaps. ``cluster.redis_log`` is the log of several nodes.
"""

from __future__ import annotations

import logging
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import lmdb

from cluster.clock import Clock
from cluster.identities import Identities

logger = logging.getLogger(__name__)

FORMAT = 1
_STREAM = struct.Struct("<BIQQq")  # format, stream id, last, trimmed, last known_at
_KEY = struct.Struct(">IQ")  # stream id, sequence: big-endian, so keys sort as numbers
_HEAD = struct.Struct("<Bq")  # format, known_at

Sequences = list[int | None]
_LOOK_S = 0.2


class LogFull(RuntimeError):
    """The log cannot take more: its map is full, or too many records wait to be written."""


class LogUnavailable(ConnectionError):
    """The log's server does not answer or refuses; whether it took the records of this call may not be known."""


@dataclass(frozen=True, slots=True)
class Record:
    """What goes in. Two records of one stream with the same ``identity`` are one; None is never compared."""

    identity: bytes | None
    value: bytes


@dataclass(frozen=True, slots=True)
class LogRecord:
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
    log's place in messages. A log on a server raises ``LogUnavailable`` from any call when the server does not answer.
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

    @contextmanager
    def transaction(self, now_us: int) -> Iterator[Transaction]:
        """See ``Log``; one fsync at the end of the block. Holds the node's only writer lock: keep the block short."""
        with self._writing() as txn:
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
        put, remember, database = self._txn.put, self._remembering.add, self._log._records
        sequences: Sequences = []
        for record in records:
            if record.identity is not None and not remember(state.id, record.identity):
                sequences.append(None)
                continue
            state.last += 1
            state.known_at = known_at
            put(_KEY.pack(state.id, state.last), head + record.value, db=database)
            sequences.append(state.last)
        return sequences

    def remember(self, stream: str, identities: Sequence[bytes]) -> list[bool]:
        """See ``LogTransaction``."""
        state = self._state(stream)
        return [self._remembering.add(state.id, identity) for identity in identities]

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
        if not isinstance(record.value, bytes) or not isinstance(record.identity, bytes | None):
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


@dataclass(eq=False)
class _Submission:
    stream: str
    records: Sequence[Record]
    future: Future[Sequences] | None
    result: Sequences | None = None

    def fail(self, error: BaseException) -> None:
        if self.future is not None:
            self.future.set_exception(error)
        else:
            count = len(self.records)
            logger.error("%d records of stream %r that nobody waits for failed: %s", count, self.stream, error)


class _HandTo:
    """Hands an error raised in its block to the submissions it concerns, and keeps it."""

    def __init__(self, submissions: Sequence[_Submission]) -> None:
        self.submissions = submissions
        self.error: BaseException | None = None

    def __enter__(self) -> _HandTo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[True]:
        self.error = error
        if error is not None:
            for submission in self.submissions:
                submission.fail(error)
        return True


class GroupCommit:
    """Appends for many threads: what waits while one transaction commits goes into the next.

    ``after_commit`` runs on the writing thread after each commit, before the futures resolve; if it
    raises, the futures of that group carry its error although their records are durable (a caller that
    tries again gets None for them). The same holds when the log became unavailable: the records may be
    durable. At most ``max_waiting`` records wait at any time, and one transaction takes about
    ``group_records`` of them. A stream that keeps ``max_kept`` records, because nobody drains it, takes no more.
    """

    def __init__(
        self,
        log: Log,
        clock: Clock,
        after_commit: Callable[[], object] | None = None,
        *,
        max_waiting: int = 100_000,
        group_records: int = 20_000,
        max_kept: int | None = None,
        real: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._clock = clock
        self._after_commit = after_commit
        self._max_waiting = max_waiting
        self._group_records = group_records
        self._max_kept = max_kept
        self._real = real
        self._kept: dict[str, int] = {}  # by stream, as of the last commit or look
        self._looked: dict[str, float] = {}
        self._queue: list[_Submission] = []
        self._waiting = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def submit(self, stream: str, records: Sequence[Record]) -> Future[Sequences]:
        """The future of the records' sequences, as ``Transaction.append`` gives them.

        Raises ``LogFull`` when more than ``max_waiting`` records would wait or the stream keeps too many,
        ``LogUnavailable`` when that cannot be told, ``RuntimeError`` once closed.
        """
        future: Future[Sequences] = Future()
        self._enqueue(_Submission(stream, list(records), future))
        return future

    def submit_quiet(self, stream: str, records: Sequence[Record]) -> None:
        """Append records that nobody waits for. A failure to write them is logged as an error. Raises as ``submit``."""
        self._enqueue(_Submission(stream, list(records), None))

    @property
    def waiting(self) -> int:
        """How many records are not yet durable."""
        with self._changed:
            return self._waiting

    def close(self) -> None:
        """Write everything that waits, then end the thread. The log stays open."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, submission: _Submission) -> None:
        self._refuse_overflow(submission)
        with self._changed:
            if self._closing:
                raise RuntimeError("this group commit is closed: open another")
            waiting = self._waiting + len(submission.records)
            if waiting > self._max_waiting:
                raise LogFull(f"{waiting} records would wait for the log, at most {self._max_waiting} may")
            self._waiting = waiting
            self._queue.append(submission)
            self._changed.notify()

    def _refuse_overflow(self, submission: _Submission) -> None:
        most, stream = self._max_kept, submission.stream
        if most is None or self._kept.get(stream, 0) + len(submission.records) <= most:
            return
        # Nothing is committed while it is full, so it has to be looked at, but not by every caller.
        if self._real() - self._looked.get(stream, -math.inf) >= _LOOK_S:
            self._looked[stream] = self._real()
            self._kept[stream] = self._log.pending(stream)
        kept = self._kept[stream]
        if kept + len(submission.records) > most:
            raise LogFull(
                f"stream {stream!r} of the log {self._log.where} keeps {kept} records that were not drained, at most "
                f"{most} may: try again later, and see whether its drain works (the alert drain_failing)"
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                taken = count = 0
                while taken < len(self._queue) and count < self._group_records:
                    count += len(self._queue[taken].records)
                    taken += 1
                group, self._queue = self._queue[:taken], self._queue[taken:]
            self._write([s for s in group if s.future is None or s.future.set_running_or_notify_cancel()])
            with self._changed:
                self._waiting -= count

    def _write(self, group: list[_Submission]) -> None:
        durable = self._append(group)
        with _HandTo(durable) as projecting:
            if self._max_kept is not None:
                self._kept |= {stream: self._log.pending(stream) for stream in {s.stream for s in durable}}
            if durable and self._after_commit is not None:
                self._after_commit()
        if projecting.error is not None:
            return
        for submission in durable:
            if submission.future is not None and submission.result is not None:
                submission.future.set_result(submission.result)

    def _append(self, group: list[_Submission]) -> list[_Submission]:
        """Write the group in one transaction, or each alone if one of them spoils it; what is durable."""
        if not group:
            return []
        alone = len(group) == 1
        with (
            _HandTo(group if alone else ()) as attempt,
            self._log.transaction(self._clock.now()) as transaction,
        ):
            for submission in group:
                submission.result = transaction.append(submission.stream, submission.records)
        if attempt.error is None:
            return group
        if isinstance(attempt.error, LogUnavailable):  # a second try could write records without identity twice
            for submission in () if alone else group:
                submission.fail(attempt.error)
            return []
        return [] if alone else [s for single in group for s in self._append([single])]
