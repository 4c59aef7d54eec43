"""A promotion and a withdrawal wait for every gateway, and nothing is waited for without end.

A rollout whose policy this code does not know ends without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.database import Database
from serving.rollout.controller import Controller
from serving.rollout.journal import Journal
from serving.rollout.lookout import APPLY_TIMEOUT_S, PROMOTE_TIMEOUT_S, START_TIMEOUT_S
from serving.rollout.machine import Kind, Phase
from serving.rollout.projections import WAITING, describe
from tests.data.rollout_play import STEPS, USE_CASE, USUAL, Clock, FakeWorld, Loading, Play

ONE, TWO = "here:1:aa", "there:2:bb"


@dataclass
class TwoGateways(FakeWorld):
    """A world in which two gateways hold a lease."""

    live: list[str] = field(default_factory=lambda: [ONE, TWO])

    def gateways(self) -> list[str]:
        return self.live

    def withdraw(self, version: str) -> None:
        self.applications.discard(version)


@dataclass
class Promoting:
    """A controller at the point where every gateway is to load the challenger."""

    controller: Controller
    world: TwoGateways
    journal: Journal
    time: float = 0.0

    def says(self, gateway: str, prepared: list[str], refused: dict[str, str] | None = None) -> None:
        """One exchange of a gateway, and the turn after it."""
        self.controller.exchange(gateway, self._epoch(), prepared, refused or {}, None, 0.0)
        self.controller.turn()

    def _epoch(self) -> int:
        assert self.world.routed is not None
        return self.world.routed.epoch

    def last(self, kind: Kind) -> dict[str, Any]:
        return next(e.payload for e in reversed(self.journal.read()) if e.kind == kind)


@pytest.fixture
def promoting(tmp_path) -> Promoting:
    """The usual rollout, by one gateway, up to the promotion; from there on a second one holds a lease too."""
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    world = TwoGateways(live=[ONE], open=["1"])
    play = Play(world, Journal(database, "aqua"))
    for name in ["settle", *USUAL[:-1]]:
        STEPS[name](play)
    assert play.controller.state.phase is Phase.PROMOTING
    world.live = [ONE, TWO]
    made = Promoting(play.controller, world, play.journal)
    made.controller = Controller(USE_CASE, play.journal, world, play.clock, real=lambda: made.time, draw=lambda: "s")
    made.controller.turn()
    return made


def test_no_gateway_swaps_before_every_one_has_loaded_the_challenger(promoting):
    promoting.says(ONE, ["1", "2"])
    promoting.says(TWO, ["1"])
    promoting.says(ONE, ["1", "2"])
    assert promoting.controller.state.phase is Phase.PROMOTING
    assert promoting.world.routed is not None
    assert (promoting.world.routed.champion, promoting.world.routed.prepare) == ("1", "2")
    promoting.says(TWO, ["1", "2"])
    assert promoting.controller.state.champion == "2"
    assert sorted(promoting.last(Kind.PROMOTED)["gateways"]) == [ONE, TWO]


def test_one_gateway_loads_it_before_the_other_is_asked_to(promoting):
    def asked() -> tuple[str | None, str | None]:
        assert promoting.world.routed is not None
        return promoting.world.routed.prepare, promoting.world.routed.prepare_in

    promoting.controller.turn()
    assert asked() == ("2", ONE)
    promoting.says(TWO, ["1", "2"])  # an old process of that name, say: it is not the one that was asked
    promoting.controller.turn()
    assert asked() == ("2", ONE)
    promoting.says(ONE, ["1", "2"])
    promoting.controller.turn()
    assert promoting.controller.state.champion == "2"
    kinds = [entry.kind for entry in promoting.journal.read()][-3:]
    assert kinds == [Kind.LOADING, Kind.LOADED, Kind.PROMOTED]


def test_a_version_that_ends_gateways_ends_three_at_most_and_the_champion_stays(promoting):
    gateways = [f"here:{number}:cc" for number in range(5)]
    promoting.world.live = [ONE, *gateways]
    for _ in range(2):
        promoting.controller.turn()
    promoting.world.live = gateways[:]
    ended = [ONE]
    for _ in range(2):
        promoting.controller.turn()
        promoting.controller.turn()
        assert promoting.world.routed is not None
        ended.append(promoting.world.routed.prepare_in)
        promoting.world.live.remove(ended[-1])
    promoting.controller.turn()
    assert promoting.last(Kind.FAILED)["reason"] == f"gateways ended while they loaded it: {', '.join(ended)}"
    assert len(set(ended)) == 3
    promoting.controller.turn()
    assert promoting.world.routed.prepare is None
    assert promoting.world.routed.champion == "1"


def test_a_gateway_whose_lease_has_ended_is_not_waited_for(promoting):
    promoting.says(ONE, ["1", "2"])
    assert promoting.controller.state.phase is Phase.PROMOTING
    promoting.world.live = [ONE]
    promoting.controller.turn()
    assert promoting.last(Kind.PROMOTED)["gateways"] == [ONE]


def _refuses(here: Promoting) -> None:
    here.says(TWO, ["1"], {"2": "its digest differs"})


def _is_silent(here: Promoting) -> None:
    here.says(ONE, ["1", "2"])
    here.time = PROMOTE_TIMEOUT_S + 1
    here.controller.turn()


@pytest.mark.parametrize(
    ("what", "reason"), [(_refuses, f"gateway {TWO} cannot load it: its digest differs"), (_is_silent, TWO)]
)
def test_a_gateway_that_refuses_or_is_silent_ends_the_promotion_and_the_champion_stays(
    promoting: Promoting, what: Callable[[Promoting], None], reason: str
):
    what(promoting)
    assert reason in promoting.last(Kind.FAILED)["reason"]
    promoting.controller.turn()
    assert promoting.world.routed is not None
    assert (promoting.world.routed.champion, promoting.world.routed.prepare) == ("1", None)
    assert promoting.controller.state.phase is Phase.WITHDRAWING


def test_a_challenger_is_taken_down_only_when_both_gateways_follow_a_table_without_it(promoting):
    promoting.controller.command("abort", "somebody", "")
    promoting.controller.turn()
    assert promoting.world.routed.challenger is None
    assert promoting.world.applications == {"2"}
    promoting.time = 3.0
    promoting.says(ONE, ["1"])
    assert promoting.world.applications == {"2"}
    promoting.time = 4.0
    promoting.says(TWO, ["1"])
    assert promoting.world.applications == set()
    promoting.controller.turn()
    assert promoting.last(Kind.WITHDRAWN)["zero_weight_s"] == 4.0


def test_a_gateway_that_follows_an_older_table_is_waited_for(promoting):
    before = promoting.world.routed.epoch
    promoting.controller.command("abort", "somebody", "")
    promoting.controller.turn()
    promoting.says(ONE, ["1"])
    promoting.controller.exchange(TWO, before, ["1"], {}, None, 0.0)
    promoting.controller.turn()
    assert promoting.world.applications == {"2"}


def test_a_silent_gateway_keeps_a_challenger_up_for_its_time_and_no_longer(promoting):
    promoting.controller.command("abort", "somebody", "")
    promoting.controller.turn()
    promoting.says(ONE, ["1"])
    promoting.time = APPLY_TIMEOUT_S
    promoting.controller.turn()
    assert promoting.world.applications == {"2"}
    promoting.time = APPLY_TIMEOUT_S + 0.1
    promoting.controller.turn()
    assert promoting.world.applications == set()
    promoting.controller.turn()
    assert promoting.controller.state.phase is Phase.IDLE


def test_a_challenger_that_is_not_running_in_time_ends_its_rollout(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    world, time = Loading(open=["1"]), [0.0]
    play = Play(world, Journal(database, "aqua"))
    play.controller = Controller(USE_CASE, play.journal, world, play.clock, real=lambda: time[0], draw=lambda: "s")
    play.settle()
    world.open = ["2"]
    time[0] = 1000.0
    play.settle()
    assert play.controller.state.phase is Phase.STARTING
    time[0] = 1000.0 + START_TIMEOUT_S
    play.controller.turn()
    assert play.controller.state.phase is Phase.STARTING
    time[0] += 1
    play.controller.turn()
    (failed,) = (e.payload for e in play.journal.read() if e.kind == Kind.FAILED)
    assert failed == {"reason": "it was not ready within 180 s: it is being loaded"}
    assert play.controller.state.outcome == "rolled_back"


def test_a_challenger_is_not_ready_before_the_state_of_its_view_is_and_an_alert_says_why(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    world, time = FakeWorld(open=["1"], without_state={"2": "run its backfill", "3": "run its backfill"}), [0.0]
    play = Play(world, Journal(database, "aqua"))
    play.controller = Controller(USE_CASE, play.journal, world, play.clock, real=lambda: time[0], draw=lambda: "s")
    for version in "23":
        play.settle()
        world.open = [version]
        time[0] += 1000.0
        play.settle()
        assert play.controller.state.phase is Phase.STARTING
        assert world.alerts == {WAITING: f"version {version} waits: run its backfill"}
        if version == "2":
            time[0] += START_TIMEOUT_S + 1
    (failed,) = (e.payload for e in play.journal.read() if e.kind == Kind.FAILED)
    assert failed == {"reason": "it was not ready within 180 s: run its backfill"}
    del world.without_state["3"]
    play.settle()
    assert (play.controller.state.phase, world.alerts) == (Phase.SHADOW, {})


def test_a_policy_that_this_code_does_not_know_ends_the_rollout_and_can_still_be_described(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    journal, clock = Journal(database, "aqua"), Clock()
    play = Play(FakeWorld(open=["1"]), journal, clock)
    for name in ("settle", "ask", "settle"):
        STEPS[name](play)
    assert play.controller.state.phase is Phase.SHADOW
    fields = {**play.controller.situation.fields, "mood": "good"}
    object.__setattr__(play.controller.situation, "fields", fields)
    told = describe(play.controller.situation, clock.now())
    assert told["phase"] == "shadow"
    assert "does not fit this code" in told["reason"]
    play.controller.turn()
    failed = next(e for e in journal.read() if e.kind == Kind.FAILED)
    assert "does not fit this code" in failed.payload["reason"]
    play.settle()
    assert play.controller.state.phase is Phase.IDLE
    assert play.world.routed is not None
    assert (play.world.routed.champion, play.world.routed.challenger) == ("1", None)
