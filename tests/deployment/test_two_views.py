"""A release from an old view to a new one, in a gateway: no gap for callers, and no value that is made wrongly.

The gateway, its log, state, tables and database are real; the models are arithmetic, and a challenger is asked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from cluster.alerts import Alerts
from cluster.clock import SystemClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import backfill as job
from pipelines.audit import fetched_columns
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, events_schema
from pipelines.drain import EVENTS, drain_once
from pipelines.features.online import open_log
from pipelines.features.served import predictions_table
from pipelines.features.skew import audit
from pipelines.features.views import open_views
from pipelines.features.windows import view_fingerprint
from pipelines.spec import Calendar, Derived, Fold, UseCase, Window
from pipelines.training.artifact import GRAPH, WEIGHTS, Artifact, Output, Prediction, write_page
from serving import following, gateway, routing
from serving.answers import Predictor
from serving.auth import owner_key
from serving.frames import Reply
from serving.gateway import Gateway
from serving.rollout.serve_world import ServeWorld
from serving.routing import Challenger
from serving.runner import LoadedVersion, Rows, VersionRefused, describe_version
from tests.data.worlds import CONTRACT, SECOND, VIEW
from tests.deployment.waiting import until
from tests.pipeline.test_online_state import MINUTE, bulk, record, use_case, write

CALENDAR = Calendar(zone="Europe/Rome", parts=("hour",))


def ratio(flow_mean_1m, level, hour):
    return flow_mean_1m / level + hour


def spread(flow_mean_90s, level):
    return flow_mean_90s * level


OLD = VIEW.model_copy(
    update={"inputs": ("level",), "calendar": CALENDAR, "derived": (Derived(name="ratio", function=ratio),)}
)
WINDOW = Window(field="flow", length=90 * SECOND, hop=30 * SECOND, folds=(Fold.MEAN, Fold.SUM))
NEW = VIEW.model_copy(
    update={
        "inputs": ("level",),
        "windows": (WINDOW, *VIEW.windows),
        "derived": (Derived(name="spread", function=spread),),
    }
)
COLUMNS = {"1": ("flow_mean_1m", "ratio"), "2": ("flow_mean_90s", "spread", "flow_count_1m")}
MARKS = {"1": view_fingerprint(OLD, CONTRACT), "2": view_fingerprint(NEW, CONTRACT)}
ROUTED = {"champion": "1", "previous": None, "prepare": None, "challenger": None}
TRIED = Challenger(
    version="2", rollout=1, salt="s", weight=0.5, shadow=0.0, deadline_ms=5_000.0, slow_factor=5.0,
    slow_floor_ms=0.5, harm_cap=25,
)  # fmt: skip


def page() -> UseCase:
    case = use_case(NEW, OLD)
    return case.model_copy(update={"model": case.model.model_copy(update={"numeric": COLUMNS["2"]})})


PAGE = page()


class Arithmetic:
    """A runner whose answer is the first column of its version."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    def predict(self, columns: dict[str, np.ndarray], strings: object, level: object) -> Prediction:
        value = np.nan_to_num(columns[self.artifact.numeric[0]])
        return Prediction(value, value - 1, value + 1)


@dataclass
class Place:
    settings: Settings
    tables: Tables
    database: Database
    artifacts: dict[str, Artifact]

    def load(self, _: UseCase, version: str, __: Settings) -> LoadedVersion:
        runner: Any = Arithmetic(self.artifacts[version])
        loaded = LoadedVersion(version, runner, None)
        loaded.past.append(0.001)
        return loaded

    def materialize(self, page: UseCase) -> None:
        job.materialize(page, tables=self.tables, database=self.database, settings=self.settings, clock=SystemClock())


