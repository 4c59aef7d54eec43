"""The controller killed between any two effects: it resumes where it was and ends where it would have ended."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.database import Database, ReleaseRequest, StaleEpoch, StaleJournal
from pipelines import usecases
from pipelines.spec import UseCase
from pipelines.validation.paired import PairedDay
from serving.rollout.controller import APPLY_TIMEOUT_S, DECIDED, START_TIMEOUT_S, Controller
from serving.rollout.journal import Journal, Situation, replay
from serving.rollout.judge import judge
from serving.rollout.machine import Kind, NotAllowed, Phase
from serving.rollout.projections import aliases, finite
from serving.rollout.projections import document as called_for
from serving.rollout.world import Standing
from serving.routing import RoutingTable

USE_CASE = usecases.load("aqua")
CAUTIOUS = USE_CASE.model_copy(update={"release": USE_CASE.release.model_copy(update={"approval": True})})
HOUR = 3_600_000_000
GATEWAY = "here:1:aa"


class Killed(BaseException):
    """The controller's process ended."""


@dataclass
class FakeWorld:
    """A world whose every change may kill the controller, before it is made or after.

    Who was killed changes nothing more, until a controller is made again (``dead`` becomes false).
    """

    kills: list[int] = field(default_factory=list)
    changes: int = 0
    dead: bool = False
    journal: Journal | None = None
    routed: RoutingTable | None = None
    applications: set[str] = field(default_factory=set)
    broken: frozenset[str] = frozenset()
    open: list[str] = field(default_factory=list)
    odd: set[str] = field(default_factory=set)  # versions asked for with a policy that is none
    closed: dict[str, str] = field(default_factory=dict)
    alerts: dict[str, str] = field(default_factory=dict)
    followed: dict[str, int] = field(default_factory=dict)
    history: list[tuple[str, float]] = field(default_factory=list)

    def point(self) -> None:
        self.changes += 1
        if self.kills and self.changes >= self.kills[0]:
            self.kills.pop(0)
            self.dead = True
        if self.dead:
            raise Killed

    def _changes(self):
        self.point()
        yield
        self.point()

    def table(self) -> RoutingTable | None:
        return self.routed

    def publish(self, expected: RoutingTable | None, document: dict[str, Any]) -> RoutingTable:
        table = RoutingTable(epoch=0, **document)
        if (self.routed and self.routed.epoch) != (expected and expected.epoch):
            raise StaleEpoch
        assert self.journal is not None
        assert document == called_for(self.journal.situation()), "a table that the journal does not call for yet"
        if expected is not None and table.model_copy(update={"epoch": expected.epoch}) == expected:
            return expected
        for _ in self._changes():
            self.routed = table.model_copy(update={"epoch": (expected.epoch if expected else 0) + 1})
            weight = table.challenger.weight if table.challenger else 0.0
            self.history.append((table.champion, weight))
        assert self.routed is not None
        return self.routed

    def deploy(self, version: str) -> None:
        for _ in self._changes():
            self.applications.add(version)

    def withdraw(self, version: str) -> None:
        assert self.routed is not None
        assert self.routed.challenger is None
        assert self.followed.get(GATEWAY) == self.routed.epoch, "a challenger was taken down under its callers"
        for _ in self._changes():
            self.applications.discard(version)

    def standing(self, version: str) -> tuple[Standing, str]:
        if version not in self.applications:
            return Standing.ABSENT, ""
        return (Standing.FAILED, "it is broken") if version in self.broken else (Standing.RUNNING, "")

    def close(self, version: str, outcome: str, request: int | None) -> None:
        for _ in self._changes():
            self.closed[version] = outcome
            self.open = [v for v in self.open if v != version]

    def tell(self, alerts: dict[str, str]) -> None:
        for _ in self._changes():
            self.alerts = alerts

    def next_request(self) -> ReleaseRequest | None:
        if not self.open:
            return None
        payload = {"policy": {"mood": "bad"}} if self.open[0] in self.odd else {"gates": []}
        return ReleaseRequest("aqua", self.open[0], payload, 0, int(self.open[0]))

    def gateways(self) -> list[str]:
        return [GATEWAY]


