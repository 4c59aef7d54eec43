"""Files as real producers break them, made from good rows, each with the rule that must catch it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from pipelines.contracts.events import INSTANT
from pipelines.spec import Contract, FieldType
from pipelines.spec.base import microseconds


@dataclass(frozen=True)
class FaultyFile:
    """A file of ``rows`` rows that must all be quarantined under ``rule``."""

    path: Path
    rows: int
    rule: str


def write_faulty_files(contract: Contract, field: str, good: pa.Table, as_of_us: int, folder: Path) -> list[FaultyFile]:
    """Breaks copies of ``good`` (rows that the good files hold too) on the number ``field`` and the time field.

    The names sort after ``history``: a duplicate must come after its original.
    """
    good = good.filter(pc.is_valid(good[field]))
    if good.num_rows < 40:
        raise ValueError(f"at least 40 good rows with {field!r} are needed, {good.num_rows} were given")
    limits = contract.field(field)
    if limits.unit is None or limits.minimum is None:
        raise ValueError(f"field {field!r} needs a unit and a minimum")
    folder.mkdir(parents=True, exist_ok=True)
    place = good.schema.get_field_index(field)

    def column(values: pa.Array, metadata: dict[str, str] | None = None) -> pa.Table:
        return good.set_column(place, pa.field(field, values.type, metadata=metadata), values)

    files = []

    def written(name: str, rows: int, rule: str) -> Path:
        files.append(FaultyFile(folder / name, rows, rule))
        return folder / name

    other_unit = column(good[field].combine_chunks(), {"unit": f"k{limits.unit}"})
    pq.write_table(other_unit.slice(0, 30), written("import-other-unit.parquet", 30, f"{field}.unit"))

    text = column(pa.array(["n/a"] * good.num_rows)).slice(0, 20)
    csv.write_csv(_as_text(contract, text), written("import-text-in-number.csv", 20, f"{field}.type"))

    below = column(pc.subtract(limits.minimum - 1.0, pc.abs(good[field])).combine_chunks()).slice(0, 25)
    _write_jsonl(_as_text(contract, below), written("import-negative.jsonl", 25, f"{field}.minimum"))

    pq.write_table(good.slice(0, 40), written("import-repeated.parquet", 40, "key.duplicate"))

    ahead = as_of_us + microseconds(contract.future + timedelta(days=30))
    future = good.slice(0, 15)
    future = future.set_column(
        future.schema.get_field_index(contract.time),
        contract.time,
        pa.array([ahead + i for i in range(15)], pa.int64()).cast(INSTANT),
    )
    pq.write_table(future, written("import-future.parquet", 15, f"{contract.time}.future"))

    whole = (folder / "import-repeated.parquet").read_bytes()
    written("import-truncated.parquet", 1, "file.unreadable").write_bytes(whole[: len(whole) // 2])
    return files


def event_time(contract: Contract, table: pa.Table) -> pa.Array:
    """The event times in microseconds since the epoch, as int64."""
    return table[contract.time].cast(INSTANT).cast(pa.int64()).combine_chunks()


def records(contract: Contract, table: pa.Table) -> list[dict[str, Any]]:
    """The rows as JSON-ready records: timestamps as RFC 3339 text in UTC."""
    rows: list[dict[str, Any]] = _as_text(contract, table).to_pylist()
    return rows


def _as_text(contract: Contract, table: pa.Table) -> pa.Table:
    for field in contract.fields:
        if field.type is FieldType.TIMESTAMP:
            moments = table[field.name].to_pylist()
            text = pa.array([m.isoformat().replace("+00:00", "Z") for m in moments], pa.string())
            table = table.set_column(table.schema.get_field_index(field.name), field.name, text)
    return table


def _write_jsonl(table: pa.Table, path: Path) -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in table.to_pylist()))
