"""The controller killed between any two effects: it resumes where it was and ends where it would have ended."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.database import Database, StaleEpoch, StaleJournal
from serving.rollout.controller import Controller
from serving.rollout.journal import Journal, replay
from serving.rollout.lookout import APPLY_TIMEOUT_S, START_TIMEOUT_S
from serving.rollout.machine import Kind, Phase
from serving.rollout.projections import aliases, describe
from serving.routing import RoutingTable
from tests.data.rollout_play import (
    APPROVED,
    CAUTIOUS,
    GATEWAY,
    SHADOWED,
    STEPS,
    STORIES,
    USE_CASE,
    USUAL,
    YIELDING,
    FakeWorld,
    FragileJournal,
    Lasting,
    Loading,
    Play,
    ends_alike,
    play_out,
    replayed_decisions,
)

names = itertools.count()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Database:
    found = Database(f"sqlite:///{tmp_path_factory.mktemp('journal')}/control.db")
    found.create()
    return found


@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=14) | st.sampled_from([USUAL, USUAL * 2, APPROVED]),
    gaps=st.lists(st.integers(1, 9), max_size=16),
    broken=st.sampled_from([frozenset(), frozenset({"2"})]),
    use_case=st.sampled_from([USE_CASE, CAUTIOUS, YIELDING]),
)
@settings(max_examples=60, deadline=None)
def test_a_killed_controller_ends_where_it_would_have_ended(database, steps, gaps, broken, use_case):
    kills = list(itertools.accumulate(gaps))
    whole = play_out(database, f"whole{next(names)}", ["settle", *steps], [], broken, use_case)
    killed = play_out(database, f"killed{next(names)}", ["settle", *steps], kills, broken, use_case)
    ends_alike(killed, whole)


@pytest.mark.parametrize("steps", STORIES)
def test_a_kill_at_any_one_point_of_a_story_changes_nothing(database, steps):
    whole = play_out(database, f"whole{next(names)}", steps, [], frozenset(), CAUTIOUS)
    for point in range(1, whole.world.changes + 1):
        ends_alike(play_out(database, f"killed{next(names)}", steps, [point], frozenset(), CAUTIOUS), whole)


def test_the_usual_way_ends_in_a_promotion_and_keeps_the_old_champion_warm(database):
    play = play_out(database, "usual", ["settle", *USUAL], [], frozenset())
    assert play.controller.state.phase is Phase.WATCHING
    assert play.world.routed is not None
    assert (play.world.routed.champion, play.world.routed.previous) == ("2", "1")
    watched = play.world.routed.challenger
    assert watched is not None
    assert (watched.version, watched.watch, watched.weight, watched.shadow) == ("1", True, 0.0, 0.1)
    assert play.world.closed == {"1": "promoted", "2": "promoted"}
    assert aliases(play.controller.state) == {"champion": "2", "previous": "1"}
    assert play.world.alerts == {}
    assert play.world.applications == set()
    assert [weight for _, weight in play.world.history] == [0.0, 0.0, 0.1, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]


def test_a_challenger_that_does_not_start_leaves_the_champion_alone(database):
    play = play_out(database, "broken", ["settle", "ask", "settle"], [], frozenset({"2"}))
    assert play.world.closed["2"] == "rolled_back"
    assert {champion for champion, _ in play.world.history} == {"1"}
    failed = next(e for e in play.journal.read() if e.kind == Kind.FAILED)
    assert failed.payload == {"reason": "it is broken"}


def test_the_journal_replays_to_the_identical_decision(database):
    play = play_out(database, "decision", ["settle", *USUAL[:6], "ask", "settle", "errors", "settle"], [], frozenset())
    assert replayed_decisions(play.journal) == [Kind.ADVANCED, Kind.ROLLED_BACK]
    whole, kept = replay(play.journal.read()), play.journal.situation()
    assert whole == play.controller.situation
    assert (kept.state, kept.sequence) == (whole.state, whole.sequence)


def test_a_version_that_needs_approval_is_promoted_only_with_it(database):
    waiting = play_out(database, "waiting", ["settle", *USUAL], [], frozenset(), CAUTIOUS)
    assert waiting.controller.state.phase is Phase.CANARY
    approved = play_out(database, "approved", ["settle", *APPROVED], [], frozenset(), CAUTIOUS)
    assert approved.controller.state.champion == "2"


def test_a_version_asked_for_later_waits_or_takes_the_place_as_the_policy_says(database):
    steps = ["settle", "ask", "settle", "ask", "ask", "settle", "settle"]
    waits = play_out(database, "waits", steps, [], frozenset())
    assert (waits.controller.state.challenger, waits.world.open) == ("2", ["2", "3", "4"])
    takes = play_out(database, "takes", steps, [], frozenset(), YIELDING)
    assert (takes.controller.state.challenger, takes.world.open) == ("4", ["4"])
    assert takes.world.closed == {"1": "promoted", "2": "superseded", "3": "superseded"}
    assert takes.world.alerts == {}
    begun = [e.payload["version"] for e in takes.journal.read() if e.kind == Kind.STARTED]
    assert begun == ["2", "3", "4"]
    told = [e.payload["reason"] for e in takes.journal.read() if e.kind == Kind.SUPERSEDED]
    assert told == [f"the release of version {newer} was asked for after it" for newer in (4, 4)]


def test_a_report_sent_twice_counts_once_and_a_lost_one_is_noticed(database):
    play = play_out(database, "twice", ["settle", "ask", "settle"], [], frozenset())
    report = {"gateway": GATEWAY, "sequence": 1, "rollout": 1, "copies": 7}
    for _ in range(3):
        play.controller.exchange(GATEWAY, 99, [], {}, report, 0.0)
    assert play.controller.situation.evidence.copies == 7
    with pytest.raises(ValueError, match="one is missing"):
        play.controller.exchange(GATEWAY, 99, [], {}, {**report, "sequence": 3}, 0.0)


def test_a_report_about_an_earlier_rollout_is_not_evidence(database):
    play = play_out(database, "late", ["settle", "ask", "settle"], [], frozenset())
    late = {"gateway": GATEWAY, "sequence": 1, "rollout": 0, "harmed": 1000, "accidents": 1000}
    play.controller.exchange(GATEWAY, 99, [], {}, late, 0.0)
    assert play.controller.state.phase is Phase.SHADOW
    assert play.controller.situation.evidence.harmed == 0


def test_a_second_controller_is_fenced_and_takes_over_what_the_first_decided(database):
    play = play_out(database, "fenced", ["settle", "ask", "settle"], [], frozenset())
    second = Controller(USE_CASE, play.journal, play.world, play.clock)
    play.controller.command("pause", "first", "")
    with pytest.raises(StaleJournal):
        second.command("abort", "second", "")
    assert second.state == play.controller.state
    assert second.state.paused
    stale = play.world.routed
    assert stale is not None
    second.command("abort", "second", "")
    second.turn()
    with pytest.raises(StaleEpoch):
        play.world.publish(stale, {"champion": "9"})


def test_a_controller_that_takes_over_measures_the_state_it_finds_from_then_on(database):
    """It has looked at an idle release for longer than a version may take to start."""
    play = Play(Loading(open=["1"]), Journal(database, "old"))
    play.settle()
    time = [0.0]
    old = Controller(USE_CASE, play.journal, play.world, play.clock, real=lambda: time[0], draw=lambda: "s")
    play.world.open = ["2"]
    play.settle()
    assert play.controller.state.phase is Phase.STARTING
    time[0] = 10 * START_TIMEOUT_S
    with pytest.raises(StaleJournal):
        old.turn()
    time[0] += START_TIMEOUT_S
    old.turn()
    assert old.state.phase is Phase.STARTING
    time[0] += 1
    old.turn()
    assert old.state.phase is Phase.WITHDRAWING


def test_a_withdrawal_waits_for_gateways_also_when_another_controller_finished_the_one_before(database):
    world = Lasting(open=["1"])
    play = Play(world, Journal(database, "finished"))
    for step in ("settle", "ask", "settle"):
        STEPS[step](play)
    play.command("abort")
    play.settle()
    old, world.lasts = play.controller, False
    assert old.state.phase is Phase.WITHDRAWING
    play.controller = play._make()
    play.settle()
    assert play.controller.state.phase is Phase.IDLE
    world.open = ["3"]
    play.settle()
    play.command("abort")
    play.controller.turn()
    with pytest.raises(StaleJournal):
        old.turn()
    assert (old.state.phase, old.state.challenger) == (Phase.WITHDRAWING, "3")
    for _ in range(4):
        old.turn()
    assert world.applications == {"3"}, "the gateway has had no time to follow"
    play.controller = old
    play.settle()
    assert old.state.phase is Phase.IDLE


def test_a_controller_that_slept_does_not_bring_an_old_table_back(database):
    """It had journalled a step and not published it when another took over and withdrew the challenger."""
    play = play_out(database, "slept", ["settle", "ask", "settle", "copies", "wait"], [], frozenset())
    asleep = play.controller
    with asleep._lock:
        asleep._record(Kind.ADVANCED, {"step": 1})
    other = Controller(USE_CASE, play.journal, play.world, play.clock)
    other.command("abort", "other", "")
    other.turn()
    assert play.world.routed is not None
    assert play.world.routed.challenger is None
    for _ in range(4):
        with contextlib.suppress(StaleEpoch, StaleJournal):
            asleep.turn()
    assert play.world.routed.challenger is None
    assert asleep.state == other.state


def test_a_waiting_request_that_cannot_be_begun_is_refused_and_the_next_one_goes_on(database):
    play = play_out(database, "odd", ["settle", "ask oddly", "ask", "settle"], [], frozenset())
    assert play.world.closed["2"] == "refused"
    assert play.controller.state.challenger == "3"
    (refused,) = (e.payload for e in play.journal.read() if e.kind == Kind.REFUSED)
    assert (refused["version"], refused["request_sequence"]) == ("2", 2)
    assert "does not fit this code: ('mood',)" in refused["reason"]


def test_a_champion_is_not_tried_against_itself_however_often_it_is_asked_for(database):
    play = play_out(database, "itself", ["settle"], [], frozenset())
    for count in (1, 2):
        play.world.open, play.world.closed["1"] = ["1"], "asked anew"
        play.settle()
        assert play.controller.state.phase is Phase.IDLE
        assert (play.world.open, play.world.closed["1"]) == ([], "refused")
        refused = [e.payload for e in play.journal.read() if e.kind == Kind.REFUSED]
        assert refused == [{"version": "1", "reason": "it is the champion already", "request_sequence": 1}] * count


def test_a_refused_request_is_journalled_once_and_before_it_is_closed(database):
    class Closing(FakeWorld):
        failures = 3

        def close(self, version: str, outcome: str, request: int | None) -> None:
            if outcome == "refused":
                assert self.journal is not None
                said = [e.payload["version"] for e in self.journal.read() if e.kind == Kind.REFUSED]
                assert said == [version]
                self.failures -= 1
                if self.failures >= 0:
                    raise ConnectionError("the database does not answer")
            super().close(version, outcome, request)

    play = Play(Closing(open=["1"]), Journal(database, "said"))
    for name in ("settle", "ask oddly"):
        STEPS[name](play)
    for _ in range(4):
        with contextlib.suppress(ConnectionError):
            play.controller.turn()
    assert play.world.open == ["2"]
    play.settle()
    assert play.world.closed["2"] == "refused"


def test_a_champion_from_before_the_journal_stays_champion(database):
    world = FakeWorld(open=["9"], routed=RoutingTable(epoch=4, champion="7"))
    play = Play(world, Journal(database, "before"))
    play.controller.turn()
    assert play.controller.state.champion == "7"
    play.settle()
    assert play.controller.state.challenger == "9"


def test_an_application_that_vanished_is_started_again(database):
    play = play_out(database, "vanished", ["settle", "ask", "settle"], [], frozenset())
    play.world.applications.clear()
    play.settle()
    assert play.controller.state.phase is Phase.SHADOW
    assert play.world.applications == {"2"}


def test_a_pause_and_a_rollback_open_alerts_that_resolve_when_the_release_moves_on(database):
    play = play_out(database, "told", ["settle", "ask", "settle", "pause", "settle"], [], frozenset())
    assert list(play.world.alerts) == ["rollout_paused"]
    play.command("resume")
    play.settle()
    assert play.world.alerts == {}
    play.report(harmed=30, accidents=30)
    play.settle()
    assert list(play.world.alerts) == ["rollout_rolled_back"]
    play.world.open = ["3"]
    play.settle()
    assert play.world.alerts == {}


def test_skew_that_an_audit_finds_pauses_the_rollout_until_a_person_resumes_it(database):
    play = play_out(database, "skewed", [*SHADOWED, "copies", "wait", "skew", "settle"], [], frozenset())
    assert (play.controller.state.phase, play.controller.state.paused) == (Phase.SHADOW, True)
    assert describe(play.controller.situation, play.clock.now())["evidence"]["skewed"] == 30
    (paused,) = (e.payload for e in play.journal.read() if e.kind == Kind.PAUSED)
    assert paused["guardrail"] == "skew"
    assert "30 of 150 answers" in paused["reason"]
    assert "demand_mean_1h in 30, hour in 2" in paused["reason"]
    assert list(play.world.alerts) == ["rollout_paused"]
    STEPS["wait"](play)
    play.settle()
    assert play.controller.state.paused
    play.command("resume")
    play.settle()
    assert (play.controller.state.phase, play.controller.state.paused) == (Phase.CANARY, False)
    play.skew()  # an audit that finds it again
    assert play.controller.state.paused
    assert play.controller.state.phase is Phase.CANARY


def test_skew_found_while_a_version_starts_pauses_it_in_shadow_and_without_a_rollout_nothing_is_kept(database):
    world = Loading(open=["1"])
    play = Play(world, FragileJournal(database, "starting", world))
    play.settle()
    before = play.journal.read()
    play.skew()
    assert play.journal.read() == before
    world.open = ["2"]
    play.settle()
    assert play.controller.state.phase is Phase.STARTING
    play.skew()
    with play.controller._lock:
        play.controller._record(Kind.READY, {})
    play.controller.turn()
    assert (play.controller.state.phase, play.controller.state.paused) == (Phase.SHADOW, True)


def test_a_policy_that_this_code_does_not_know_ends_its_rollout_and_no_journal(database):
    play = play_out(database, "policy", ["settle", "ask", "settle"], [], frozenset())
    unknown = replace(play.controller.situation, fields={"mood": "bad"})
    play.controller.situation = unknown
    play.controller.turn()
    assert play.controller.state.outcome == "rolled_back"
    play.settle()
    assert play.controller.state.phase is Phase.IDLE


def test_a_policy_that_this_code_does_not_know_ends_a_rollout_that_is_starting_too(database):
    play = Play(Loading(open=["1", "2"]), Journal(database, "unknown"))
    play.settle()
    assert play.controller.state.phase is Phase.STARTING
    play.controller.situation = replace(play.controller.situation, fields={"mood": "bad"})
    play.controller.turn()
    assert play.controller.state.outcome == "rolled_back"


def test_an_effect_that_failed_is_tried_again_by_the_same_controller(database):
    class Once(FakeWorld):
        failed = False

        def deploy(self, version: str) -> None:
            if not self.failed:
                self.failed = True
                raise ConnectionError("Serve does not answer")
            super().deploy(version)

    play = Play(Once(open=["1", "2"]), Journal(database, "retried"))

    def turns() -> None:
        for _ in range(6):
            play.controller.turn()

    with pytest.raises(ConnectionError):
        turns()
    play.settle()
    assert play.controller.state.phase is Phase.SHADOW


@pytest.mark.parametrize("after", [False, True])
def test_a_challenger_is_not_taken_down_before_the_table_without_it_is_in_force(database, after):
    class Locked(FakeWorld):
        locked, failures = True, 0

        def publish(self, expected: RoutingTable | None, document: dict[str, Any]) -> RoutingTable:
            routed = self.routed is not None and self.routed.challenger is not None
            ends = self.locked and routed and document["challenger"] is None
            if ends and after:
                super().publish(expected, document)
            if ends:
                self.failures += 1
                raise ConnectionError("the database does not answer")
            return super().publish(expected, document)

    world = Locked(open=["1"])
    play = Play(world, Journal(database, f"locked{after}"))
    for step in ("settle", "ask", "settle", "copies", "wait", "settle"):
        STEPS[step](play)
    assert play.controller.state.weight == 0.1
    play.command("abort")
    # No time-out ends this: callers are still told to ask it.
    for _ in range(2 if after else 20):
        with contextlib.suppress(ConnectionError, StaleEpoch):
            play.time += APPLY_TIMEOUT_S
            play.controller.turn()
        assert play.world.applications == {"2"}
        assert play.controller.state.phase is Phase.WITHDRAWING
    assert world.failures == (1 if after else 20)
    world.locked = False
    play.controller.turn()
    assert play.world.applications == {"2"}, "the gateway has had no time to follow"
    play.settle()
    assert play.controller.state.phase is Phase.IDLE
    assert play.world.applications == set()


def test_harm_adds_up_over_reports_to_its_cap(database):
    play = play_out(database, "harm", ["settle", "ask", "settle", "copies"], [], frozenset())
    play.report(harmed=13, accidents=13)
    assert play.controller.state.phase is Phase.SHADOW
    play.report(harmed=12, accidents=12)
    assert play.controller.state.outcome == "rolled_back"
