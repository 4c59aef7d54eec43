"""A version that was promoted, watched beside the one before it, which answers again as soon as the new one hurts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.database import Database
from serving.rollout.machine import Kind, Phase
from serving.rollout.projections import describe
from tests.data.rollout_play import USE_CASE, USUAL, play_out


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Database:
    found = Database(f"sqlite:///{tmp_path_factory.mktemp('journal')}/control.db")
    found.create()
    return found


@pytest.mark.parametrize(("found", "guardrail"), [("coins", "errors"), ("worse", "quality")])
def test_what_is_found_while_a_promoted_version_is_watched_brings_the_one_before_it_back(database, found, guardrail):
    play = play_out(database, f"watch{found}", ["settle", *USUAL, found, "settle"], [], frozenset())
    state, last = play.controller.state, play.journal.read()[-1]
    assert (state.phase, state.champion, state.previous, state.reverted) == (Phase.IDLE, "1", None, "2")
    assert (last.kind, last.payload["guardrail"]) == (Kind.ROLLED_BACK, guardrail)
    assert play.world.routed is not None
    assert (play.world.routed.champion, play.world.routed.challenger) == ("1", None)
    assert play.world.alerts == {"champion_reverted": f"version 1 answers in place of 2: {last.payload['reason']}"}
    assert describe(play.controller.situation, play.clock.now())["reason"] == last.payload["reason"]


def test_a_watch_ends_after_its_time_or_with_the_next_release_and_its_evidence_is_its_own(database):
    usual = ["settle", *USUAL]
    over = play_out(database, "over", [*usual, "day", "settle", "coins", "settle"], [], frozenset())
    assert (over.controller.state.phase, over.controller.state.previous) == (Phase.IDLE, "1")
    assert over.journal.read()[-1].payload["reason"] == "nothing was found against it while it was watched"
    early = play_out(database, "early", [*usual, "wait", "settle"], [], frozenset())
    assert early.controller.state.phase is Phase.WATCHING
    evidence = early.controller.situation.evidence
    assert (evidence.copies, evidence.days, evidence.exposed) == (0, (), {})
    follows = play_out(database, "follows", [*usual, "ask", "settle"], [], frozenset())
    assert (follows.controller.state.phase, follows.controller.state.challenger) == (Phase.SHADOW, "3")
    without = USE_CASE.model_copy(update={"release": USE_CASE.release.model_copy(update={"watch": None})})
    plain = play_out(database, "unwatched", usual, [], frozenset(), without)
    assert (plain.controller.state.phase, plain.controller.state.champion) == (Phase.IDLE, "2")


def test_a_watch_whose_policy_this_code_does_not_know_ends_and_the_champion_stays(database):
    play = play_out(database, "oddwatch", ["settle", *USUAL], [], frozenset())
    play.controller.situation = replace(play.controller.situation, fields={"mood": "bad"})
    play.controller.turn()
    assert (play.controller.state.phase, play.controller.state.champion) == (Phase.IDLE, "2")
