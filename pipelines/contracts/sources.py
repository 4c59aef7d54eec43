"""Finding and reading source files (.parquet, .csv, .jsonl; local or s3://) in splits, in one stable order.

A record that cannot be read becomes an unreadable row; a file that cannot be read raises ``Unreadable``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash

from cluster.filesystems import open_filesystem
from pipelines.contracts.parsing import AmbiguousColumns, Parsed, from_arrow, from_records, from_text
from pipelines.spec import Contract
from pipelines.spec.base import fingerprint

Kind = Literal["parquet", "csv", "jsonl", "other"]
_SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl"}
_SPLIT_ROWS = 1_000_000
_BATCH_ROWS = 131_072
_LATER, _LATER_OF_FIELDS = (
    ("rules", "load_rules"),
    (
        *("min_length", "max_length", "precision", "scale"),
        *("warn", "refuse"),
        *("items", "min_items", "max_items"),
    ),
)
_BLOCK_BYTES = 8 << 20


class NoSource(ValueError):
    """There is nothing to load by that name; the message says what there should be."""


class Unreadable(ValueError):
    """The file is not what its name says; the message is the reader's reason."""


@dataclass(frozen=True)
class Source:
    """One file. ``name`` is stable where the files are copied: the path below what the caller named."""

    uri: str
    name: str
    kind: Kind
    size: int


@dataclass(frozen=True)
class Split:
    """A part of a source that one task reads: row groups of a Parquet file, or a whole file."""

    source: Source
    order: int
    first: int
    row_groups: tuple[int, ...] | None


@dataclass(frozen=True)
class Batch:
    """Parsed rows and the position of each in its source, counted from 0 (int64[n])."""

    parsed: Parsed
    positions: np.ndarray


def find(sources: Sequence[str], storage_options: Mapping[str, str]) -> list[Source]:
    """The files in the order given, those of a directory by name; hidden and ``_`` files are passed over.

    A file of another kind, in a directory, is none that can be read. Raises ``FileNotFoundError``, or ``NoSource`` for
    a file of another kind that is named, and for what holds no file.
    """
    found: list[Source] = []
    for given in sources:
        uri = given if "://" in given else Path(given).absolute().as_uri()
        filesystem, path = open_filesystem(uri, storage_options)
        path = path.rstrip("/")
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(f"no source {given!r}: name existing files or directories")
        infos = [info]
        if info.type == pafs.FileType.Directory:
            listed = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
            infos = sorted((i for i in listed if i.type == pafs.FileType.File), key=lambda i: i.path)
        for one in infos:
            below = one.path.removeprefix(path).lstrip("/")
            if any(part.startswith((".", "_")) for part in below.split("/") if below):
                continue
            kind = _SUFFIXES.get("." + one.path.rpartition(".")[2].lower(), "other")
            if kind == "other" and not below:
                raise NoSource(f"source {one.path!r} must end in one of {sorted(_SUFFIXES)}")
            # Joined as text: quoting is the file URI's own and the rest is taken as it is.
            where = Path(one.path).as_uri() if uri.startswith("file:") else f"s3://{one.path}"
            found.append(Source(where, below or path.rpartition("/")[2], kind, one.size))
    if not found:
        raise NoSource(f"there is no file in {', '.join(sources)}")
    return _distinct_names(found)


def identity(contract: Contract, use_case: str, sources: Sequence[Source], storage_options: Mapping[str, str]) -> str:
    """The default load id: a hash of use case, contract, and the names and contents of the sources."""
    # An example decides nothing, nor does a promise: with another one, or none, the same files are still the same load.
    # What contracts came to say later is left out where one says nothing of it: loads of before are known again.
    said = {
        place: {"example"} | {name for name in _LATER_OF_FIELDS if getattr(field, name) in (None, ())}
        for place, field in enumerate(contract.fields)
    }
    silent: dict[str, Any] = {name: True for name in _LATER if not getattr(contract, name)}
    known = {
        place: {"known_for"} for place, rule in enumerate(contract.load_rules) if not getattr(rule, "known_for", None)
    }
    exclude = {"fields": said, "load_rules": known, "sla": True, **silent}
    parts: list[Any] = [use_case, contract.model_dump_json(exclude=exclude)]
    for source in sources:
        digest = xxhash.xxh3_128()
        filesystem, path = open_filesystem(source.uri, storage_options)
        with filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(_BLOCK_BYTES):
                digest.update(chunk)
        parts += [source.name, digest.hexdigest()]
    return fingerprint(*parts)


def estimated_rows(sources: Sequence[Source], storage_options: Mapping[str, str]) -> int:
    """About how many rows the files hold: what Parquet says, and 64 bytes a row of text."""
    total = 0
    for source in sources:
        if source.kind != "parquet":
            total += source.size // 64
            continue
        try:
            with _parquet(source, storage_options) as file:
                total += file.metadata.num_rows
        except Unreadable:
            total += 1
    return total


