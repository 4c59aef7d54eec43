"""Lists keep their values from any source to the events table, through the quarantine, and through the log."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.contracts.events import decode_events, encoder
from pipelines.contracts.parsing import from_arrow
from pipelines.contracts.requests import check_record, compile_model
from pipelines.replay import replay
from pipelines.spec import Field, FieldType, Rule
from tests.pipeline.loads import USE_CASE, everything, readings, world

PEAKS = Field(name="peaks", type=FieldType.LIST, items=FieldType.FLOAT, nullable=True, minimum=0, max_items=3)
TAGS = Field(name="tags", type=FieldType.LIST, items=FieldType.STRING, nullable=True, pattern="[a-z]+")
CONTRACT = USE_CASE.contract.model_copy(
    update={
        "fields": (*USE_CASE.contract.fields, PEAKS, TAGS),
        "rules": (Rule(name="told", check="len(peaks) == len(tags)"),),
        "load_rules": (),
        "max_rejected_share": 1.0,
    }
)
PAGE = USE_CASE.model_copy(update={"contract": CONTRACT})
GIVEN = [([1.0, 2.5], ["a", "b"]), ([], []), (None, ["a"]), ([3.0], None)]


def test_lists_of_every_kind_of_file_are_the_same_in_the_table(home: Path, tmp_path: Path) -> None:
    here = world(home)
    peaks, tags = ([row[place] for row in GIVEN] for place in (0, 1))
    kinds = {"plain": (pa.list_(pa.float64()), pa.list_(pa.string()))}
    kinds["large"] = (pa.large_list(pa.float32()), pa.large_list(pa.large_string()))
    for place, (name, (numbers, texts)) in enumerate(kinds.items()):
        table = readings(range(4 * place, 4 * place + 4))
        table = table.append_column("peaks", pa.array(peaks, numbers)).append_column("tags", pa.array(tags, texts))
        pq.write_table(table, tmp_path / f"{name}.parquet")
    head = "district,time,inflow,temperature,rain,humidity,windspeed,holiday"
    lines = [f"{head},peaks,tags"]
    objects = []
    for hour, (one, other) in enumerate(GIVEN):
        cells = ["" if value is None else '"' + json.dumps(value).replace('"', '""') + '"' for value in (one, other)]
        lines.append(f"dma_1,2022-01-01T0{hour}:00:00Z,1,1,0,,,false,{','.join(cells)}")
        row = {"district": "dma_2", "time": f"2022-01-01T0{hour}:00:00Z", "inflow": 1.0, "temperature": 1, "rain": 0}
        objects.append(json.dumps({**row, "holiday": False, "peaks": one, "tags": other}))
    (tmp_path / "lines.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "lines.jsonl").write_text("\n".join(objects) + "\n")
    files = [str(tmp_path / name) for name in ("plain.parquet", "large.parquet", "lines.csv", "lines.jsonl")]
    for once in (files[:2], files[2:]):  # the second load is added to a table that Delta has written
        report = here.load(once, PAGE)
        assert (report.status, report.accepted) == ("published", 8), report
    accepted = everything(here.tables)[0]
    found = zip(accepted.column("peaks").to_pylist(), accepted.column("tags").to_pylist(), strict=True)
    assert sorted(found, key=str) == sorted(GIVEN * 4, key=str)


KINDS = (pa.list_view(pa.float64()), pa.large_list_view(pa.float32()), pa.large_list(pa.int16()), pa.list_(pa.uint8()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_lists_of_every_arrow_type_are_the_same(kind: pa.DataType) -> None:
    column = pa.array([[1, 2], [], None, [3]], kind)
    table = readings(range(4)).append_column("peaks", column)
    parsed = from_arrow(CONTRACT, table.slice(1, 3))
    assert parsed.table.column("peaks").to_pylist() == [[], None, [3.0]]
    assert parsed.broken == ()


def test_a_list_that_breaks_a_rule_is_shown_as_it_came_and_may_come_again(home: Path, tmp_path: Path) -> None:
    here = world(home)
    peaks = [[1.0, -1.0], [1.0, None], [1.0] * 4, [2.0]]
    tags = [["a", "b"], None, None, ["a", "B"]]
    table = readings(range(4)).append_column("peaks", pa.array(peaks)).append_column("tags", pa.array(tags))
    pq.write_table(table, tmp_path / "a.parquet")
    report = here.load([str(tmp_path / "a.parquet")], PAGE)
    assert report.by_rule == {
        "peaks.minimum": 1,
        "peaks.type": 1,
        "peaks.max_items": 1,
        "tags.pattern": 1,
        "rule:told": 1,
    }
    records = [json.loads(record) for record in everything(here.tables)[1].column("record").to_pylist()]
    assert sorted((r["peaks"] for r in records), key=str) == sorted(peaks, key=str)
    kept = [field for field in CONTRACT.fields if field not in (PEAKS, TAGS)]
    loose = {"fields": (*kept, PEAKS.model_copy(update={"minimum": None}), TAGS.model_copy(update={"pattern": None}))}
    page = PAGE.model_copy(update={"contract": CONTRACT.model_copy(update=loose)})
    done = replay(page, tables=here.tables, database=here.database, settings=here.settings, clock=here.clock)
    assert done.accepted == 1, "the last one breaks the rule between fields, too"
    assert everything(here.tables)[0].column("peaks").to_pylist() == [[1.0, -1.0]]


def test_lists_go_through_the_log_as_they_are() -> None:
    record = {
        "district": "dma_1", "time": "2022-01-01T00:00:00Z", "inflow": 1.0, "temperature": 1.0, "rain": 0.0,
        "humidity": None, "windspeed": None, "holiday": False, "peaks": [1, 2.5], "tags": ["é", ""],
    }  # fmt: skip
    _, problems = check_record(compile_model(CONTRACT), record, 2 * 10**15)
    assert [problem.message for problem in problems] == [
        'every value of tags must match \'[a-z]+\' as a whole, got ["\\u00e9", ""]'
    ]
    typed, problems = check_record(compile_model(CONTRACT), {**record, "tags": ["a", "b"]}, 2 * 10**15)
    assert typed is not None, problems
    rows = decode_events(CONTRACT, [encoder(CONTRACT)(typed)[2]], [1], [1], load_id="drain", buckets=1)
    assert (rows.column("peaks").to_pylist(), rows.column("tags").to_pylist()) == ([[1.0, 2.5]], [["a", "b"]])
