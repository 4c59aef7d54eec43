"""Triggers: opened once, on evidence, with a journal entry and an alert; claimed by lease; closed once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from cluster.alerts import Alerts
from cluster.database import Database
from cluster.triggers import Triggers
from pipelines import usecases
from pipelines.monitoring.drift import Drift, SeriesDrift
from pipelines.monitoring.performance import Decay
from pipelines.retraining import triggers
from pipelines.retraining.triggers import Aged, Decayed, Drifted, Observed
from pipelines.spec import DecayRule, DriftRule, RetrainPolicy, UseCase

DAY = 86_400_000_000
SECOND = 1_000_000
POLICY = RetrainPolicy(cool_down=timedelta(days=7))
DECAY = Decay("decayed", "1.5 times", "3", "mae", 1.5, 1.4, 1.6, 1.2, 1.5, 1.0, 400, 336, 0, 14, 0, 13)
SERIES = SeriesDrift("x", "a", "drifted", "+3", 3.0, 0.5, 1e-6, 0.0, 300)


class Hand:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.time = 100 * DAY

    def now(self) -> int:
        return self.time


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    yield database
    database.close()


@pytest.fixture
def clock() -> Hand:
    return Hand()


def aqua() -> UseCase:
    return usecases.load("aqua")


def observed(**changes: object) -> Observed:
    return replace(Observed("3", 100 * DAY), **changes)


def test_decay_is_due_on_its_verdict_and_never_on_silence() -> None:
    seen = Decayed().look(observed(decay=DECAY))
    assert (seen.due, seen.kind, seen.evidence["ratio"], seen.evidence["version"]) == (True, "decay", 1.5, "3")
    assert not Decayed().look(observed(decay=replace(DECAY, finding="holds"))).due
    silent = Decayed().look(observed(decay=replace(DECAY, finding="inconclusive", ratio=math.nan)))
    assert not silent.due
    assert silent.reason.startswith("inconclusive")
    assert silent.evidence["ratio"] is None
    assert not Decayed().look(observed()).due


def test_one_drifted_series_of_fifty_is_due_and_named() -> None:
    quiet = [replace(SERIES, entity=f"b{i}", finding="holds", effect=0.1) for i in range(49)]
    seen = Drifted().look(observed(drift=Drift("drifted", (*quiet, SERIES))))
    assert seen.due
    assert "1 of 50 series drifted: x of a" in seen.reason
    assert seen.evidence["largest"][0]["effect"] == 3.0
    assert not Drifted().look(observed(drift=Drift("holds", tuple(quiet)))).due
    blind = Drift("inconclusive", (replace(SERIES, finding="inconclusive", effect=math.nan),))
    assert Drifted().look(observed(drift=blind)).reason.startswith("inconclusive")
    assert not Drifted().look(observed()).due


def test_age_is_that_of_the_newest_example() -> None:
    assert Aged(timedelta(days=9)).look(observed(newest_us=90 * DAY)).due
    assert not Aged(timedelta(days=10)).look(observed(newest_us=90 * DAY)).due
    assert not Aged(timedelta(days=10)).look(observed(newest_us=None)).due


def test_a_policy_watches_what_it_names() -> None:
    policy = RetrainPolicy(drift=DriftRule(columns=("x",)), max_age=timedelta(days=3))
    assert [type(one) for one in triggers.conditions(policy)] == [Decayed, Drifted, Aged]
    assert triggers.conditions(RetrainPolicy(decay=None)) == ()
    with pytest.raises(ValueError, match="cannot hold the 20"):
        DecayRule(days=14, min_days=20)
    with pytest.raises(ValueError, match="drift watches"):
        UseCase(**{**{n: getattr(aqua(), n) for n in UseCase.model_fields}, "retraining": policy})


def test_what_is_due_opens_one_trigger_with_journal_and_alert(database: Database, clock: Hand) -> None:
    seen = triggers.look((Decayed(), Drifted()), observed(decay=DECAY))
    made = triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock)
    assert made is not None
    assert (made.kind, made.status, made.evidence["ratio"], made.opened_us) == ("decay", "open", 1.5, clock.time)
    assert triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock) is None
    assert triggers.open_by_hand(aqua(), "now", database=database, clock=clock) is None
    (entry,) = database.journal("aqua")
    assert (entry.kind, entry.payload["trigger"], entry.payload["trigger_kind"]) == ("trigger_opened", made.id, "decay")
    assert entry.payload["evidence"] == made.evidence
    (alert,) = Alerts(database, clock).open_alerts()
    assert (alert.name, alert.subject, alert.repeats) == ("retraining_triggered", "aqua", 0)
    assert "decay: 1.5 times" in alert.detail
    assert triggers.pending(database, "aqua") == made
    assert triggers.pending(database, "prop") is None


def test_nothing_due_opens_nothing(database: Database, clock: Hand) -> None:
    seen = triggers.look((Decayed(), Drifted()), observed())
    assert triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock) is None
    assert database.journal("aqua") == []
    assert Alerts(database, clock).open_alerts() == []


def test_the_cool_down_is_waited_out_except_by_a_person(database: Database, clock: Hand) -> None:
    seen = triggers.look((Decayed(),), observed(decay=DECAY))
    first = triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock)
    assert first is not None
    Triggers(database).finish(first.id, "done", {}, clock.now())
    clock.time += 7 * DAY - 1
    assert triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock) is None
    by_hand = triggers.open_by_hand(aqua(), "new meters", database=database, clock=clock)
    assert by_hand is not None
    assert by_hand.evidence == {"reason": "new meters"}
    Triggers(database).finish(by_hand.id, "failed", {}, clock.now())
    clock.time += 7 * DAY
    assert triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock) is not None
    with pytest.raises(ValueError, match="needs a reason"):
        triggers.open_by_hand(aqua(), " ", database=database, clock=clock)


def test_nothing_is_opened_while_a_release_is_under_way(database: Database, clock: Hand) -> None:
    seen = triggers.look((Decayed(),), observed(decay=DECAY))
    database.request_release("aqua", "4", {}, 1)
    assert database.open_releases("aqua") == ["4"]
    assert triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock) is None
    database.finish_release("aqua", "4", "rolled back")
    assert triggers.open_due(aqua(), POLICY, seen, database=database, clock=clock) is not None


def test_a_trigger_is_claimed_by_one_and_taken_up_when_that_one_is_gone(database: Database) -> None:
    assert Triggers(database).claim("aqua", "a", 10, 0) is None
    made = Triggers(database).open("aqua", "decay", {}, 5)
    assert made is not None
    claimed = Triggers(database).claim("aqua", "a", 10, 0)
    assert claimed is not None
    assert (claimed.id, claimed.status, claimed.attempts) == (made.id, "running", 1)
    assert Triggers(database).claim("aqua", "b", 10, 10 * SECOND - 1) is None
    again = Triggers(database).claim("aqua", "a", 10, 5 * SECOND)  # renewed until 15
    assert again is not None
    assert again.attempts == 1
    assert Triggers(database).claim("aqua", "b", 10, 12 * SECOND) is None
    taken = Triggers(database).claim("aqua", "b", 10, 15 * SECOND)
    assert taken is not None
    assert taken.attempts == 2
    Triggers(database).finish(made.id, "done", {"reason": "x"}, 20)
    assert Triggers(database).claim("aqua", "b", 10, 16 * SECOND) is None
    assert Triggers(database).open("aqua", "drift", {}, 30) is not None


def test_notes_and_the_end_are_written_once(database: Database) -> None:
    made = Triggers(database).open("aqua", "decay", {}, 5)
    assert made is not None
    assert Triggers(database).note(made.id, {"search": 1}, "search_finished", 6).outcome == {"search": 1}
    assert Triggers(database).note(made.id, {"search": 2}, "search_finished", 7).outcome == {"search": 1}
    ended = Triggers(database).finish(made.id, "done", {"version": "4"}, 8)
    assert Triggers(database).finish(made.id, "failed", {"version": "5"}, 9) == ended
    assert (ended.status, ended.outcome) == ("done", {"search": 1, "version": "4"})
    assert [(entry.kind, entry.at_us) for entry in database.journal("aqua")] == [
        ("trigger_opened", 5),
        ("search_finished", 6),
        ("trigger_closed", 8),
    ]
    with pytest.raises(KeyError, match="no trigger 99"):
        Triggers(database).note(99, {}, None, 1)


def test_a_trigger_asks_for_one_version_only(database: Database) -> None:
    made = Triggers(database).open("aqua", "decay", {}, 5)
    assert made is not None
    assert Triggers(database).request_release(made.id, "4", {"gates": []}, 6)
    assert not Triggers(database).request_release(made.id, "4", {}, 6)
    assert not Triggers(database).request_release(made.id, "5", {}, 7)
    assert database.open_releases("aqua") == ["4"]
    assert Triggers(database).all("aqua")[0].outcome == {"version": "4", "requested": True}
    request = database.claim_release("aqua", "a", 5, 0)
    assert request is not None
    assert request.payload == {"gates": [], "trigger": made.id}
