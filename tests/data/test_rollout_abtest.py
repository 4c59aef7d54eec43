"""An A/B test as the controller runs it: what gateways are told, when it ends, and what follows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from cluster.database import Database
from pipelines.spec import ABTest, Assignment
from pipelines.statistics.asymptotic import Sample
from pipelines.validation.arms import Arm
from serving.rollout.controller import Controller
from serving.rollout.lookout import START_TIMEOUT_S
from serving.rollout.machine import Kind, NotAllowed, Outcome, Phase
from serving.rollout.pages import report
from serving.rollout.projections import aliases, describe, describe_test
from serving.routing import Share, Split
from serving.wire import ABTestStatus, RolloutStatus
from tests.data.rollout_play import (
    HOUR,
    STEPS,
    TEST,
    USUAL,
    FakeWorld,
    FragileJournal,
    Loading,
    Play,
    play_out,
    replayed_decisions,
)

names = itertools.count()
TESTED = ["settle", "test", "settle"]


@dataclass
class Stubborn(FakeWorld):
    """A world in which nothing is deployed any more once ``deploys`` is false."""

    deploys: bool = True

    def deploy(self, version: str) -> None:
        if self.deploys:
            super().deploy(version)


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Database:
    found = Database(f"sqlite:///{tmp_path_factory.mktemp('journal')}/control.db")
    found.create()
    return found


def played(
    database: Database, *steps: str, broken: frozenset[str] = frozenset(), world: FakeWorld | None = None
) -> Play:
    if world is None:
        return play_out(database, f"test{next(names)}", [*TESTED, *steps], [], broken)
    play = Play(world, FragileJournal(database, f"test{next(names)}", world))
    for step in (*TESTED, *steps):
        STEPS[step](play)
    return play


def test_while_it_runs_gateways_split_units_between_all_versions(database):
    play = played(database)
    assert play.world.routed is not None
    assert play.world.routed.split == Split(
        test=1,
        salt="s",
        by_entity=TEST.unit is Assignment.ENTITY,
        shares=(Share(version="8", upto=0.3), Share(version="9", upto=0.5)),
        deadline_ms=250.0,
        harm_cap=25,
    )
    assert (play.world.routed.champion, play.world.routed.challenger, play.world.routed.number) == ("1", None, 1)
    assert play.world.applications == {"8", "9"}
    assert aliases(play.controller.state) == {"champion": "1"}
    assert RolloutStatus(**describe(play.controller.situation, 0)).variants == ["8", "9"]


def test_the_winner_is_withdrawn_with_the_others_and_its_release_is_asked_for(database):
    play = played(database, "even", "better variant", "wait", "better variant", "settle")
    kinds = [entry.kind for entry in play.journal.read()]
    assert kinds.count(Kind.TEST_RESULTS) == 1, "what is known already is not journalled again"
    ended = next(entry for entry in play.journal.read() if entry.kind == Kind.TEST_ENDED)
    assert (ended.payload["outcome"], ended.payload["winner"]) == ("won", "9")
    state = play.controller.state
    assert (state.phase, state.challenger, state.rollout, state.test) == (Phase.SHADOW, "9", 2, False)
    assert play.world.applications == {"9"}
    assert replayed_decisions(play.journal) == [Kind.TEST_ENDED]


@pytest.mark.parametrize(
    ("steps", "outcome", "alert"),
    [
        (("worse variants", "wait"), Outcome.LOST, "test_lost"),
        (("unclear", "day", "day"), Outcome.INCONCLUSIVE, "test_inconclusive"),
        (("harm",), Outcome.LOST, "test_lost"),
        (("abort",), Outcome.ABORTED, None),
    ],
)
def test_a_test_that_nobody_wins_leaves_the_champion(database, steps, outcome, alert):
    play = played(database, *steps)
    state = play.controller.state
    assert (state.phase, state.champion, state.outcome, state.ended) == (Phase.IDLE, "1", outcome, None)
    assert set(play.world.alerts) == ({alert} if alert else set())
    assert (play.world.applications, play.world.open) == (set(), [])
    assert play.world.closed == {"1": "promoted"}, "no release request has to do with it"


def test_uneven_shares_pause_it_so_that_the_champion_answers_all_until_it_is_resumed(database):
    play = played(database, "uneven")
    assert play.controller.state.paused
    assert play.world.routed is not None
    assert play.world.routed.split is None
    assert play.world.applications == {"8", "9"}
    why = play.controller.situation.why
    assert why is not None
    assert why.startswith("units are not assigned by their shares")
    assert play.world.alerts == {"rollout_paused": f"A/B test 1 waits for somebody to look at it: {why}"}
    assert describe_test(play.controller.situation, play.clock.now())["reason"] == f"paused: {why}"
    for step in ("resume", "settle"):
        STEPS[step](play)
    assert play.world.routed.split is not None
    assert play.controller.situation.evidence.arms == ()
    assert play.world.alerts == {}


def test_a_release_that_is_asked_for_meanwhile_waits_for_its_end(database):
    play = played(database, "ask", "settle")
    assert (play.controller.state.phase, play.world.open) == (Phase.TESTING, ["2"])
    for step in ("abort", "settle"):
        STEPS[step](play)
    assert (play.controller.state.phase, play.controller.state.challenger) == (Phase.SHADOW, "2")


def test_a_test_does_not_begin_while_a_version_is_being_tried_or_with_the_champion_in_it(database):
    play = play_out(database, "tried", ["settle", "ask", "settle"], [], frozenset())
    with pytest.raises(NotAllowed, match="test_started does not fit a release that is shadow"):
        play.controller.start_test(TEST, "someone", "")
    idle = play_out(database, "idle", ["settle"], [], frozenset())
    mine = ABTest.model_validate({**TEST.model_dump(), "variants": [{"version": "1", "share": 0.5}]})
    with pytest.raises(NotAllowed, match="version 1 is the champion"):
        idle.controller.start_test(mine, "someone", "")
    empty = FakeWorld()
    nobody = Play(empty, FragileJournal(database, "empty", empty))
    with pytest.raises(NotAllowed, match="does not fit a release that is empty"):
        nobody.controller.start_test(TEST, "someone", "")


def test_a_variant_that_does_not_run_ends_it(database):
    play = played(database, broken=frozenset({"9"}))
    assert play.controller.state.outcome is Outcome.LOST
    ended = next(entry for entry in play.journal.read() if entry.kind == Kind.TEST_ENDED)
    assert ended.payload["reason"] == "version 9 does not run: it is broken"


def test_a_variant_that_is_never_ready_ends_it_after_a_while(database):
    play = played(database, world=Loading(open=["1"]))
    assert play.controller.state.phase is Phase.TESTING
    play.time += START_TIMEOUT_S
    play.settle()
    assert play.controller.state.outcome is Outcome.LOST
    ended = next(entry for entry in play.journal.read() if entry.kind == Kind.TEST_ENDED)
    assert "did not run within 180 s" in ended.payload["reason"]


def test_a_variant_whose_state_is_never_complete_ends_it_after_a_while(database):
    play = played(database, world=FakeWorld(open=["1"], without_state={"9": "it is behind"}))
    play.time += START_TIMEOUT_S
    play.settle()
    ended = next(entry for entry in play.journal.read() if entry.kind == Kind.TEST_ENDED)
    assert ended.payload["reason"] == "version 9 did not run within 180 s: it is behind"


def test_a_variant_that_ran_and_is_away_for_a_moment_is_deployed_again(database):
    world = Stubborn(open=["1"])
    play = played(database, world=world)
    play.settle()
    play.world.applications.discard("8")
    play.settle()
    assert play.world.applications == {"8", "9"}
    assert play.controller.state.phase is Phase.TESTING
    world.deploys = False
    play.world.applications.discard("8")
    play.settle()
    play.time += START_TIMEOUT_S
    play.settle()
    assert play.controller.state.outcome is Outcome.LOST


def test_a_variant_that_is_being_replaced_while_somebody_pauses_ends_nothing(database):
    play = played(database, world=FakeWorld(open=["1"]))
    play.settle()
    play.world.broken = frozenset({"8"})
    for step in ("pause", "settle", "resume", "settle"):
        STEPS[step](play)
    assert play.controller.state.phase is Phase.TESTING
    STEPS["even"](play)  # some of which variants answered
    play.controller = Controller(play.use_case, play.journal, play.world, play.clock, real=play._tick, draw=lambda: "t")
    play.settle()
    assert play.controller.state.phase is Phase.TESTING, "nor does a controller that knows of it by the journal alone"


def test_a_test_that_begins_at_once_takes_up_no_release_that_has_ended(database):
    play = play_out(database, "at once", ["settle", "ask", "settle"], [], frozenset())
    for step in ("abort", "end", "test", "settle", "abort", "settle", "settle"):
        STEPS[step](play)
    started = [entry.payload["version"] for entry in play.journal.read() if entry.kind == Kind.STARTED]
    assert started == ["2"]
    assert (play.controller.state.phase, play.world.open, play.world.closed["2"]) == (Phase.IDLE, [], "aborted")


def test_a_winner_that_was_forced_into_the_test_is_asked_for_as_forced(database):
    asked = []

    class Listening(FakeWorld):
        def ask(self, version: str, by: str, reason: str, *, forced: bool) -> None:
            asked.append((version, by, reason, forced))

    for forced in ((), ("9",)):
        world = Listening(open=["1"])
        play = Play(world, FragileJournal(database, f"forced{len(forced)}", world))
        play.settle()
        play.controller.start_test(TEST, "someone", "a try", forced)
        for step in ("settle", "even", "wait", "better variant", "settle"):
            STEPS[step](play)
    assert set(asked) == {("9", "someone", "it won A/B test 1", False), ("9", "someone", "it won A/B test 1", True)}


def test_a_word_that_is_meant_for_a_test_steers_nothing_else(database):
    play = play_out(database, "steered", ["settle", "ask", "settle"], [], frozenset())
    with pytest.raises(NotAllowed, match="no A/B test is running: the release is shadow"):
        play.controller.command("abort", "someone", "", of_test=True)
    assert play.controller.state.phase is Phase.SHADOW


def test_going_back_to_the_previous_champion_ends_it(database):
    play = play_out(database, "back", ["settle", *USUAL, "test", "settle", "revert"], [], frozenset())
    state = play.controller.state
    assert (state.phase, state.champion, state.outcome, state.previous) == (Phase.IDLE, "1", Outcome.ABORTED, None)
    assert play.world.applications == set()


def test_results_of_an_earlier_test_are_not_taken(database):
    play = played(database, "abort", "settle", "test", "settle")
    assert play.controller.state.rollout == 2
    play.controller.take_results(1, (Arm("8", 400, Sample(400, 5.0, 1.0)),))
    assert play.controller.situation.evidence.results == ()


def test_a_definition_of_other_code_ends_the_test(database, monkeypatch):
    play = played(database, world=FakeWorld(open=["1"]))
    document = {"variants": [{"version": "8", "share": 0.3}], "mood": "bad"}
    play.journal._database.append_journal(
        play.journal.stream, "aborted", {"by": "x"}, 0, expected=play.controller.situation.sequence
    )
    again = Controller(play.use_case, play.journal, play.world, play.clock, real=play._tick, draw=lambda: "t")
    play.controller = again
    play.settle()
    entry = {"test": document, "champion": "1", "salt": "t", "by": "x", "reason": ""}
    play.journal._database.append_journal(
        play.journal.stream, "test_started", entry, play.clock.now(), expected=again.situation.sequence
    )
    play.controller = Controller(play.use_case, play.journal, play.world, play.clock, real=play._tick)
    shown = describe_test(play.controller.situation, 0)
    assert shown is not None
    assert "does not fit this code" in shown["reason"]
    play.settle()
    assert (play.controller.state.phase, play.controller.state.outcome) == (Phase.IDLE, Outcome.LOST)


def test_the_status_and_the_page_tell_of_the_last_test_also_when_it_is_over(database):
    play = played(database, world=FakeWorld(open=["1"]))
    assert ABTestStatus(**describe_test(play.controller.situation, play.clock.time)).variants[0].high is None
    assert "No unit has an outcome yet" in (report("aqua", play.controller.situation, play.clock.time))
    for hours, means in ((1, (5.0, 5.1, 4.9)), (2, (5.0, 5.1, 4.6)), (2, (5.0, 5.2, 4.0))):
        play.clock.time += hours * HOUR
        play.results(*means)
    STEPS["even"](play)
    running = ABTestStatus(**describe_test(play.controller.situation, play.clock.time))
    assert (running.champion, running.champion_units, running.champion_mean) == ("1", 400, 5.0)
    assert [(one.version, one.units, one.mean) for one in running.variants] == [("8", 400, 5.2), ("9", 400, 4.0)]
    assert running.assigned == [500, 300, 200]
    assert [one.finding for one in running.variants] == ["open", "better"]
    for step in ("wait", "settle", "settle"):
        STEPS[step](play)
    assert play.controller.state.challenger == "9", "the rollout of the winner began"
    last = play.journal.test()
    assert last is not None
    over = ABTestStatus(**describe_test(last, play.clock.time))
    assert (over.running, over.outcome, over.winner) == (False, "won", "9")
    page = report("aqua", last, play.clock.time)
    for part in ("A/B test 1 of aqua", "won, version 9", 'id="interval-8"', 'id="difference-9"', "500", "better"):
        assert part in page
    assert "http" not in page.replace("http://www.w3.org", ""), "nothing is fetched for it"


def test_the_last_of_several_tests_is_told_of_and_nothing_of_what_came_after_it(database):
    play = played(database, "unclear", "abort", "settle", "ask", "settle", "abort", "settle", "test", "settle", "even")
    running = play.journal.test()
    assert running == play.controller.situation
    for step in ("abort", "settle", "ask", "settle", "copies"):
        STEPS[step](play)
    last = play.journal.test()
    assert last is not None
    assert (last.state.rollout, last.state.phase, last.state.outcome) == (3, Phase.IDLE, Outcome.ABORTED)
    assert last.evidence.arms == (500, 300, 200)
    assert last.evidence.results == ()
    untested = play_out(database, "untested", ["settle", "ask", "settle"], [], frozenset())
    assert untested.journal.test() is None
