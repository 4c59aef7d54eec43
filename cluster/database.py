"""The control plane's database: loads, leases, release requests, routing tables and the rollout journal.

SQLite by default, PostgreSQL by URL. It promises that writers exclude each other, so every method is one
atomic step whichever process calls it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Row, event, insert, select, update
from sqlalchemy.engine import URL

from cluster.schema import IDENTITIES, JOURNAL, LEASES, LOADS, METADATA, RELEASES, ROUTING, TOLD

# The advisory lock that PostgreSQL's writers take: "tidegate" in ASCII.
_WRITER_LOCK = 0x7469646567617465
_BUSY_SECONDS = 60

LoadStatus = Literal["begun", "published", "refused"]


class StaleEpoch(RuntimeError):
    """Another controller has written the routing table since the caller read it."""


class OtherLoad(ValueError):
    """A load's id stands for another load; the message says what to do."""


class StaleJournal(RuntimeError):
    """Another writer has added to the journal since the caller read it."""


@dataclass(frozen=True)
class Load:
    """One load of rows into a table. ``as_of_us`` is the time at which its first attempt began."""

    load_id: str
    usecase: str
    table: str
    as_of_us: int
    status: LoadStatus
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class ReleaseRequest:
    """A model version that asks to be released. ``sequence`` tells one request of a version from a later one."""

    usecase: str
    version: str
    payload: dict[str, Any]
    requested_us: int
    sequence: int


@dataclass(frozen=True)
class Routing:
    """A routing table as last written."""

    epoch: int
    document: dict[str, Any]


@dataclass(frozen=True)
class JournalEntry:
    """One entry of a use case's journal; sequences start at 1 and have no gaps."""

    sequence: int
    kind: str
    payload: dict[str, Any]
    at_us: int


