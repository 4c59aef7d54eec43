"""A load and what its contract wants of it as a whole, with real tables: warnings, refusals, history, and its page."""

from __future__ import annotations

from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines import usecases
from pipelines.spec import (
    Field,
    FieldType,
    Freshness,
    LoadRule,
    NullShare,
    References,
    Rule,
    Severity,
    Silence,
    UseCase,
    Volume,
)
from serving.cli import main as tidegate
from tests.pipeline.loads import USE_CASE, World, readings, world

HOUR = timedelta(hours=1)


def page(*load_rules: LoadRule, rules: tuple[Rule, ...] = (), warn: bool = False) -> UseCase:
    """Aqua, with other rules; with ``warn``, an inflow that is too large only warns."""
    fields = tuple(
        field.model_copy(update={"warn": ("maximum",)}) if warn and field.name == "inflow" else field
        for field in USE_CASE.contract.fields
    )
    contract = USE_CASE.contract.model_copy(update={"load_rules": load_rules, "rules": rules, "fields": fields})
    return USE_CASE.model_copy(update={"contract": contract})


@pytest.fixture
def here(tmp_path) -> World:
    return world(tmp_path / "home")


def file(folder: Path, name: str, table: pa.Table) -> list[str]:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / name)
    return [str(folder / name)]


def test_a_load_that_breaks_a_rule_of_loads_is_refused_and_says_what_was_measured(here, tmp_path) -> None:
    rules = (Volume(minimum=1_000), Freshness(max_age=HOUR, severity=Severity.WARN))
    report = here.load(file(tmp_path / "in", "a.parquet", readings(range(20))), page(*rules))
    assert (report.status, report.accepted, report.quarantined) == ("refused", 0, 20)
    assert report.refusals == ("load.volume: 20 rows are fewer than 1000",)
    assert report.by_rule == {"load.refused": 20}
    (warning,) = report.warnings
    assert warning.startswith("load.freshness: the newest event is")
    again = here.load(file(tmp_path / "in", "a.parquet", readings(range(20))), page(*rules))
    assert (again.status, tuple(again.refusals)) == ("already_refused", report.refusals)


def test_a_load_is_held_against_those_before_it_and_a_refused_one_is_no_measure(here, tmp_path) -> None:
    usual = page(Volume(history=5))
    for i in range(3):
        report = here.load(file(tmp_path / "in", f"{i}.parquet", readings(range(20 * i, 20 * i + 20))), usual)
        assert report.status == "published"
    for i in range(3):
        small = here.load(file(tmp_path / "in", f"s{i}.parquet", readings(range(100 + i, 105 + i))), usual)
        assert small.status == "refused"
        assert "the median of the last 3 loads" in small.refusals[0]
    assert here.load(file(tmp_path / "in", "n.parquet", readings(range(200, 220))), usual).status == "published"


def test_rows_that_came_before_do_not_count(here, tmp_path) -> None:
    enough = page(Volume(minimum=41))
    twice = pa.concat_tables([readings(range(40)), readings(range(20))])
    report = here.load(file(tmp_path / "in", "a.parquet", twice), enough)
    assert report.refusals[-1] == "load.volume: 40 rows are fewer than 41"


def test_rows_that_a_rule_only_warns_of_are_taken_and_counted(here, tmp_path) -> None:
    table = readings(range(50))
    table = table.set_column(2, "inflow", pa.array([400.0 if i % 10 == 0 else 5.0 for i in range(50)]))
    careful = page(warn=True, rules=(Rule(name="small", check="inflow < 300", severity=Severity.WARN),))
    report = here.load(file(tmp_path / "in", "a.parquet", table), careful)
    assert (report.status, report.accepted) == ("published", 50)
    assert report.warned == {"inflow.maximum": 5, "rule:small": 5}
    assert report.by_rule == {}


def test_one_row_that_breaks_a_rule_for_which_loads_are_refused_refuses_all(here, tmp_path) -> None:
    strict = page(rules=(Rule(name="plausible", check="inflow < 300 or rain > 0", severity=Severity.REFUSE),))
    table = readings(range(50))
    inflow = pa.array([300.0 if i == 7 else 5.0 for i in range(50)])
    report = here.load(file(tmp_path / "in", "a.parquet", table.set_column(2, "inflow", inflow)), strict)
    assert (report.status, report.quarantined) == ("refused", 50)
    assert report.by_rule == {"load.refused": 49, "rule:plausible": 1}
    assert report.refusals == ("1 rows break rule:plausible, for which a load is refused",)


