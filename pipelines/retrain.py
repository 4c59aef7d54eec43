"""The retraining job: looks at decay, drift and age, opens a trigger when one is due, and carries it to its end.

``python -m pipelines.retrain aqua [--check | --manual REASON]`` prints its report as one line of JSON, the last of its
output. It exits with 0 when a release was requested (with ``--check``: when training again is due), 1 when the
candidate did not pass or the cycle failed, 3 when there is nothing to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.clock import Clock, open_clock
from cluster.database import Database
from cluster.session import connect
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.contracts.events import INSTANT
from pipelines.features.offline import TIME
from pipelines.features.served import OUTCOME_SCHEMA, SERVED_SCHEMA, outcomes_table, predictions_table
from pipelines.features.training_table import training_rows
from pipelines.features.windows import pages
from pipelines.monitoring.drift import Drift, Rows, judge_drift
from pipelines.monitoring.performance import Decay, Reference, champion_answers, judge_decay
from pipelines.retraining import triggers
from pipelines.retraining.cycle import CycleReport, run
from pipelines.retraining.triggers import Observed, Seen
from pipelines.spec import DecayRule, DriftRule, UseCase
from pipelines.spec.base import DAY_US, microseconds
from pipelines.training.dataset import load_examples
from pipelines.training.registry import ModelVersion, Registry

DUE, NOT_PASSED, NOTHING = 0, 1, 3
"""Exit codes; see above."""


@dataclass(frozen=True)
class RetrainReport:
    """What the job saw and did. ``champion`` is None before the first release; ``seen`` is empty when a trigger was
    pending already, so that nothing was looked at. ``message`` says in words why there is or is not a cycle.
    """

    use_case: str
    champion: str | None
    message: str
    seen: tuple[Seen, ...] = ()
    trigger: int | None = None
    cycle: CycleReport | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def champion_of(use_case: UseCase, database: Database) -> str | None:
    """The version that answers now, by the routing table; None before the first."""
    routing = database.routing(use_case.name)
    champion = None if routing is None else routing.document.get("champion")
    return None if champion is None else str(champion)


def observe(use_case: UseCase, champion: str, *, tables: Tables, registry: Registry, now_us: int) -> Observed:
    """Everything that the policy's conditions look at, from the tables as they are now.

    Raises ``ValueError`` when the use case has no retraining policy and ``RegistryError`` for an unknown champion.
    """
    policy = use_case.retraining
    if policy is None:
        raise ValueError(f"use case {use_case.name!r} has no retraining policy: nothing says when to train it again")
    entry = registry.version(use_case.name, champion)
    snapshot = json.loads(entry.tags["snapshot"])
    # The table version belongs to the view that made it; None for a view that is no longer on the page.
    page = pages(use_case).get(snapshot["view"])
    newest_us: int | None = None
    if policy.max_age is not None and page is not None:
        dimensions = snapshot.get("dimensions", {})  # versions made before there were any have none
        made = training_rows(page, tables, snapshot["events_version"], dimensions=dimensions, columns=[TIME])
        newest_us = pc.max(pc.cast(made.column(TIME), pa.int64())).as_py()
    rule = None if policy.drift is None or page is None else _watched(use_case, page, policy.drift)
    return Observed(
        version=champion,
        now_us=now_us,
        newest_us=newest_us,
        decay=None if policy.decay is None else _decay(use_case, policy.decay, entry, tables, now_us),
        drift=None if rule is None or page is None else _drift(page, rule, snapshot, tables, now_us),
    )


def retrain(
    use_case: UseCase,
    *,
    tables: Tables,
    database: Database,
    settings: Settings,
    clock: Clock,
    check: bool = False,
    manual: str | None = None,
    registry: Registry | None = None,
) -> RetrainReport:
    """Looks, opens, and runs the cycle; a trigger that is pending already is taken up without another look.

    With ``check`` nothing is opened and nothing runs, and Ray need not be connected. ``manual`` is the reason of a
    person who asks for a new training.
    """
    policy = use_case.retraining
    if policy is None:
        raise ValueError(f"use case {use_case.name!r} has no retraining policy: nothing says when to train it again")
    champion = champion_of(use_case, database)
    held = triggers.pending(database, use_case.name)
    seen: tuple[Seen, ...] = ()
    if held is not None:
        message = f"trigger {held.id} ({held.kind}) is {held.status}"
    elif manual is not None and not check:
        held = triggers.open_by_hand(use_case, manual, database=database, clock=clock)
        message = f"asked for by hand: {manual}" if held else "another process has just opened a trigger"
    elif champion is None:
        message = "nothing is due: there is no champion yet, whose answers could be looked at"
    else:
        registry = registry or Registry(settings)
        observed = observe(use_case, champion, tables=tables, registry=registry, now_us=clock.now())
        seen = triggers.look(triggers.conditions(policy), observed)
        due = next((one for one in seen if one.due), None)
        if due is None:
            message = "nothing is due: " + "; ".join(f"{one.kind}: {one.reason}" for one in seen)
        elif check:
            return RetrainReport(use_case.name, champion, f"{due.kind} is due: {due.reason}", seen)
        else:
            held = triggers.open_due(use_case, policy, seen, database=database, clock=clock)
            why = "a release is under way" if database.open_releases(use_case.name) else "the cool-down lasts"
            message = f"{due.kind} is due" + (f": {due.reason}" if held else f", and nothing is opened while {why}")
    if held is None or check:
        return RetrainReport(use_case.name, champion, message, seen, held.id if held else None)
    cycle = run(use_case, tables=tables, database=database, settings=settings, clock=clock, registry=registry)
    if cycle is None:
        message = f"trigger {held.id} is in another process's hands; if that has died, try again in half a minute"
    return RetrainReport(use_case.name, champion, message, seen, held.id, cycle)


def exit_code(report: RetrainReport, check: bool = False) -> int:
    """The job's exit code for a report; see the module."""
    if report.cycle is not None:
        return DUE if report.cycle.requested else NOT_PASSED
    due = check and (report.trigger is not None or any(one.due for one in report.seen))
    return DUE if due else NOTHING


