"""The rollout controller of one use case: takes evidence in, decides, and makes the world what the state requires.

Every event is journalled before anything is done about it, and every effect may be repeated, so a controller that is
killed between any two of them goes on where it was. It never stands in a request's way: gateways keep their last
table without it. The Ray actor around it is ``serving.rollout.actor``.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from cluster.clock import Clock
from cluster.database import JournalEntry, StaleEpoch, StaleJournal
from pipelines.spec import ABTest, UseCase
from pipelines.validation.arms import Arm
from pipelines.validation.paired import PairedDay
from serving.rollout import comparison
from serving.rollout.announcements import announcement
from serving.rollout.evidence import Report, Skew
from serving.rollout.journal import Journal, Situation
from serving.rollout.judge import Action, Verdict, judge
from serving.rollout.lookout import Lookout
from serving.rollout.machine import TABLE, Effect, Kind, NotAllowed, Outcome, Phase, State, required
from serving.rollout.projections import alerts, document, finite
from serving.rollout.world import World

logger = logging.getLogger(__name__)

COMMANDS = {
    "pause": Kind.PAUSED,
    "resume": Kind.RESUMED,
    "approve": Kind.APPROVED,
    "abort": Kind.ABORTED,
    "revert": Kind.REVERTED,
}


def _salt() -> str:
    return secrets.token_hex(8)


class Controller:
    """One use case's rollouts. Safe to call from several threads; ``turn`` is to be called again and again."""

    def __init__(
        self,
        use_case: UseCase,
        journal: Journal,
        world: World,
        clock: Clock,
        real: Callable[[], float] = time.monotonic,
        draw: Callable[[], str] = _salt,
    ) -> None:
        self._use_case = use_case
        self._journal = journal
        self._world = world
        self._clock = clock
        self._draw = draw
        self._real = real  # time-outs of machinery are real time, also under a replay clock
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.situation = journal.situation()
        self.table = world.table()
        self._made_true: State | None = None
        self._lookout = Lookout(use_case, world, real, draw)

    @property
    def state(self) -> State:
        """The state after the last journalled event."""
        return self.situation.state

    def exchange(
        self,
        gateway: str,
        epoch: int,
        prepared: list[str],
        refused: dict[str, str],
        report: dict[str, Any] | None,
        wait_s: float,
    ) -> dict[str, Any] | None:
        """A gateway's call: takes its report, and answers with a newer table or, after ``wait_s``, with None.

        ``epoch`` is the table it follows, ``prepared`` the versions it has loaded, ``refused`` those it could not load.
        When this returns, the report is journalled and what follows from it is decided.
        """
        with self._lock:
            self._lookout.hear(gateway, epoch, prepared)
            if report is not None:
                self._take(Report.model_validate(report))
            if self.state.phase is Phase.PROMOTING and self.state.challenger in refused:
                reason = refused[self.state.challenger]
                self._record(Kind.FAILED, {"reason": f"gateway {gateway} cannot load it: {reason}"})
            self._changed.notify_all()
            until = self._real() + wait_s
            while (self.table is None or self.table.epoch <= epoch) and (left := until - self._real()) > 0:
                self._changed.wait(left)
            newer = self.table is not None and self.table.epoch > epoch
            return self.table.model_dump(mode="json", exclude_none=True) if newer and self.table is not None else None

    def command(self, name: str, by: str, reason: str = "", *, of_test: bool = False) -> None:
        """An operator's word, one of ``COMMANDS``; raises ``NotAllowed`` when it does not fit.

        With ``of_test`` it is meant for an A/B test and for nothing else that may be under way by now.
        """
        if name not in COMMANDS:
            raise NotAllowed(f"{name!r} is none of {', '.join(COMMANDS)}")
        with self._lock:
            if of_test and self.state.phase is not Phase.TESTING:
                raise NotAllowed(f"no A/B test is running: the release is {self.state.phase}")
            takes = TABLE[self.state.phase]
            if COMMANDS[name] not in takes:
                fits = [command for command, kind in COMMANDS.items() if kind in takes]
                fits += ["start"] if Kind.STARTED in takes else []
                said = f"{name} does not fit a release that is {self.state.phase}"
                raise NotAllowed(f"{said}; what fits: {', '.join(fits) or 'nothing'}")
            self._record(COMMANDS[name], {"by": by, "reason": reason})
            self._changed.notify_all()  # the next turn does what follows

    def start_test(self, test: ABTest, by: str, reason: str, forced: tuple[str, ...] = ()) -> None:
        """Begins an A/B test; raises ``NotAllowed`` while anything else is being tried, or without a champion.

        ``forced`` are those of its versions whose gates did not pass.
        """
        with self._lock:
            if self.state.phase in (Phase.IDLE, Phase.WATCHING):
                self._perform()  # the request of what ended before is closed, or it would be taken up again
            if self.state.champion in test.versions:
                raise NotAllowed(f"version {self.state.champion} is the champion: it is part of every test")
            self._record(
                Kind.TEST_STARTED,
                {
                    "test": test.model_dump(mode="json"),
                    "champion": self.state.champion,
                    "salt": self._draw(),
                    "by": by,
                    "reason": reason,
                    "forced": list(forced),
                },
            )
            self._changed.notify_all()

    def take_results(self, rollout: int, arms: tuple[Arm, ...]) -> None:
        """The arms of an A/B test by the outcomes known now; they are journalled, and what follows is decided."""
        with self._lock:
            if self.state.phase is not Phase.TESTING or self.state.rollout != rollout:
                return
            known = self.situation.evidence.results
            if arms and (not known or known[-1].arms != arms):
                payload = {"at_us": self._clock.now(), "arms": [asdict(arm) for arm in arms]}
                self._record(Kind.TEST_RESULTS, payload)
            self._judge()

    def take_labels(self, rollout: int, days: tuple[PairedDay, ...]) -> None:
        """The complete days of a rollout with matured outcomes; known ones are not counted again."""
        with self._lock:
            fits = self.state.judged and self.state.rollout == rollout
            later = self.situation.evidence.later(days)
            if fits and later:
                self._record(Kind.LABELS, {"days": [asdict(day) for day in later]})
            self._judge()

    def take_skew(self, skew: Skew) -> None:
        """What an audit found: it pauses a rollout in shadow or canary, at once or as soon as it gets there.

        A finding that is repeated until it is taken counts once.
        """
        with self._lock:
            fits = self.state.tried or self.state.phase is Phase.STARTING
            if fits and self.situation.evidence.skew != skew:
                self._record(Kind.SKEW, skew.model_dump(mode="json"))
            self._judge()

    def turn(self) -> None:
        """Makes the world what the state requires, looks at it, and decides."""
        with self._lock:
            self._refuse_unknown_policy()
            try:
                self._perform()
            finally:  # an effect that fails must not keep time-outs and verdicts from happening
                self._observe()
                self._judge()

    # What follows is called with the lock held.

    def _record(self, kind: Kind, payload: dict[str, Any]) -> None:
        try:
            following = self._journal.append(self.situation, kind, payload, self._clock.now())
        except StaleJournal:
            self._reread()
            raise
        before, entry = self.state, JournalEntry(following.sequence, kind, payload, self._clock.now())
        self._go_on_from(following)
        if (line := announcement(self._use_case.name, before, self.state, entry)) is not None:
            logger.info("%s", line)

    def _reread(self) -> None:
        """Another controller acted: its word counts."""
        found, self.table, self._made_true = self._journal.situation(), self._world.table(), None
        self._go_on_from(found)

    def _go_on_from(self, following: Situation) -> None:
        before, self.situation = self.state, following
        if self.state != before:
            self._lookout.begin(before, self.state)
            self._changed.notify_all()

    def _take(self, report: Report) -> None:
        if report.rollout > self.state.rollout:
            self._reread()
            raise StaleJournal(f"gateway {report.gateway} is in rollout {report.rollout}: the journal was read again")
        if report.rollout < self.state.rollout or not self.state.counted:
            return  # counted for a rollout that is over
        if self.situation.evidence.is_next(report):
            self._record(Kind.EVIDENCE, report.model_dump(mode="json"))
        self._judge()  # a repeated one too: a controller that was killed after it had journalled it decided nothing

    def _judge(self) -> None:
        if self.state.phase is Phase.TESTING:
            self._judge_test()
        if not self.state.judged:
            return
        situation = self.situation
        verdict = judge(situation.policy, situation.state, situation.evidence, self._clock.now())
        if verdict.action is not Action.HOLD:
            self._record(DECIDED[verdict.action], _payload(verdict, situation))
            self._route()

    def _judge_test(self) -> None:
        situation = self.situation
        found = comparison.verdict(
            situation.test, situation.tested, self.state.paused, situation.evidence, self._clock.now()
        )
        if found.outcome is not None:
            payload = {"outcome": found.outcome, "winner": found.winner, "reason": found.reason}
            self._record(Kind.TEST_ENDED, payload)
            self._route()
        elif found.pause:
            self._record(Kind.PAUSED, {"guardrail": "sample_ratio", "reason": found.reason})
            self._route()

    def _refuse_unknown_policy(self) -> None:
        """Ends a trial, a watch or a test that other code journalled with what is no policy, or test, to this code."""
        if not (self.state.judged or self.state.phase in (Phase.STARTING, Phase.TESTING)):
            return
        try:
            _ = self.situation.test if self.state.test else self.situation.policy
        except ValidationError as error:
            reason = f"what it was started with does not fit this code: {error.errors()[0]['msg']}"
            if self.state.phase is Phase.TESTING:
                self._record(Kind.TEST_ENDED, {"outcome": Outcome.LOST, "winner": None, "reason": reason})
            else:
                watched = self.state.phase is Phase.WATCHING
                self._record(Kind.CONFIRMED if watched else Kind.FAILED, {"reason": reason})

    def _perform(self) -> None:
        state = self.state
        if state == self._made_true:
            return
        for effect in required(state):
            match effect:
                case Effect.ROUTE:
                    self._route()
                case Effect.DEPLOY:
                    for version in state.applications:
                        self._world.deploy(version)
                case Effect.CLOSE:
                    if state.ended is not None and state.outcome is not None:
                        self._world.close(state.ended, state.outcome, state.request)
                    if state.refused is not None:
                        self._world.close(state.refused, "refused", state.refused_request)
                case Effect.TELL:
                    self._world.tell(alerts(self.situation))
                    self._lookout.told()
        self._made_true = state

    def _route(self) -> None:
        wanted = document(self.situation)
        if wanted is None:
            return
        try:
            self.table = self._world.publish(self.table, wanted)
        except StaleEpoch:
            self._reread()
            raise
        self._changed.notify_all()

    def _observe(self) -> None:
        found = self._lookout.look(self.situation, self.table, settled=self.state == self._made_true)
        if found.kind is not None:
            self._record(found.kind, dict(found.payload))
        if found.redo:
            self._made_true = None
        if found.kind is Kind.TEST_ENDED:
            self._route()


DECIDED = {
    Action.ADVANCE: Kind.ADVANCED,
    Action.PROMOTE: Kind.PROMOTION_BEGUN,
    Action.PAUSE: Kind.PAUSED,
    Action.ROLL_BACK: Kind.ROLLED_BACK,
    Action.GIVE_UP: Kind.INCONCLUSIVE,
    Action.CONFIRM: Kind.CONFIRMED,
}


def _payload(verdict: Verdict, situation: Situation) -> dict[str, Any]:
    evidence = situation.evidence
    return {
        "step": situation.state.step + 1,
        "guardrail": verdict.guardrail,
        "reason": verdict.reason,
        "log_e": finite(verdict.log_e),
        "threshold": verdict.threshold,
        "challenger_requests": evidence.challenger_requests(),
        "served": evidence.served,
        "harmed": evidence.harmed,
        "days": len(evidence.days),
    }
