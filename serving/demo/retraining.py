"""The retraining step of the demo: one district's demand grows, drift opens a trigger, and a new version goes all the
way from the search to its rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.alerts import Alerts
from cluster.database import Database
from pipelines.retrain import RetrainReport
from pipelines.retraining.cycle import CycleReport
from pipelines.retraining.triggers import ALERT
from pipelines.spec import DriftRule, RetrainPolicy, UseCase
from serving.demo.release import Releases
from serving.demo.replay import Replay
from serving.demo.report import expect, known
from serving.rollout.machine import Kind

GROWTH = 1.6
"""By how much the district's readings are multiplied: a large new consumer."""
_STEPS = ["trigger_opened", "search_finished", "candidate_judged", "trigger_closed"]


def retrain_on_drift(
    use_case: UseCase,
    replay: Replay,
    releases: Releases,
    retrain: Callable[[], RetrainReport],
    database: Database,
    alerts: Alerts,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Lets demand grow until the page's drift window is full, retrains, and follows the rollout to its end."""
    policy: RetrainPolicy = known(use_case.retraining, "the page has no retraining policy")
    drift: DriftRule = known(policy.drift, "the page watches no drift")
    district = replay.entities()[-1]
    replay.factors = {district: GROWTH}
    replay.begin()
    replay.run((drift.days + 1) * 24, say)
    expect(replay.done.failed == 0, f"{replay.done.failed} requests failed")
    before = len(database.journal(use_case.name))
    report = retrain()
    cycle: CycleReport = known(report.cycle, f"retraining was not triggered: {report.message}")
    say(f"    {report.message}; {cycle.reason}")
    expect(cycle.requested and cycle.version is not None, f"no release was asked for: {cycle.reason}")
    entries = database.journal(use_case.name, after=before)
    told = [entry.kind for entry in entries]
    expect(told == _STEPS, f"the journal holds {told}, not {_STEPS}")
    opened = entries[0].payload["evidence"]
    named = [one["entity"] for one in opened.get("largest", [])]
    expect(district in named, f"demand grew in {district}, and the trigger's evidence names {named}")
    expect(not any(a.name == ALERT for a in alerts.open_alerts()), f"the alert {ALERT} is still open")
    done = releases.drive(str(cycle.version), most=replay.left)
    asked_by = releases.started(str(cycle.version))["request"].get("trigger")
    expect(asked_by == cycle.trigger, f"the rollout was asked for by trigger {asked_by}, not {cycle.trigger}")
    expect(done.outcome == Kind.PROMOTED, f"the retrained version ended as {done.outcome}: {done.ended.payload}")
    trials = (cycle.search or {}).get("trials", [])
    return {
        "trigger": cycle.kind,
        "trials": len(trials),
        "chosen": str((cycle.search or {}).get("chosen")),
        **{f"gate_{gate['name']}_upper": gate["upper"] for gate in cycle.gates},
        **done.figures("retrained"),
        "retrained_days": done.days,
    }
