"""Invariant 3: what was served is what the events known then make again; a tampered value is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest

from cluster.alerts import Alerts
from cluster.clock import ReplayClock
from cluster.database import Database
from cluster.log import DurableLog
from cluster.tables import Tables
from pipelines.audit import audit_lately
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, decode_events, events_schema
from pipelines.features import derived
from pipelines.features.online import OnlineState
from pipelines.features.served import SERVED_SCHEMA, Status, predictions_table
from pipelines.features.skew import FeatureSkew, SkewReport, audit
from pipelines.spec import Calendar, Derived, UseCase
from tests.data.worlds import BASE, CONTRACT, VIEW
from tests.pipeline.test_online_state import MINUTE, bulk, record, use_case, write


def scaled(flow_mean_1m, level, hour):
    return flow_mean_1m / level + hour


def audited_case() -> UseCase:
    view = VIEW.model_copy(
        update={
            "inputs": ("level",),
            "calendar": Calendar(zone="Europe/Rome", parts=("hour",)),
            "derived": (Derived(name="scaled", function=scaled),),
        }
    )
    case = use_case(view)
    return case.model_copy(
        update={"model": case.model.model_copy(update={"numeric": ("scaled", "flow_std_1m", "hour")})}
    )


CASE = audited_case()


@dataclass
class Plant:
    """A use case in operation: bulk history, events over the log, answers logged as the gateway logs them."""

    tables: Tables
    log: DurableLog
    state: OnlineState
    served: list[dict[str, object]]

    def serve(self, meters: list[str], now: int) -> None:
        read = self.state.bind().read(meters, now)
        level = [0.5, None, 0.0][len(self.served) % 3]
        inputs = {"level": [level] * len(meters)}
        times = np.full(len(meters), now, np.int64)
        columns = derived.columns(CASE.view, read.values, inputs, times)
        for i, meter in enumerate(meters):
            told = {
                "prediction_id": f"p{len(self.served)}",
                "_time": now,
                "entity": meter,
                "inputs": orjson.dumps({"level": level}).decode(),
                "stored": read.values[i].tolist(),
                "status": read.status[i].tolist(),
                "numeric": [float(columns[name][i]) for name in CASE.model.numeric],
                "sequence": read.sequence,
                "generation": read.generation,
                "others": [],
                "view": self.state.plan.fingerprint,
            }
            self.served.append(orjson.loads(orjson.dumps(told)))  # NaN and infinity become null on the way

    def impute(self, row: int, feature: str, value: float) -> None:
        """Answers ``row`` again with a normal in the place of ``feature``, as the gateway does and logs it."""
        told = self.served[row]
        place = VIEW.stored.index(feature)
        stored, status = list(told["stored"]), list(told["status"])
        stored[place], status[place] = value, int(Status.IMPUTED)
        given = np.array([[np.nan if v is None else v for v in stored]])
        inputs = {"level": [orjson.loads(told["inputs"])["level"]]}
        columns = derived.columns(CASE.view, given, inputs, np.array([told["_time"]], np.int64))
        numeric = [float(columns[name][0]) for name in CASE.model.numeric]
        changed = {**told, "stored": stored, "status": status, "numeric": numeric}
        self.served[row] = orjson.loads(orjson.dumps(changed))

    def drain(self, marker: int, without: int = 0) -> None:
        records = self.log.read("events", 0)
        after = self.tables.marker(events_table(CASE), "drain/events") or 0
        records = [r for r in records if after < r.sequence <= marker and r.sequence != without]
        rows = decode_events(
            CONTRACT,
            [r.value for r in records],
            [r.known_at_us for r in records],
            [r.sequence for r in records],
            load_id="drain",
            buckets=4,
        )
        self.tables.append(events_table(CASE), rows, "drain/events", marker)

    @property
    def states(self) -> dict[str, OnlineState]:
        return {self.state.plan.fingerprint: self.state}

    def predictions(self) -> pa.Table:
        rows = [{**dict.fromkeys(SERVED_SCHEMA.names), **row} for row in self.served]
        return pa.Table.from_pylist(rows, schema=SERVED_SCHEMA)


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    """Forty steps with late events between the answers, and a rebuild of state halfway."""
    tables = Tables((tmp_path / "tables").as_uri())
    tables.ensure(events_table(CASE), events_schema(CONTRACT), partition_by=[BUCKET])
    history = [record(m, BASE + i * MINUTE // 3, i / 7, 1.0) for i in range(60) for m in ("a", "b")]
    tables.append(events_table(CASE), bulk(history), "load/1")
    log = DurableLog(tmp_path / "log", remember_us=3_600_000_000)
    state = OnlineState(tmp_path / "state", CASE)
    made = Plant(tables, log, state, [])
    state.materialize(tables.read(events_table(CASE)), tables.version(events_table(CASE)), log)
    rng = np.random.default_rng(1)
    now = BASE + 21 * MINUTE
    for step in range(40):
        now += int(rng.integers(1, 40_000_000))
        late = int(rng.choice([0, 0, 5_000_000, 80_000_000, 120_000_000]))
        told = [record(m, now - late, float(rng.normal()), float(rng.normal())) for m in ("a", "b")]
        write(log, told, now)
        state.project(log)
        made.serve(["a", "b", "unknown"], now)
        if step == 19:
            made.drain(log.last("events"))
            version = tables.version(events_table(CASE))
            state.materialize(tables.read(events_table(CASE)), version, log)
    yield made
    state.close()
    log.close()


def test_every_served_value_is_recomputed_to_the_last_bit(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert (report.checked, report.mismatched, report.pending, report.foreign) == (120, 0, 0, 0)
    assert {row["generation"] for row in plant.served} == {1, 2}


def test_one_changed_bit_is_found_and_named(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    mean = VIEW.stored.index("flow_mean_5m")
    victim = plant.served[90]
    stored = list(victim["stored"])
    stored[mean] = float(np.nextafter(stored[mean], 1e9))
    victim["stored"] = stored
    plant.served[30]["numeric"] = [1.0, *plant.served[30]["numeric"][1:]]
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert report.mismatched == 2
    assert {name: skew.differing for name, skew in report.by_feature.items()} == {"flow_mean_5m": 1, "scaled": 1}
    found = {example.feature: example.prediction_id for example in report.examples}
    assert found == {"flow_mean_5m": "p90", "scaled": "p30"}


def test_the_distance_of_what_differs_is_told_by_feature(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    mean = VIEW.stored.index("flow_mean_5m")
    for row, change in ((90, 2.0), (93, -0.5)):
        stored = list(plant.served[row]["stored"])
        stored[mean] += change
        plant.served[row]["stored"] = stored
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert report.by_feature == {"flow_mean_5m": FeatureSkew(2, 0, 0, pytest.approx(2.0))}


def test_the_job_audits_a_share_of_what_was_served_lately_and_keeps_an_alert_by_it(
    plant: Plant, tmp_path: Path
) -> None:
    plant.drain(plant.log.last("events"))
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    now = max(int(row["_time"]) for row in plant.served) + 1
    clock = ReplayClock(tmp_path / "clock")
    clock.set(now)
    alerts = Alerts(database, clock)

    def run(**how: object) -> SkewReport:
        found = {"tables": plant.tables, "database": database, "clock": clock} | how
        return audit_lately(CASE, states=plant.states, **found)

    assert run() == SkewReport(checked=0, mismatched=0, pending=0, foreign=0)
    plant.tables.ensure(predictions_table(CASE), SERVED_SCHEMA)
    plant.tables.append(predictions_table(CASE), plant.predictions(), "served/1")
    whole = run(share=1.0)
    assert (whole.checked, whole.mismatched, alerts.open_alerts()) == (120, 0, [])
    assert 10 < run(share=1.0, rows=40).checked < 80
    part = run(share=0.3)
    assert 10 < part.checked < 70
    assert run(share=1.0, lately=timedelta(microseconds=1)).checked < 10
    wrong = plant.predictions().slice(60, 30)
    numeric = [[1.0, *row[1:]] for row in wrong.column("numeric").to_pylist()]
    wrong = wrong.set_column(wrong.column_names.index("numeric"), SERVED_SCHEMA.field("numeric"), [numeric])
    plant.tables.append(predictions_table(CASE), wrong, "served/2")
    assert run(share=1.0).mismatched == 30
    (alert,) = alerts.open_alerts()
    assert (alert.name, alert.subject) == ("feature_skew", CASE.name)
    assert "30 of 150" in alert.detail
    assert "'scaled'" in alert.detail
    assert run(share=1.0, lately=timedelta(microseconds=1)).mismatched == 0
    assert alerts.open_alerts() == []


def test_a_value_that_should_be_missing_is_a_mismatch(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    unknown = plant.served[2]
    assert unknown["entity"] == "unknown"
    stored = list(unknown["stored"])
    stored[VIEW.stored.index("flow_mean_1m")] = 0.0
    unknown["stored"] = stored
    known = plant.served[90]
    known["stored"] = [None, *known["stored"][1:]]
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert report.by_feature == {"flow_mean_1m": FeatureSkew(1, 0, 1, 0.0), "flow_count_1m": FeatureSkew(1, 1, 0, 0.0)}


def test_an_event_that_the_table_lost_shows_as_skew(plant: Plant) -> None:
    plant.drain(plant.log.last("events"), without=55)
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert report.mismatched > 0


def test_answers_whose_events_are_not_in_the_table_yet_wait(plant: Plant) -> None:
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert (report.checked, report.pending) == (60, 60)


def test_a_drain_that_commits_during_an_audit_makes_no_skew(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    half, rest = plant.log.last("events") // 2, plant.log.last("events")
    plant.drain(half)
    version = Tables.version

    def drained_meanwhile(tables: Tables, name: str) -> int:
        found = version(tables, name)
        monkeypatch.setattr(Tables, "version", version)
        plant.drain(rest)
        return found

    monkeypatch.setattr(Tables, "version", drained_meanwhile)
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert report.checked > 0
    assert (report.checked + report.pending, report.mismatched) == (120, 0)


def test_answers_of_another_view_are_not_judged_by_this_one(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    plant.served[0]["view"] = "0123456789abcdef"
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert (report.checked, report.foreign) == (119, 1)


def test_answers_of_a_state_that_was_lost_since_are_not_judged(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    plant.served[0]["generation"] = 7
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert (report.checked, report.mismatched, report.pending, report.foreign) == (119, 0, 0, 1)


def test_an_imputed_value_is_counted_and_what_is_made_of_it_is_recomputed(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    plant.impute(2, "flow_mean_1m", 3.25)  # of the entity that nobody knows
    plant.impute(90, "flow_std_1m", 0.1)
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert (report.checked, report.mismatched, report.imputed) == (120, 0, 2)


def test_a_column_that_was_not_made_of_the_imputed_value_is_found(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    before = plant.served[90]["numeric"]
    plant.impute(90, "flow_mean_1m", 3.25)
    plant.served[90]["numeric"] = before
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert (report.mismatched, report.imputed) == (1, 1)
    assert {name: skew.differing for name, skew in report.by_feature.items()} == {"scaled": 1}


def test_beside_an_imputed_value_every_other_is_still_compared(plant: Plant) -> None:
    plant.drain(plant.log.last("events"))
    plant.impute(90, "flow_std_1m", 0.1)
    mean = VIEW.stored.index("flow_mean_5m")
    stored = list(plant.served[90]["stored"])
    stored[mean] = float(np.nextafter(stored[mean], 1e9))
    plant.served[90]["stored"] = stored
    report = audit(CASE, plant.predictions(), tables=plant.tables, states=plant.states)
    assert (report.mismatched, report.imputed) == (1, 1)
    assert {name: skew.differing for name, skew in report.by_feature.items()} == {"flow_mean_5m": 1}