@dataclass
class Lasting(FakeWorld):
    """A world in which Serve takes its time to end an application."""

    lasts: bool = True

    def withdraw(self, version: str) -> None:
        if not self.lasts:
            super().withdraw(version)


@dataclass
class Loading(FakeWorld):
    """A world in which no application is ready yet."""

    def standing(self, version: str) -> tuple[Standing, str]:
        return Standing.STARTING, "it is being loaded"


class FragileJournal(Journal):
    """A journal whose every entry may kill the controller of a world, before it is written or after."""

    def __init__(self, database: Database, usecase: str, world: FakeWorld) -> None:
        super().__init__(database, usecase)
        self._world = world

    def append(self, situation: Situation, kind: Kind, payload: dict[str, Any], at_us: int) -> Situation:
        self._world.point()
        following = super().append(situation, kind, payload, at_us)
        self._world.point()
        return following


class Clock:
    def __init__(self) -> None:
        self.time = 1_700_000_000_000_000

    def now(self) -> int:
        return self.time


@dataclass
class Play:
    """A controller that is made again from its journal each time it is killed."""

    world: FakeWorld
    journal: Journal
    clock: Clock = field(default_factory=Clock)
    time: float = 0.0
    use_case: UseCase = USE_CASE

    def __post_init__(self) -> None:
        self.world.journal = self.journal
        self.sent: dict[int, int] = {}
        self.said = 0
        self.controller = self._survive(self._make)

    def _make(self) -> Controller:
        self.world.dead = False
        return Controller(self.use_case, self.journal, self.world, self.clock, real=self._tick, draw=lambda: "s")

    def _tick(self) -> float:
        """Real time that goes on a little each time somebody looks: periods end, time-outs do not."""
        self.time += 0.3
        return self.time

    def _survive(self, act):
        while True:
            try:
                return act()
            except Killed:
                if hasattr(self, "controller"):
                    self.controller = self._survive(self._make)

    def settle(self) -> None:
        """Turns until nothing changes any more."""
        for _ in range(16):
            self._survive(lambda: self.controller.turn())
            table = self.world.routed
            prepared = [v for v in (table.champion, table.prepare) if v] if table else []
            epoch = table.epoch if table else 0
            self.world.followed[GATEWAY] = epoch
            self._survive(lambda: self.controller.exchange(GATEWAY, epoch, prepared, {}, None, 0.0))  # noqa: B023

    def report(self, **counters: Any) -> None:
        """What the gateway sends, again and again until it is acknowledged; nothing without a challenger."""
        rollout = self.controller.state.rollout
        if not self.controller.state.tried:
            return
        self.sent[rollout] = self.sent.get(rollout, 0) + 1
        report = {"gateway": GATEWAY, "sequence": self.sent[rollout], "rollout": rollout, **counters}
        epoch = self.world.routed.epoch if self.world.routed else 0
        self._survive(lambda: self.controller.exchange(GATEWAY, epoch, [], {}, report, 0.0))

    def labels(self, count: int, difference: float) -> None:
        days = tuple(PairedDay(20_000 + i, 240, difference) for i in range(count))
        rollout = self.controller.state.rollout
        self._survive(lambda: self.controller.take_labels(rollout, days))

    def ask(self, odd: bool = False) -> None:
        version = str(1 + len(self.world.open) + len(self.world.closed))
        self.world.open.append(version)
        if odd:
            self.world.odd.add(version)

    def command(self, name: str) -> None:
        self.said += 1
        reason = f"because {self.said}"

        def act() -> None:  # an operator without an answer looks whether it was heard
            if any(entry.payload.get("reason") == reason for entry in self.journal.read()):
                return
            with contextlib.suppress(NotAllowed):
                self.controller.command(name, "someone", reason)

        self._survive(act)


