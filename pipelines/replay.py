"""Quarantined rows once more, after a fix of the data or of the contract: ``tidegate contract replay USECASE``.

A replay is a load of its own: what passes is added to the events table, and what does not is quarantined again, by the
replay's id. Each quarantined row is replayed once: the table ``<source>/replayed`` says in which replay.

The rows of a replay are set aside in files, then named in that table, then loaded. Whoever is killed in between is
followed by a run that loads what is named first; files of which no row is named were never decided upon.
"""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import xxhash

from cluster.clock import Clock
from cluster.database import Database
from cluster.filesystems import open_filesystem
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts import events, rules
from pipelines.contracts.enforce import quarantine_table
from pipelines.contracts.leases import kept_lease
from pipelines.ingest import LoadReport, ingest
from pipelines.spec import EventSource
from pipelines.spec.base import fingerprint

REPLAYED_SCHEMA = pa.schema([("row", pa.string()), ("replay", pa.string())])
"""``row`` is the fingerprint of a quarantined row, ``replay`` the id of the load that took it up."""
_HTTP, _ROWS = "http", "rows"
_NEVER = frozenset({rules.FILE_UNREADABLE, rules.KEY_DUPLICATE})
Origin = Literal["http", "files"]


@dataclass(frozen=True)
class Replayed:
    """The loads of a replay, and how many quarantined rows were passed over: duplicates and unreadable files, which are
    ``left``, and rows that are no record, which are ``unreadable``.
    """

    loads: tuple[LoadReport, ...]
    left: int
    unreadable: int

    @property
    def accepted(self) -> int:
        """Rows that came into the events table."""
        return sum(load.accepted for load in self.loads)


@dataclass(frozen=True)
class _Row:
    """A quarantined row that can be replayed; ``text`` when it was a line of a CSV file, whose cells have no types."""

    mark: str
    record: dict[str, Any]
    origin: Origin
    text: bool


def replayed_table(source: EventSource) -> str:
    """The Delta table of the quarantined rows that were replayed."""
    return f"{source.name}/replayed"


def replay(
    source: EventSource,
    *,
    tables: Tables,
    database: Database,
    settings: Settings,
    clock: Clock,
    broken: Sequence[str] = (),
    loads: Sequence[str] = (),
) -> Replayed:
    """Replays what the quarantine of ``source`` holds and was not replayed: all, or the rows that broke any of the
    rules ``broken`` (``inflow.maximum``) or came by any of ``loads``.

    Rows that came over HTTP are taken to be known from now on, since no state has had them; those of files as those of
    any load. However many are refused again, the others are published. Raises ``TimeoutError`` while another replay of
    the source runs.
    """
    tables.ensure(replayed_table(source), REPLAYED_SCHEMA)
    place = _Place(source, tables, database, settings, clock)
    with kept_lease(database, f"replay/{source.name}", uuid.uuid4().hex) as still_held:
        rows, left, unreadable = _select(place, set(broken), set(loads))  # first: what follows may refuse rows again
        done = [place.load(name) for name in place.begun()]
        for origin in ("http", "files"):
            mine = [row for row in rows if row.origin == origin]
            if mine:
                name = f"{origin}-{fingerprint(*sorted(row.mark for row in mine))}"
                place.set_aside(name, mine)
                still_held()
                marks = pa.table([[row.mark for row in mine], [name] * len(mine)], schema=REPLAYED_SCHEMA)
                tables.append(replayed_table(source), marks, f"replay/{name}")
                done.append(place.load(name))
    return Replayed(tuple(done), left, unreadable)


@dataclass(frozen=True)
class _Place:
    """Where the rows of replays are set aside, and what loads them."""

    source: EventSource
    tables: Tables
    database: Database
    settings: Settings
    clock: Clock

    @property
    def uri(self) -> str:
        return f"{self.tables.url}/_replay/{self.source.name}"

    def begun(self) -> list[str]:
        """The replays that were decided upon and whose files are still there; other files are removed."""
        filesystem, root = open_filesystem(self.uri, self.tables.storage_options)
        selector = pafs.FileSelector(root, allow_not_found=True)
        found = sorted(info.base_name for info in filesystem.get_file_info(selector))
        named = pc.unique(self.tables.read(replayed_table(self.source)).column("replay")).to_pylist()
        for name in found:
            if name not in named:
                filesystem.delete_dir(f"{root}/{name}")
        return [name for name in found if name in named]

    def set_aside(self, name: str, rows: Sequence[_Row]) -> None:
        filesystem, root = open_filesystem(f"{self.uri}/{name}", self.tables.storage_options)
        filesystem.create_dir(root, recursive=True)
        for kind, text in (("jsonl", _jsonl(rows)), ("csv", _csv(rows, self.source))):
            if text:
                with filesystem.open_output_stream(f"{root}/{_ROWS}.{kind}") as stream:
                    stream.write(text.encode())

    def load(self, name: str) -> LoadReport:
        """Loads a replay's rows, once, and removes its files."""
        # The share of rows that may be refused is meant for deliveries: these were refused before.
        contract = self.source.contract.model_copy(update={"max_rejected_share": 1.0})
        report = ingest(
            self.source.model_copy(update={"contract": contract}),
            [f"{self.uri}/{name}"],
            tables=self.tables,
            database=self.database,
            settings=self.settings,
            clock=self.clock,
            load_id=f"replay/{self.source.name}/{name}",
            known_from_us=self.clock.now() if name.startswith(_HTTP) else 0,
        )
        filesystem, root = open_filesystem(f"{self.uri}/{name}", self.tables.storage_options)
        filesystem.delete_dir(root)
        return report


def _select(place: _Place, broken: set[str], loads: set[str]) -> tuple[list[_Row], int, int]:
    """The rows to be replayed, each once; how many are left as they are, and how many are no record."""
    name = quarantine_table(place.source)
    if not place.tables.exists(name):
        return [], 0, 0
    gone = set(place.tables.read(replayed_table(place.source)).column("row").to_pylist())
    rows: dict[str, _Row] = {}
    left = unreadable = 0
    for row in place.tables.read(name).to_pylist():
        told = (row[events.LOAD_ID], row["source"], row["position"], row["at"], row["record"])
        mark = xxhash.xxh3_128_hexdigest(repr(told).encode())
        chosen = (not broken or broken & set(row["rules"])) and (not loads or row[events.LOAD_ID] in loads)
        if mark in gone or not chosen:
            continue
        if _NEVER & set(row["rules"]):
            left += 1
            continue
        record = json.loads(row["record"])
        if not isinstance(record, dict):
            unreadable += 1
            continue
        origin: Origin = "http" if row["source"] == _HTTP else "files"
        rows[mark] = _Row(mark, record, origin, row["source"].endswith(".csv"))
    return list(rows.values()), left, unreadable


def _jsonl(rows: Iterable[_Row]) -> str:
    return "".join(json.dumps(row.record) + "\n" for row in rows if not row.text)


def _csv(rows: Iterable[_Row], source: EventSource) -> str:
    mine = [row.record for row in rows if row.text]
    if not mine:
        return ""
    given = {name for record in mine for name in record}
    order = [field.name for field in source.contract.fields if field.name in given]
    names = order + sorted(given - set(order))
    written = io.StringIO()
    writer = csv.DictWriter(written, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if record.get(name) is None else record[name] for name in names} for record in mine)
    return written.getvalue()
