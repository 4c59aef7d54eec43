"""The control-plane tables. Moments are microseconds since the Unix epoch."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, MetaData, String, Table, UniqueConstraint

METADATA = MetaData()

LOADS = Table(
    "loads",
    METADATA,
    Column("load_id", String, primary_key=True),
    Column("usecase", String, nullable=False, index=True),
    Column("table_name", String, nullable=False),
    Column("as_of_us", BigInteger, nullable=False),
    Column("status", String, nullable=False),
    Column("manifest", JSON(none_as_null=True)),
)

IDENTITIES = Table(
    "load_identities",
    METADATA,
    Column("load_id", String, primary_key=True),
    Column("identity", String, nullable=False),
)

LEASES = Table(
    "leases",
    METADATA,
    Column("name", String, primary_key=True),
    Column("holder", String, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)

RELEASES = Table(
    "releases",
    METADATA,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("usecase", String, nullable=False),
    Column("version", String, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("requested_us", BigInteger, nullable=False),
    Column("status", String, nullable=False),
    UniqueConstraint("usecase", "version"),
    sqlite_autoincrement=True,  # a sequence is never used again, so it names one request for good
)

ROUTING = Table(
    "routing",
    METADATA,
    Column("usecase", String, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("document", JSON, nullable=False),
)

JOURNAL = Table(
    "journal",
    METADATA,
    Column("usecase", String, primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("kind", String, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("at_us", BigInteger, nullable=False),
)

TRIGGERS = Table(
    "triggers",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("usecase", String, nullable=False, index=True),
    Column("kind", String, nullable=False),
    Column("evidence", JSON, nullable=False),
    Column("opened_us", BigInteger, nullable=False),
    Column("status", String, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("outcome", JSON, nullable=False),
)

ALERTS = Table(
    "alerts",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("detail", String, nullable=False),
    Column("opened_us", BigInteger, nullable=False),
    Column("seen_us", BigInteger, nullable=False),
    Column("told_us", BigInteger, nullable=False),
    Column("repeats", BigInteger, nullable=False),
    Column("resolved_us", BigInteger),
    Index("alerts_by_subject", "name", "subject"),
)

TOLD = Table(
    "told",
    METADATA,
    Column("usecase", String, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
)

NOTIFICATIONS = Table(
    "notifications",
    METADATA,
    Column("alert_id", Integer, primary_key=True, autoincrement=False),
    Column("told", String, nullable=False),
)
