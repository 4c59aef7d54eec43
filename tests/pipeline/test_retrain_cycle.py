"""From a trigger to a release request: once, wherever the cycle is killed; real Ray Tune and Train at the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.alerts import Alerts
from cluster.clock import ReplayClock, SystemClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from cluster.triggers import Triggers
from pipelines import retrain as job
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, INSTANT, events_schema
from pipelines.features.served import (
    OUTCOME_SCHEMA,
    SERVED_SCHEMA,
    outcomes_table,
    predictions_table,
)
from pipelines.features.training_table import backfill
from pipelines.retrain import RetrainReport, exit_code, retrain
from pipelines.retraining import cycle, triggers
from pipelines.retraining.cycle import ATTEMPTS, CycleReport
from pipelines.spec import DecayRule, DriftRule, UseCase
from pipelines.spec.base import microseconds
from pipelines.training.dataset import Frame, load_examples
from pipelines.training.registry import Registry
from pipelines.training.search import SearchError
from tests.model import demand
from tests.pipeline import retraining
from tests.pipeline.retraining import POLICY, STEPS, World

CLOCK = SystemClock()
DAY_US = 86_400_000_000
ENTRIES = ["trigger_opened", "search_finished", "candidate_judged", "trigger_closed"]


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.database.close()


def opened(world: World) -> int:
    made = triggers.open_by_hand(retraining.use_case(), "a test", database=world.database, clock=CLOCK)
    assert made is not None
    return made.id


def open_alerts(world: World) -> dict[str, str]:
    """The open alerts of the use case: what each says."""
    return {alert.name: alert.detail for alert in Alerts(world.database, CLOCK).open_alerts()}


def kill_after(step: str):
    def hook(done: str) -> None:
        if done == step:
            raise Killed

    return hook


def ended_once(world: World, trigger: int) -> None:
    (kept,) = Triggers(world.database).all("aqua")
    assert (kept.id, kept.status) == (trigger, "done")
    assert world.database.open_releases("aqua") == [kept.outcome["version"]]
    entries = world.database.journal("aqua")
    assert [entry.kind for entry in entries] == ENTRIES
    assert all(entry.payload["trigger"] == trigger for entry in entries)
    assert entries[1].payload["search"]["trials"][0]["error"] == 0.5
    assert entries[2].payload["judged"]["version"] == entries[3].payload["version"] == kept.outcome["version"]
    assert entries[2].payload["judged"]["passed"] is True
    assert Alerts(world.database, CLOCK).open_alerts() == []


def test_a_cycle_goes_from_its_trigger_to_a_release_request(world: World) -> None:
    assert world.run() is None  # nothing is pending
    trigger = opened(world)
    assert [alert.name for alert in Alerts(world.database, CLOCK).open_alerts()] == ["retraining_triggered"]
    seen: list[str] = []
    report = world.run(seen.append)
    assert report == CycleReport(
        use_case="aqua", trigger=trigger, kind="manual", status="done",
        reason="version 1 passed its gates and asks for its release", version="1", gates_passed=True, requested=True,
        resumed=False, search=report.search if report else None, gates=[{"name": "gate", "passed": True}],
    )  # fmt: skip
    assert tuple(seen) == STEPS
    ended_once(world, trigger)
    assert world.run() is None


@pytest.mark.parametrize("step", STEPS)
def test_a_cycle_killed_after_any_step_ends_once_with_one_request(world: World, step: str) -> None:
    trigger = opened(world)
    with pytest.raises(Killed):
        world.run(kill_after(step))
    report = world.run()
    if step == "closed":
        assert report is None
    else:
        assert report is not None
        assert (report.resumed, report.requested, report.version) == (True, True, "1")
    ended_once(world, trigger)
    assert world.made() == ["1"]
    assert world.searches.read_text() == "x"


def test_a_version_lost_before_its_request_is_made_again_and_one_is_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = opened(world)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Triggers, "request_release", die)
        with pytest.raises(Killed):
            world.run()
    report = world.run()
    assert report is not None
    assert world.made() == ["1", "2"]
    assert report.version == "2"
    ended_once(world, trigger)


@pytest.mark.parametrize("step", ["searched", "trained"])
def test_a_process_killed_outright_leaves_a_trigger_that_the_next_takes_up(world: World, step: str) -> None:
    trigger = opened(world)
    command = [sys.executable, "-m", "tests.pipeline.retraining", str(world.home), step]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while (report := world.run()) is None:  # until the dead process's lease has ended
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert report.resumed
    ended_once(world, trigger)
    assert world.made() == ["1"]


def test_two_processes_do_not_run_one_trigger(world: World) -> None:
    opened(world)
    inside: list[object] = []
    world.run(lambda step: inside.append(world.run()) if step == "searched" else None)
    assert inside == [None]


def test_a_candidate_that_fails_its_gates_ends_the_cycle_without_a_request(world: World) -> None:
    world.passes = False
    opened(world)
    with pytest.raises(Killed):
        world.run(kill_after("noted"))
    report = world.run()
    assert report is not None
    assert (report.status, report.gates_passed, report.requested, report.version) == ("done", False, False, "1")
    assert world.made() == ["1"]
    assert world.database.open_releases("aqua") == []
    assert world.database.journal("aqua")[2].payload["judged"]["passed"] is False
    assert exit_code(RetrainReport("aqua", None, "", cycle=report)) == job.NOT_PASSED


def test_a_search_without_a_single_good_trial_fails_the_trigger(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise SearchError("all 2 trials failed")

    opened(world)
    monkeypatch.setattr(world, "_search", none)
    report = world.run()
    assert report is not None
    assert (report.status, report.reason, report.version) == ("failed", "all 2 trials failed", None)
    assert [entry.kind for entry in world.database.journal("aqua")] == ["trigger_opened", "trigger_closed"]
    assert open_alerts(world) == {"retraining_failed": "all 2 trials failed"}


@pytest.mark.parametrize("passes", [True, False])
def test_an_alert_says_why_a_retraining_failed_until_one_comes_to_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    def none(*_: object, **__: object) -> None:
        raise SearchError("all 2 trials failed")

    opened(world)
    with monkeypatch.context() as patch:
        patch.setattr(world, "_search", none)
        with pytest.raises(Killed):
            world.run(kill_after("resolved"))
        report = world.run()
    assert report is not None
    assert report.status == "failed"
    assert open_alerts(world) == {"retraining_failed": "all 2 trials failed"}
    world.passes = passes
    opened(world)
    assert set(open_alerts(world)) == {"retraining_failed", "retraining_triggered"}
    report = world.run()
    assert report is not None
    assert report.status == "done"
    assert open_alerts(world) == {}


def test_a_cycle_that_always_dies_is_given_up(world: World) -> None:
    opened(world)
    for _ in range(ATTEMPTS):
        with pytest.raises(Killed):
            world.run(kill_after("pinned"))
    report = world.run()
    assert report is not None
    assert (report.status, report.version) == ("failed", None)
    assert open_alerts(world) == {"retraining_failed": "3 attempts came to no end"}
    assert world.made() == []


def test_a_use_case_without_a_policy_is_told_so(world: World) -> None:
    case = demand.use_case().model_copy(update={"retraining": None})
    parts = {"tables": Tables(world.settings.tables_url), "database": world.database, "settings": world.settings}
    with pytest.raises(ValueError, match="no retraining policy"):
        cycle.run(case, clock=CLOCK, **parts)
    with pytest.raises(ValueError, match="no retraining policy"):
        retrain(case, clock=CLOCK, **parts)


@dataclass(frozen=True)
class Real:
    """Two real districts, half a year, one champion that a real cycle made; ``end_us`` is their last request."""

    case: UseCase
    settings: Settings
    tables: Tables
    database: Database
    registry: Registry
    frame: Frame
    report: CycleReport
    kept: list[str]

    @property
    def end_us(self) -> int:
        return int(self.frame.time_us.max())


@pytest.fixture(scope="module")
def real(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), clock="replay")
    case = retraining.use_case(hidden=(32, 16), epochs=8)
    tables, database, registry = Tables(settings.tables_url), Database(settings.database_url), Registry(settings)
    database.create()
    tables.ensure(events_table(case), events_schema(case.contract), [BUCKET])
    tables.append(events_table(case), demand.events(case, districts=2, days=150), "load/1")
    assert triggers.open_by_hand(case, "first", database=database, clock=CLOCK) is not None

    def attempt(after: object) -> CycleReport | None:
        return cycle.run(
            case,
            tables=tables,
            database=database,
            settings=settings,
            clock=CLOCK,
            registry=registry,
            after=after,
        )

    with pytest.raises(Killed):
        attempt(kill_after("trained"))
    kept = [entry.version for entry in registry.versions("aqua")]
    report = attempt(cycle._nothing)
    assert report is not None
    filled = backfill(case, tables=tables, settings=settings)
    frame = load_examples(
        case, tables, training_version=filled.table_version, events_version=filled.events_version,
        view=filled.view_fingerprint, dimensions=filled.dimensions,
    )  # fmt: skip
    yield Real(case, settings, tables, database, registry, frame, report, kept)
    database.close()


def test_a_real_search_and_training_survive_a_death_and_ask_for_one_release(real: Real) -> None:
    report, database = real.report, real.database
    assert report.gates_passed
    assert report.requested
    assert report.resumed
    assert [entry.version for entry in real.registry.versions("aqua")] == real.kept == [report.version]
    assert database.open_releases("aqua") == [report.version]
    entries = {entry.kind: entry.payload for entry in database.journal("aqua")}
    assert list(entries) == ENTRIES
    found = entries["search_finished"]["search"]
    assert len(found["trials"]) == POLICY.search.trials
    assert all(trial["error"] > 0 for trial in found["trials"])
    later = real.case.model.split.test + real.case.model.split.calibration
    before_calibration = real.frame.time_us <= real.end_us - microseconds(later)
    # Trials saw rows of the train part only.
    assert 0 < found["train_rows"] + found["holdout_rows"] <= int(before_calibration.sum())
    judged = entries["candidate_judged"]["judged"]
    assert (judged["version"], judged["passed"]) == (report.version, True)
    assert judged["gates"][0]["name"] == "beats_last_week"
    assert real.registry.version("aqua", report.version or "").gates_passed
    assert list((real.settings.home / "search").iterdir()) == []


def serve(real: Real, *, error: float, bias: float = 0.0) -> tuple[Tables, int]:
    """Tables beside the real ones with the last 16 days as they would have been served, and the time after them.

    Answers err by ``error`` times what validation found; ``bias`` is added to the temperature of one district.
    """
    entry = real.registry.version("aqua", real.report.version or "")
    promised = {name: one["mae"] for name, one in json.loads(entry.tags["gates"])["by_entity"].items()}
    keep = real.frame.time_us > real.end_us - 16 * DAY_US
    frame = real.frame.take(keep)
    n = len(frame)
    rng = np.random.default_rng(0)
    scale = np.array([promised[entity] for entity in frame.entity])
    moved = np.where(frame.entity == "dma_2", bias, 0.0)
    stored = np.column_stack([frame.columns[name] for name in real.case.view.stored])
    numeric = np.column_stack(
        [frame.columns[name] + (moved if name == "temperature" else 0) for name in real.case.model.numeric]
    )
    ids = [f"p{i}" for i in range(n)]
    value = frame.label + error * scale * rng.choice([-1, 1], n) * rng.exponential(size=n)
    columns: dict[str, object] = {
        **{name: pa.nulls(n, SERVED_SCHEMA.field(name).type) for name in SERVED_SCHEMA.names},
        "prediction_id": ids,
        "_time": pa.array(frame.time_us).cast(INSTANT),
        "entity": frame.entity.tolist(),
        "stored": stored.tolist(),
        "numeric": numeric.tolist(),
        "view": [entry.tags["view"]] * n,
        "model_version": [entry.version] * n,
        "variant": ["champion"] * n,
        "value": value,
    }
    outcomes = {"prediction_id": ids, "value": frame.label, "at": pa.array(frame.time_us + DAY_US).cast(INSTANT)}
    tables = Tables(real.settings.tables_url)
    name = f"{error}-{bias}"
    for table, schema, rows in (
        (predictions_table(real.case), SERVED_SCHEMA, columns),
        (outcomes_table(real.case), OUTCOME_SCHEMA, outcomes),
    ):
        tables.ensure(table, schema)
        tables.append(table, pa.table(rows, schema=schema), f"test/{name}")
    return tables, real.end_us + 26 * 3_600_000_000


def watching(case: UseCase) -> UseCase:
    rules = {
        "decay": DecayRule(outcomes=200),
        "drift": DriftRule(columns=("temperature", "inflow_mean_1d"), days=10, windows=8),
        "max_age": timedelta(days=365),
    }
    return case.model_copy(update={"retraining": POLICY.model_copy(update=rules)})


def test_the_job_sees_decay_in_the_tables_and_opens_its_trigger_there(
    real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = watching(real.case)
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    clock = ReplayClock(tmp_path / "clock")
    parts = {"tables": real.tables, "database": database, "settings": real.settings, "registry": real.registry}

    def at(moment_us: int, **options: object) -> RetrainReport:
        clock.set(moment_us)
        return retrain(case, clock=clock, **parts, **options)

    first = at(real.end_us)
    assert "no champion yet" in first.message
    assert exit_code(first) == job.NOTHING
    database.put_routing("aqua", None, {"champion": real.report.version})

    silent = at(real.end_us)
    assert exit_code(silent, check=True) == job.NOTHING
    assert [one.reason.startswith("inconclusive") for one in silent.seen] == [True, True, False]

    _, now = serve(real, error=1.0)
    fine = at(now)
    assert [(one.kind, one.due) for one in fine.seen] == [("decay", False), ("drift", False), ("age", False)], fine
    assert fine.message.startswith("nothing is due")
    assert not any(one.reason.startswith("inconclusive") for one in fine.seen)

    monkeypatch.setattr(job, "predictions_table", lambda _: "aqua/bad_predictions")
    monkeypatch.setattr(job, "outcomes_table", lambda _: "aqua/bad_outcomes")
    monkeypatch.setitem(serve.__globals__, "predictions_table", lambda _: "aqua/bad_predictions")
    monkeypatch.setitem(serve.__globals__, "outcomes_table", lambda _: "aqua/bad_outcomes")
    serve(real, error=2.0, bias=60.0)
    bad = at(now, check=True)
    assert [(one.kind, one.due) for one in bad.seen] == [("decay", True), ("drift", True), ("age", False)]
    assert "temperature of dma_2" in bad.seen[1].reason
    assert bad.seen[1].evidence["drifted"] == 1
    assert exit_code(bad, check=True) == job.DUE
    assert Triggers(database).all("aqua") == []
    aged = job.observe(case, real.report.version or "", tables=real.tables, registry=real.registry, now_us=now)
    assert aged.newest_us == real.end_us

    monkeypatch.setattr(job, "run", lambda *_, **__: None)  # the cycle itself is tested above
    acted = at(now)
    (trigger,) = Triggers(database).all("aqua")
    assert (trigger.kind, trigger.opened_us, acted.trigger) == ("decay", now, trigger.id)
    assert 1.6 < trigger.evidence["ratio"] < 2.4
    assert "another process's hands" in acted.message
    assert at(now, check=True).trigger == trigger.id
    json.dumps(replace(acted, cycle=real.report).to_json(), allow_nan=False)

    monkeypatch.setattr(job.usecases, "load", lambda _: case)
    monkeypatch.setattr(job, "Database", lambda _: database)
    monkeypatch.setattr(job, "open_clock", lambda _: clock)
    monkeypatch.setenv("TIDEGATE_HOME", str(real.settings.home))
    Triggers(database).finish(trigger.id, "done", {}, now)
    database.request_release("aqua", "99", {}, now)
    assert job.main(["aqua", "--check"]) == job.DUE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["champion"] == real.report.version
    database.close()
