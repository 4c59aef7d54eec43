"""Ingest over HTTP: each event passes the contract, becomes durable in the log, and only then is acknowledged.

State is the log's projection and is brought up to the log before the acknowledgement, so a caller reads what it
wrote. A refused event is as durable as an accepted one: it goes to the quarantine stream.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from deltalake.exceptions import DeltaError
from sqlalchemy.exc import OperationalError

from cluster.alerts import Alerts
from cluster.clock import Clock
from cluster.database import Database
from cluster.group_commit import GroupCommit
from cluster.log import Log, LogFull, LogUnavailable, Record, Sequences
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.events import LOAD_ID, describe, encoder
from pipelines.contracts.requests import check_record, compile_model
from pipelines.contracts.rules import as_json
from pipelines.drain import EVENTS, OUTCOMES, PREDICTIONS, QUARANTINE, drain_once
from pipelines.spec import EventSource
from serving.problems import Problem

SOURCE = "http"
ALERT = "drain_failing"


class EventIntake:
    """Checks, logs and acknowledges events; also carries the records of predictions and outcomes."""

    def __init__(
        self, source: EventSource, log: Log, clock: Clock, project: Callable[[], object], max_kept: int | None = None
    ) -> None:
        """``max_kept`` as of ``GroupCommit``."""
        self._contract = source.contract
        self._model = compile_model(source.contract)
        self._encode = encoder(source.contract)
        describe(source.contract, log, clock.now())
        self._clock = clock
        self._commit = GroupCommit(log, clock, after_commit=project, max_kept=max_kept)

    async def ingest(self, events: Sequence[Any]) -> list[dict[str, Any]]:
        """One result per event, in order: accepted (with its sequence, and the rules that it breaks and that
        only warn) or quarantined (with the broken rules).

        An event whose id is remembered is accepted again without being stored again. Raises ``Problem`` 429
        when the log cannot take more, 503 when it does not answer: some of the events may then be durable.
        """
        now = self._clock.now()
        results: list[dict[str, Any]] = []
        accepted: list[Record] = []
        refused: list[Record] = []
        places: list[int] = []
        for position, event in enumerate(events):
            record, problems = check_record(self._model, event, now)
            if record is None:
                rules = list(dict.fromkeys(problem.rule for problem in problems))
                results.append(
                    {
                        "status": "quarantined",
                        "rules": rules,
                        "problems": [{"field": p.field, "rule": p.rule, "message": p.message} for p in problems],
                    }
                )
                refused.append(self._quarantine(event, position, rules, now))
            else:
                event_id, identity, value = self._encode(record)
                warnings = {"warnings": [problem.rule for problem in problems]} if problems else {}
                results.append({"status": "accepted", "event_id": event_id, **warnings})
                accepted.append(Record(identity, value))
                places.append(position)
        sequences: Sequences = []
        try:
            # In this order: a caller who must send them again finds accepted events remembered, and refused ones are
            # not.
            if accepted:
                sequences = await asyncio.wrap_future(self._commit.submit(EVENTS, accepted))
            if refused:
                await asyncio.wrap_future(self._commit.submit(QUARANTINE, refused))
        except LogFull as error:
            raise Problem(429, "The event log is full", str(error), retry_after_s=1) from error
        except LogUnavailable as error:
            raise Problem(503, "The event log does not answer", str(error), retry_after_s=1) from error
        for place, sequence in zip(places, sequences, strict=True):
            results[place]["duplicate" if sequence is None else "sequence"] = sequence is None or sequence
        return results

    async def outcomes(self, values: Mapping[str, bytes]) -> None:
        """Logs outcomes by prediction id; returns when they are durable. The first outcome of a prediction counts.

        Raises ``Problem`` 429 when the log cannot take more, 503 when it does not answer.
        """
        try:
            records = [Record(identity.encode(), value) for identity, value in values.items()]
            await asyncio.wrap_future(self._commit.submit(OUTCOMES, records))
        except LogFull as error:
            raise Problem(429, "The log is full", str(error), retry_after_s=1) from error
        except LogUnavailable as error:
            raise Problem(503, "The log does not answer", str(error), retry_after_s=1) from error

    def predictions(self, values: Sequence[bytes]) -> None:
        """Logs predictions, for which nobody waits; a crash may lose those of the last moment.

        Raises ``Problem`` 429 when the log cannot take more, 503 when it does not answer: an answer that is not logged
        could never be audited.
        """
        try:
            self._commit.submit_quiet(PREDICTIONS, [Record(None, value) for value in values])
        except LogFull as error:
            raise Problem(429, "The log is full", str(error), retry_after_s=1) from error
        except LogUnavailable as error:
            raise Problem(503, "The log does not answer", str(error), retry_after_s=1) from error

    def close(self) -> None:
        """Writes what waits, then stops."""
        self._commit.close()

    def _quarantine(self, event: Any, position: int, rules: list[str], now: int) -> Record:
        row = {
            LOAD_ID: SOURCE,
            "source": SOURCE,
            "position": position,
            "contract": self._contract.name,
            "contract_version": self._contract.version,
            "rules": rules,
            "record": as_json(event),
            "at": now,
        }
        return Record(None, orjson.dumps(row))


class Drain:
    """Moves the log to the tables in the background, whenever nobody else of the node or cluster does.

    State is brought up to the log first, and no event leaves the log before state has it, nor an answer before the
    events that it was made from: ``project`` returns the sequence that all state has which the log feeds.
    """

    def __init__(
        self,
        source: EventSource,
        log: Log,
        project: Callable[[], int],
        tables: Tables,
        database: Database,
        settings: Settings,
        alerts: Alerts,
        holder: str,
    ) -> None:
        self.failure: BaseException | None = None

        def stop_at() -> dict[str, int]:
            # In this order: what answers through ``answered`` read is in the events that leave the log before them.
            answered = log.last(PREDICTIONS)
            return {EVENTS: project(), PREDICTIONS: answered}

        def turn() -> None:
            project()  # also where another gateway has the lease: this process sees whose state is in step
            done = drain_once(source, log, tables, database, settings, holder, stop_at=stop_at)
            if done is not None and self.failure is not None:
                alerts.resolve(ALERT, source.name, "the log reaches its tables again")
                self.failure = None

        def failed(error: OSError | DeltaError) -> None:
            self.failure = error
            alerts.open(ALERT, source.name, f"the log does not reach its tables: {error}")

        self._turn, self._failed = turn, failed
        self._period = settings.drain_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="drain", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop.wait(self._period):
            # Nothing is lost while this fails: the records stay in the log, and the next turn tries again.
            try:
                try:
                    self._turn()
                except (OSError, DeltaError) as error:
                    self._failed(error)
            except OperationalError as error:
                self.failure = error  # without the database there is no place for an alert; readiness tells
            except BaseException as error:
                self.failure = error
                raise

    def alive(self) -> bool:
        """Whether the drain still takes its turns."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stops after the turn that is under way."""
        self._stop.set()
        self._thread.join(timeout=10)


class DimensionFeed:
    """The way in of a dimension's rows: a log, an intake and a drain of their own."""

    def __init__(
        self,
        source: EventSource,
        log: Log,
        project: Callable[[], int],
        *,
        settings: Settings,
        clock: Clock,
        tables: Tables,
        database: Database,
        alerts: Alerts,
        holder: str,
    ) -> None:
        """``project`` brings the state of ``source`` up to ``log``, as of ``Drain``."""
        project()  # what an earlier process logged and did not live to apply
        self.log = log
        self.intake = EventIntake(source, log, clock, project, settings.log_rows)
        self.drain = Drain(source, log, project, tables, database, settings, alerts, holder)

    def close(self) -> None:
        """Flushes the log and stops."""
        self.intake.close()
        self.drain.close()