STEPS = {
    "wait": lambda play: setattr(play.clock, "time", play.clock.time + 7 * HOUR),
    "copies": lambda play: play.report(copies=150),
    "healthy": lambda play: play.report(exposed={"0.1": (60, 540), "0.5": (250, 250)}, served=310),
    "errors": lambda play: play.report(exposed={"0.1": (10, 90)}, errors={"0.1": (12, 0)}, harmed=12, accidents=12),
    "harm": lambda play: play.report(harmed=30, accidents=30),
    "better": lambda play: play.labels(25, -0.05),
    "worse": lambda play: play.labels(25, 0.07),
    "pause": lambda play: play.command("pause"),
    "resume": lambda play: play.command("resume"),
    "approve": lambda play: play.command("approve"),
    "abort": lambda play: play.command("abort"),
    "ask": lambda play: play.ask(),
    "ask oddly": lambda play: play.ask(odd=True),
    "settle": lambda play: play.settle(),
}
USUAL = ["ask", "settle", "copies", "wait", "settle", "healthy", "wait", "settle", "wait", "settle", "better", "settle"]
APPROVED = [*USUAL, "approve", "settle"]
SHADOWED = ["settle", "ask", "settle"]
# Each report and command is followed by one that would end otherwise if what the first called for was not decided.
STORIES = [
    ["settle", *APPROVED],
    [*SHADOWED, "harm", "abort"],
    [*SHADOWED, "copies", "wait", "settle", "errors", "pause", "ask", "settle", "pause", "resume", "approve", "abort"],
    [*SHADOWED, "copies", "wait", "settle", "worse", "abort", "ask"],
    ["settle", "ask oddly", "ask oddly", "ask", "settle", "abort", "settle", "ask oddly"],
]


def play_out(
    database: Database,
    name: str,
    steps: list[str],
    kills: list[int],
    broken: frozenset[str],
    use_case: UseCase = USE_CASE,
) -> Play:
    world = FakeWorld(kills=kills, open=["1"], broken=broken)
    play = Play(world, FragileJournal(database, name, world), use_case=use_case)
    for step in steps:
        STEPS[step](play)
    play.settle()
    return play


def replayed_decisions(journal: Journal) -> list[Kind]:
    """The kinds of all that the judge decided, each found to follow from the entries before it alone."""
    before, kinds = Situation(), []
    for entry in journal.read():
        if "threshold" in entry.payload:
            again = judge(before.policy, before.state, before.evidence, entry.at_us)
            assert DECIDED[again.action] == entry.kind
            said = {**asdict(again), "log_e": finite(again.log_e)}
            for name in ("reason", "guardrail", "log_e", "threshold"):
                assert entry.payload[name] == said[name]
            kinds.append(Kind(entry.kind))
        before = before.after(entry)
    kept = journal.situation()
    assert (kept.state, kept.sequence) == (before.state, before.sequence)
    return kinds


def ends_alike(killed: Play, whole: Play) -> None:
    """Both plays came to the same state, evidence and world, by the same events and decisions."""
    assert killed.controller.state == whole.controller.state
    assert killed.controller.situation.evidence == whole.controller.situation.evidence
    for part in ("applications", "open", "closed", "alerts"):
        assert getattr(killed.world, part) == getattr(whole.world, part), part
    left, right = killed.world.routed, whole.world.routed
    assert left is not None
    assert right is not None
    assert left.model_dump(exclude={"epoch"}) == right.model_dump(exclude={"epoch"})
    kinds = [[e.kind for e in play.journal.read()] for play in (killed, whole)]
    assert kinds[0] == kinds[1]
    assert replayed_decisions(killed.journal) == replayed_decisions(whole.journal)


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
    use_case=st.sampled_from([USE_CASE, CAUTIOUS]),
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
    assert play.controller.state.phase is Phase.IDLE
    assert play.world.routed is not None
    assert (play.world.routed.champion, play.world.routed.previous) == ("2", "1")
    assert play.world.closed == {"1": "promoted", "2": "promoted"}
    assert aliases(play.controller.state) == {"champion": "2", "previous": "1"}
    assert play.world.alerts == {}
    assert play.world.applications == set()
    assert [weight for _, weight in play.world.history] == [0.0, 0.0, 0.1, 0.5, 0.5, 0.0]


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


def test_a_policy_that_this_code_does_not_know_ends_its_rollout_and_no_journal(database):
    play = play_out(database, "policy", ["settle", "ask", "settle"], [], frozenset())
    unknown = replace(play.controller.situation, fields={"mood": "bad"})
    play.controller.situation = unknown
    play.controller.turn()
    assert play.controller.state.outcome == "rolled_back"
    play.settle()
    assert play.controller.state.phase is Phase.IDLE


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
