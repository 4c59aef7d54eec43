"""A load whose disk takes no more, wherever it is by then: nothing is half there, and the same load ends it later."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy.exc import OperationalError

from cluster.database import Database
from cluster.tables import Tables
from pipelines.contracts import enforce
from tests.pipeline.loads import World, everything, readings, world

ROWS, BAD = 2_000, 50


@pytest.fixture
def source(tmp_path: Path) -> str:
    temperature = pa.array([99.0 if row % (ROWS // BAD) == 0 else 1.0 for row in range(ROWS)])
    pq.write_table(readings(range(ROWS)).set_column(3, "temperature", temperature), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


@contextmanager
def full() -> Iterator[None]:
    """No file of this process may grow any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


POINTS: dict[str, tuple[Any, str, int]] = {
    "tables": (Tables, "ensure", 1),
    "staging": (enforce, "stage", 1),
    "settling": (enforce, "settle", 1),
    "events": (Tables, "commit", 1),
    "quarantine": (Tables, "commit", 2),
    "ending": (Database, "finish_load", 1),
}


def _fills_up(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, which: int) -> None:
    """The disk is full while the call of that number runs, and has room again when it has failed."""
    function, calls = getattr(owner, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) != which:
            return function(*arguments, **options)
        with full():
            return function(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("point", POINTS)
def test_a_load_that_finds_no_room_commits_all_or_nothing_and_is_ended_when_there_is_some(
    home: Path, source: str, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    expected, here = world(home / "expected"), world(home / "here")
    expected.load([source], load_id="one")
    with monkeypatch.context() as broken:
        _fills_up(broken, *POINTS[point])
        with pytest.raises((OSError, OperationalError)):
            here.load([source], load_id="one")
    if point in ("staging", "settling", "events"):
        assert [table.num_rows for table in everything(here.tables)] == [0, 0]
    report = here.load([source], load_id="one")
    assert (report.status, report.rows_in, report.accepted, report.quarantined) == ("published", ROWS, ROWS - BAD, BAD)
    assert _rows(here) == _rows(expected)
    assert here.load([source], load_id="one").status == "already_published"


def _rows(here: World) -> list[list[dict[str, Any]]]:
    return [sorted(table.to_pylist(), key=str) for table in everything(here.tables)]


def test_the_command_says_that_there_is_no_room_and_what_to_do(home: Path, source: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f 0; exec "{sys.executable}" -m pipelines.ingest aqua "{source}"'],
        env={"TIDEGATE_HOME": str(home), "PATH": "/usr/bin:/bin", "NUMBA_CACHE_DIR": str(home / "numba")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("tidegate: the disk takes no more (")
    assert "run it again" in done.stderr