class _Pages(HTMLParser):
    """What a page says, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.drawn = 0

    def handle_starttag(self, tag, attrs) -> None:
        self.drawn += tag == "svg"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        pass

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def test_the_page_of_a_load_tells_what_came_and_what_was_refused_and_why(here, tmp_path, monkeypatch) -> None:
    table = readings(range(100))
    temperature = pa.array([99.0 if i in (3, 4) else 1.0 for i in range(100)])
    hidden = table.set_column(3, "temperature", temperature).append_column("note", pa.nulls(100, pa.string()))
    here.load(file(tmp_path / "in", "a.parquet", table.set_column(3, "temperature", temperature)), load_id="<one>")
    refused = here.load(file(tmp_path / "in", "b.parquet", hidden), load_id="two")
    assert refused.status == "refused"
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path / "home"))
    pages = {}
    for name, options in (("<one>", ["--load", "<one>"]), ("two", [])):
        out = tmp_path / "page.html"
        assert tidegate(["contract", "page", "aqua", *options, "--out", str(out)]) == 0
        read = _Pages()
        read.feed(out.read_text())
        read.close()
        assert read.open == []
        pages[name] = read, " ".join(read.text)
    one, said = pages["<one>"]
    assert "100 came, 98 were accepted, 2 refused" in said
    assert "temperature.maximum" in said
    assert '"temperature": 99.0' in said
    assert "load <one>" in said
    assert one.drawn >= 6
    other, said = pages["two"]
    assert "Why nothing was published" in said
    assert "note.unknown" in said
    assert other.drawn == 1, "nothing was accepted that could be drawn"
    assert tidegate(["contract", "page", "aqua", "--load", "three", "--out", str(tmp_path / "x.html")]) == 1


def test_the_page_of_a_load_from_before_a_field_came_leaves_it_out(here, tmp_path, monkeypatch) -> None:
    here.load(file(tmp_path / "in", "a.parquet", readings(range(20))), load_id="one")
    known = USE_CASE.contract
    fields = (*known.fields, Field(name="pressure", type=FieldType.FLOAT, nullable=True))
    later = USE_CASE.model_copy(update={"contract": known.model_copy(update={"fields": fields})})
    monkeypatch.setattr(usecases, "load", lambda name: later)
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path / "home"))
    out = tmp_path / "page.html"
    assert tidegate(["contract", "page", "aqua", "--out", str(out)]) == 0
    assert "20 came, 20 were accepted" in out.read_text()


def test_null_shares_and_silences_are_those_of_all_buckets_together(here, tmp_path) -> None:
    table = readings(range(60))
    inflow = pa.array([None if i % 3 == 0 else 5.0 for i in range(60)], pa.float64())
    rules = (
        NullShare(field="inflow", maximum=0.3, severity=Severity.WARN),
        Silence(every=timedelta(milliseconds=50), severity=Severity.WARN),
    )
    report = here.load(file(tmp_path / "in", "a.parquet", table.set_column(2, "inflow", inflow)), page(*rules))
    assert report.status == "published"
    assert report.warnings[0] == "inflow.null_share: 33.3% of inflow are null, and at most 30.0% may be"
    # Every one of ten districts reports each 0.1 s: five times between its six rows, and nine until the load's last.
    assert report.warnings[1].startswith("load.silence_50000us: 54 gaps exceed 0:00:00.050000, the longest 0.1 s")


def test_an_entity_that_is_expected_and_does_not_come_is_silent(here, tmp_path) -> None:
    rule = Silence(every=timedelta(seconds=1), known_for=timedelta(minutes=1), severity=Severity.WARN)
    table = readings(range(3_100))
    here.load(file(tmp_path / "in", "a.parquet", table.slice(0, 1_000)), page(rule))
    without = table.slice(1_000, 1_000).filter(pc.not_equal(table.slice(1_000, 1_000).column("district"), "dma_3"))
    report = here.load(file(tmp_path / "in", "b.parquet", without), page(rule))
    last = 19.99 - 9.93
    assert report.warnings == (f"load.silence_1s: 1 gaps exceed 0:00:01, the longest {last:g} s (dma_3)",)
    long_ago = page(rule.model_copy(update={"known_for": timedelta(seconds=5)}))
    alone = table.slice(3_000, 100).filter(pc.equal(table.slice(3_000, 100).column("district"), "dma_1"))
    assert here.load(file(tmp_path / "in", "c.parquet", alone), long_ago).warnings == ()
    strict = page(rule.model_copy(update={"severity": Severity.REFUSE}))
    refused = here.load(file(tmp_path / "in", "d.parquet", table.slice(2_000, 1)), strict)
    assert refused.status == "refused"
    assert "9 gaps exceed" not in refused.refusals[0], "what came just before is not silent yet"


def test_values_refer_to_a_column_of_another_source_that_has_been_loaded(here, tmp_path) -> None:
    refers = page(References(field="district", source="places", column="district"))
    early = here.load(file(tmp_path / "in", "a.parquet", readings(range(20))), refers)
    assert early.refusals[-1].startswith("district.references: there is no column 'district' of events of 'places'")
    places = USE_CASE.model_copy(update={"name": "places"})
    here.load(file(tmp_path / "in", "places.parquet", readings(range(8))), places)
    later = here.load(file(tmp_path / "in", "a.parquet", readings(range(20))), refers, load_id="again")
    assert later.refusals[-1].endswith(
        "2 values of district are not among those of district of places: 'dma_8', 'dma_9'"
    )
    here.load(file(tmp_path / "in", "rest.parquet", readings(range(8, 10))), places)
    assert here.load(file(tmp_path / "in", "a.parquet", readings(range(20))), refers, load_id="last").accepted == 20
