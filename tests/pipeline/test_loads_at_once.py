"""Several processes that load at the same time, the same files and others with the same events: nothing comes twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cluster.database import Database
from pipelines.contracts import events
from tests.pipeline.loads import World, everything, readings, world
from tests.services import postgresql

ROWS, BAD, SHARED, LOADS = 1_000, 10, 15, 3


@pytest.fixture(params=["sqlite", "postgresql"])
def here(request, home: Path) -> Iterator[World]:
    made = world(home)
    if request.param == "sqlite":
        yield made
        return
    with postgresql() as url:
        settings = made.settings.model_copy(update={"database_url": url})
        yield World(settings, made.tables, Database(url), made.clock)


def _file(path: Path, numbers: range) -> str:
    """Readings of which every hundredth is too warm."""
    warm = pa.array([99.0 if number % (ROWS // BAD) == 0 else 1.0 for number in numbers])
    pq.write_table(readings(numbers).set_column(3, "temperature", warm), path)
    return str(path)


def _all_at_once(here: World, loads: list[list[str]]) -> list[dict[str, Any]]:
    """The reports of ``python -m pipelines.ingest aqua FILE …``, one process each, begun together."""
    environment = {"PATH": "/usr/bin:/bin", **here.settings.environment()}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "pipelines.ingest", "aqua", *files, "--engine", "arrow"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for files in loads
    ]
    said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * len(loads), "".join(error[-3000:] for _, error in said)
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


def test_the_same_load_in_three_processes_is_one(here: World, tmp_path: Path) -> None:
    source = _file(tmp_path / "a.parquet", range(ROWS))
    reports = _all_at_once(here, [[source]] * LOADS)
    assert len({report["load_id"] for report in reports}) == 1
    for report in reports:
        assert report["status"] in ("published", "already_published")
        assert (report["rows_in"], report["accepted"], report["quarantined"]) == (ROWS, ROWS - BAD, BAD)
    accepted, quarantine = everything(here.tables)
    assert (accepted.num_rows, quarantine.num_rows) == (ROWS - BAD, BAD)
    assert len(pc.unique(accepted.column(events.EVENT_ID))) == ROWS - BAD


def test_loads_that_have_events_in_common_publish_each_of_them_once(here: World, tmp_path: Path) -> None:
    """Each of three files has the last events of the one before it, too."""
    spans = [range(place * (ROWS - SHARED), place * (ROWS - SHARED) + ROWS) for place in range(LOADS)]
    files = [[_file(tmp_path / f"{place}.parquet", span)] for place, span in enumerate(spans)]
    reports = _all_at_once(here, files)
    for report in reports:
        assert report["rows_in"] == ROWS == report["accepted"] + report["quarantined"]
    accepted, quarantine = everything(here.tables)
    every = {number for span in spans for number in span}
    good = {number for number in every if number % (ROWS // BAD)}
    assert accepted.num_rows == len(good) == sum(report["accepted"] for report in reports)
    assert len(pc.unique(accepted.column(events.EVENT_ID))) == len(good)
    assert quarantine.num_rows == LOADS * ROWS - len(good)
    twice = sum(report["by_rule"]["key.duplicate"] for report in reports if "key.duplicate" in report["by_rule"])
    told_twice = [number for span, after in pairwise(spans) for number in set(span) & set(after)]
    assert twice == sum(number in good for number in told_twice)