def _decay(use_case: UseCase, rule: DecayRule, entry: ModelVersion, tables: Tables, now_us: int) -> Decay:
    horizon = microseconds(use_case.model.target.horizon)
    since = now_us - horizon - microseconds(rule.grace) - (rule.days + 2) * DAY_US
    predictions = _served(use_case, tables, since, now_us)
    name = outcomes_table(use_case)
    known = pc.field("at") >= pa.scalar(since, pa.int64()).cast(INSTANT)
    outcomes = tables.read(name, filter=known) if tables.exists(name) else OUTCOME_SCHEMA.empty_table()
    report = json.loads(entry.tags["gates"])
    missing = float("nan")
    by_entity = {entity: found[rule.metric] for entity, found in report["by_entity"].items()}
    reference = Reference(
        everywhere=missing if report["test"][rule.metric] is None else report["test"][rule.metric],
        by_entity={entity: value for entity, value in by_entity.items() if value is not None},
    )
    return judge_decay(
        rule,
        champion_answers(predictions, outcomes, now_us),
        version=entry.version,
        reference=reference,
        horizon_us=horizon,
        now_us=now_us,
        seed=use_case.model.seed,
    )


def _watched(use_case: UseCase, page: UseCase, rule: DriftRule) -> DriftRule | None:
    """The rule as far as answers from the view of ``page`` can be held to it; None for not at all.

    Those of a kept view log numeric columns that the page does not name, so only the stored ones are watched.
    """
    if page is use_case:
        return rule
    stored = tuple(name for name in rule.columns if name in page.view.stored)
    return rule.model_copy(update={"columns": stored}) if stored else None


def _drift(use_case: UseCase, rule: DriftRule, snapshot: dict[str, Any], tables: Tables, now_us: int) -> Drift:
    """Drift of a champion that answers from the view of ``use_case``."""
    frame = load_examples(
        use_case,
        tables,
        training_version=snapshot["training_version"],
        events_version=snapshot["events_version"],
        view=snapshot["view"],
        dimensions=snapshot.get("dimensions", {}),
    )
    reference = Rows(frame.time_us, frame.entity, {name: frame.columns[name] for name in rule.columns})
    served = _served(use_case, tables, now_us - rule.days * DAY_US, now_us)
    mine = served.filter(
        pc.and_(pc.equal(served.column("variant"), "champion"), pc.equal(served.column("view"), snapshot["view"]))
    )
    calendar = use_case.view.calendar
    return judge_drift(
        rule, reference, served_rows(use_case, rule, mine), now_us=now_us, zone=calendar.zone if calendar else None
    )


def served_rows(use_case: UseCase, rule: DriftRule, predictions: pa.Table) -> Rows:
    """The watched columns as they were served: ``predictions`` are logged answers of the view of ``use_case``.

    Where numeric columns are watched, answers of another model definition, which has others, are left out.
    """
    stored, numeric = use_case.view.stored, use_case.model.numeric
    fits = pc.equal(pc.list_value_length(predictions.column("stored")), len(stored))
    if not set(rule.columns) <= set(stored):
        fits = pc.and_(fits, pc.equal(pc.list_value_length(predictions.column("numeric")), len(numeric)))
    mine = predictions.filter(pc.fill_null(fits, False))
    columns = {}
    for name in rule.columns:
        kept, place = ("stored", stored.index(name)) if name in stored else ("numeric", numeric.index(name))
        values = pc.list_element(mine.column(kept), place)
        columns[name] = pc.fill_null(values, np.nan).to_numpy()
    return Rows(
        pc.cast(mine.column("_time"), pa.int64()).to_numpy(),
        np.array(mine.column("entity").to_pylist(), dtype=object),
        columns,
    )


def _served(use_case: UseCase, tables: Tables, since_us: int, now_us: int) -> pa.Table:
    name = predictions_table(use_case)
    if not tables.exists(name):
        return SERVED_SCHEMA.empty_table()
    since, now = (pa.scalar(moment, pa.int64()).cast(INSTANT) for moment in (since_us, now_us))
    return tables.read(name, filter=(pc.field("_time") >= since) & (pc.field("_time") <= now))


def main(arguments: Sequence[str] | None = None) -> int:
    """The job's entry point; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.retrain", description=__doc__)
    parser.add_argument("use_case", choices=usecases.names())
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="look and say what is due; open and run nothing")
    only.add_argument("--manual", metavar="REASON", help="train again now, for this reason")
    chosen = parser.parse_args(arguments)
    settings = Settings.from_environment()
    if not chosen.check:
        connect(settings)
    database = Database(settings.database_url)
    database.create()
    report = retrain(
        usecases.load(chosen.use_case),
        tables=Tables(settings.tables_url, settings.storage_options),
        database=database,
        settings=settings,
        clock=open_clock(settings),
        check=chosen.check,
        manual=chosen.manual,
    )
    database.close()
    sys.stdout.write(f"{report.cycle.reason if report.cycle else report.message}\n{json.dumps(report.to_json())}\n")
    return exit_code(report, chosen.check)


if __name__ == "__main__":
    sys.exit(main())
