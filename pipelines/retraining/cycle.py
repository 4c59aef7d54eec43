"""One trigger carried to its end: pin, search, train, judge, close; every decision is in the journal.

Each step notes its result in the trigger before the next begins, and the release request and its note are one step.
A cycle killed anywhere and run again goes on after the last note, and asks for one release at most.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.alerts import Alerts
from cluster.clock import Clock, SystemClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from cluster.triggers import Trigger, Triggers, lease
from pipelines.contracts.enforce import events_table
from pipelines.contracts.leases import kept_lease
from pipelines.features.training_table import backfill
from pipelines.retraining import triggers
from pipelines.spec import RetrainPolicy, UseCase
from pipelines.train import train
from pipelines.training.dataset import load_examples, split
from pipelines.training.registry import Registry
from pipelines.training.search import SearchError, search, with_settings

ATTEMPTS = 3
"""A trigger whose cycle has been begun so often without an end is closed as failed."""
_CLAIM_S = 30.0


@dataclass(frozen=True)
class CycleReport:
    """How a cycle ended. ``version`` is the candidate (None: there is none), ``requested`` whether it asked for its
    release, ``resumed`` whether an earlier attempt had begun it. ``search`` and ``gates`` are those of the journal.
    """

    use_case: str
    trigger: int
    kind: str
    status: str
    reason: str
    version: str | None
    gates_passed: bool
    requested: bool
    resumed: bool
    search: dict[str, Any] | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def _nothing(_: str) -> None:
    """The hook of a caller that needs none."""


def run(
    use_case: UseCase,
    *,
    tables: Tables,
    database: Database,
    settings: Settings,
    clock: Clock,
    registry: Registry | None = None,
    after: Callable[[str], None] = _nothing,
) -> CycleReport | None:
    """Claims the pending trigger and carries it to its end; None when there is none or another process has it.

    Ray must be connected. ``after`` is called with the name of each step once its effect is stored. Raises
    ``ValueError`` when the use case has no retraining policy, ``LeaseLost`` when another process has taken over, and
    whatever a step raises: the trigger then stays, and the next call goes on with it.
    """
    policy = use_case.retraining
    if policy is None:
        raise ValueError(f"use case {use_case.name!r} has no retraining policy: its page must say what to search")
    holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    # Leases end in real time, also under a replay clock: they guard against processes that died.
    trigger = Triggers(database).claim(use_case.name, holder, _CLAIM_S, SystemClock().now())
    if trigger is None:
        return None
    with kept_lease(database, lease(use_case.name), holder) as still_held:
        cycle = _Cycle(use_case, policy, tables, database, settings, clock, registry, after, still_held, trigger)
        return cycle.run()


class _Cycle:
    def __init__(
        self,
        use_case: UseCase,
        policy: RetrainPolicy,
        tables: Tables,
        database: Database,
        settings: Settings,
        clock: Clock,
        registry: Registry | None,
        after: Callable[[str], None],
        still_held: Callable[[], None],
        trigger: Trigger,
    ) -> None:
        self._use_case, self._policy = use_case, policy
        self._tables, self._database, self._settings, self._clock = tables, database, settings, clock
        self._triggers = Triggers(database)
        self._given = registry
        self._after, self._still_held = after, still_held
        self._trigger = trigger
        self._alerts = Alerts(database, clock)

    def run(self) -> CycleReport:
        triggers.tell(self._trigger, self._alerts)
        self._after("claimed")
        if "version" not in self._trigger.outcome and self._trigger.attempts > ATTEMPTS:
            return self._close("failed", f"{ATTEMPTS} attempts came to no end")
        # A version that was asked for is there: whatever else was lost, nothing is trained again.
        if "version" not in self._trigger.outcome:
            self._pin()
            try:
                self._search()
            except SearchError as error:
                return self._close("failed", str(error))
            self._train()
        self._judge()
        judged = self._trigger.outcome["judged"]
        if judged["passed"]:
            return self._close("done", f"version {judged['version']} passed its gates and asks for its release")
        return self._close("done", f"version {judged['version']} did not pass its gates")

    def _pin(self) -> None:
        newest = self._tables.version(events_table(self._use_case))
        self._note({"events_version": newest}, None)
        self._after("pinned")

    def _search(self) -> None:
        if "search" in self._trigger.outcome:
            return
        use_case, tables = self._use_case, self._tables
        filled = backfill(
            use_case, tables=tables, settings=self._settings, events_version=self._trigger.outcome["events_version"]
        )
        frame = load_examples(
            use_case,
            tables,
            training_version=filled.table_version,
            events_version=filled.events_version,
            view=filled.view_fingerprint,
            dimensions=filled.dimensions,
        )
        found = search(
            use_case,
            self._policy.search,
            split(frame, use_case.model).train,
            settings=self._settings,
            run_name=f"{use_case.name}-trigger-{self._trigger.id}",
        )
        self._note({"search": found.to_json()}, "search_finished")
        self._after("searched")

    def _train(self) -> None:
        chosen = self._trigger.outcome["search"]["chosen"]
        self._still_held()
        report = train(
            with_settings(self._use_case, chosen),
            tables=self._tables,
            database=self._database,
            settings=self._settings,
            clock=self._clock,
            events_version=self._trigger.outcome["events_version"],
            registry=self._registry(),
            trigger=self._trigger.id,
        )
        self._after("trained")
        # With a release request the version is noted already; a version that failed its gates is noted here.
        self._note({"version": report.version, "requested": report.requested}, None)
        self._after("noted")

    def _judge(self) -> None:
        version = self._trigger.outcome["version"]
        entry = self._registry().version(self._use_case.name, version)
        report = json.loads(entry.tags["gates"])
        judged = {"version": version, "passed": entry.gates_passed, "gates": report["gates"], "test": report["test"]}
        self._note({"judged": judged}, "candidate_judged")
        self._after("judged")

    def _close(self, status: str, reason: str) -> CycleReport:
        outcome = self._trigger.outcome
        self._still_held()
        # First, because a process killed in between comes back here, and an ended trigger is not taken up again.
        if status == "done":
            self._alerts.resolve(triggers.FAILED_ALERT, self._use_case.name, reason)
        else:
            self._alerts.open(triggers.FAILED_ALERT, self._use_case.name, reason)
        self._alerts.resolve(triggers.ALERT, self._use_case.name, reason)
        self._after("resolved")
        self._still_held()
        ended = self._triggers.finish(
            self._trigger.id,
            "done" if status == "done" else "failed",
            {"reason": reason, "version": outcome.get("version"), "requested": bool(outcome.get("requested"))},
            self._clock.now(),
        )
        self._after("closed")
        judged = ended.outcome.get("judged", {})
        return CycleReport(
            use_case=self._use_case.name,
            trigger=ended.id,
            kind=ended.kind,
            status=ended.status,
            reason=reason,
            version=ended.outcome["version"],
            gates_passed=bool(judged.get("passed")),
            requested=ended.outcome["requested"],
            resumed=ended.attempts > 1,
            search=ended.outcome.get("search"),
            gates=judged.get("gates", []),
        )

    def _note(self, notes: dict[str, Any], kind: str | None) -> None:
        self._still_held()
        self._trigger = self._triggers.note(self._trigger.id, notes, kind, self._clock.now())

    def _registry(self) -> Registry:
        # Opened late: MLflow takes seconds to import.
        self._given = self._given or Registry(self._settings)
        return self._given
