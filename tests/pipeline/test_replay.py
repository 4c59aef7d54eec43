"""Quarantined rows go through their contract again, each once, whoever is killed meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from pipelines import contract as command
from pipelines import replay as module
from pipelines.contracts import enforce, events
from pipelines.replay import Replayed, replay, replayed_table
from pipelines.spec import UseCase
from tests.pipeline.loads import USE_CASE, World, everything, readings, world


def limited(maximum: float, version: str = "1.0.0") -> UseCase:
    """The page whose contract refuses an inflow above ``maximum``, and no load."""
    contract = USE_CASE.contract
    fields = tuple(f.model_copy(update={"maximum": maximum}) if f.name == "inflow" else f for f in contract.fields)
    changes = {"fields": fields, "version": version, "max_rejected_share": 1.0}
    return USE_CASE.model_copy(update={"contract": contract.model_copy(update=changes)})


def again(here: World, case: UseCase, **options: Any) -> Replayed:
    return replay(case, tables=here.tables, database=here.database, settings=here.settings, clock=here.clock, **options)


def inflows(here: World) -> list[float]:
    return sorted(everything(here.tables)[0].column("inflow").to_pylist())


@pytest.fixture
def loaded(home: Path, tmp_path: Path) -> World:
    """Readings of every kind of file; an inflow above 9 was refused, 30 of 40."""
    here, inbox = world(home), tmp_path / "inbox"
    inbox.mkdir()
    pq.write_table(readings(range(10)), inbox / "a.parquet")
    pq.write_table(readings(range(10, 20)), inbox / "b.parquet")
    text = readings(range(20, 30))
    columns = [c.cast(pa.string()) for c in text.columns]
    pacsv.write_csv(pa.table(columns, names=text.column_names), inbox / "c.csv")
    lines = [json.dumps({**row, "time": row["time"].isoformat()}) for row in readings(range(30, 40)).to_pylist()]
    (inbox / "d.jsonl").write_text("\n".join([*lines, "{", "[1]"]))
    (inbox / "e.parquet").write_bytes(b"not parquet")
    report = here.load([str(inbox)], limited(9.0))
    assert (report.accepted, report.quarantined) == (10, 33)
    return here


def test_rows_of_every_kind_of_file_pass_once_the_contract_allows_them_and_once_only(loaded) -> None:
    done = again(loaded, limited(300.0, "2.0.0"))
    assert (done.accepted, done.refused, done.left, done.unreadable) == (30, 0, 1, 2)
    assert inflows(loaded) == [float(i) for i in range(40)]
    assert again(loaded, limited(300.0, "2.0.0")) == Replayed((), 0, 1, 2)
    assert inflows(loaded) == [float(i) for i in range(40)]
    accepted, quarantine = everything(loaded.tables)
    assert len(pc.unique(accepted.column(events.EVENT_ID))) == 40
    assert quarantine.num_rows == 33, "what was refused is still told of"
    known, time = (accepted.column(name).cast(pa.int64()) for name in (events.KNOWN_AT, "time"))
    assert len(pc.unique(pc.subtract(known, time))) == 1, "known as rows of any other file"


def test_what_is_still_refused_stays_where_it_is_for_the_next_contract(loaded) -> None:
    for _ in range(2):
        assert again(loaded, limited(9.0)) == Replayed((), 30, 1, 2)
    first = again(loaded, limited(19.0))
    assert (first.accepted, first.refused, first.loads[0].quarantined) == (10, 20, 0)
    assert everything(loaded.tables)[1].num_rows == 33
    assert inflows(loaded) == [float(i) for i in range(20)]
    second = again(loaded, limited(300.0))
    assert (second.accepted, second.refused) == (20, 0)
    assert inflows(loaded) == [float(i) for i in range(40)]


def test_the_rows_of_a_load_that_was_refused_as_a_whole_pass_where_they_are_good(home, tmp_path) -> None:
    here, inbox = world(home), tmp_path / "inbox"
    inbox.mkdir()
    table = readings(range(10))
    pq.write_table(table, inbox / "a.parquet")
    columns = [c.cast(pa.string()) for c in readings(range(10, 15)).columns]
    pacsv.write_csv(pa.table(columns, names=table.column_names), inbox / "b.csv")
    strict = limited(7.0)
    contract = strict.contract.model_copy(update={"max_rejected_share": 0.0})
    refused = here.load([str(inbox)], strict.model_copy(update={"contract": contract}))
    assert (refused.status, refused.accepted) == ("refused", 0)
    careful = strict.model_copy(update={"contract": contract})
    assert again(here, careful) == Replayed((), 7, 8, 0), "nobody said that the others are to be taken after all"
    done = again(here, careful, loads=[refused.load_id])
    assert (done.accepted, done.refused) == (8, 7), "they were refused for the share of the others"
    assert again(here, limited(300.0)).accepted == 7
    assert inflows(here) == [float(i) for i in range(15)]


def quarantine_http(here: World, rows: pa.Table) -> None:
    """What a gateway refused and its drain has moved to the table."""
    records = [json.dumps({**row, "time": row["time"].isoformat()}) for row in rows.to_pylist()]
    refused = enforce.quarantined(
        USE_CASE.contract,
        load_id="http",
        sources=["http"] * len(records),
        positions=pa.array([0] * len(records)).to_numpy(),
        rules_column=pa.array([["inflow.maximum"]] * len(records), pa.list_(pa.string())),
        records=records,
        at_us=here.clock.now(),
    )
    here.tables.ensure(enforce.quarantine_table(USE_CASE), events.QUARANTINE_SCHEMA)
    here.tables.append(enforce.quarantine_table(USE_CASE), refused, "drain/quarantine", 1)


def test_rows_that_came_over_http_are_known_from_the_replay_on(home) -> None:
    here = world(home)
    quarantine_http(here, readings(range(5)))
    assert again(here, limited(300.0)).accepted == 5, "though all came at one position of their requests"
    accepted, _ = everything(here.tables)
    assert set(accepted.column(events.KNOWN_AT).cast(pa.int64()).to_pylist()) == {here.clock.now()}


def test_rows_that_came_over_http_and_were_refused_once_more_are_known_no_earlier(home) -> None:
    here = world(home)
    quarantine_http(here, readings(range(5)))
    assert again(here, limited(2.0)).accepted == 3
    assert again(here, limited(300.0)).accepted == 2
    accepted, _ = everything(here.tables)
    assert set(accepted.column(events.KNOWN_AT).cast(pa.int64()).to_pylist()) == {here.clock.now()}


def test_lines_of_files_with_other_columns_an_empty_text_or_a_name_in_capitals_stand_for_themselves(home, tmp_path):
    here, inbox = world(home), tmp_path / "inbox"
    inbox.mkdir()

    def write(name: str, numbers: range, **extra: str) -> None:
        rows = readings(numbers)
        columns = {n: [v or "" for v in rows.column(n).cast(pa.string()).to_pylist()] for n in rows.column_names}
        columns |= {n: [text] * len(numbers) for n, text in extra.items()}
        lines = [list(columns), *zip(*columns.values(), strict=True)]
        (inbox / name).write_text("\n".join(",".join(line) for line in lines) + "\n")

    write("a.csv", range(3), mood="bad")
    write("b.csv", range(10, 15))
    write("C.CSV", range(20, 25))
    write("d.csv", range(30, 32), humidity='""')
    here.load([str(inbox)], limited(1.0))
    fixed = limited(300.0)
    assert inflows(here) == []
    done = again(here, fixed)
    assert (done.accepted, done.refused) == (10, 5), "those with a column too many, and with a text for a number"
    assert inflows(here) == [float(i) for i in (*range(10, 15), *range(20, 25))]


def test_rows_of_parquet_files_come_back_with_their_zones_and_decimals(home, tmp_path) -> None:
    here = world(home)
    rows = readings(range(10, 15))
    place = rows.column_names.index("time")
    rows = rows.set_column(place, "time", rows.column("time").cast(pa.timestamp("us", "Europe/Vienna")))
    place = rows.column_names.index("inflow")
    rows = rows.set_column(place, "inflow", rows.column("inflow").cast(pa.decimal128(10, 2)))
    pq.write_table(rows, tmp_path / "a.parquet")
    here.load([str(tmp_path / "a.parquet")], limited(1.0))
    assert again(here, limited(300.0)).accepted == 5
    found = everything(here.tables)[0].sort_by("inflow")
    assert found.column("time").cast(pa.int64()).to_pylist() == rows.column("time").cast(pa.int64()).to_pylist()


@pytest.mark.parametrize("at_once", [1, 7, 30])
def test_many_rows_are_replayed_some_at_a_time_and_each_once(loaded, monkeypatch, at_once) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    half = again(loaded, limited(19.0))
    assert (half.accepted, half.refused, half.left, half.unreadable) == (10, 20, 1, 2)
    rest = again(loaded, limited(300.0))
    assert (rest.accepted, rest.refused) == (20, 0)
    assert len(rest.loads) > 1 or at_once == 30
    assert inflows(loaded) == [float(i) for i in range(40)]


def test_rules_and_loads_choose_rows(loaded) -> None:
    quarantine_http(loaded, readings(range(40, 43)))
    assert again(loaded, limited(300.0), broken=["inflow.minimum"]).loads == ()
    assert again(loaded, limited(300.0), loads=["http"]).accepted == 3
    assert again(loaded, limited(300.0), broken=["inflow.maximum"]).accepted == 30
    assert inflows(loaded) == [float(i) for i in range(43)]


class Killed(BaseException):
    """The process ended."""


@pytest.mark.parametrize("contract", [19.0, 300.0])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("point", ["set_aside", "append", "events", "quarantine", "delete"])
def test_a_replay_that_is_killed_is_ended_by_the_next_one(loaded, monkeypatch, point, after, contract) -> None:
    """Killed under a contract that takes all rows, and run again, ten rows at a time, under another."""
    quarantine_http(loaded, readings(range(40, 43)))
    plain = type(loaded.tables)

    def dying(function, which: int = 1):
        calls = []

        def die(*arguments, **options):
            calls.append(None)
            if len(calls) != which:
                return function(*arguments, **options)
            if after:
                function(*arguments, **options)
            raise Killed

        return die

    tables = type("Tables", (plain,), {})(loaded.tables.url)
    with monkeypatch.context() as broken:
        if point == "set_aside":
            broken.setattr(module._Place, "set_aside", dying(module._Place.set_aside))
        elif point == "append":
            broken.setattr(type(tables), "append", dying(plain.append))
        elif point == "delete":
            broken.setattr(module._Place, "load", dying(module._Place.load))
        else:  # the second and the third commit are those of the first load, the first one names its rows
            broken.setattr(type(tables), "commit", dying(plain.commit, 2 if point == "events" else 3))
        with pytest.raises(Killed):
            replay(
                limited(50.0),
                tables=tables,
                database=loaded.database,
                settings=loaded.settings,
                clock=loaded.clock,
            )
    monkeypatch.setattr(module, "_AT_ONCE", 10)
    again(loaded, limited(contract))
    again(loaded, limited(300.0))
    assert inflows(loaded) == [float(i) for i in range(43)]
    replayed = loaded.tables.read(replayed_table(USE_CASE)).column("row").to_pylist()
    assert len(replayed) == len(set(replayed)) == 33, "each row was taken up once"
    _, quarantine = everything(loaded.tables)
    assert quarantine.num_rows == 36, "nothing was refused that had passed"
    assert again(loaded, limited(300.0)) == Replayed((), 0, 1, 2)


def test_the_command_replays_and_says_what_came_of_it(loaded, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TIDEGATE_HOME", str(loaded.settings.home))
    assert command.main(["replay", "aqua", "--rule", "inflow.maximum"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["accepted"], said["refused"], said["left"], said["unreadable"]) == (30, 0, 0, 0)
    assert command.main(["replay", "aqua", "--dimension", "none"]) == 1
    assert "'aqua' has no dimension 'none'" in capsys.readouterr().err
