"""Bulk ingest through real files, real Delta tables and a real database, in plain Arrow and in Ray Data."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from pipelines import ingest as job
from pipelines.contracts import enforce, events
from pipelines.contracts.sources import identity
from pipelines.spec import ServiceLevel, Silence
from pipelines.usecases import aqua
from tests.pipeline.loads import everything, readings, world

USE_CASE = aqua.USE_CASE


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    path = tmp_path / "inbox"
    path.mkdir()
    return path


def test_every_kind_of_file_is_read_and_every_row_is_somewhere(home: Path, inbox: Path) -> None:
    here = world(home)
    pq.write_table(readings(range(40)), inbox / "a.parquet")
    pacsv.write_csv(_text(readings(range(40, 80))), inbox / "b.csv")
    lines = [*map(_json, readings(range(80, 120)).to_pylist()), "{", "[1]", "", '{"district": "x"}']
    (inbox / "c.jsonl").write_text("\n".join(lines))
    (inbox / "d.parquet").write_bytes(b"not parquet")
    (inbox / "e.csv").write_bytes(b"district,time\n\xff\xff,1\n")
    report = here.load([str(inbox)])
    assert (report.rows_in, report.accepted, report.quarantined) == (125, 120, 5)
    assert report.by_source["c.jsonl"] == {"rows_in": 43, "accepted": 40, "quarantined": 3}
    assert report.by_rule["row.unreadable"] == 2
    assert report.by_rule["file.unreadable"] == 2
    accepted, quarantine = everything(here.tables)
    assert sorted(accepted.column("inflow").to_pylist()) == [float(i) for i in range(120)]
    refused = {(row["source"], row["position"]): row for row in quarantine.to_pylist()}
    assert refused["c.jsonl", 40]["record"] == json.dumps("{")
    assert refused["c.jsonl", 43]["rules"] == [
        "district.pattern", "time.missing", "temperature.missing", "rain.missing", "holiday.missing",
    ]  # fmt: skip
    assert "magic" in refused["d.parquet", 0]["record"]
    assert all(row["contract_version"] == USE_CASE.contract.version for row in refused.values())


def test_a_csv_line_of_another_width_is_one_refused_row(home: Path, inbox: Path) -> None:
    here = world(home)
    text = _csv(readings(range(30)))
    lines = text.splitlines()
    lines.insert(3, "dma_1,2021-01-01T00:00:00Z")
    (inbox / "b.csv").write_text("\n".join(lines) + "\n")
    here.load([str(inbox / "b.csv")])
    accepted, quarantine = everything(here.tables)
    assert accepted.num_rows == 30
    (row,) = quarantine.to_pylist()
    assert (row["position"], row["rules"]) == (2, ["row.unreadable"])
    assert row["record"] == json.dumps("dma_1,2021-01-01T00:00:00Z")


def test_positions_count_over_batches_and_over_refused_lines(home: Path, inbox: Path) -> None:
    here = world(home)
    table = readings(range(200_000))
    bad = table.set_column(3, "temperature", pa.array([99.0 if i in (7, 199_999) else 1.0 for i in range(200_000)]))
    lines = _csv(bad).splitlines()
    lines.insert(100_001, "short")
    (inbox / "b.csv").write_text("\n".join(lines) + "\n")
    here.load([str(inbox / "b.csv")])
    quarantine = everything(here.tables)[1].to_pylist()
    assert sorted((row["position"], tuple(row["rules"])) for row in quarantine) == [
        (7, ("temperature.maximum",)), (100_000, ("row.unreadable",)), (200_000, ("temperature.maximum",)),
    ]  # fmt: skip


def test_ray_and_arrow_accept_and_refuse_the_same(ray_cluster: None, home: Path, inbox: Path) -> None:
    table = readings(range(300))
    table = table.set_column(3, "temperature", pa.array([99.0 if i % 50 == 0 else 1.0 for i in range(300)]))
    pq.write_table(table.slice(0, 200), inbox / "a.parquet")
    pacsv.write_csv(_text(table.slice(195)), inbox / "b.csv")  # five keys of the first file again
    results = []
    for engine in ("arrow", "ray"):
        here = world(home / engine)
        report = here.load([str(inbox / "a.parquet"), str(inbox / "b.csv")], engine=engine, load_id="same")
        assert (report.status, report.rows_in, report.accepted) == ("published", 305, 294)
        accepted, quarantine = everything(here.tables)
        results.append(
            (
                report.by_rule,
                report.by_source,
                accepted.sort_by([("_event_id", "ascending")]).to_pylist(),
                quarantine.sort_by([("source", "ascending"), ("position", "ascending")]).to_pylist(),
            )
        )
    assert results[0] == results[1]
    assert results[0][0]["temperature.maximum"] == 6


def test_the_first_in_source_order_keeps_a_key(home: Path, inbox: Path) -> None:
    here = world(home)
    first = readings(range(100))
    again = first.slice(3, 2).set_column(2, "inflow", pa.array([250.0, 251.0]))
    pq.write_table(again, inbox / "a.parquet")
    pq.write_table(first, inbox / "z.parquet")
    report = here.load([str(inbox / "z.parquet"), str(inbox / "a.parquet")])
    assert report.by_rule == {"key.duplicate": 2}
    accepted, quarantine = everything(here.tables)
    assert max(accepted.column("inflow").to_pylist()) == 99.0
    assert {row["source"] for row in quarantine.to_pylist()} == {"a.parquet"}


def test_a_key_that_the_table_has_is_refused_and_too_many_refuse_the_load(home: Path, inbox: Path) -> None:
    here = world(home)
    pq.write_table(readings(range(100)), inbox / "a.parquet")
    pq.write_table(readings(range(98, 198)), inbox / "b.parquet")
    pq.write_table(readings(range(110)), inbox / "c.parquet")
    assert here.load([str(inbox / "a.parquet")]).accepted == 100
    second = here.load([str(inbox / "b.parquet")])
    assert (second.accepted, second.by_rule) == (98, {"key.duplicate": 2})
    third = here.load([str(inbox / "c.parquet")], load_id="third")
    assert (third.status, third.accepted, third.quarantined) == ("refused", 0, 110)
    assert third.by_rule == {"key.duplicate": 110}
    accepted, quarantine = everything(here.tables)
    assert (accepted.num_rows, quarantine.num_rows) == (198, 112)
    assert len(set(accepted.column("_event_id").to_pylist())) == 198


def test_a_refused_load_publishes_nothing_and_loses_nothing(home: Path, inbox: Path) -> None:
    here = world(home)
    table = readings(range(100))
    bad = table.set_column(3, "temperature", pa.array([99.0 if i < 6 else 1.0 for i in range(100)]))
    pq.write_table(bad, inbox / "a.parquet")
    report = here.load([str(inbox / "a.parquet")])
    assert (report.status, report.accepted, report.quarantined) == ("refused", 0, 100)
    assert report.by_rule == {"load.refused": 94, "temperature.maximum": 6}
    accepted, quarantine = everything(here.tables)
    assert (accepted.num_rows, quarantine.num_rows) == (0, 100)
    assert here.load([str(inbox / "a.parquet")]).status == "already_refused"


def test_a_load_told_twice_is_only_reported_the_second_time(home: Path, inbox: Path) -> None:
    here = world(home)
    pq.write_table(readings(range(50)), inbox / "a.parquet")
    first = here.load([str(inbox / "a.parquet")])
    second = here.load([str(inbox / "a.parquet")])
    assert (first.status, second.status) == ("published", "already_published")
    assert (first.load_id, first.accepted, first.events_version) == (
        second.load_id, second.accepted, second.events_version,
    )  # fmt: skip
    assert everything(here.tables)[0].num_rows == 50


def test_the_default_load_id_follows_contents(home: Path, inbox: Path) -> None:
    here = world(home)
    pq.write_table(readings(range(50)), inbox / "a.parquet")
    first = here.load([str(inbox / "a.parquet")])
    pq.write_table(readings(range(50, 90)), inbox / "a.parquet")
    second = here.load([str(inbox / "a.parquet")])
    assert second.status == "published"
    assert first.load_id != second.load_id


def test_a_field_that_left_the_contract_is_null_in_new_rows_and_stays_in_old_ones(home: Path, inbox: Path) -> None:
    here = world(home)
    pq.write_table(readings(range(20)), inbox / "a.parquet")
    here.load([str(inbox / "a.parquet")])
    kept = tuple(field for field in aqua.CONTRACT.fields if field.name != "windspeed")
    calm = aqua.USE_CASE.model_copy(update={"contract": aqua.CONTRACT.model_copy(update={"fields": kept})})
    pq.write_table(readings(range(20, 50)).drop_columns(["windspeed"]), inbox / "b.parquet")
    assert here.load([str(inbox / "b.parquet")], calm).accepted == 30
    pq.write_table(readings(range(50, 60)), inbox / "c.parquet")
    assert here.load([str(inbox / "c.parquet")]).accepted == 10, "and may come back"
    assert everything(here.tables)[0].column("windspeed").null_count == 30


def test_an_example_of_the_contract_makes_no_other_load_of_the_same_files() -> None:
    fields = tuple(field.model_copy(update={"example": None}) for field in aqua.CONTRACT.fields)
    assert fields != aqua.CONTRACT.fields
    plain = aqua.CONTRACT.model_copy(update={"rules": (), "load_rules": (), "version": "1.0.0"})
    bare = plain.model_copy(update={"fields": fields})
    # Spelt out, since a load of an earlier release must be known again.
    assert [identity(contract, "aqua", [], {}) for contract in (plain, bare)] == ["09ccb7aa68f04e51"] * 2
    assert identity(aqua.CONTRACT, "aqua", [], {}) != "09ccb7aa68f04e51"
    ruled = plain.model_copy(update={"load_rules": (Silence(every=timedelta(hours=3)),)})
    promised = ruled.model_copy(update={"sla": (ServiceLevel(name="latency", value=1, unit="h"),)})
    assert [identity(contract, "aqua", [], {}) for contract in (ruled, promised)] == ["2cce4084e198bbd5"] * 2


def test_events_lie_in_canonical_order_with_what_is_known_of_them(home: Path, inbox: Path) -> None:
    here = world(home)
    table = readings(range(200))
    pq.write_table(table.take(pa.array(list(reversed(range(200))))), inbox / "a.parquet")
    report = here.load([str(inbox / "a.parquet")])
    for uri in here.tables.files(enforce.events_table(USE_CASE)):
        part = pq.ParquetFile(uri.removeprefix("file://")).read()
        pairs = list(zip(part.column("district").to_pylist(), part.column("time").to_pylist(), strict=True))
        assert pairs == sorted(pairs)
        bucket = int(uri.split("_bucket=")[1].split("/")[0])
        assert {events.bucket_of(d, 8) for d, _ in pairs} == {bucket}
    accepted = everything(here.tables)[0]
    assert accepted.column(events.KNOWN_AT) == accepted.column("time")
    assert set(accepted.column(events.SEQUENCE).to_pylist()) == {0}
    assert set(accepted.column(events.LOAD_ID).to_pylist()) == {report.load_id}


def test_a_file_that_declares_another_unit_or_column_is_refused(home: Path, inbox: Path) -> None:
    here = world(home)
    table = readings(range(10)).append_column("note", pa.array(["x"] * 10))
    schema = table.schema.set(2, table.schema.field(2).with_metadata({b"unit": b"m3/h"}))
    pq.write_table(table.cast(schema), inbox / "a.parquet")
    report = here.load([str(inbox / "a.parquet")])
    assert report.by_rule == {"inflow.unit": 10, "note.unknown": 10}
    assert report.status == "refused"


def test_a_source_that_is_not_there_or_of_no_known_kind_is_named(home: Path, inbox: Path) -> None:
    here = world(home)
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        here.load([str(inbox / "gone.csv")])
    (inbox / "a.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.xlsx.*must end in"):
        here.load([str(inbox / "a.xlsx")])


def test_the_job_reports_as_json_and_fails_when_refused(
    home: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIDEGATE_HOME", str(home))
    pq.write_table(readings(range(20)), inbox / "a.parquet")
    (inbox / "b.csv").write_text("district,time\nx,y\n")
    assert job.main(["aqua", str(inbox / "a.parquet"), "--load-id", "one"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accepted"] == 20
    assert job.main(["aqua", str(inbox / "b.csv")]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "refused"


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, default=lambda when: when.isoformat())


def _text(table: pa.Table) -> pa.Table:
    when = [t.isoformat() for t in table.column("time").to_pylist()]
    return table.set_column(1, "time", pa.array(when))


def _csv(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    pacsv.write_csv(_text(table), sink, pacsv.WriteOptions(quoting_style="none"))
    return sink.getvalue().to_pybytes().decode()


PATIENT = USE_CASE.contract.model_copy(update={"max_rejected_share": 1.0})
NOT_TEXT = pa.Array.from_buffers(pa.string(), 4, pa.array([b"fine", b"\xff\xfe", b"fine", b"fine"]).buffers())
ODD = {
    "views of strings": ("district", pa.array(["dma_1", "dma_2", "nowhere", "dma_3"]).cast(pa.string_view()), 3),
    "no text in a dictionary": ("note", pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3]), NOT_TEXT), 0),
    "no text in a list": ("note", pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), NOT_TEXT), 0),
    "no text in a struct": ("note", pa.StructArray.from_arrays([NOT_TEXT], ["a"]), 0),
    "moments beyond Python's": (
        "note",
        pa.StructArray.from_arrays([pa.array([2**62] * 4).cast(pa.timestamp("us"))], ["a"]),
        0,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_column_stops_no_other_file(name: str, home: Path, inbox: Path) -> None:
    column, values, taken = ODD[name]
    table = readings(range(4))
    place = table.column_names.index(column) if column in table.column_names else None
    table = table.append_column(column, values) if place is None else table.set_column(place, column, values)
    pq.write_table(table, inbox / "odd.parquet")
    pq.write_table(readings(range(100, 200)), inbox / "good.parquet")
    report = world(home).load([str(inbox)], USE_CASE.model_copy(update={"contract": PATIENT}))
    assert report.by_source["good.parquet"]["accepted"] == 100
    assert report.by_source["odd.parquet"]["accepted"] == taken
    assert report.by_source["odd.parquet"]["rows_in"] in (1, 4)


def test_files_that_are_none_stop_no_other_and_alone_are_no_load(home: Path, inbox: Path) -> None:
    """Of another kind, cut off, without a row, or without a column that every row has: each is one refused row."""
    here = world(home)
    pq.write_table(readings(range(15)), inbox / "good.parquet")
    pq.write_table(readings(range(3)), inbox / "cut.parquet")
    (inbox / "cut.parquet").write_bytes((inbox / "cut.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"foo": [1] * 100}), inbox / "other.parquet")
    pq.write_table(readings(range(0)), inbox / "none.parquet")
    (inbox / "header.csv").write_text(",".join(readings(range(1)).column_names) + "\n")
    (inbox / "empty.jsonl").write_text("\n")
    (inbox / "notes.txt").write_text("hello")
    report = here.load([str(inbox)])
    assert (report.status, report.rows_in, report.accepted) == ("published", 21, 15), report
    assert report.by_rule == {"file.unreadable": 6}
    said = {row["source"]: json.loads(row["record"])["reason"] for row in everything(here.tables)[1].to_pylist()}
    assert said["notes.txt"] == "its name ends in none of ['.csv', '.jsonl', '.parquet']"
    assert said["other.parquet"].startswith("it has no column district, time, temperature, rain, holiday; its columns")
    assert [said[name] for name in ("none.parquet", "header.csv", "empty.jsonl")] == ["it holds no row"] * 3
    alone = here.load([str(inbox / "other.parquet")])
    assert (alone.status, alone.refusals[0]) == ("refused", "there is no other file than those that could not be read")