class Database:
    """The database at ``url``; connections open at first use. Pickles as its URL.

    Raises ``ValueError`` for anything but SQLite and PostgreSQL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = _engine(_normalised(url))

    def create(self) -> None:
        """Create the tables that do not exist; any number of processes may do so at once."""
        with self.write() as connection:
            METADATA.create_all(connection)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that excludes every other writer; commits at the end, rolls back on an error."""
        with self._engine.connect() as connection:
            connection = connection.execution_options(tidegate_write=True)
            with connection.begin():
                if self._engine.dialect.name == "postgresql":
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITER_LOCK})
                yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; no writer waits for it."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    def begin_load(self, load_id: str, usecase: str, table: str, as_of_us: int, identity: str | None = None) -> Load:
        """The load of that id: a new one, or the one begun before, with its first ``as_of_us``.

        ``identity`` stands for what is loaded, and under which contract. Raises ``OtherLoad`` when the id was begun for
        another use case or table, or with another identity.
        """
        with self.write() as connection:
            row = connection.execute(select(LOADS).where(LOADS.c.load_id == load_id)).one_or_none()
            if row is None:
                values = {"load_id": load_id, "usecase": usecase, "table_name": table, "as_of_us": as_of_us}
                connection.execute(insert(LOADS).values(**values, status="begun"))
                if identity is not None:
                    connection.execute(insert(IDENTITIES).values(load_id=load_id, identity=identity))
                return Load(load_id, usecase, table, as_of_us, "begun", None)
            known = select(IDENTITIES.c.identity).where(IDENTITIES.c.load_id == load_id)
            begun_with = connection.execute(known).scalar()
        load = _load(row)
        if identity is not None and begun_with is not None and identity != begun_with:
            raise OtherLoad(
                f"load {load_id!r} was begun with other files or under another contract: run it again with those, or "
                "give this one another id"
            )
        if (load.usecase, load.table) != (usecase, table):
            raise OtherLoad(
                f"load {load_id!r} was begun for {load.usecase!r} into {load.table!r}, "
                f"not for {usecase!r} into {table!r}: give this one another id"
            )
        return load

    def finish_load(self, load_id: str, status: Literal["published", "refused"], manifest: dict[str, Any]) -> None:
        """Record how a load ended. A load that ended the same way before keeps its first manifest.

        Raises ``KeyError`` for a load never begun, ``ValueError`` when it ended the other way.
        """
        with self.write() as connection:
            row = connection.execute(select(LOADS).where(LOADS.c.load_id == load_id)).one_or_none()
            if row is None:
                raise KeyError(f"load {load_id!r} was never begun: call begin_load first")
            if row.status == "begun":
                done = update(LOADS).where(LOADS.c.load_id == load_id)
                connection.execute(done.values(status=status, manifest=manifest))
            elif row.status != status:
                raise ValueError(f"load {load_id!r} has ended as {row.status!r} and cannot become {status!r}")

    def load(self, load_id: str) -> Load | None:
        """The load of that id, None if it was never begun."""
        with self.read() as connection:
            row = connection.execute(select(LOADS).where(LOADS.c.load_id == load_id)).one_or_none()
        return None if row is None else _load(row)

    def loads(self, usecase: str) -> list[Load]:
        """All loads of a use case by the time they began."""
        query = select(LOADS).where(LOADS.c.usecase == usecase).order_by(LOADS.c.as_of_us, LOADS.c.load_id)
        with self.read() as connection:
            return [_load(row) for row in connection.execute(query)]

    def acquire_lease(self, name: str, holder: str, seconds: float, now_us: int) -> bool:
        """Take or renew the lease until ``now_us`` + ``seconds``; False while another's has not expired."""
        with self.write() as connection:
            return acquire(connection, name, holder, seconds, now_us)

    def renew_lease(self, name: str, holder: str, seconds: float, now_us: int) -> bool:
        """Keep a lease that nobody else has had since ``holder`` took it; False when somebody may have."""
        expires_us = now_us + round(seconds * 1_000_000)
        mine = (LEASES.c.name == name, LEASES.c.holder == holder)
        with self.write() as connection:
            return bool(connection.execute(update(LEASES).where(*mine).values(expires_us=expires_us)).rowcount)

    def release_lease(self, name: str, holder: str) -> None:
        """Give the lease back; nothing happens if ``holder`` does not have it."""
        with self.write() as connection:
            connection.execute(LEASES.delete().where(LEASES.c.name == name, LEASES.c.holder == holder))

    def live_leases(self, prefix: str, now_us: int) -> list[str]:
        """The names, without ``prefix``, of the leases below it that have not expired."""
        held = (LEASES.c.name.startswith(prefix, autoescape=True), LEASES.c.expires_us > now_us)
        with self.read() as connection:
            names = connection.execute(select(LEASES.c.name).where(*held).order_by(LEASES.c.name)).scalars().all()
        return [name.removeprefix(prefix) for name in names]

    def request_release(
        self, usecase: str, version: str, payload: dict[str, Any], now_us: int, *, again: bool = False
    ) -> bool:
        """Ask for a version to be released; False if that version was asked for before.

        With ``again`` a request that has ended is opened anew, behind those that wait; False if it is still open.
        """
        this = (RELEASES.c.usecase == usecase, RELEASES.c.version == version)
        with self.write() as connection:
            status = connection.execute(select(RELEASES.c.status).where(*this)).scalar()
            if status is not None and (status == "open" or not again):
                return False
            connection.execute(RELEASES.delete().where(*this))
            ask_release(connection, usecase, version, payload, now_us)
            return True

    def claim_release(self, usecase: str, holder: str, seconds: float, now_us: int) -> ReleaseRequest | None:
        """The oldest open request, claimed (or claimed again) until ``now_us`` + ``seconds``.

        None when nothing is open, or when the oldest is claimed by another: requests keep their order.
        """
        oldest = (
            select(RELEASES)
            .where(RELEASES.c.usecase == usecase, RELEASES.c.status == "open")
            .order_by(RELEASES.c.sequence)
            .limit(1)
        )
        with self.write() as connection:
            row = connection.execute(oldest).one_or_none()
            if row is None or not acquire(connection, f"release/{usecase}", holder, seconds, now_us):
                return None
        return ReleaseRequest(row.usecase, row.version, row.payload, row.requested_us, row.sequence)

    def finish_release(self, usecase: str, version: str, status: str, sequence: int | None = None) -> None:
        """Close a request with any status but ``open``; ``KeyError`` if it was never made.

        With ``sequence`` only that request is closed: nothing happens when the version was asked for anew since.
        """
        if status == "open":
            raise ValueError(f"release {version!r} of {usecase!r} is to be finished, and 'open' is no end")
        this = update(RELEASES).where(RELEASES.c.usecase == usecase, RELEASES.c.version == version)
        with self.write() as connection:
            if sequence is not None:
                connection.execute(this.where(RELEASES.c.sequence == sequence).values(status=status))
            elif connection.execute(this.values(status=status)).rowcount == 0:
                raise KeyError(f"no release of version {version!r} of {usecase!r} was requested")
            connection.execute(LEASES.delete().where(LEASES.c.name == f"release/{usecase}"))

    def routing(self, usecase: str) -> Routing | None:
        """The routing table of a use case, None before the first."""
        with self.read() as connection:
            row = connection.execute(select(ROUTING).where(ROUTING.c.usecase == usecase)).one_or_none()
        return None if row is None else Routing(row.epoch, row.document)

    def put_routing(self, usecase: str, expected_epoch: int | None, document: dict[str, Any]) -> int:
        """Replace the table of ``expected_epoch`` (None: there is none yet) and return the new epoch.

        Epochs start at 1. Raises ``StaleEpoch`` when the table has another epoch.
        """
        with self.write() as connection:
            found = connection.execute(select(ROUTING.c.epoch).where(ROUTING.c.usecase == usecase)).scalar()
            if found != expected_epoch:
                raise StaleEpoch(
                    f"the routing table of {usecase!r} has epoch {found}, not {expected_epoch}: "
                    "read it again and decide anew"
                )
            if found is None:
                connection.execute(insert(ROUTING).values(usecase=usecase, epoch=1, document=document))
                return 1
            change = update(ROUTING).where(ROUTING.c.usecase == usecase)
            connection.execute(change.values(epoch=found + 1, document=document))
            return int(found) + 1

    def append_journal(
        self, usecase: str, kind: str, payload: dict[str, Any], at_us: int, *, expected: int | None = None
    ) -> int:
        """Add an entry and return its sequence.

        Raises ``StaleJournal``, and adds nothing, when the last entry does not have the sequence ``expected``.
        """
        with self.write() as connection:
            return append_entry(connection, usecase, kind, payload, at_us, expected)

    def journal(self, usecase: str, *, after: int = 0) -> list[JournalEntry]:
        """The entries of a use case with a sequence above ``after``, in order."""
        mine = (JOURNAL.c.usecase == usecase, JOURNAL.c.sequence > after)
        query = select(JOURNAL).where(*mine).order_by(JOURNAL.c.sequence)
        with self.read() as connection:
            rows = connection.execute(query).all()
        return [JournalEntry(row.sequence, row.kind, row.payload, row.at_us) for row in rows]

    def last_entry(self, usecase: str, kind: str, before: int | None = None) -> JournalEntry | None:
        """The last entry of a kind in a use case's journal (before a sequence), None when there is none."""
        mine = (JOURNAL.c.usecase == usecase, JOURNAL.c.kind == kind)
        query = select(JOURNAL).where(*mine)
        if before is not None:
            query = query.where(JOURNAL.c.sequence < before)
        query = query.order_by(JOURNAL.c.sequence.desc()).limit(1)
        with self.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else JournalEntry(row.sequence, row.kind, row.payload, row.at_us)

    def told(self, usecase: str) -> int | None:
        """The sequence up to which a use case's journal was announced; None when nobody began to."""
        with self.read() as connection:
            return connection.execute(select(TOLD.c.sequence).where(TOLD.c.usecase == usecase)).scalar()

    def tell_until(self, usecase: str, sequence: int) -> None:
        """Keeps that it was announced up to there."""
        with self.write() as connection:
            change = update(TOLD).where(TOLD.c.usecase == usecase).values(sequence=sequence)
            if not connection.execute(change).rowcount:
                connection.execute(insert(TOLD).values(usecase=usecase, sequence=sequence))

    def open_releases(self, usecase: str) -> list[str]:
        """The versions whose release was requested and has not ended, the oldest request first."""
        mine = (RELEASES.c.usecase == usecase, RELEASES.c.status == "open")
        with self.read() as connection:
            found = connection.execute(select(RELEASES.c.version).where(*mine).order_by(RELEASES.c.sequence))
            return list(found.scalars())

    def newest_release(self, usecase: str, after: int) -> str | None:
        """The version of the newest open request with a sequence above ``after``; None when there is none."""
        mine = (RELEASES.c.usecase == usecase, RELEASES.c.status == "open", RELEASES.c.sequence > after)
        newest = select(RELEASES.c.version).where(*mine).order_by(RELEASES.c.sequence.desc()).limit(1)
        with self.read() as connection:
            return connection.execute(newest).scalar()

    def __reduce__(self) -> tuple[type[Database], tuple[str]]:
        return Database, (self.url,)


