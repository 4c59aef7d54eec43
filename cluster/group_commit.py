"""Group commit: many threads append to a log, and what waits while one transaction commits goes into the next."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from cluster.clock import Clock
from cluster.log import Log, LogFull, LogUnavailable, Record, Sequences

logger = logging.getLogger(__name__)

_LOOK_S = 0.2
_LINGER_S = 0.02


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

    Records that nobody waits for are written within 20 ms, together with whatever comes until then: a transaction costs
    the process more than its records do. ``after_commit`` runs on the writing thread after each commit of records that
    somebody waits for, before the futures resolve; if it raises, the futures of that group carry its error although
    their records are durable (a caller that tries again gets None for them). The same holds when the log became
    unavailable: the records may be durable. At most ``max_waiting`` records wait at any time, and one transaction takes
    about ``group_records`` of them. A stream that keeps ``max_kept`` records, because nobody drains it, takes no more.
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
        self._awaited = 0  # submissions in the queue that have a future
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
            self._awaited += submission.future is not None
            if self._awaited or len(self._queue) == 1 or waiting >= self._group_records:
                self._changed.notify()  # otherwise it is lingering and need not be woken

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
                self._changed.wait_for(self._is_urgent, timeout=_LINGER_S)
                taken = count = 0
                while taken < len(self._queue) and count < self._group_records:
                    count += len(self._queue[taken].records)
                    taken += 1
                group, self._queue = self._queue[:taken], self._queue[taken:]
                self._awaited -= sum(submission.future is not None for submission in group)
            self._write([s for s in group if s.future is None or s.future.set_running_or_notify_cancel()])
            with self._changed:
                self._waiting -= count

    def _is_urgent(self) -> bool:
        return bool(self._awaited) or self._closing or self._waiting >= self._group_records

    def _write(self, group: list[_Submission]) -> None:
        durable = self._append(group)
        with _HandTo(durable) as projecting:
            if self._max_kept is not None:
                self._kept |= {stream: self._log.pending(stream) for stream in {s.stream for s in durable}}
            if self._after_commit is not None and any(submission.future is not None for submission in durable):
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
