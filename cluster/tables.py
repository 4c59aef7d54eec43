"""Delta tables: files are written by anyone in parallel, and committed here, each load exactly once.

A commit carries (app_id, marker) in Delta's own transaction log; what a marker has committed is never
committed again, whichever process asks. Reads go through pyarrow on a pinned list of files.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from cluster import table_schemas
from cluster.filesystems import open_filesystem

_PARTITION_VALUE = re.compile(r"[A-Za-z0-9._-]{1,100}")
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
# How often a commit that lost a race looks again; each loser's rival has moved the table forward.
_ATTEMPTS = 40
# deltalake looks for each version between the newest and the one asked for, a million of them in a tenth of a second.
_LOOKED_FOR = 1_000_000


class NoVersion(ValueError):
    """The table has no such version, or no longer has it; the message names the newest and says what to ask for."""


@dataclass(frozen=True)
class DataFile:
    """A Parquet file that was written and not yet committed; ``path`` is relative to its table."""

    path: str
    size: int
    rows: int
    partition: dict[str, str]
    stats: str
    modified_ms: int


@dataclass(frozen=True)
class Entry:
    """A data file of a version: its path relative to the table, its partition values, its rows."""

    path: str
    partition: dict[str, str]
    rows: int


@dataclass(frozen=True)
class Commit:
    """A version that holds what was asked for, and whether this call (not an earlier one) put it there."""

    version: int
    applied: bool


class TableMoved(OSError):
    """Somebody else has committed to the table meanwhile: look at it again."""


class Tables:
    """The tables below one URL (``file:///…`` or ``s3://…``). Holds no connection, so it pickles anywhere.

    ``storage_options`` are object_store's (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, …); what they do
    not name is read from the environment. Names are slash-separated, such as ``aqua/events``.
    """

    def __init__(self, url: str, storage_options: Mapping[str, str] | None = None) -> None:
        if not url.startswith(("file:///", "s3://")):
            raise ValueError(f"tables live below file:///… or s3://…, not {url!r}")
        self.url = url.rstrip("/")
        self.storage_options = dict(storage_options or {})

    def uri(self, name: str) -> str:
        """The URI of a table, with its scheme."""
        if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
            raise ValueError(f"table name {name!r} must be words of letters, digits, '_', '-', '.' between '/'")
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the table has been created."""
        # Not DeltaTable.is_deltatable: it keeps the interpreter's lock while it waits for the store.
        try:
            self._open(name, without_files=True)
        except TableNotFoundError:
            return False
        return True

    def ensure(self, name: str, schema: pa.Schema, partition_by: Sequence[str] = (), *, grows: bool = False) -> None:
        """Create the table, or check that it has this schema and these partitions.

        With ``grows``, columns that an older table lacks are added to it; they are null in the rows it has. Columns
        that it has beyond the schema stay, for rows that are written as ``partial``. Raises ``ValueError`` naming every
        field that differs.
        """
        stored = table_schemas.storable(schema)
        if not self.exists(name):
            if self.url.startswith("file:"):
                Path(self._filesystem(name)[1]).mkdir(parents=True, exist_ok=True)
            try:
                DeltaTable.create(
                    self.uri(name),
                    stored,
                    mode="error",
                    partition_by=list(partition_by),
                    configuration={table_schemas.SCHEMA_KEY: table_schemas.pack(schema)},
                    raise_if_key_not_exists=False,
                    storage_options=self.storage_options or None,
                    # A second try would add this definition to the table that another process made meanwhile.
                    commit_properties=CommitProperties(max_commit_retries=0),
                )
            except DeltaError:
                if not self.exists(name):  # otherwise another process created it meanwhile
                    raise
        handle = self._open(name, without_files=True)
        declared = table_schemas.declared(handle)
        if grows and (added := [field for field in schema if field.name not in declared.names]):
            table_schemas.compare(
                name, declared, pa.schema([f for f in schema if f.name in declared.names]), partial=True
            )
            handle = self._grow(name, handle, pa.schema([*declared, *added]))
        table_schemas.compare(name, table_schemas.declared(handle), schema, partial=grows)
        if (existing := list(handle.metadata().partition_columns)) != list(partition_by):
            raise ValueError(
                f"table {name!r} is partitioned by {existing}, not by {list(partition_by)}: use another name"
            )

    def write_file(
        self,
        name: str,
        table: pa.Table,
        partition: Mapping[str, int | str] | None = None,
        *,
        partial: bool = False,
    ) -> DataFile:
        """Write one Parquet file of a uniquely named path; nothing sees it before ``commit``.

        ``partition`` gives the value of every partition column; those columns are not in the file. With ``partial``,
        columns that ``table`` lacks are null. Raises ``ValueError`` when columns or partitions do not fit the table.
        """
        handle = self._open(name, without_files=True)
        schema, columns = table_schemas.declared(handle), list(handle.metadata().partition_columns)
        values = {key: _partition_text(name, key, value) for key, value in (partition or {}).items()}
        if sorted(values) != sorted(columns):
            raise ValueError(f"table {name!r} is partitioned by {columns}, but {sorted(values)} were given")
        body = pa.schema([field for field in schema if field.name not in columns])
        table = table.drop_columns([column for column in columns if column in table.column_names])
        table_schemas.compare(name, body, table.schema, partial=partial)
        for field in body:
            if field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        table = table.select(body.names).cast(table_schemas.storable(body))
        folder = "/".join(f"{column}={values[column]}" for column in columns)
        path = f"{folder}/part-{uuid.uuid4().hex}.parquet" if folder else f"part-{uuid.uuid4().hex}.parquet"
        filesystem, root = self._filesystem(name)
        target = f"{root}/{path}"
        if isinstance(filesystem, pafs.LocalFileSystem):
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        pq.write_table(table, target, filesystem=filesystem, compression="zstd")
        self._sync(target)
        info = filesystem.get_file_info(target)
        stats = json.dumps({"numRecords": table.num_rows})
        return DataFile(path, info.size, table.num_rows, values, stats, int(time.time() * 1000))

    def commit(
        self, name: str, files: Sequence[DataFile], app_id: str, marker: int = 1, *, after: int | None = None
    ) -> Commit:
        """Make ``files`` part of the table in one version, unless ``app_id`` has reached ``marker`` before.

        An empty list records the marker alone. Safe against any number of concurrent committers; raises
        ``CommitFailedError`` when it keeps losing to others. With ``after``, it follows on that version of the table or
        raises ``TableMoved``: for files that were made by what the table held then.
        """
        for attempt in range(_ATTEMPTS):
            handle = self._open(name)  # fresh: a handle's view of markers is that of its own version
            seen = handle.transaction_version(app_id)
            if seen is not None and seen >= marker:
                return Commit(handle.version(), applied=False)
            if after is not None and handle.version() != after:
                raise TableMoved(f"table {name!r} is at version {handle.version()} and no longer at {after}")
            try:
                self._commit(handle, files, Transaction(app_id, marker), next_one=after is not None)
            except CommitFailedError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.005, 0.05))
                continue
            base = handle.version()
            handle.update_incremental()
            version = handle.version()
            for written in range(base + 1, version + 1):
                self._sync(f"{self._filesystem(name)[1]}/_delta_log/{written:020d}.json")
            return Commit(version, applied=True)
        raise AssertionError("unreachable")

    def append(
        self,
        name: str,
        table: pa.Table,
        app_id: str,
        marker: int = 1,
        *,
        partial: bool = False,
        after: int | None = None,
    ) -> Commit:
        """Split ``table`` by its partition columns, write the files (see ``write_file``) and commit them once, as
        ``commit`` does.
        """
        if (seen := self.marker(name, app_id)) is not None and seen >= marker:
            return Commit(self.version(name), applied=False)
        columns = list(self._open(name, without_files=True).metadata().partition_columns)
        parts = _split(table, columns) if table.num_rows else []
        files = [self.write_file(name, rows, at, partial=partial) for at, rows in parts]
        return self.commit(name, files, app_id, marker, after=after)

    def version(self, name: str) -> int:
        """The newest version of the table."""
        return self._open(name, without_files=True).version()

    def schema(self, name: str, version: int | None = None) -> pa.Schema:
        """The declared schema of one version, partition columns included."""
        return table_schemas.declared(self._open(name, version, without_files=True))

    def marker(self, name: str, app_id: str) -> int | None:
        """The highest marker that ``app_id`` has committed, None if it never has."""
        return self._open(name, without_files=True).transaction_version(app_id)

    def files(
        self,
        name: str,
        version: int | None = None,
        partition: Mapping[str, Sequence[int | str]] | None = None,
    ) -> list[str]:
        """The URIs of the data files of one version, in the order of their paths.

        ``partition`` keeps only the files whose partition values are among those given. The partition
        columns are not in the files: their values are in the paths, as ``column=value``.
        """
        handle = self._open(name, version)
        return [f"{self.uri(name)}/{entry.path}" for entry in _data_files(name, handle, partition)]

    def entries(self, name: str, version: int | None = None) -> list[Entry]:
        """The data files of one version, in the order of their paths; no file is opened for it."""
        return _data_files(name, self._open(name, version), None)

    def read(
        self,
        name: str,
        version: int | None = None,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,
        partition: Mapping[str, Sequence[int | str]] | None = None,
        encoded: Sequence[str] = (),
    ) -> pa.Table:
        """The rows of one version as the declared schema (or ``columns`` of it).

        ``partition`` prunes as in ``files``. Rows of a file keep their order; files come by path. The strings of
        ``encoded`` come as dictionaries, as they lie in the files, which spares a copy of every one.
        """
        dataset, schema = self._dataset(name, version, columns, partition, encoded)
        return dataset.to_table(columns=schema.names, filter=filter).cast(schema)

    def batches(
        self,
        name: str,
        version: int | None = None,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,
    ) -> Iterator[pa.Table]:
        """What ``read`` gives, a few thousand rows at a time: no more than some files lie in memory at once."""
        dataset, schema = self._dataset(name, version, columns, None, ())
        scan = dataset.scanner(columns=schema.names, filter=filter, batch_readahead=2, fragment_readahead=1)
        for batch in scan.to_batches():
            if batch.num_rows:
                yield pa.Table.from_batches([batch]).cast(schema)

    def _dataset(
        self,
        name: str,
        version: int | None,
        columns: Sequence[str] | None,
        partition: Mapping[str, Sequence[int | str]] | None,
        encoded: Sequence[str],
    ) -> tuple[ds.Dataset, pa.Schema]:
        """The files of a version, and the schema of the columns that are asked for."""
        handle = self._open(name, version)
        schema = table_schemas.encoded(table_schemas.declared(handle), encoded)
        stored = table_schemas.storable(schema)
        filesystem, root = self._filesystem(name)
        parquet = ds.ParquetFileFormat(read_options=ds.ParquetReadOptions(dictionary_columns=list(encoded)))
        fragments = [
            parquet.make_fragment(f"{root}/{entry.path}", filesystem, _partition_expression(entry.partition, stored))
            for entry in _data_files(name, handle, partition)
        ]
        dataset = ds.FileSystemDataset(fragments, stored, parquet, filesystem)
        names = list(columns) if columns is not None else schema.names
        return dataset, pa.schema([schema.field(column) for column in names])

    def compact(self, name: str) -> int:
        """Rewrite small files as large ones in a new version with the same rows; how many files went."""
        return int(self._open(name).optimize.compact()["numFilesRemoved"])

    def vacuum(self, name: str, older_than: timedelta) -> list[str]:
        """Delete files that were replaced, or written and never committed, more than ``older_than`` ago.

        Returns their paths. ``older_than`` (whole hours, rounded up) must exceed both the longest load and
        the age of the oldest version that is still read.
        """
        hours = -(-older_than // timedelta(hours=1))
        gone = self._open(name).vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True)
        return sorted(gone)

    def _grow(self, name: str, handle: DeltaTable, schema: pa.Schema) -> DeltaTable:
        """The table with the columns of ``schema`` that it lacks; whatever another process has added by then."""
        held = set(pa.schema(handle.schema()).names)
        lacking = pa.schema([field for field in table_schemas.storable(schema) if field.name not in held])
        try:
            handle.alter.add_columns(list(DeltaSchema.from_arrow(lacking).fields))
            handle.alter.set_table_properties(
                {table_schemas.SCHEMA_KEY: table_schemas.pack(schema)}, raise_if_not_exists=False
            )
        except DeltaError:
            if set(schema.names) - set(self.schema(name).names):  # otherwise another process has grown it meanwhile
                raise
        return self._open(name, without_files=True)

    def _open(self, name: str, version: int | None = None, *, without_files: bool = False) -> DeltaTable:
        if version is not None and not 0 <= version < _LOOKED_FOR:
            newest = self.version(name)
            if not 0 <= version <= newest:
                raise _no_version(name, version, newest)
        try:
            return DeltaTable(
                self.uri(name),
                version=version,
                storage_options=self.storage_options or None,
                without_files=without_files,
            )
        except TableNotFoundError:
            if version is not None:  # unless there is no table at all, which this finds out
                raise _no_version(name, version, self.version(name)) from None
            raise TableNotFoundError(f"there is no table {name!r} below {self.url} yet") from None
        except DeltaError:
            if version is None or version <= (newest := self.version(name)):
                raise
            raise _no_version(name, version, newest) from None

    def _commit(
        self, handle: DeltaTable, files: Sequence[DataFile], transaction: Transaction, *, next_one: bool
    ) -> None:
        """``next_one``: as the version after the handle's, or not at all."""
        actions: list[AddAction | RemoveAction] = [
            AddAction(file.path, file.size, file.partition, file.modified_ms, True, file.stats) for file in files
        ]
        handle.create_write_transaction(
            actions,
            mode="append",
            schema=handle.schema(),
            partition_by=list(handle.metadata().partition_columns),
            commit_properties=CommitProperties(
                app_transactions=[transaction], max_commit_retries=0 if next_one else None
            ),
        )

    def _filesystem(self, name: str) -> tuple[pafs.FileSystem, str]:
        return open_filesystem(self.uri(name), self.storage_options)

    def _sync(self, path: str) -> None:
        # The ingest log forgets rows once they are committed here: a local commit must outlive a power cut.
        if not self.url.startswith("file:"):
            return
        for target in (path, path.rpartition("/")[0]):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _no_version(name: str, version: int, newest: int) -> NoVersion:
    if 0 <= version <= newest:  # Delta deletes what its log says of versions older than the log's retention
        return NoVersion(
            f"table {name!r} no longer has version {version}: its newest is {newest}; ask for a later one, "
            "or for none to get the newest"
        )
    return NoVersion(
        f"table {name!r} has no version {version}: its newest is {newest}; ask for one from 0 to {newest}, "
        "or for none to get the newest"
    )