@pytest.fixture
def put(home: Path, redis_server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Version 1 answers from the old view; the page has the new one, whose state nobody built while the log went on."""
    redis_server.empty()
    settings = Settings(home=home, state_url=redis_server.url, drain_seconds=0.05, buckets=4)
    tables, database = Tables(settings.tables_url), Database(settings.database_url)
    database.create()
    artifacts = {}
    for version, numeric in COLUMNS.items():
        folder = settings.cache_dir / "models" / PAGE.name / version
        folder.mkdir(parents=True)
        for name in (GRAPH, WEIGHTS):
            (folder / name).write_bytes(b"arithmetic")
        artifact = Artifact(
            use_case=PAGE.name, contract="readings", contract_version="1.0.0", view=MARKS[version], entity="meter",
            inputs=("level",), numeric=numeric, vocabularies={}, anchor=None, scale=None, transform="identity",
            output=Output(field="flow", unit=None, horizon_us=0), shape={}, snapshot={}, training={}, code="",
            versions={},
        )  # fmt: skip
        artifacts[version] = write_page(folder, artifact)
    made = Place(settings, tables, database, artifacts)

    class Asker:
        def __init__(self, usecase: str, version: str) -> None:
            self.runner = Arithmetic(artifacts[version])

        def ready(self, timeout_s: float) -> bool:
            return True

        async def ask(self, rows: Rows) -> Reply:
            found = self.runner.predict(rows.columns, rows.strings, rows.level)
            return Reply(found.value, found.lower, found.upper, 0.0001)

        def close(self) -> None:
            pass

    def away(_: str) -> None:
        raise ValueError("there is no controller here: tables come from the database")

    monkeypatch.setattr(gateway.usecases, "load", lambda _: PAGE)
    monkeypatch.setattr(following, "load_version", made.load)
    monkeypatch.setattr(following, "handle", away)
    monkeypatch.setattr(following, "start", lambda _: None)
    monkeypatch.setattr(following, "Asker", Asker)
    monkeypatch.setattr(following, "_AFTER_REFUSAL_S", 0.05)
    monkeypatch.setattr(following, "_WITHOUT_CONTROLLER_S", 0.02)
    now = SystemClock().now()
    history = [record(m, now - i * MINUTE // 3, i / 7, 1.0) for i in range(1, 60) for m in ("a", "b")]
    tables.ensure(events_table(PAGE), events_schema(CONTRACT), partition_by=[BUCKET])
    tables.append(events_table(PAGE), bulk(history), "load/1")
    made.materialize(PAGE.under(OLD))
    log, views = open_log(settings, PAGE), open_views(settings, PAGE.under(OLD))
    write(log, [record("a", now, 0.1, 1.0)], now)
    assert drain_once(PAGE, log, tables, database, settings, "old", stop_at=lambda: {EVENTS: views.project(log)})
    views.close()
    log.close()
    routing.publish(database, PAGE.name, None, ROUTED)
    yield made
    database.close()


def test_a_challenger_on_a_new_view_waits_for_its_state_and_both_answer_what_is_made_again(put: Place) -> None:
    key = {"authorization": f"Bearer {owner_key(put.settings)}"}
    world = ServeWorld(PAGE, put.settings, put.database, Alerts(put.database, SystemClock()), SystemClock())
    turn = [0]
    log, views = open_log(put.settings, PAGE), open_views(put.settings, PAGE)

    def step(client: TestClient) -> list[dict[str, Any]]:
        """An event of each meter, and a request for both and for one that nobody knows."""
        turn[0] += 1
        at = datetime.now(UTC).isoformat()
        told = [{"meter": m, "at": at, "flow": turn[0] / 3, "level": 1 / turn[0]} for m in ("a", "b")]
        sent = client.post("/events", json={"events": told}, headers=key).json()
        assert [result["status"] for result in sent["results"]] == ["accepted"] * 2
        asked = [{"meter": "a", "level": 0.3}, {"meter": "b"}, {"meter": "never", "level": -0.1}]
        answer = client.post("/predict", json={"instances": asked}, headers=key)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]

    def drained() -> bool:
        return log.pending("events") == 0

    made = Gateway(PAGE.name, put.settings)
    try:
        with TestClient(made) as client:
            assert {answer["variant"] for answer in step(client)} == {"champion"}
            until(drained, "the drain goes on without the new view's state", 20)
            routed = put.database.routing(PAGE.name)
            assert routed is not None
            put.database.put_routing(PAGE.name, routed.epoch, {**ROUTED, "challenger": TRIED.model_dump(mode="json")})
            until(lambda: "2" in made.follower.refused(), "the challenger is refused", 20)
            assert {answer["variant"] for _ in range(3) for answer in step(client)} == {"champion"}
            status = client.get("/status", headers=key).json()
            assert "pipelines.backfill meter --materialize" in status["refused"]["2"]
            assert any(MARKS["2"] in failure for failure in status["failures"])
            assert client.get("/readyz").status_code == 200
            assert "made from no version of the events table" in (world.lacking("1", "2") or "")

            put.materialize(PAGE)
            until(lambda: made.follower.serving.trial is not None, "the challenger is tried", 20)
            assert world.lacking("1", "2") is None
            answers = [answer for _ in range(15) for answer in step(client)]
            assert {(a["variant"], a["model_version"]) for a in answers} == {("champion", "1"), ("challenger", "2")}
            status = client.get("/status", headers=key).json()
            assert (status["refused"], status["failures"]) == ({}, [])
            until(lambda: drained() and log.pending("predictions") == 0, "all is in the tables", 20)
    finally:
        made.close()
    logged = put.tables.read(predictions_table(PAGE))
    assert logged.num_rows == 3 * turn[0]
    by_version = {(row["model_version"], row["view"], len(row["numeric"])) for row in logged.to_pylist()}
    assert by_version == {("1", MARKS["1"], 2), ("2", MARKS["2"], 3)}
    columns = fetched_columns(PAGE, put.settings)
    report = audit(PAGE, logged, tables=put.tables, states=views.states, columns=columns)
    assert (report.checked, report.mismatched, report.foreign, report.stored_only) == (logged.num_rows, 0, 0, 0)
    of_page = audit(PAGE, logged, tables=put.tables, states=views.states)
    kept = sum(row["view"] == MARKS["1"] for row in logged.to_pylist())
    assert (of_page.checked, of_page.mismatched, of_page.stored_only) == (logged.num_rows, 0, kept)
    for version in COLUMNS:
        wrong = changed(logged, version)
        report = audit(PAGE, wrong, tables=put.tables, states=views.states, columns=columns)
        assert report.mismatched == 1
        assert list(report.by_feature) == [COLUMNS[version][0]]
    views.close()
    log.close()


def changed(logged: pa.Table, version: str) -> pa.Table:
    """``logged`` with one bit more in the first numeric column of one answer of a version."""
    rows = logged.to_pylist()
    row = next(r for r in rows if r["model_version"] == version and r["entity"] != "never")
    row["numeric"] = [float(np.nextafter(row["numeric"][0], 1e9)), *row["numeric"][1:]]
    return pa.Table.from_pylist(rows, schema=logged.schema)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"view": "0123456789abcdef"}, "keep that view on the page"),
        ({"numeric": ("flow_mean_1m", "spread")}, r"needs \['spread'\], which its view does not compute"),
    ],
)
def test_a_version_whose_rows_this_code_cannot_make_is_refused(put: Place, changes: dict[str, Any], words: str) -> None:
    folder = put.settings.cache_dir / "models" / PAGE.name / "1"
    write_page(folder, put.artifacts["1"].model_copy(update=changes))
    with pytest.raises(VersionRefused, match=words):
        describe_version(PAGE, "1", put.settings)


def test_a_request_brings_what_all_views_of_the_page_take(put: Place) -> None:
    bare = NEW.model_copy(update={"inputs": (), "derived": ()})
    views = open_views(put.settings, use_case(bare, OLD))
    predictor = Predictor(views.use_case, views)
    (record,) = predictor.parse({"instances": [{"meter": "a", "level": 0.3}]})
    assert record == {"meter": "a", "level": 0.3}
    views.close()