def split(sources: Sequence[Source], storage_options: Mapping[str, str]) -> list[Split]:
    """One split per file, or per about a million rows of a Parquet file. An unreadable file is one split."""
    splits = []
    for order, source in enumerate(sources):
        counts: list[int] = []
        if source.kind == "parquet":
            try:
                with _parquet(source, storage_options) as file:
                    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            except Unreadable:
                counts = []
        if sum(counts) <= _SPLIT_ROWS:
            splits.append(Split(source, order, 0, None))
            continue
        first, start, groups = 0, 0, []
        for place, count in enumerate(counts):
            groups.append(place)
            start += count
            if start - first >= _SPLIT_ROWS or place == len(counts) - 1:
                splits.append(Split(source, order, first, tuple(groups)))
                first, groups = start, []
    return splits


def read(contract: Contract, part: Split, storage_options: Mapping[str, str]) -> Iterator[Batch]:
    """The rows of a split in batches. Raises ``Unreadable``, possibly after some batches."""
    rows = 0
    for batch in _read(contract, part, storage_options):
        rows += len(batch.positions)
        yield batch
    if not rows and not part.first:
        raise Unreadable("it holds no row")


def _read(contract: Contract, part: Split, storage_options: Mapping[str, str]) -> Iterator[Batch]:
    filesystem, path = open_filesystem(part.source.uri, storage_options)
    match part.source.kind:
        case "parquet":
            yield from _read_parquet(contract, part, storage_options)
        case "csv":
            yield from _read_csv(contract, lambda: filesystem.open_input_stream(path))
        case "jsonl":
            with filesystem.open_input_stream(path) as stream:
                yield from _read_jsonl(contract, stream)
        case "other":
            raise Unreadable(f"its name ends in none of {sorted(_SUFFIXES)}")


def _read_parquet(contract: Contract, part: Split, storage_options: Mapping[str, str]) -> Iterator[Batch]:
    with _parquet(part.source, storage_options) as file, _reasons():
        _refuse_others(contract, file.schema_arrow.names)
        position = part.first
        groups = list(part.row_groups) if part.row_groups is not None else None
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups):
            for column in batch.columns:
                column.validate(full=True)  # Parquet does not promise UTF-8
            table = _plain(pa.Table.from_batches([batch]))
            yield Batch(from_arrow(contract, table), np.arange(position, position + batch.num_rows))
            position += batch.num_rows


def _plain(table: pa.Table) -> pa.Table:
    """With strings where there are views of strings, of which Arrow cannot take some rows."""
    for place, (name, kind) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        if pa.types.is_string_view(kind):
            table = table.set_column(place, name, table.column(place).cast(pa.string()))
    return table


def _read_csv(contract: Contract, reopen: Callable[[], IO[bytes]]) -> Iterator[Batch]:
    bad: list[tuple[int, str]] = []

    def refuse(row: Any) -> str:
        bad.append((row.number - 2, row.text))  # counted from 1, the header included
        return "skip"

    with _reasons():
        serial = pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)  # threads do not number rows
        with pacsv.open_csv(reopen(), serial, _csv_cells(lambda row: "skip")) as peek:
            header = peek.schema.names
        _refuse_others(contract, header)
        reader = pacsv.open_csv(
            reopen(),
            serial,
            _csv_cells(refuse),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        position = 0
        for batch in reader:
            skipped = np.array([place for place, _ in bad if place >= position], dtype=np.int64)
            places = np.setdiff1d(np.arange(position, position + batch.num_rows + len(skipped)), skipped)
            places = places[: batch.num_rows]
            if batch.num_rows:
                yield Batch(from_text(contract, pa.Table.from_batches([batch])), places)
                position = int(places[-1]) + 1
    if bad:
        yield Batch(from_records(contract, [text for _, text in bad]), np.array([place for place, _ in bad]))


def _refuse_others(contract: Contract, columns: Sequence[str]) -> None:
    """Raises ``Unreadable`` for a file without a column that every row of the contract has: it is of something else."""
    lacking = [field.name for field in contract.fields if not field.nullable and field.name not in columns]
    if lacking:
        raise Unreadable(f"it has no column {', '.join(lacking)}; its columns are {', '.join(columns)}"[:500])


def _csv_cells(refuse: Callable[[Any], str]) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse)


def _read_jsonl(contract: Contract, stream: IO[bytes]) -> Iterator[Batch]:
    numbered = ((place, line) for place, line in enumerate(_lines(stream)) if line.strip())
    while chunk := list(islice(numbered, _BATCH_ROWS)):
        records = [_record(line) for _, line in chunk]
        yield Batch(from_records(contract, records), np.array([place for place, _ in chunk]))


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _record(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # the text itself is no object, so the row counts as unreadable
        return line.decode("utf-8", "backslashreplace")


def _parquet(source: Source, storage_options: Mapping[str, str]) -> pq.ParquetFile:
    filesystem, path = open_filesystem(source.uri, storage_options)
    file = filesystem.open_input_file(path)
    with _reasons():
        return pq.ParquetFile(file)


class _reasons:
    """Turns what a reader says of a file's content into ``Unreadable``; failures of the storage pass."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Arrow reports damaged pages as OSError without errno, and so do its S3 client's own failures.
        damaged = isinstance(error, OSError) and error.errno is None and "AWS Error" not in str(error)
        if damaged or isinstance(error, pa.ArrowInvalid | AmbiguousColumns):
            raise Unreadable(str(error)) from error


def _distinct_names(sources: list[Source]) -> list[Source]:
    names = [source.name for source in sources]
    return [s if names.count(s.name) == 1 else Source(s.uri, s.uri, s.kind, s.size) for s in sources]