def _split(table: pa.Table, columns: Sequence[str]) -> list[tuple[dict[str, int | str], pa.Table]]:
    """The rows of each combination of values of ``columns``, in their order."""
    if not columns:
        return [({}, table)]
    keys = table.select(columns).group_by(list(columns)).aggregate([])
    parts = []
    for values in keys.sort_by([(column, "ascending") for column in columns]).to_pylist():
        mask = pa.scalar(True)
        for column, value in values.items():
            mask = pc.and_(mask, pc.equal(table.column(column), pa.scalar(value, table.field(column).type)))
        parts.append((values, table.filter(mask)))
    return parts


def _data_files(name: str, handle: DeltaTable, partition: Mapping[str, Sequence[int | str]] | None) -> list[Entry]:
    """Every live file, sorted by path."""
    columns = list(handle.metadata().partition_columns)
    if unknown := sorted(set(partition or {}) - set(columns)):
        raise ValueError(f"table {name!r} is partitioned by {columns}, so it cannot be pruned by {unknown}")
    wanted = {key: {str(value) for value in values} for key, values in (partition or {}).items()}
    actions = pa.table(handle.get_add_actions(flatten=True))
    found = []
    rows = actions.column("num_records").to_pylist()
    values = [actions.column(f"partition.{column}").to_pylist() for column in columns]
    for place, path in enumerate(actions.column("path").to_pylist()):
        mine = {column: str(values[i][place]) for i, column in enumerate(columns)}
        if all(mine[key] in allowed for key, allowed in wanted.items()):
            found.append(Entry(path, mine, rows[place]))
    return sorted(found, key=lambda entry: entry.path)


def _partition_expression(values: Mapping[str, str], schema: pa.Schema) -> pc.Expression:
    expression = pc.scalar(True)
    for column, text in values.items():
        value = pa.scalar(text).cast(schema.field(column).type)
        expression = expression & (pc.field(column) == value)
    return expression


def _partition_text(name: str, column: str, value: int | str) -> str:
    text = str(value)
    if not _PARTITION_VALUE.fullmatch(text):
        raise ValueError(
            f"table {name!r}: partition value {text!r} of {column!r} must be letters, digits, '.', '_' or '-'"
        )
    return text
