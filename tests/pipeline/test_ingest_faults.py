"""Rows in = accepted + quarantined, and nothing twice, whichever process of a load is killed where."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from cluster.database import OtherLoad
from cluster.schema import LEASES
from cluster.tables import Tables
from pipelines.contracts import enforce, leases
from pipelines.contracts.datasets import ReconciliationError, Tally, reconcile
from tests.pipeline.killed_driver import killed_once
from tests.pipeline.loads import USE_CASE, FixedClock, everything, readings, world

ROOT = Path(__file__).parents[2]


def _file(path: Path, bad: int) -> str:
    """100 rows: ``bad`` too warm, one in the future of the first attempt, one key told twice."""
    table = readings(range(100)).set_column(3, "temperature", pa.array([99.0] * bad + [1.0] * (100 - bad)))
    times = table.column("time").to_pylist()
    times[98] = FixedClock().moment + timedelta(hours=1)
    times[99] = times[89]
    table = table.set_column(1, "time", pa.array(times, table.schema.field("time").type))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("stage", ["stage", "settle"])
def test_a_worker_killed_after_its_work_changes_nothing(
    ray_cluster: None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    source = _file(tmp_path / "in" / "a.parquet", bad=2)
    expected = world(home / "expected")
    expected.load([source], load_id="one")
    flag = tmp_path / "killed"
    monkeypatch.setattr(enforce, stage, partial(killed_once, str(flag), stage))
    here = world(home / "here")
    report = here.load([source], load_id="one", engine="ray")
    assert flag.exists()
    assert (report.rows_in, report.accepted, report.quarantined) == (100, 96, 4)
    assert _rows(here.tables) == _rows(expected.tables)


@pytest.mark.parametrize("point", ["staged", "settled", "between", "committed"])
def test_a_killed_driver_run_again_completes_the_load_as_it_began(home: Path, tmp_path: Path, point: str) -> None:
    source = _file(tmp_path / "in" / "a.parquet", bad=2)
    expected = world(home / "expected")
    expected.load([source], load_id="one")
    here = world(home / "here")
    _killed(here.settings.home, source, point)
    later = replace(here, clock=FixedClock(datetime.fromisoformat("2023-02-01T00:00:00Z")))
    report = later.load([source], load_id="one")
    assert (report.status, report.rows_in, report.accepted, report.quarantined) == ("published", 100, 96, 4)
    assert report.by_rule == {"key.duplicate": 1, "temperature.maximum": 2, "time.future": 1}
    assert _rows(here.tables) == _rows(expected.tables)
    if point in ("between", "committed"):  # the events were committed: none of them is written again
        written = (home / "here" / "tables" / "aqua" / "events").rglob("part-*.parquet")
        assert len(list(written)) == len(here.tables.files(enforce.events_table(USE_CASE)))
    assert later.load([source], load_id="one").status == "already_published"


@pytest.mark.parametrize("point", ["undecided", "committed"])
def test_a_killed_driver_of_a_refused_load_leaves_it_refused(home: Path, tmp_path: Path, point: str) -> None:
    source = _file(tmp_path / "in" / "a.parquet", bad=20)
    here = world(home)
    _killed(here.settings.home, source, point)
    tolerant = USE_CASE.contract.model_copy(update={"max_rejected_share": 1.0})
    with pytest.raises(OtherLoad, match="'one' was begun with other files or under another contract"):
        here.load([source], USE_CASE.model_copy(update={"contract": tolerant}), load_id="one")
    report = here.load([source], load_id="one")
    assert (report.status, report.accepted, report.quarantined) == ("refused", 0, 100)
    accepted, quarantine = everything(here.tables)
    assert (accepted.num_rows, quarantine.num_rows) == (0, 100)
    assert report.by_rule["load.refused"] == 78


def test_a_finished_load_leaves_no_staging_behind(home: Path, tmp_path: Path) -> None:
    source = _file(tmp_path / "in" / "a.parquet", bad=2)
    here = world(home)
    _killed(here.settings.home, source, "settled")
    assert list((home / "tables" / "_staging").rglob("*.arrow"))
    here.load([source], load_id="one")
    assert not list((home / "tables" / "_staging").rglob("*.arrow"))


def test_nothing_is_committed_when_rows_do_not_add_up(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _file(tmp_path / "in" / "a.parquet", bad=2)
    here = world(home)
    settle = enforce.settle

    def losing(*arguments, **options):
        settled = settle(*arguments, **options)
        return replace(settled, accepted={order: count - 1 for order, count in settled.accepted.items()})

    monkeypatch.setattr(enforce, "settle", losing)
    with pytest.raises(ReconciliationError, match=r"'a\.parquet': 100 rows came in"):
        here.load([source])
    accepted, quarantine = everything(here.tables)
    assert (accepted.num_rows, quarantine.num_rows) == (0, 0)


def test_reconciliation_looks_at_each_source() -> None:
    balanced = [("a", Tally(3, 2, 0)), ("a", Tally(0, 0, 1)), ("b", Tally(1, 1, 0))]
    assert reconcile(balanced, [("x", 1), ("x", 2)]).total == Tally(4, 3, 1)
    with pytest.raises(ReconciliationError, match="'a'"):  # although the totals agree
        reconcile([("a", Tally(2, 1, 0)), ("b", Tally(1, 2, 0))], [])


def test_a_load_waits_for_the_drain_and_says_for_how_long(home: Path) -> None:
    here = world(home)
    assert leases.try_events(here.database, USE_CASE, "a drain")
    with (
        pytest.raises(TimeoutError, match="others held the lease 'drain/aqua' for 0 s"),
        leases.events_lease(here.database, USE_CASE, "me", patience_s=0.2),
    ):
        pass


def test_a_lease_that_another_took_lets_nothing_be_committed(home: Path) -> None:
    here = world(home)
    with leases.events_lease(here.database, USE_CASE, "me") as still_held:
        still_held()
        here.database.release_lease(f"drain/{USE_CASE.name}", "me")
        assert leases.try_events(here.database, USE_CASE, "other")
        with pytest.raises(leases.LeaseLost, match="run it again"):
            still_held()


@pytest.mark.parametrize("point", ["settled", "checked"])
def test_a_load_that_slept_through_its_lease_publishes_nothing_that_another_did(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Another load has the same events meanwhile, from the lease's end on, and gives the lease back."""
    source = _file(tmp_path / "in" / "a.parquet", bad=2)
    here = world(home)
    slept = []

    def other_comes() -> None:
        if not slept:
            slept.append(None)
            here.database.release_lease(f"drain/{USE_CASE.name}", _holder(here))
            assert here.load([source], load_id="other").accepted == 96

    settle, commit = enforce.settle, Tables.commit

    def settled(*arguments, **options):
        found = settle(*arguments, **options)
        other_comes()
        return found

    def committed(self, name, *arguments, **options):
        if name.endswith("/events"):
            other_comes()
        return commit(self, name, *arguments, **options)

    if point == "settled":
        monkeypatch.setattr(enforce, "settle", settled)
    else:
        monkeypatch.setattr(Tables, "commit", committed)
    with pytest.raises(leases.LeaseLost):
        here.load([source], load_id="one")
    report = here.load([source], load_id="one")
    assert (report.rows_in, report.accepted) == (100, 0)
    assert everything(here.tables)[0].num_rows == 96