def ask_release(connection: Connection, usecase: str, version: str, payload: dict[str, Any], now_us: int) -> None:
    """Adds an open request of a version that has none, inside ``Database.write``."""
    values = {"usecase": usecase, "version": version, "payload": payload, "requested_us": now_us}
    connection.execute(insert(RELEASES).values(**values, status="open"))


def append_entry(
    connection: Connection,
    usecase: str,
    kind: str,
    payload: dict[str, Any],
    at_us: int,
    expected: int | None = None,
) -> int:
    """``Database.append_journal`` inside ``Database.write``."""
    newest = select(sa.func.max(JOURNAL.c.sequence)).where(JOURNAL.c.usecase == usecase)
    last: int = connection.execute(newest).scalar() or 0
    if expected is not None and last != expected:
        raise StaleJournal(f"the journal of {usecase!r} is at {last}, not {expected}: read it again and decide anew")
    values = {"usecase": usecase, "sequence": last + 1, "kind": kind, "payload": payload}
    connection.execute(insert(JOURNAL).values(**values, at_us=at_us))
    return last + 1


def acquire(connection: Connection, name: str, holder: str, seconds: float, now_us: int) -> bool:
    """``Database.acquire_lease`` inside ``Database.write``."""
    if seconds <= 0:
        raise ValueError(f"lease {name!r} of {holder!r} needs more than {seconds} seconds")
    expires_us = now_us + round(seconds * 1_000_000)
    row = connection.execute(select(LEASES).where(LEASES.c.name == name)).one_or_none()
    if row is None:
        connection.execute(insert(LEASES).values(name=name, holder=holder, expires_us=expires_us))
        return True
    if row.holder != holder and row.expires_us > now_us:
        return False
    change = update(LEASES).where(LEASES.c.name == name)
    connection.execute(change.values(holder=holder, expires_us=expires_us))
    return True


def _load(row: Row[Any]) -> Load:
    return Load(row.load_id, row.usecase, row.table_name, row.as_of_us, row.status, row.manifest)


def _normalised(url: str) -> URL:
    parsed = sa.make_url(url)
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite") or parsed.database in (None, "", ":memory:"):
        raise ValueError(
            f"database {parsed.render_as_string(hide_password=True)!r} is neither a SQLite file "
            "(sqlite:////absolute/path) nor PostgreSQL (postgresql://user@host/name)"
        )
    return parsed


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        return sa.create_engine(url, pool_pre_ping=True)
    path = Path(url.database or "")
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS})

    @event.listens_for(engine, "do_connect")
    def make_directory(*_: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where the "begin" event says
        # SQLite does not wait for its lock when it switches to WAL, so openers take turns.
        with open(f"{path}.lock", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("tidegate_write", False)
        # A write lock taken at once waits its turn; one taken after a read fails at once when it must wait.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
