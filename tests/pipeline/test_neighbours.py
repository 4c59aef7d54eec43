"""Neighbours from state, on both backends, and in tables: equal to the search through the past, bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.log import Log, Record
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, EVENT_ID, SEQUENCE, encode_event, events_schema, from_microseconds
from pipelines.features import derived
from pipelines.features.neighbours import NeighbourState, asked_of, points_of, search_past
from pipelines.features.offline import build_examples, examples_schema
from pipelines.features.served import SERVED_SCHEMA, Status
from pipelines.features.skew import audit
from pipelines.features.state import StateError
from pipelines.features.training_table import backfill, training_rows
from tests.backends import open_log, open_state
from tests.data.sales import BASE, CASE, CONTRACT, DAY_US, Asked, Sale, table, worlds
from tests.data.worlds import same_bits
from tests.pipeline.test_backfill import same_tables


def write(log: Log, sale: Sale) -> None:
    with log.transaction(sale.known_at) as txn:
        txn.append("events", [Record(None, encode_event(CONTRACT, sale.record))])


def past(state: NeighbourState, sales: list[Sale], request: Asked) -> np.ndarray:
    sequences = np.arange(1, len(sales) + 1)
    asked = asked_of(state.find.near, {name: [value] for name, value in request.inputs.items()})
    points = points_of(state.find, CONTRACT, table(sales))
    now, cut = np.array([request.now]), np.array([request.cut])
    return search_past(state.find, points, sequences, asked, now, cut).values[:, 0]


def test_state_finds_what_the_past_has_however_it_was_made(place: str) -> None:
    numbers = itertools.count()

    @given(worlds(most=25), st.data())
    @settings(max_examples=15, deadline=None)
    def holds(world: tuple[list[Sale], list[Asked]], data: st.DataObject) -> None:
        sales, requests = world
        log, state = open_log(place, f"log{next(numbers)}"), open_state(place, CASE)
        for projection in state.projections:
            projection.materialize([], 0, log)
        done = 0
        for request in requests:
            for sale in sales[done : request.cut]:
                write(log, sale)
            done = request.cut
            if data.draw(st.booleans()):  # from the table up to some event, and the log after it
                upto = data.draw(st.integers(0, done))
                rows = table(sales[:upto], list(range(1, upto + 1)))
                for projection in state.projections:
                    projection.materialize(rows, 7, log)
            assert state.project(log) == done
            inputs = {name: [value] for name, value in request.inputs.items()}
            for near in state.neighbours:
                try:
                    found, (generation, sequence) = near.read(inputs, request.now)
                except StateError:
                    assert request.now < max(s.time for s in sales[:done]) - near.find.behind_us
                    continue
                assert sequence == done
                assert near.generation(generation) in (0, 7)
                assert same_bits(found.values[:, 0], past(near, sales, request))
        state.close()
        log.close()

    holds()


def sale(number: int, at: int, price: float, east: float = 0.0, area: str = "a") -> Sale:
    told = {"sale": f"s{number}", "area": area, "at": from_microseconds(at), "price": price, "size": 100.0}
    return Sale({**told, "kind": "house", "longitude": 10.0 + east, "latitude": 50.0}, at)


def test_values_have_the_status_and_the_age_of_the_newest_event_among_them(place: str) -> None:
    log, state = open_log(place), open_state(place, CASE)
    write(log, sale(1, BASE, 5.0))
    write(log, sale(2, BASE + DAY_US, 7.0, 0.02))
    state.project(log)
    mine = {"size": [100.0], "kind": ["house"], "longitude": [10.0], "latitude": [50.0]}
    reader, names = state.bind(), list(CASE.view.stored)
    at = names.index("near_price_mean")
    read = reader.read(["a"], BASE + 2 * DAY_US, mine)
    assert (read.values[0, at], read.status[0, at], read.age_s[0, at]) == (6.0, Status.FRESH, 86_400.0)
    assert read.values[0, names.index("near_count")] == 2.0
    assert read.others == ((0, 2), (0, 2))
    old = reader.read(["a"], BASE + 12 * DAY_US, mine)  # the view's ttl is ten days
    assert (old.values[0, at], old.status[0, at]) == (6.0, Status.STALE)
    elsewhere = reader.read(["a"], BASE + 2 * DAY_US, {**mine, "latitude": [51.0]})
    assert (elsewhere.values[0, names.index("near_count")], elsewhere.status[0, at]) == (0.0, Status.MISSING)
    unasked = reader.read(["a"], BASE + 2 * DAY_US)
    assert (unasked.status[0, 1:] == Status.MISSING).all()
    assert unasked.others == ()
    with pytest.raises(ValueError, match=r"\['kind'\] were not given"):
        reader.read(["a"], BASE, {name: mine[name] for name in ("size", "longitude", "latitude")})
    state.close()
    log.close()


def test_a_cell_forgets_what_no_request_can_ask_for(place: str) -> None:
    log, state = open_log(place), open_state(place, CASE)
    near = state.neighbours[1]
    for number in range(60):
        write(log, sale(number, BASE + number * DAY_US, 1.0))
        state.project(log)
    with near.store.reading(near.store.names()) as snapshot:
        (blob,) = [bytes(blob) for blob in snapshot.blobs if blob is not None]
    kept = (len(blob) // 8 - 2) // near.find.words
    assert 7 <= kept <= 14  # a week's sales, and those that a late one or a slow clock may still ask for
    # A clock that is behind the newest event, and no further than a late event may be, still sees its own week.
    assert near.read({"longitude": [10.0], "latitude": [50.0]}, BASE + 55 * DAY_US)[0].values[0] == 7.0
    with pytest.raises(StateError, match="check the clocks"):
        near.read({"longitude": [10.0], "latitude": [50.0]}, BASE + 40 * DAY_US)
    state.close()
    log.close()


def loaded(sales: list[Sale]) -> pa.Table:
    """Rows of a bulk load, known a minute later: a sale is not among what its own request knows."""
    return table([replace(one, known_at=one.known_at + 60_000_000) for one in sales])


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """Sales of 20 areas, all of one neighbourhood, in four buckets."""
    made = Tables((tmp_path / "tables").as_uri())
    made.ensure(events_table(CASE), events_schema(CONTRACT), partition_by=[BUCKET])
    rng = np.random.default_rng(5)
    sales = [
        sale(i, BASE + i * DAY_US // 8, float(rng.lognormal()), float(rng.normal(0, 0.02)), f"area{i % 20}")
        for i in range(300)
    ]
    made.append(events_table(CASE), loaded(sales), "load/1")
    return made


def test_training_rows_see_the_neighbours_of_every_bucket(tables: Tables, tmp_path: Path) -> None:
    whole = build_examples(CASE, tables.read(events_table(CASE)))
    assert whole.column("near_count").to_numpy().mean() > 2
    for turn, rows in enumerate((1_000_000, 13)):  # whole buckets, and slices of time
        home = tmp_path / str(turn)
        copy = Tables(home.as_uri())
        copy.ensure(events_table(CASE), events_schema(CONTRACT), partition_by=[BUCKET])
        copy.append(events_table(CASE), tables.read(events_table(CASE)), "load/1")
        done = backfill(CASE, tables=copy, settings=Settings(home=home, task_rows=rows), engine="arrow")
        made = training_rows(CASE, copy, done.events_version)
        order = [("_time", "ascending"), (EVENT_ID, "ascending")]
        made = made.select(examples_schema(CASE).names).sort_by(order)
        assert same_tables(made, whole.sort_by(order))


def test_one_more_sale_makes_the_examples_of_all_buckets_again(tables: Tables, tmp_path: Path) -> None:
    first = backfill(CASE, tables=tables, settings=Settings(home=tmp_path), engine="arrow")
    assert first.buckets > 1
    tables.append(events_table(CASE), loaded([sale(999, BASE + 5 * DAY_US, 3.0)]), "load/2")
    second = backfill(CASE, tables=tables, settings=Settings(home=tmp_path), engine="arrow")
    assert (second.buckets, second.rows) == (first.buckets, first.rows + 1)
    assert training_rows(CASE, tables, first.events_version).num_rows == first.rows


def test_served_neighbours_are_made_again_by_the_audit(tables: Tables, place: str) -> None:
    log, state = open_log(place), open_state(place, CASE)
    events = tables.read(events_table(CASE))
    for projection in state.projections:
        projection.materialize(events, tables.version(events_table(CASE)), log)
    served, now = [], BASE + 38 * DAY_US
    for step in range(6):
        now += DAY_US // 2
        told = sale(1000 + step, now, 10.0 * step, 0.001 * step, f"area{step}")
        write(log, told)
        state.project(log)
        if step == 3:  # the neighbours alone are rebuilt: their generation is another than the entities'
            state.neighbours[0].materialize(events, tables.version(events_table(CASE)), log)
        inputs = {name: [told.record[name]] for name in CASE.view.inputs}
        read = state.bind().read([f"area{step}"], now, inputs)
        columns = derived.columns(CASE.view, read.values, inputs, np.array([now]))
        row = {
            "prediction_id": f"p{step}", "_time": now, "entity": f"area{step}",
            "inputs": orjson.dumps({name: told.record[name] for name in CASE.view.inputs}).decode(),
            "stored": read.values[0].tolist(), "status": read.status[0].tolist(),
            "numeric": [float(columns[name][0]) for name in CASE.model.numeric],
            "sequence": read.sequence, "generation": read.generation,
            "others": [number for position in read.others for number in position],
            "view": state.plan.fingerprint,
        }  # fmt: skip
        served.append(dict.fromkeys(SERVED_SCHEMA.names) | orjson.loads(orjson.dumps(row)))
    drained = table([sale(1000 + s, BASE + 38 * DAY_US + (s + 1) * DAY_US // 2, 10.0 * s, 0.001 * s, f"area{s}")
                     for s in range(6)], list(range(1, 7)))  # fmt: skip
    tables.append(events_table(CASE), drained, "drain/events", 5)
    assert drained.column(SEQUENCE).to_pylist()[-1] == 6

    def report() -> object:
        predictions = pa.Table.from_pylist(served, schema=SERVED_SCHEMA)
        found = audit(CASE, predictions, tables=tables, states={state.plan.fingerprint: state})
        return found.checked, found.mismatched, sorted(found.by_feature)

    assert report() == (6, 0, [])
    served[2]["stored"][CASE.view.stored.index("anything_count")] += 1.0
    assert report() == (6, 1, ["anything_count"])
    state.close()
    log.close()
