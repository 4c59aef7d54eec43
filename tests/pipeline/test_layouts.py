"""Events that wait in the log while their contract changes: found by name, and never read as another field's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.log import Log
from pipelines.contracts.events import (
    Layout,
    OtherLayout,
    decode_events,
    encode_event,
    events_schema,
    from_microseconds,
    layouts_of,
)
from pipelines.drain import drain
from pipelines.features.online import OnlineState
from pipelines.spec import Contract, Field, FieldType, UseCase
from serving.events import EventIntake
from tests.backends import open_log, open_state
from tests.data.worlds import BASE, CONTRACT
from tests.pipeline.loads import World, world
from tests.pipeline.test_online_state import use_case

EXTRA = tuple(Field(name=f"x{place}", type=FieldType.FLOAT, nullable=True) for place in range(4))


def contract(fields: Sequence[Field]) -> Contract:
    """That of the meters with more fields, in that order."""
    return Contract(**{**{name: getattr(CONTRACT, name) for name in Contract.model_fields}, "fields": tuple(fields)})


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    chosen = draw(st.lists(st.sampled_from(EXTRA), unique_by=lambda field: field.name))
    return contract(draw(st.permutations([*CONTRACT.fields, *chosen])))


@given(st.lists(contracts(), min_size=1, max_size=4), contracts(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_value_is_found_by_its_name_whichever_contract_it_was_written_under(writers, reader, data) -> None:
    blobs, expected = [], []
    for number in range(data.draw(st.integers(1, 6))):
        writer = data.draw(st.sampled_from(writers))
        values = {field.name: data.draw(st.none() | st.floats(-9, 9)) for field in writer.fields[:]}
        record = {**values, "meter": "m", "at": from_microseconds(BASE + number)}
        blobs.append(encode_event(writer, record))
        names = {field.name for field in writer.fields}
        expected.append({f.name: record[f.name] if f.name in names else None for f in reader.fields})
    known = [Layout.of(writer) for writer in writers]
    count = range(len(blobs))
    found = decode_events(reader, blobs, count, count, load_id="x", buckets=1, layouts=lambda: known)
    assert found.schema == events_schema(reader)
    assert found.select([field.name for field in reader.fields]).to_pylist() == expected


def test_a_record_from_before_there_were_layouts_is_read_by_its_places() -> None:
    before = b'["m|1",null,' + str(BASE).encode() + b",2.5]"
    order = {"meter": 0, "at": 1, "flow": 2, "level": 3}
    reader = contract([*sorted(CONTRACT.fields, key=lambda field: order[field.name]), EXTRA[0]])
    blob = before.replace(b"null", b'"m"')
    found = decode_events(reader, [blob], [1], [1], load_id="x", buckets=1)
    assert found.select(["meter", "flow", "level", "x0"]).to_pylist() == [
        {"meter": "m", "flow": 2.5, "level": None, "x0": None}
    ]


def test_what_cannot_be_told_or_must_not_be_lost_is_refused() -> None:
    later = contract([*CONTRACT.fields, EXTRA[0]])
    record = {"meter": "m", "at": from_microseconds(BASE), "flow": 1.0, "level": None, "x0": 7.0}
    blob = encode_event(later, record)

    def read(reader: Contract, *known: Contract, whole: bool = True) -> pa.Table:
        layouts = [Layout.of(one) for one in known]
        return decode_events(reader, [blob], [1], [1], load_id="", buckets=1, layouts=lambda: layouts, whole=whole)

    with pytest.raises(OtherLayout, match="which nothing in the log describes"):
        read(CONTRACT, CONTRACT)
    with pytest.raises(OtherLayout, match=r"have \['x0'\], of a later contract"):
        read(CONTRACT, CONTRACT, later)
    assert read(CONTRACT, CONTRACT, later, whole=False).num_rows == 1
    assert read(CONTRACT, later, CONTRACT).num_rows == 1, "the field was taken off the contract since"
    typed = contract([*CONTRACT.fields, Field(name="x0", type=FieldType.STRING, nullable=True)])
    with pytest.raises(OtherLayout, match="have 'x0' as double, and the contract has it as string"):
        read(typed, later, typed)
    counted = contract([*CONTRACT.fields, Field(name="x0", type=FieldType.INTEGER, nullable=True)])
    blob = encode_event(counted, {**record, "x0": 7})
    assert read(later, counted, later).column("x0").to_pylist() == [7.0]


class Clock:
    def now(self) -> int:
        return BASE + 60_000_000


def page(fields: Sequence[Field]) -> UseCase:
    return use_case().model_copy(update={"contract": contract(fields)})


def send(log: Log, case: UseCase, state: OnlineState, second: int, **values: Any) -> None:
    """An event as the gateway of that page takes it."""
    event = {"meter": "a", "at": f"2023-11-14T22:13:{20 + second:02d}Z", "flow": 1.0, "level": 0.5, **values}
    intake = EventIntake(case, log, Clock(), lambda: state.project(log))
    (result,) = asyncio.run(intake.ingest([event]))
    intake.close()
    assert result["status"] == "accepted", result


def test_a_contract_changes_while_its_events_wait_in_the_log(place: str, home: Path) -> None:
    """Fields are turned round, one goes, one comes; a gateway of before that still drains loses nothing."""
    here: World = world(home)
    log = open_log(place)
    old, new = page([*CONTRACT.fields, EXTRA[0]]), page([EXTRA[1], *reversed(CONTRACT.fields)])
    state = open_state(place, old)
    send(log, old, state, 0, x0=7.0)
    send(log, old, state, 2, x0=9.0)
    send(log, new, state, 1, x1=8.0, flow=2.0)
    assert layouts_of(log) == [Layout.of(p.contract) for p in (old, new)]
    with pytest.raises(OtherLayout, match="the code that has it drains them"):
        drain(old, log, here.tables, here.settings)
    assert log.pending("events") == 3
    drain(new, log, here.tables, here.settings)
    rows = here.tables.read("meter/events").sort_by("at")
    assert rows.column("flow").to_pylist() == [1.0, 2.0, 1.0]
    assert rows.column("level").to_pylist() == [0.5] * 3
    assert rows.column("x1").to_pylist() == [None, 8.0, None]
    assert state.applied() == 3
    send(log, new, state, 3, x1=5.0)
    send(log, old, state, 4, x0=6.0)
    assert layouts_of(log) == [Layout.of(p.contract) for p in (old, new, old)]
    drain(old, log, here.tables, here.settings)
    rows = here.tables.read("meter/events").sort_by("at").slice(3)
    assert rows.select(["x0", "x1"]).to_pylist() == [{"x0": None, "x1": None}, {"x0": 6.0, "x1": None}], (
        "it was taken back"
    )
    state.close()
    log.close()
