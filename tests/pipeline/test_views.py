"""State of several views side by side: dual writes, a new view before and after its backfill, what a page may keep."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.clock import SystemClock
from cluster.database import Database
from cluster.log import Log
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import backfill as job
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, events_schema
from pipelines.drain import EVENTS, drain_once
from pipelines.features.online import StateGap, open_log
from pipelines.features.training_table import backfill
from pipelines.features.views import Views, open_views
from pipelines.features.windows import pages, view_fingerprint
from pipelines.retrain import observe
from pipelines.retraining.triggers import Observed
from pipelines.spec import DriftRule, Fallback, Fold, RetrainPolicy, UseCase, Window
from pipelines.training.registry import ModelVersion
from tests.backends import on_redis
from tests.backends import open_log as open_log_at
from tests.backends import open_views as open_views_at
from tests.data.profiles import PROFILE, made_case
from tests.data.worlds import BASE, CONTRACT, SECOND, VIEW
from tests.pipeline.test_dimensions import fact
from tests.pipeline.test_dimensions import write as write_fact
from tests.pipeline.test_online_state import MINUTE, bulk, record, use_case, write

NEW = VIEW.model_copy(
    update={"windows": (Window(field="flow", length=90 * SECOND, hop=30 * SECOND, folds=(Fold.MEAN,)), *VIEW.windows)}
)
OLD_PAGE, PAGE = use_case(), use_case(NEW, VIEW)
OLD, PRESENT = (view_fingerprint(view, CONTRACT) for view in (VIEW, NEW))


def test_a_kept_view_is_held_to_the_contract_and_the_models_columns_are_not_its_own() -> None:
    bare = VIEW.model_copy(update={"windows": (), "lags": ()})
    assert use_case(VIEW, bare).kept == (bare,)
    with pytest.raises(ValidationError, match="no numeric columns"):
        use_case(bare, VIEW)
    unknown = VIEW.model_copy(update={"windows": (VIEW.windows[0].model_copy(update={"field": "pressure"}),)})
    for kept, words in (
        (unknown, "pressure"),
        (VIEW.model_copy(update={"inputs": ("at",)}), "input 'at' must be a number or a string"),
        (VIEW.model_copy(update={"inputs": ("meter",)}), "the entity 'meter' is given anyway"),
        (VIEW.model_copy(update={"inputs": ("flow",)}), "the target 'flow' cannot be an input"),
    ):
        with pytest.raises((ValidationError, KeyError), match=words):
            use_case(VIEW, kept)
    ladder = Fallback(hold=300 * SECOND, silence=60 * SECOND, zone="Europe/Rome", slots=("hour",))
    with pytest.raises(ValidationError, match="must not exceed that"):
        UseCase(**{**dict(use_case(VIEW, bare)), "fallback": ladder})


def test_views_of_one_page_take_the_same_inputs_but_for_nullable_ones() -> None:
    asking = VIEW.model_copy(update={"inputs": ("level",)})
    assert use_case(VIEW, asking).kept == (asking,)
    strict = CONTRACT.model_copy(
        update={"fields": tuple(f.model_copy(update={"nullable": f.name == "flow"}) for f in CONTRACT.fields)}
    )
    for views in ((VIEW, asking), (asking, VIEW)):
        with pytest.raises(ValidationError, match=r"must bring the same inputs; \['level'\]"):
            UseCase(**{**dict(use_case(*views)), "contract": strict})


def test_two_views_that_compute_the_same_are_an_error() -> None:
    again = VIEW.model_copy(update={"name": "renamed", "ttl": timedelta(seconds=5)})
    with pytest.raises(ValueError, match="the kept view 'renamed' computes the same as 'meter_state'"):
        pages(use_case(VIEW, again))
    with pytest.raises(ValueError, match="leave it out"):
        pages(use_case(NEW, VIEW, again))
    assert list(pages(PAGE)) == [PRESENT, OLD]


class Use:
    """A use case in operation on one backend, whose log has been drained before its page gets a new view."""

    def __init__(self, place: str, home: Path) -> None:
        self.settings = Settings(home=home, state_url=place if on_redis(place) else None, buckets=4)
        self.tables, self.database = Tables(self.settings.tables_url), Database(self.settings.database_url)
        self.database.create()
        name = events_table(PAGE)
        self.tables.ensure(name, events_schema(CONTRACT), partition_by=[BUCKET])
        self.tables.append(name, bulk([record(m, BASE - i * MINUTE, i / 7) for i in range(9) for m in "ab"]), "load/1")
        self.materialize(OLD_PAGE)
        log, views = self.open(OLD_PAGE)
        self.told = 0
        self.tell(log)
        assert self.drained(log, views) == 1
        self.close(log, views)

    def materialize(self, page: UseCase) -> job.Materialized:
        return job.materialize(
            page, tables=self.tables, database=self.database, settings=self.settings, clock=SystemClock()
        )

    def open(self, page: UseCase) -> tuple[Log, Views]:
        return open_log(self.settings, page), open_views(self.settings, page)

    def close(self, log: Log, views: Views) -> None:
        views.close()
        log.close()

    def tell(self, log: Log) -> None:
        self.told += 1
        write(log, [record("a", BASE + self.told * 1_000_000, self.told / 3)], BASE + self.told * 1_000_000)

    def drained(self, log: Log, views: Views) -> int:
        done = drain_once(
            PAGE, log, self.tables, self.database, self.settings, "me",
            stop_at=lambda: {EVENTS: views.project(log, needed=OLD)},
        )  # fmt: skip
        assert done is not None
        return done.total


def test_a_new_view_without_its_state_holds_nothing_up_and_is_ready_after_its_backfill(place: str, home: Path) -> None:
    use = Use(place, home)
    log, views = use.open(PAGE)
    use.tell(log)
    assert views.project(log, needed=OLD) == 2
    assert list(views.gaps()) == [PRESENT]
    with pytest.raises(StateGap, match=r"pipelines\.backfill meter --materialize"):
        views.check(PRESENT)
    with pytest.raises(StateGap, match=PRESENT):
        views.project(log, needed=PRESENT)
    assert "made from no version of the events table" in (views.behind(PRESENT, OLD) or "")
    assert (use.drained(log, views), log.pending(EVENTS)) == (1, 0)
    use.tell(log)
    with pytest.raises(RuntimeError, match="without being published"), views.states[PRESENT].store.rebuilding():
        assert views.project(log, needed=OLD) == 3, "a rebuild of the new state keeps nobody waiting"
    use.close(log, views)

    done = use.materialize(PAGE)
    assert [one.view for one in (done, *done.kept)] == [PRESENT, OLD]
    assert {one.sequence for one in (done, *done.kept)} == {3}
    log, views = use.open(PAGE)
    views.events.look(log)
    assert (views.gaps(), views.behind(PRESENT, OLD), views.behind(OLD, PRESENT)) == ({}, None, None)
    use.tell(log)
    views.states[OLD].project(log)
    assert "has not applied all" in (views.behind(PRESENT, OLD) or "")
    assert (views.project(log), views.behind(PRESENT, OLD)) == (4, None)
    use.close(log, views)


def test_what_any_state_lacks_stays_in_the_log(place: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use = Use(place, home)
    use.materialize(PAGE)
    log, views = use.open(PAGE)
    for _ in range(2):
        use.tell(log)
    assert views.states[OLD].project(log) == 3
    assert views.project(log, needed=OLD) == 3
    with monkeypatch.context() as patch:
        patch.setattr(views.states[PRESENT], "project", lambda *_: 2)  # it has one record less
        assert (use.drained(log, views), log.pending(EVENTS)) == (1, 1)
    use.tell(log)
    views.states[OLD].project(log)
    log.trim(EVENTS, 4)  # by the drain of a gateway that does not have the new view on its page
    assert (views.project(log, needed=OLD), list(views.gaps())) == (4, [PRESENT])
    use.close(log, views)


def test_a_dimension_is_kept_up_for_every_view_that_has_it(place: str) -> None:
    case = made_case()
    parts = {name: getattr(case, name) for name in UseCase.model_fields}
    older = case.view.model_copy(update={"dimensions": (PROFILE,)})
    page = UseCase(**{**parts, "kept": (older,)})
    present, old = pages(page)
    log, views = open_log_at(place), open_views_at(place, page)
    profile, kind = views.dimensions["profile"], views.dimensions["kind"]
    assert (list(profile.states), list(kind.states)) == ([present, old], [present])
    write_fact(log, fact(1, BASE, 7))
    assert profile.project(log, needed=old) == 1
    values = [state.bind().read(["m"], BASE).values[0] for state in views.states.values()]
    assert [row[case.view.stored.index("profile_people")] for row in values] == [7.0, 7.0]
    assert "dimension 'kind'" in (views.behind(present, old) or "")
    kind.states[present].materialize([], 0, log)
    assert views.behind(present, old) is None
    write_fact(log, fact(2, BASE, 8))
    profile.states[old].project(log)
    log.trim(EVENTS, 2)
    write_fact(log, fact(3, BASE, 9))
    assert profile.project(log, needed=old) == 3
    views.check(old)
    with pytest.raises(StateGap, match=present):
        views.check(present)
    assert "dimension 'profile'" in (views.behind(present, old) or "")
    views.close()
    log.close()
    other = PROFILE.model_copy(update={"contract": PROFILE.contract.model_copy(update={"version": "2.0.0"})})
    with pytest.raises(ValidationError, match=r"dimensions \['profile'\] have one contract"):
        UseCase(**{**parts, "kept": (older.model_copy(update={"dimensions": (other,)}),)})


def test_drift_and_age_of_a_champion_are_those_of_the_view_that_it_was_trained_on(tmp_path: Path, home: Path) -> None:
    use = Use(str(tmp_path), home)
    made = backfill(OLD_PAGE, tables=use.tables, settings=use.settings, engine="arrow")
    snapshot = {
        "view": OLD,
        "events_version": made.events_version,
        "training_version": made.table_version,
        "dimensions": {},
    }

    class Entries:
        def version(self, model: str, version: str) -> ModelVersion:
            return ModelVersion(model, version, "", "", True, {"snapshot": json.dumps(snapshot)})

    def observed(page: UseCase, *watched: str) -> Observed:
        registry: Any = Entries()
        rule = DriftRule(columns=watched, by_entity=False)
        policy = RetrainPolicy(decay=None, drift=rule, max_age=timedelta(days=1))
        held = page.model_copy(update={"retraining": policy})
        return observe(held, "1", tables=use.tables, registry=registry, now_us=BASE + 60 * MINUTE)

    alone = observed(OLD_PAGE, "flow_sum_5m")
    assert alone.newest_us is not None
    assert alone.drift is not None
    kept = observed(PAGE, "flow_sum_5m", "flow_mean_90s")
    assert kept.newest_us == alone.newest_us
    assert kept.drift is not None
    assert [one.column for one in kept.drift.series] == ["flow_sum_5m"], "it logs no column of the new view alone"
    assert observed(PAGE, "flow_mean_90s").drift is None
    gone = observed(use_case(NEW), "flow_sum_5m")
    assert (gone.newest_us, gone.drift) == (None, None)
