"""Exact numbers stay exact from any source to the events table, and through the log."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contracts.events import decode_events, encoder
from pipelines.contracts.requests import check_record, compile_model
from pipelines.replay import replay
from pipelines.spec import Field, FieldType, Volume
from tests.pipeline.loads import USE_CASE, everything, readings, world

COST = Field(name="cost", type=FieldType.DECIMAL, precision=12, scale=3, nullable=True, minimum=0, maximum=0.3)
CONTRACT = USE_CASE.contract.model_copy(update={"fields": (*USE_CASE.contract.fields, COST), "load_rules": ()})
PAGE = USE_CASE.model_copy(update={"contract": CONTRACT})


def test_decimals_of_every_kind_of_file_are_exact_in_the_table(home: Path, tmp_path: Path) -> None:
    here = world(home)
    costs = [Decimal("0.100"), Decimal("0.300"), None, Decimal("0.001")]
    kinds = {
        "narrow": pa.array(costs, pa.decimal128(4, 3)),
        "wide": pa.array(costs, pa.decimal256(60, 20)),
        "text": pa.array([None if cost is None else str(cost) for cost in costs]),
    }
    for place, (name, column) in enumerate(kinds.items()):
        table = readings(range(4 * place, 4 * place + 4)).append_column("cost", column)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    lines = ["district,time,inflow,temperature,rain,humidity,windspeed,holiday,cost"]
    lines += [f"dma_1,2022-01-01T0{i}:00:00Z,1,1,0,,,false,{cost or ''}" for i, cost in enumerate(costs)]
    (tmp_path / "lines.csv").write_text("\n".join(lines) + "\n")
    report = here.load([str(tmp_path / f"{name}.parquet") for name in kinds] + [str(tmp_path / "lines.csv")], PAGE)
    assert (report.status, report.accepted) == ("published", 16), report
    accepted = everything(here.tables)[0]
    assert accepted.schema.field("cost").type == pa.decimal128(12, 3)
    found = sorted(cost for cost in accepted.column("cost").to_pylist() if cost is not None)
    assert found == sorted([cost for cost in costs if cost is not None] * 4)


def test_what_is_not_exact_or_outside_is_refused_and_shown_as_it_came(home: Path, tmp_path: Path) -> None:
    here = world(home)
    column = pa.array([Decimal("0.3001"), Decimal("0.3010"), Decimal("0.3"), Decimal("-0.001")], pa.decimal128(9, 4))
    pq.write_table(readings(range(4)).append_column("cost", column.slice(0, 4)), tmp_path / "a.parquet")
    patient = PAGE.model_copy(update={"contract": CONTRACT.model_copy(update={"max_rejected_share": 1.0})})
    report = here.load([str(tmp_path / "a.parquet")], patient)
    assert report.by_rule == {"cost.maximum": 1, "cost.minimum": 1, "cost.type": 1}
    refused = everything(here.tables)[1].column("record").to_pylist()
    assert any('"cost": "0.3001"' in record for record in refused)


def test_small_decimals_that_were_refused_are_spelt_so_that_they_can_come_again(home: Path, tmp_path: Path) -> None:
    here = world(home)
    fine = COST.model_copy(update={"precision": 20, "scale": 8, "maximum": None})
    contract = CONTRACT.model_copy(update={"fields": (*USE_CASE.contract.fields, fine)})
    rules = {"load_rules": (Volume(minimum=1_000),)}
    strict = USE_CASE.model_copy(update={"contract": contract.model_copy(update=rules)})
    costs = [Decimal(0), Decimal("0.00000012"), Decimal("1.5"), None]
    table = readings(range(4)).append_column("cost", pa.array(costs, pa.decimal128(20, 8)))
    pq.write_table(table, tmp_path / "a.parquet")
    assert here.load([str(tmp_path / "a.parquet")], strict).status == "refused"
    page = USE_CASE.model_copy(update={"contract": contract})
    place = {"tables": here.tables, "database": here.database, "settings": here.settings, "clock": here.clock}
    done = replay(page, **place, broken=["load.refused"])
    assert done.accepted == 4
    assert sorted(everything(here.tables)[0].column("cost").to_pylist(), key=str) == sorted(costs, key=str)


def test_decimals_go_through_the_log_as_they_are() -> None:
    record = {
        "district": "dma_1", "time": "2022-01-01T00:00:00Z", "inflow": 1.0, "temperature": 1.0, "rain": 0.0,
        "humidity": None, "windspeed": None, "holiday": False, "cost": "0.1",
    }  # fmt: skip
    typed, problems = check_record(compile_model(CONTRACT), record, 2 * 10**15)
    assert typed is not None, problems
    rows = decode_events(CONTRACT, [encoder(CONTRACT)(typed)[2]], [1], [1], load_id="drain", buckets=1)
    assert rows.column("cost").to_pylist() == [Decimal("0.100")]
