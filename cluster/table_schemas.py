"""The columns of a table: as they are declared, as they lie in files, and whether rows fit them."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import pyarrow as pa
from deltalake import DeltaTable

SCHEMA_KEY = "tidegate.arrowSchema"


class OtherSchema(OSError, ValueError):
    """Rows or a definition do not fit a table's columns; the message names every column."""


def storable(schema: pa.Schema) -> pa.Schema:
    """The schema as it lies in files: Delta has no unsigned numbers, so they take the next wider type."""
    return pa.schema([pa.field(field.name, _signed(field.type), field.nullable) for field in schema])


def _signed(kind: pa.DataType) -> pa.DataType:
    wider = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64()}
    if pa.types.is_list(kind):
        return pa.list_(_signed(kind.value_type))
    if kind == pa.uint64():
        raise ValueError("a table cannot hold uint64: use int64")
    return wider.get(kind, kind)


def encoded(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    """With the strings of ``columns`` as dictionaries."""
    return pa.schema(
        [
            pa.field(field.name, pa.dictionary(pa.int32(), field.type), field.nullable)
            if field.name in columns
            else field
            for field in schema
        ]
    )


def pack(schema: pa.Schema) -> str:
    """The schema as text, for the table's configuration."""
    return base64.b64encode(schema.remove_metadata().serialize().to_pybytes()).decode()


def declared(handle: DeltaTable) -> pa.Schema:
    """The schema that a table was made with; Delta's own does not know every Arrow type."""
    packed = handle.metadata().configuration.get(SCHEMA_KEY)
    if packed is None:
        return pa.schema(handle.schema())
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(packed)))


def compare(name: str, table: pa.Schema, given: pa.Schema, *, partial: bool = False) -> None:
    """Raises ``OtherSchema`` unless ``given`` has the table's columns, or with ``partial`` some of them."""
    mine = {field.name: field.type for field in table}
    other = {field.name: field.type for field in given}
    faults = [f"{key} is {mine[key]}, given {other[key]}" for key in mine if key in other and mine[key] != other[key]]
    faults += [f"{key} ({mine[key]}) is missing" for key in mine if key not in other and not partial]
    faults += [f"{key} ({other[key]}) is not a column of it" for key in other if key not in mine]
    if faults:
        raise OtherSchema(f"table {name!r} has another schema: {'; '.join(faults)}")
