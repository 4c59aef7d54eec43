"""Quarantined rows once more, after a fix of the contract: ``tidegate contract replay USECASE``.

Rows that pass by now are loaded, each once: the table ``<source>/replayed`` says in which replay. Rows that still break
a rule stay where they are, for the next fix.

The rows of a replay are set aside in files, with the contract that they passed, then named in that table, then loaded.
Whoever is killed in between is followed by a run that first loads what is named, under the contract of then.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from pipelines.contracts.parsing import from_records, from_text
from pipelines.contracts.rows import check
from pipelines.ingest import REPLAY, LoadReport, ingest
from pipelines.spec import Contract, EventSource
from pipelines.spec.base import fingerprint

REPLAYED_SCHEMA = pa.schema([("row", pa.string()), ("replay", pa.string())])
"""``row`` is the fingerprint of a quarantined row, ``replay`` the id of the load that took it up."""
_HTTP, _ROWS, _CONTRACT = "http", "rows", "contract"
_NEVER = frozenset({rules.FILE_UNREADABLE, rules.KEY_DUPLICATE})
_AT_ONCE = 100_000
_ORPHANED_S = 24 * 3600.0
_COLUMNS = [events.LOAD_ID, "source", "position", "rules", "record", "at"]


@dataclass(frozen=True)
class Replayed:
    """The loads of a replay, and how many quarantined rows stay where they are: those that still break a rule
    (``refused``), duplicates, unreadable files and rows of refused loads (``left``), and rows that are no record
    (``unreadable``).
    """

    loads: tuple[LoadReport, ...]
    refused: int
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
    http: bool
    text: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """What a file of such lines has for columns; nothing of a record with types."""
        return tuple(self.record) if self.text else ()


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
    """Loads what the quarantine of ``source`` holds, passes its contract by now and was not replayed before: of all
    rows, or of those that broke any of the rules ``broken`` (``inflow.maximum``) or came by any of ``loads``. Rows that
    broke nothing, and were refused with their whole load, are taken up only where one of these names them: what a load
    has to be is not asked of a replay.

    Rows that came over HTTP are taken to be known from now on, since no state has had them; those of files as those of
    any load. Some at a time are taken up, so that a quarantine of any size can be replayed. Raises ``TimeoutError``
    while another replay of the source runs.
    """
    tables.ensure(replayed_table(source), REPLAYED_SCHEMA)
    place = _Place(source, tables, database, settings, clock)
    with kept_lease(database, f"replay/{source.name}", uuid.uuid4().hex) as still_held:
        done = [place.load(name) for name in place.begun()]
        refused = 0
        chosen = _Selection(place, frozenset(broken), frozenset(loads))
        for found in chosen.rows():
            rows = _passing(source.contract, found, clock.now())
            refused += len(found) - len(rows)
            for http in (True, False):
                mine = [row for row in rows if row.http is http]
                if not mine:
                    continue
                kind = _HTTP if http else "files"
                name = f"{kind}-{fingerprint(source.contract, *sorted(row.mark for row in mine))}"
                place.set_aside(name, mine)
                still_held()
                marks = pa.table([[row.mark for row in mine], [name] * len(mine)], schema=REPLAYED_SCHEMA)
                tables.append(replayed_table(source), marks, f"replay/{name}")
                done.append(place.load(name))
    return Replayed(tuple(done), refused, chosen.left, chosen.unreadable)


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
        """The replays that were decided upon and whose files are still there.

        Others may still be decided upon by somebody who is slow; they are removed after a day.
        """
        filesystem, root = open_filesystem(self.uri, self.tables.storage_options)
        found = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        named = set(pc.unique(self.tables.read(replayed_table(self.source)).column("replay")).to_pylist())
        for info in found:
            made_ns = info.mtime_ns
            if info.base_name not in named and made_ns is not None and time.time() - made_ns / 1e9 > _ORPHANED_S:
                filesystem.delete_dir(info.path)
        return sorted(info.base_name for info in found if info.base_name in named)

    def set_aside(self, name: str, rows: Sequence[_Row]) -> None:
        filesystem, root = open_filesystem(f"{self.uri}/{name}", self.tables.storage_options)
        filesystem.create_dir(f"{root}/{_ROWS}", recursive=True)
        files = {f"{_CONTRACT}.json": self.source.contract.model_dump_json()}
        for place, (columns, mine) in enumerate(_by_columns(rows)):
            kind, text = ("csv", _csv(columns, mine)) if columns else ("jsonl", _jsonl(mine))
            files[f"{_ROWS}/{place}.{kind}"] = text
        for path, text in files.items():
            with filesystem.open_output_stream(f"{root}/{path}") as stream:
                stream.write(text.encode())

    def load(self, name: str) -> LoadReport:
        """Loads a replay's rows, once, under the contract that they passed, and removes its files."""
        filesystem, root = open_filesystem(f"{self.uri}/{name}", self.tables.storage_options)
        with filesystem.open_input_stream(f"{root}/{_CONTRACT}.json") as stream:
            contract = Contract.model_validate_json(stream.read())
        # What a load has to be is meant for deliveries: here some rows of several are loaded, and only duplicates are
        # left to be refused.
        contract = contract.model_copy(update={"max_rejected_share": 1.0, "load_rules": ()})
        report = ingest(
            self.source.model_copy(update={"contract": contract}),
            [f"{self.uri}/{name}/{_ROWS}"],
            tables=self.tables,
            database=self.database,
            settings=self.settings,
            clock=self.clock,
            load_id=f"{REPLAY}/{self.source.name}/{name}",
            known_from_us=self.clock.now() if name.startswith(_HTTP) else 0,
        )
        filesystem.delete_dir(root)
        return report


