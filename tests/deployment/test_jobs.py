"""Jobs submitted to a running cluster as a user submits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster import session
from pipelines import samples, usecases

ROOT = Path(__file__).parent.parent.parent
RAY = Path(sys.executable).with_name("ray")


def submit(demo, *module: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TIDEGATE_"))}
    done = subprocess.run(
        [str(RAY), "job", "submit", "--working-dir", ".", "--", "python", "-m", *module],
        cwd=ROOT,
        env={**environment, **session.job_environment(demo.settings)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def report(output: str) -> dict[str, object]:
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))


@pytest.mark.timeout(280)
def test_the_second_use_case_is_ingested_and_trained_by_submitted_jobs(demo, tmp_path):
    rows = samples.rows(usecases.load("prop"))
    pq.write_table(rows.slice(rows.num_rows - 12_000), tmp_path / "sales.parquet")
    loaded = report(submit(demo, "pipelines.ingest", "prop", str(tmp_path / "sales.parquet")))
    assert (loaded["status"], loaded["accepted"]) == ("published", 12_000)
    trained = report(submit(demo, "pipelines.train", "prop"))
    assert trained["use_case"] == "prop"
    assert trained["version"] == "1"
    assert trained["gates_passed"] is True
    assert trained["requested"] is True
