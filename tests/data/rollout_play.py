"""A rollout played in a made-up world: a controller that may be killed at every point, and stories for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from cluster.database import Database, JournalEntry, ReleaseRequest, StaleEpoch
from pipelines import usecases
from pipelines.spec import ABTest, UseCase, Variant
from pipelines.statistics.asymptotic import Sample
from pipelines.validation.arms import Arm
from pipelines.validation.paired import PairedDay
from serving.rollout import comparison
from serving.rollout.controller import DECIDED, Controller
from serving.rollout.evidence import Skew
from serving.rollout.journal import Journal, Situation
from serving.rollout.judge import judge
from serving.rollout.machine import Kind, NotAllowed, Phase
from serving.rollout.projections import document as called_for
from serving.rollout.projections import finite
from serving.rollout.world import Standing
from serving.routing import RoutingTable

USE_CASE = usecases.load("aqua")
CAUTIOUS = USE_CASE.model_copy(update={"release": USE_CASE.release.model_copy(update={"approval": True})})
YIELDING = USE_CASE.model_copy(update={"release": USE_CASE.release.model_copy(update={"supersede": True})})
TEST = ABTest(
    variants=(Variant(version="8", share=0.3), Variant(version="9", share=0.2)),
    units=100,
    time=timedelta(hours=6),
    patience=timedelta(days=2),
    harm_cap=25,
)
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
    without_state: dict[str, str] = field(default_factory=dict)  # versions whose view's state lacks something, and why
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
        assert not self.routed.tried
        assert self.followed.get(GATEWAY) == self.routed.epoch, "a challenger was taken down under its callers"
        for _ in self._changes():
            self.applications.discard(version)

    def standing(self, version: str) -> tuple[Standing, str]:
        if version not in self.applications:
            return Standing.ABSENT, ""
        return (Standing.FAILED, "it is broken") if version in self.broken else (Standing.RUNNING, "")

    def lacking(self, champion: str, version: str) -> str | None:
        return self.without_state.get(version)

    def close(self, version: str, outcome: str, request: int | None) -> None:
        if request is None:
            return
        for _ in self._changes():
            self.closed[version] = outcome
            self.open = [v for v in self.open if v != version]

    def tell(self, alerts: dict[str, str]) -> None:
        for _ in self._changes():
            self.alerts = alerts

    def ask(self, version: str, by: str, reason: str, *, forced: bool) -> None:
        assert by == "someone"
        for _ in self._changes():
            if version not in self.open:
                self.open.append(version)

    def next_request(self) -> ReleaseRequest | None:
        if not self.open:
            return None
        payload = {"policy": {"mood": "bad"}} if self.open[0] in self.odd else {"requested_by": "asker"}
        return ReleaseRequest("aqua", self.open[0], payload, 0, int(self.open[0]))

    def asked_after(self, request: int) -> str | None:
        later = [version for version in self.open if int(version) > request]
        return later[-1] if later else None

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

    def end(self) -> None:
        """Turns until nothing is being taken down any more, and not one more."""
        while self.controller.state.phase is Phase.WITHDRAWING:
            self.world.followed[GATEWAY] = epoch = self.world.routed.epoch if self.world.routed else 0
            self._survive(lambda: self.controller.exchange(GATEWAY, epoch, [], {}, None, 0.0))  # noqa: B023
            self._survive(lambda: self.controller.turn())

    def report(self, **counters: Any) -> None:
        """What the gateway sends, again and again until it is acknowledged; nothing where nothing is judged."""
        rollout = self.controller.state.rollout
        if not (self.controller.state.judged or self.controller.state.phase is Phase.TESTING):
            return
        self.sent[rollout] = self.sent.get(rollout, 0) + 1
        report = {"gateway": GATEWAY, "sequence": self.sent[rollout], "rollout": rollout, **counters}
        self.world.followed[GATEWAY] = epoch = self.world.routed.epoch if self.world.routed else 0
        self._survive(lambda: self.controller.exchange(GATEWAY, epoch, [], {}, report, 0.0))

    def labels(self, count: int, difference: float) -> None:
        days = tuple(PairedDay(20_000 + i, 240, difference) for i in range(count))
        rollout = self.controller.state.rollout
        self._survive(lambda: self.controller.take_labels(rollout, days))

    def skew(self) -> None:
        found = Skew(checked=150, mismatched=30, features={"demand_mean_1h": 30, "hour": 2})
        self._survive(lambda: self.controller.take_skew(found))

    def results(self, *means: float) -> None:
        arms = tuple(Arm(v, 400, Sample(400, mean, 1.0)) for v, mean in zip("189", means, strict=True))
        rollout = self.controller.state.rollout
        self._survive(lambda: self.controller.take_results(rollout, arms))

    def ask(self, odd: bool = False) -> None:
        version = str(1 + len(self.world.open) + len(self.world.closed))
        self.world.open.append(version)
        if odd:
            self.world.odd.add(version)

    def command(self, name: str) -> None:
        self._say(lambda reason: self.controller.command(name, "someone", reason))

    def test(self) -> None:
        self._say(lambda reason: self.controller.start_test(TEST, "someone", reason))

    def _say(self, word: Callable[[str], None]) -> None:
        self.said += 1
        reason = f"because {self.said}"

        def act() -> None:  # an operator without an answer looks whether it was heard
            if any(entry.payload.get("reason") == reason for entry in self.journal.read()):
                return
            with contextlib.suppress(NotAllowed):
                word(reason)

        self._survive(act)


STEPS = {
    "wait": lambda play: setattr(play.clock, "time", play.clock.time + 7 * HOUR),
    "day": lambda play: setattr(play.clock, "time", play.clock.time + 24 * HOUR),
    "copies": lambda play: play.report(copies=150),
    "coins": lambda play: play.report(copies=150, errors={"0.5": (20, 0)}),
    "healthy": lambda play: play.report(exposed={"0.1": (60, 540), "0.5": (250, 250)}, served=310),
    "errors": lambda play: play.report(exposed={"0.1": (10, 90)}, errors={"0.1": (12, 0)}, harmed=12, accidents=12),
    "harm": lambda play: play.report(harmed=30, accidents=30),
    "better": lambda play: play.labels(25, -0.05),
    "worse": lambda play: play.labels(25, 0.07),
    "skew": lambda play: play.skew(),
    "pause": lambda play: play.command("pause"),
    "resume": lambda play: play.command("resume"),
    "approve": lambda play: play.command("approve"),
    "abort": lambda play: play.command("abort"),
    "revert": lambda play: play.command("revert"),
    "test": lambda play: play.test(),
    "end": lambda play: play.end(),
    "even": lambda play: play.report(arms=(500, 300, 200), served=500),
    "uneven": lambda play: play.report(arms=(800, 200, 200)),
    "better variant": lambda play: play.results(5.0, 5.0, 4.0),
    "worse variants": lambda play: play.results(5.0, 6.0, 7.0),
    "unclear": lambda play: play.results(5.0, 5.0, 5.0),
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
    [*SHADOWED, "skew", "copies", "wait", "settle", "resume"],
    ["settle", *APPROVED, "revert", "revert", "ask", "settle", "copies", "wait", "settle", "abort", "settle", "revert"],
    ["settle", *APPROVED, "ask", "settle", "revert", "settle", "ask", "settle"],
    ["settle", *APPROVED, "coins", "day", "settle", "revert", "ask", "settle"],
    ["settle", *APPROVED, "worse", "day", "settle", "ask", "settle"],
    ["settle", *APPROVED, "better", "wait", "settle", "day", "settle", "coins", "revert", "settle"],
    ["settle", "test", "settle", "even", "better variant", "wait", "better variant", "pause", "settle", "copies"],
    ["settle", "test", "settle", "uneven", "resume", "even", "wait", "worse variants", "abort", "settle", "ask"],
    ["settle", "test", "ask", "test", "settle", "harm", "abort", "settle", "test", "abort"],
    ["settle", *APPROVED, "test", "settle", "unclear", "day", "day", "settle", "revert", "test", "pause", "day", "day"],
    ["settle", *APPROVED, "test", "settle", "revert", "settle", "test"],
    [*SHADOWED, "abort", "end", "test", "settle", "abort", "settle"],
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
        elif before.state.phase is Phase.TESTING and entry.payload.get("by") is None:
            kinds += _replayed_test_decision(before, entry)
        before = before.after(entry)
    kept = journal.situation()
    assert (kept.state, kept.sequence) == (before.state, before.sequence)
    return kinds


def _replayed_test_decision(before: Situation, entry: JournalEntry) -> list[Kind]:
    """The kind of what the evidence of an A/B test led to, found to follow from it; nothing for anything else."""
    if entry.kind not in (Kind.TEST_ENDED, Kind.PAUSED) or "does not run" in entry.payload["reason"]:
        return []
    again = comparison.verdict(before.test, before.tested, before.state.paused, before.evidence, entry.at_us)
    assert again.reason == entry.payload["reason"]
    assert again.pause == (entry.kind == Kind.PAUSED)
    assert (again.outcome, again.winner) == (entry.payload.get("outcome"), entry.payload.get("winner"))
    return [Kind(entry.kind)]


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