def _passing(contract: Contract, rows: Sequence[_Row], now_us: int) -> list[_Row]:
    """Those of ``rows`` that the contract accepts."""
    kept: list[_Row] = []
    for columns, mine in _by_columns(rows):
        if columns:
            cells = [pa.array([row.record[name] for row in mine], pa.string()) for name in columns]
            parsed = from_text(contract, pa.table(cells, names=list(columns)))
        else:
            parsed = from_records(contract, [row.record for row in mine])
        kept += [mine[place] for place in np.flatnonzero(check(contract, parsed, now_us).accepted).tolist()]
    return kept


def _by_columns(rows: Iterable[_Row]) -> list[tuple[tuple[str, ...], list[_Row]]]:
    """Lines of files with the same columns together: a column too many in one is nothing to another."""
    found: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        found.setdefault(row.columns, []).append(row)
    return sorted(found.items())


@dataclass
class _Selection:
    """The rows of the quarantine that may be replayed, each once. When all were given, ``left`` says how many never can
    be, and ``unreadable`` how many are no record.
    """

    place: _Place
    broken: frozenset[str]
    loads: frozenset[str]
    left: int = 0
    unreadable: int = 0

    def rows(self) -> Iterator[list[_Row]]:
        """Some at a time, as the quarantine is now."""
        name, found = quarantine_table(self.place.source), dict[str, _Row]()
        tables, seen = self.place.tables, set[str]()
        if not tables.exists(name):
            return
        gone = tables.read(replayed_table(self.place.source)).column("row").combine_chunks()
        wanted = pc.field(events.LOAD_ID).isin(sorted(self.loads)) if self.loads else None
        for batch in tables.batches(name, tables.version(name), _COLUMNS, wanted):
            found |= {row.mark: row for row in self._of_batch(batch, gone) if row.mark not in seen}
            if len(found) >= _AT_ONCE:
                seen.update(found)
                yield list(found.values())
                found = {}
        if found:
            yield list(found.values())

    def _of_batch(self, table: pa.Table, gone: pa.Array) -> Iterator[_Row]:
        table = table.set_column(_COLUMNS.index("at"), "at", table.column("at").cast(pa.int64()))
        rows = table.to_pylist()
        marks = [_mark(row) for row in rows]
        taken = pc.is_in(pa.array(marks, pa.string()), value_set=gone).to_pylist()
        for row, mark, before in zip(rows, marks, taken, strict=True):
            if before or (self.broken and not self.broken & set(row["rules"])):
                continue
            refused_whole = rules.LOAD_REFUSED in row["rules"] and not (self.loads or self.broken)
            if refused_whole or _NEVER & set(row["rules"]):
                self.left += 1
                continue
            record = json.loads(row["record"])
            if not isinstance(record, dict):
                self.unreadable += 1
                continue
            cells = all(value is None or isinstance(value, str) for value in record.values())
            yield _Row(mark, record, row["source"] == _HTTP, row["source"].lower().endswith(".csv") and cells)


def _mark(row: dict[str, Any]) -> str:
    """The fingerprint of a quarantined row."""
    told = (row[events.LOAD_ID], row["source"], row["position"], row["at"], row["record"])
    return xxhash.xxh3_128_hexdigest(repr(told).encode())


def _jsonl(rows: Iterable[_Row]) -> str:
    return "".join(json.dumps(row.record) + "\n" for row in rows)


def _csv(columns: Sequence[str], rows: Iterable[_Row]) -> str:
    """Cells in quotes, so that an empty text stays one; a null is an empty cell without."""

    def cell(value: str | None) -> str:
        return "" if value is None else '"' + value.replace('"', '""') + '"'

    lines = [columns, *([row.record[name] for name in columns] for row in rows)]
    return "".join(",".join(map(cell, line)) + "\n" for line in lines)