def test_a_table_that_moved_under_a_load_is_looked_at_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compaction moves it, which needs no lease."""
    source = _file(tmp_path / "in" / "a.parquet", bad=2)
    here, moved, commit = world(home), [], Tables.commit

    def committed(self, name, *arguments, **options):
        if name.endswith("/events") and not moved:
            moved.append(commit(self, name, [], "a compaction").version)
        return commit(self, name, *arguments, **options)

    monkeypatch.setattr(Tables, "commit", committed)
    report = here.load([source], load_id="one")
    assert (report.accepted, report.quarantined, report.events_version) == (96, 4, moved[0] + 1)
    assert [table.num_rows for table in everything(here.tables)] == [96, 4]


def _holder(here) -> str:
    with here.database.read() as connection:
        return connection.execute(select(LEASES.c.holder).where(LEASES.c.name == f"drain/{USE_CASE.name}")).scalar()


def _killed(home: Path, source: str, point: str) -> None:
    command = [sys.executable, "-m", "tests.pipeline.killed_driver", str(home), source, point]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert ended.returncode == -9, ended.stderr.decode()


def _rows(tables) -> tuple[list, list]:
    accepted, quarantine = everything(tables)
    return (
        accepted.sort_by([("_event_id", "ascending")]).to_pylist(),
        quarantine.sort_by([("position", "ascending")]).to_pylist(),
    )
