"""The demo at reduced size: what each step reports, and how it ends when a step breaks."""

from __future__ import annotations

import json
import os
import time

from cluster import processes, session
from cluster.settings import Settings
from serving.demo.run import _only_run
from serving.demo.steps import SERVED_SHARE
from tests.deployment.conftest import HISTORY_DAYS, REPLAY_DAYS, TRIALS, tidegate


def test_every_step_of_the_main_job_succeeds(demo):
    assert list(demo.steps) == [
        "contract", "features", "train", "gate", "serve", "skew", "release", "sensor", "retrain",
    ]  # fmt: skip
    assert all(step["ok"] for step in demo.steps.values())
    assert "report:" in demo.output


def test_no_row_is_lost_and_each_fault_is_caught_by_its_rule(demo):
    figures = demo.steps["contract"]["figures"]
    assert figures["rows_in"] == figures["accepted"] + figures["quarantined"]
    assert figures["accepted"] == HISTORY_DAYS * 24 * 10
    assert figures["by_rule"] == {
        "inflow.unit": 30,
        "inflow.type": 20,
        "inflow.minimum": 25,
        "key.duplicate": 40,
        "time.future": 15,
        "file.unreadable": 1,
    }


def test_the_model_beats_its_baseline_in_the_gate_and_in_the_replay(demo):
    assert demo.steps["gate"]["figures"]["beats_last_week_upper"] < 1
    served = demo.steps["serve"]["figures"]
    assert served["mae_ratio"] < 1
    assert served["moments"] == round(
        (REPLAY_DAYS * 24 - 2) * SERVED_SHARE
    )  # two hours: daylight saving, local midnight
    assert served["events"] == served["moments"] * 10
    assert served["refused_events"] >= REPLAY_DAYS * SERVED_SHARE
    assert 0.75 < served["interval_coverage"] <= 1


def test_no_served_value_differs_from_its_recomputation(demo):
    assert demo.steps["skew"]["figures"]["checked"] == 500
    assert demo.steps["skew"]["figures"]["mismatched"] == 0


def test_bad_versions_are_withdrawn_by_their_evidence_and_a_better_one_is_promoted(demo):
    figures = demo.steps["release"]["figures"]
    outcomes = {name: figures[f"{name}_outcome"] for name in ("erring", "slow", "nan", "identical", "better")}
    slow = outcomes.pop("slow")  # on a busy machine its calls may be late before enough of them were slow
    assert slow in ("rolled_back:latency", "rolled_back:harm")
    assert outcomes == {
        "erring": "rolled_back:errors",
        "nan": "rolled_back:errors",
        "identical": "aborted",
        "better": "promoted",
    }
    for name in (*outcomes, "slow"):
        assert figures[f"{name}_failed"] == 0
        assert figures[f"{name}_harmed"] <= 25
        assert figures[f"{name}_zero_weight_s"] < 5
    assert figures["better_days"] >= 7
    assert min(figures[f"{name}_shared_batches"] for name in ("identical", "better")) > 0


def test_a_silent_sensor_goes_down_the_ladder_with_wider_intervals_and_an_alert(demo):
    figures = demo.steps["sensor"]["figures"]
    assert figures["answers_fresh"] > 0
    assert figures["answers_held"] > 0
    assert figures["answers_normal"] > 0
    assert min(figures["interval_held_over_fresh"], figures["interval_normal_over_fresh"]) > 1
    assert figures["unknown_refused"] is True
    assert figures["alerts_left_open"] == figures["failed_requests"] == figures["mismatched"] == 0
    assert figures["imputed"] > 0


def test_drift_leads_to_a_search_a_gated_version_and_its_promotion(demo):
    figures = demo.steps["retrain"]["figures"]
    assert figures["trigger"] == "drift"
    assert figures["trials"] == TRIALS
    assert figures["gate_beats_last_week_upper"] < 1
    assert figures["retrained_outcome"] == "promoted"
    assert figures["retrained_failed"] == 0
    assert figures["retrained_days"] >= 7


def test_a_broken_step_is_named_and_nothing_is_left_running(tmp_path):
    """Thirty days of history are fewer than the split needs, so training must fail, loudly."""
    home, log = tmp_path / "home", tmp_path / "output.txt"
    port = session.free_port()
    settings = Settings(home=home, http_port=port)
    run = tidegate(
        "demo", "aqua", "--home", str(home), "--history-days", "30", "--replay-days", "1", port=port, log=log
    )
    marker = None
    while run.poll() is None:
        current = session.current(settings)
        marker = current.environment_marker if current else marker
        time.sleep(0.1)
    assert run.returncode != 0
    assert "the step 'train' failed" in log.read_text()
    steps = json.loads((home / "report.json").read_text())["steps"]
    assert [step["ok"] for step in steps] == [True, True, False]
    assert steps[-1]["step"] == "train"
    assert steps[-1]["error"]
    assert marker is not None
    assert processes.session_pids(marker) == []
    assert processes.listener(port) is None


def test_a_second_demo_in_a_home_where_one_runs_is_refused(tmp_path):
    home, log = tmp_path / "home", tmp_path / "output.txt"
    with _only_run(home):
        run = tidegate("demo", "aqua", "--home", str(home), port=session.free_port(), log=log)
        assert run.wait(timeout=60) != 0
    assert f"another demo (pid {os.getpid()}) runs in {home}" in log.read_text()


def test_a_directory_that_the_demo_did_not_make_is_not_emptied(tmp_path):
    (tmp_path / "precious.txt").write_text("kept")
    run = tidegate("demo", "aqua", "--home", str(tmp_path), port=session.free_port(), log=tmp_path / "output.txt")
    assert run.wait(timeout=60) != 0
    assert (tmp_path / "precious.txt").read_text() == "kept"
