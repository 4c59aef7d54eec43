"""Triggers in the control plane's database: why a use case is to be trained again, and how far that has come.

What a trigger is opened on, claimed for and ended with is journalled in the step that stores it, so the journal and
the trigger cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, insert, select, update

from cluster.database import Database, acquire, append_entry, ask_release
from cluster.schema import LEASES, RELEASES, TRIGGERS

Status = Literal["open", "running", "done", "failed"]
_UNFINISHED = ("open", "running")


@dataclass(frozen=True)
class Trigger:
    """Why a use case is to be trained again, and how far that has come.

    ``evidence`` are the numbers it was opened on, ``attempts`` counts its claims by a new process, ``outcome`` is
    what was noted on the way.
    """

    id: int
    usecase: str
    kind: str
    evidence: dict[str, Any]
    opened_us: int
    status: Status
    attempts: int
    outcome: dict[str, Any]

    @property
    def pending(self) -> bool:
        """Whether it has not ended."""
        return self.status in _UNFINISHED


def lease(usecase: str) -> str:
    """The name of the lease under which a use case's trigger is worked on."""
    return f"trigger/{usecase}"


class Triggers:
    """The triggers in ``database``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self, usecase: str) -> list[Trigger]:
        """All triggers of a use case in the order in which they opened."""
        query = select(TRIGGERS).where(TRIGGERS.c.usecase == usecase).order_by(TRIGGERS.c.id)
        with self._database.read() as connection:
            return [_trigger(row) for row in connection.execute(query)]

    def open(
        self, usecase: str, kind: str, evidence: dict[str, Any], now_us: int, cool_down_us: int = 0
    ) -> Trigger | None:
        """Open a trigger and journal it as ``trigger_opened``, in one step.

        None, and nothing written, while another of the use case is open or running, or when its last one was opened
        less than ``cool_down_us`` ago.
        """
        last = select(TRIGGERS).where(TRIGGERS.c.usecase == usecase).order_by(TRIGGERS.c.id.desc()).limit(1)
        with self._database.write() as connection:
            row = connection.execute(last).one_or_none()
            if row is not None and (_trigger(row).pending or now_us - row.opened_us < cool_down_us):
                return None
            values = {"usecase": usecase, "kind": kind, "evidence": evidence, "opened_us": now_us}
            made = connection.execute(insert(TRIGGERS).values(**values, status="open", attempts=0, outcome={}))
            identity = int((made.inserted_primary_key or (0,))[0])
            payload = {"trigger": identity, "trigger_kind": kind, "evidence": evidence}
            append_entry(connection, usecase, "trigger_opened", payload, now_us)
        return Trigger(identity, usecase, kind, evidence, now_us, "open", 0, {})

    def claim(self, usecase: str, holder: str, seconds: float, now_us: int) -> Trigger | None:
        """The open trigger, or the running one that nobody holds, claimed until ``now_us`` + ``seconds``.

        Claiming again renews the ``lease``, and only a claim by a new holder is an attempt. None when there is none,
        or when another holds it.
        """
        name = lease(usecase)
        pending = select(TRIGGERS).where(TRIGGERS.c.usecase == usecase, TRIGGERS.c.status.in_(_UNFINISHED))
        with self._database.write() as connection:
            row = connection.execute(pending).one_or_none()
            before = connection.execute(select(LEASES.c.holder).where(LEASES.c.name == name)).scalar()
            if row is None or not acquire(connection, name, holder, seconds, now_us):
                return None
            attempts = row.attempts + (before != holder)
            change = update(TRIGGERS).where(TRIGGERS.c.id == row.id)
            connection.execute(change.values(status="running", attempts=attempts))
            return _one(connection, row.id)

    def note(self, trigger: int, notes: dict[str, Any], kind: str | None, now_us: int) -> Trigger:
        """Add ``notes`` to the outcome and journal them as ``kind`` (None: not), in one step and once.

        What was noted under the same names before stays, and is not journalled again. ``KeyError`` for a trigger
        that never was.
        """
        with self._database.write() as connection:
            found = _one(connection, trigger)
            if not notes.keys() <= found.outcome.keys():
                outcome = {**notes, **found.outcome}
                connection.execute(update(TRIGGERS).where(TRIGGERS.c.id == trigger).values(outcome=outcome))
                if kind is not None:
                    append_entry(connection, found.usecase, kind, {"trigger": trigger, **notes}, now_us)
            return _one(connection, trigger)

    def request_release(self, trigger: int, version: str, payload: dict[str, Any], now_us: int) -> bool:
        """Ask for a release on behalf of a trigger, which asks for one version at most, whichever comes first.

        The request's payload names the trigger, and the trigger's outcome the version, in one step. False when the
        trigger or the version has a request; raises ``KeyError`` for a trigger that never was.
        """
        with self._database.write() as connection:
            found = _one(connection, trigger)
            this = (RELEASES.c.usecase == found.usecase, RELEASES.c.version == version)
            asked = connection.execute(select(RELEASES.c.version).where(*this)).one_or_none()
            if found.outcome.get("requested") or asked is not None:
                return False
            ask_release(connection, found.usecase, version, {**payload, "trigger": trigger}, now_us)
            outcome = {**found.outcome, "version": version, "requested": True}
            connection.execute(update(TRIGGERS).where(TRIGGERS.c.id == trigger).values(outcome=outcome))
            return True

    def finish(self, trigger: int, status: Literal["done", "failed"], notes: dict[str, Any], now_us: int) -> Trigger:
        """End a trigger, journal it as ``trigger_closed`` and free its lease, in one step; once ended it stays so."""
        with self._database.write() as connection:
            found = _one(connection, trigger)
            if found.pending:
                change = update(TRIGGERS).where(TRIGGERS.c.id == trigger)
                connection.execute(change.values(status=status, outcome={**found.outcome, **notes}))
                payload = {"trigger": trigger, "status": status, **notes}
                append_entry(connection, found.usecase, "trigger_closed", payload, now_us)
                connection.execute(LEASES.delete().where(LEASES.c.name == lease(found.usecase)))
            return _one(connection, trigger)


def _one(connection: Connection, trigger: int) -> Trigger:
    row = connection.execute(select(TRIGGERS).where(TRIGGERS.c.id == trigger)).one_or_none()
    if row is None:
        raise KeyError(f"there is no trigger {trigger}: `open` makes one")
    return _trigger(row)


def _trigger(row: Row[Any]) -> Trigger:
    return Trigger(row.id, row.usecase, row.kind, row.evidence, row.opened_us, row.status, row.attempts, row.outcome)
