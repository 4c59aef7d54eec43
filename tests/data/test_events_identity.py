"""An event has one identity, one order and one bucket, whether a batch or a request brought it."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import events, requests, rows
from pipelines.spec import Contract, Field, FieldType
from tests.data import contract_oracle as oracle


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_arrow_and_python_give_an_event_one_identity(data: st.DataObject) -> None:
    contract = data.draw(oracle.contracts())
    keys = [f.name for f in contract.fields if not f.nullable and f.type is not FieldType.LIST]
    contract = contract.model_copy(update={"key": tuple(data.draw(st.permutations(keys)))})
    records = data.draw(st.lists(oracle.records(contract), min_size=1, max_size=6))
    parsed = rows.from_records(contract, records)
    accepted = rows.check(contract, parsed, oracle.NOW_US).accepted
    table = parsed.table.filter(pa.array(accepted))
    model = requests.compile_model(contract)
    typed = [requests.check_record(model, records[i], oracle.NOW_US)[0] for i in accepted.nonzero()[0]]
    ids = events.event_ids(contract, table).to_pylist()
    assert ids == [events.event_id(contract, record) for record in typed if record is not None]
    assert None not in ids
    entities = [record[contract.entity] for record in typed if record is not None]
    buckets = events.buckets_of(table.column(contract.entity), 5).to_pylist()
    assert buckets == [events.bucket_of(entity, 5) for entity in entities]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_event_survives_the_log_unchanged(data: st.DataObject) -> None:
    contract = data.draw(oracle.contracts())
    records = data.draw(st.lists(oracle.records(contract), min_size=1, max_size=6))
    parsed = rows.from_records(contract, records)
    accepted = rows.check(contract, parsed, oracle.NOW_US).accepted
    table = parsed.table.filter(pa.array(accepted))
    model = requests.compile_model(contract)
    typed = [requests.check_record(model, records[i], oracle.NOW_US)[0] for i in accepted.nonzero()[0]]
    blobs = [events.encode_event(contract, record) for record in typed if record is not None]
    times = [oracle.NOW_US + place for place in range(len(blobs))]
    back = events.decode_events(contract, blobs, times, range(1, len(blobs) + 1), load_id="x", buckets=5)
    names = [field.name for field in contract.fields]
    assert back.select(names).to_pylist() == table.to_pylist()
    assert back.column(events.EVENT_ID).to_pylist() == events.event_ids(contract, table).to_pylist()
    assert back.schema == events.events_schema(contract)
    encode = events.encoder(contract)
    made = [encode(record) for record in typed if record is not None]
    assert [value for _, _, value in made] == blobs
    assert [identity for _, identity, _ in made] == events.log_identities(contract, back)


EVERY_TYPE = Contract(
    name="every",
    version="1.0.0",
    owner="tests",
    fields=(
        Field(name="who", type=FieldType.STRING),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="level", type=FieldType.FLOAT),
        Field(name="count", type=FieldType.INTEGER),
        Field(name="open", type=FieldType.BOOLEAN),
    ),
    entity="who",
    time="at",
    key=("who", "at", "level", "count", "open"),
)
RECORDS = [
    {"who": "a|b", "at": "2026-01-01T00:00:00.000001Z", "level": 0.1, "count": -(2**63), "open": True},
    {"who": "é", "at": "1969-12-31T23:59:59.999999Z", "level": 1e22, "count": 2**63 - 1, "open": False},
    {"who": "", "at": "2026-01-01T00:00:00+05:30", "level": -0.0, "count": 0, "open": True},
    {"who": "x", "at": "1000-01-01T00:00:00Z", "level": 5e-324, "count": 7, "open": False},
    {"who": "x", "at": "2026-01-01T00:00:00Z", "level": 3, "count": 7, "open": False},
]


def test_keys_of_every_type_have_one_identity_and_survive_the_log() -> None:
    parsed = rows.from_records(EVERY_TYPE, RECORDS)
    assert rows.check(EVERY_TYPE, parsed, oracle.NOW_US).accepted.all()
    model = requests.compile_model(EVERY_TYPE)
    typed = [requests.check_record(model, record, oracle.NOW_US)[0] for record in RECORDS]
    ids = events.event_ids(EVERY_TYPE, parsed.table).to_pylist()
    assert ids == [events.event_id(EVERY_TYPE, record) for record in typed if record is not None]
    assert ids[0] == r"a\|b|1767225600000001|0.1|-9223372036854775808|true"
    blobs = [events.encode_event(EVERY_TYPE, record) for record in typed if record is not None]
    count = len(blobs)
    back = events.decode_events(EVERY_TYPE, blobs, range(count), range(count), load_id="x", buckets=5)
    assert back.select(parsed.table.column_names).to_pylist() == parsed.table.to_pylist()
    assert back.column(events.EVENT_ID).to_pylist() == ids


def test_what_the_log_knows_events_by_stands_in_the_order_of_their_times() -> None:
    parsed = rows.from_records(EVERY_TYPE, RECORDS)
    table = parsed.table.append_column(events.EVENT_ID, events.event_ids(EVERY_TYPE, parsed.table))
    found = dict(zip(events.log_identities(EVERY_TYPE, table), parsed.table.column("at").to_pylist(), strict=True))
    assert [found[identity] for identity in sorted(found)] == sorted(found.values())
    untimed = EVERY_TYPE.model_copy(update={"key": ("who",)})
    assert events.log_identities(untimed, table) == [i.encode() for i in table.column(events.EVENT_ID).to_pylist()]


def test_a_separator_inside_a_key_cannot_make_two_events_one() -> None:
    contract = Contract(
        name="c", version="1.0.0", owner="o", entity="a", time="at", key=("a", "b"),
        fields=(
            Field(name="a", type=FieldType.STRING),
            Field(name="b", type=FieldType.STRING),
            Field(name="at", type=FieldType.TIMESTAMP),
        ),
    )  # fmt: skip
    pairs = [("x|y", "z"), ("x", "y|z"), ("x\\", "|z"), ("x", "\\|z"), ("x\\|", "z"), ("x", "|z")]
    table = pa.table({"a": [a for a, _ in pairs], "b": [b for _, b in pairs]})
    ids = events.event_ids(contract, table).to_pylist()
    assert len(set(ids)) == len(pairs)
    assert ids == [events.event_id(contract, {"a": a, "b": b}) for a, b in pairs]


def test_the_order_of_events_is_the_same_in_every_process() -> None:
    order = events.event_order(["a", "b", "dma_1|1672531200000000"])
    assert order.dtype == np.int64
    assert order.tolist() == [-1817709641818812897, 6294355645245719615, -6678045603897308711]


def test_instants_are_exact_microseconds_on_both_ends_of_time() -> None:
    for text in ("1000-01-01T00:00:00.000001Z", "1969-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"):
        record = {"at": text}
        contract = Contract.model_validate(
            {
                "name": "c", "version": "1.0.0", "owner": "o", "entity": "who", "time": "at",
                "key": ("at",),
                "fields": EVERY_TYPE.fields[:2],
                "future": timedelta(days=365 * 8000),
            }
        )  # fmt: skip
        typed, _ = requests.check_record(requests.compile_model(contract), {**record, "who": "a"}, oracle.NOW_US)
        assert typed is not None
        moment = typed["at"]
        assert events.from_microseconds(events.to_microseconds(moment)) == moment
        assert moment.isoformat().replace("+00:00", "Z") == text
