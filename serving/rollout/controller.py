"""The rollout controller of one use case: takes evidence in, decides, and makes the world what the state requires.

Every event is journalled before anything is done about it, and every effect may be repeated, so a controller that is
killed between any two of them goes on where it was. It never stands in a request's way: gateways keep their last
table without it. The Ray actor around it is ``serving.rollout.actor``.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from cluster.clock import Clock
from cluster.database import ReleaseRequest, StaleEpoch, StaleJournal
from pipelines.spec import ABTest, ReleasePolicy, UseCase
from pipelines.validation.arms import Arm
from pipelines.validation.paired import PairedDay
from serving.rollout import comparison
from serving.rollout.evidence import Report, Skew
from serving.rollout.journal import Journal, Situation
from serving.rollout.judge import Action, Verdict, judge
from serving.rollout.machine import Effect, Kind, NotAllowed, Outcome, Phase, State, required
from serving.rollout.projections import WAITING, alerts, document, finite
from serving.rollout.world import Standing, World

START_TIMEOUT_S = 180.0
PROMOTE_TIMEOUT_S = 90.0
APPLY_TIMEOUT_S = 15.0
_LOOK_EVERY_S, _REQUESTS_EVERY_S = 2.0, 0.25


COMMANDS = {
    "pause": Kind.PAUSED,
    "resume": Kind.RESUMED,
    "approve": Kind.APPROVED,
    "abort": Kind.ABORTED,
    "revert": Kind.REVERTED,
}


def _salt() -> str:
    return secrets.token_hex(8)


@dataclass
class _Seen:
    """What was seen of the world since the state began; the next state begins without any of it. Real seconds.

    ``looked`` is when something was last asked of it, ``absent`` since when the challenger's application is gone,
    ``told`` when the table without the challenger was first seen in force, and ``unrouted_s`` how long after the
    decision nobody asked it any more. ``waiting`` is what a challenger that runs was last said to wait for. ``ran``:
    all variants of a test were seen to run.
    """

    entered: float
    looked: float = -math.inf
    absent: float | None = None
    told: float | None = None
    unrouted_s: float | None = None
    waiting: str | None = None
    ran: bool = False


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
        self._seen = _Seen(real())
        self._applied: dict[str, int] = {}
        self._prepared: dict[str, set[str]] = {}

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
            self._applied[gateway], self._prepared[gateway] = epoch, set(prepared)
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
        self._go_on_from(following)

    def _reread(self) -> None:
        """Another controller acted: its word counts."""
        found, self.table, self._made_true = self._journal.situation(), self._world.table(), None
        self._go_on_from(found)

    def _go_on_from(self, following: Situation) -> None:
        before, self.situation = self.state, following
        if self.state != before:
            same = (before.phase, before.rollout) == (self.state.phase, self.state.rollout)
            self._seen = _Seen(self._real(), ran=same and self._seen.ran)
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
            self._end_test(found.outcome, found.reason, found.winner)
        elif found.pause:
            self._record(Kind.PAUSED, {"guardrail": "sample_ratio", "reason": found.reason})
            self._route()

    def _end_test(self, outcome: Outcome, reason: str, winner: str | None = None) -> None:
        self._record(Kind.TEST_ENDED, {"outcome": outcome, "winner": winner, "reason": reason})
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
                    self._world.tell(alerts(state))
                    self._seen.waiting = None
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
        state = self.state
        match state.phase:
            case Phase.EMPTY | Phase.IDLE | Phase.WATCHING:
                self._observe_requests(state)
            case Phase.STARTING:
                self._observe_start(state)
            case Phase.SHADOW | Phase.CANARY:
                self._observe_trial(state)
            case Phase.PROMOTING:
                self._observe_promotion(state)
            case Phase.TESTING:
                self._observe_test(state)
            case Phase.WITHDRAWING:
                self._observe_withdrawal(state)

    def _observe_requests(self, state: State) -> None:
        if state.phase is Phase.EMPTY and self.table is not None:
            # A champion from before there was a journal stays what it is.
            self._record(Kind.ADOPTED, {"version": self.table.champion, "reason": "it answered already"})
            return
        ready = state.phase is Phase.EMPTY or state == self._made_true
        if not ready or not self._due(_REQUESTS_EVERY_S):
            return
        request = self._world.next_request()
        if request is None:
            return
        if state.phase is Phase.EMPTY:
            self._record(
                Kind.ADOPTED,
                {"version": request.version, **request.payload, "request_sequence": request.sequence},
            )
            return
        given = request.payload.get("policy")
        try:
            policy = self._use_case.release if given is None else ReleasePolicy.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            self._refuse(request, f"its policy does not fit this code: {first['loc']}: {first['msg']}")
            return
        if request.version == state.champion:
            self._refuse(request, "it is the champion already")
            return
        self._record(
            Kind.STARTED,
            {
                "version": request.version,
                "champion": state.champion,
                "weights": [step.weight for step in policy.steps],
                "salt": self._draw(),
                "policy": policy.model_dump(mode="json"),
                "request": request.payload,
                "request_sequence": request.sequence,
            },
        )

    def _refuse(self, request: ReleaseRequest, reason: str) -> None:
        """Journals it; the state has it closed, and until that is done no request is looked at."""
        payload = {"version": request.version, "reason": reason, "request_sequence": request.sequence}
        self._record(Kind.REFUSED, payload)
        self._made_true = None  # also when it was refused before under the same number

    def _due(self, every_s: float) -> bool:
        """True once in that time, and at once after the state has changed."""
        due = self._real() - self._seen.looked >= every_s
        if due:
            self._seen.looked = self._real()
        return due

    def _superseded(self, state: State) -> bool:
        """Ends a trial whose policy gives way to a version whose release was asked for later."""
        if state.request is None or not self.situation.policy.supersede:
            return False
        newer = self._world.asked_after(state.request)
        if newer is not None:
            self._record(Kind.SUPERSEDED, {"reason": f"the release of version {newer} was asked for after it"})
        return newer is not None

    def _observe_start(self, state: State) -> None:
        if self._due(_LOOK_EVERY_S) and self._superseded(state):
            return
        standing, why = self._world.standing(state.challenger or "")
        if standing is Standing.RUNNING:
            lacking = self._world.lacking(state.champion or "", state.challenger or "")
            if lacking is None:
                self._record(Kind.READY, {})
                return
            why = lacking
            if why != self._seen.waiting:
                self._world.tell({**alerts(state), WAITING: f"version {state.challenger} waits: {why}"})
                self._seen.waiting = why
        if standing is Standing.FAILED:
            self._record(Kind.FAILED, {"reason": why})
        elif self._since_entered() > START_TIMEOUT_S:
            self._record(Kind.FAILED, {"reason": f"it was not ready within {START_TIMEOUT_S:g} s: {why}"})

    def _observe_trial(self, state: State) -> None:
        if not self._due(_LOOK_EVERY_S) or self._superseded(state):
            return
        if self._gone_for_good(state):
            self._record(Kind.FAILED, {"reason": "its application is gone and does not come back"})

    def _observe_test(self, state: State) -> None:
        if not self._due(_LOOK_EVERY_S):
            return
        # What has answered did run; a replica that is being replaced later is no reason to end a test.
        ran = self._seen.ran or self.situation.evidence.served > 0
        if not ran and not self._run(state):
            return
        self._seen.ran = True
        if self._gone_for_good(state):
            self._end_test(Outcome.LOST, "an application of a variant is gone and does not come back")

    def _run(self, state: State) -> bool:
        """Whether all variants run, with the state that they answer from; ends a test in which one does not."""
        for version in state.variants:
            standing, why = self._world.standing(version)
            if standing is Standing.FAILED:
                self._end_test(Outcome.LOST, f"version {version} does not run: {why}")
                return False
            if standing is Standing.RUNNING:
                lacking = self._world.lacking(state.champion or "", version)
                if lacking is None:
                    continue
                why = lacking
            if self._since_entered() > START_TIMEOUT_S:
                self._end_test(Outcome.LOST, f"version {version} did not run within {START_TIMEOUT_S:g} s: {why}")
            return False
        return True

    def _gone_for_good(self, state: State) -> bool:
        """Whether an application that had been deployed has been absent for too long, although it is deployed again."""
        if all(self._world.standing(version)[0] is not Standing.ABSENT for version in state.applications):
            self._seen.absent = None
            return False
        # The whole cluster may have been started anew, which is no fault of the version.
        self._made_true = None
        self._seen.absent = self._seen.absent or self._real()
        return self._real() - self._seen.absent > START_TIMEOUT_S

    def _observe_promotion(self, state: State) -> None:
        live = self._world.gateways()
        waiting = [gateway for gateway in live if state.challenger not in self._prepared.get(gateway, ())]
        if live and not waiting:
            self._record(Kind.PROMOTED, {"gateways": live, "replaced": state.champion})
        elif self._since_entered() > PROMOTE_TIMEOUT_S:
            reason = f"not loaded within {PROMOTE_TIMEOUT_S:g} s by {waiting or 'any gateway: none is alive'}"
            self._record(Kind.FAILED, {"reason": reason})

    def _observe_withdrawal(self, state: State) -> None:
        if self.table is not None and self.table.tried:
            return  # the table without it could not be put in force yet: it is still being asked
        if self._seen.told is None:
            self._seen.told = self._real()
        live = self._world.gateways()
        if self._seen.unrouted_s is None:
            followed = all(self._applied.get(gateway, 0) >= self._epoch() for gateway in live)
            if not followed and self._real() - self._seen.told <= APPLY_TIMEOUT_S:
                return  # first nobody asks it any more, then it goes
            self._seen.unrouted_s = self._since_entered()
            self._applied = {gateway: self._applied.get(gateway, 0) for gateway in live}
            self._prepared = {gateway: self._prepared.get(gateway, set()) for gateway in live}
        left = [v for v in state.applications if self._world.standing(v)[0] is not Standing.ABSENT]
        if not left:
            if state.outcome is Outcome.WON and state.ended is not None:
                # As long as this is not journalled no request is looked at, so that asking again asks for nothing more.
                begun = self.situation.begun
                forced = state.ended in begun.get("forced", ())
                self._world.ask(state.ended, begun["by"], f"it won A/B test {state.rollout}", forced=forced)
            self._record(
                Kind.WITHDRAWN, {"zero_weight_s": round(self._seen.unrouted_s, 4), "watch": self._is_to_be_watched()}
            )
        elif self._due(_LOOK_EVERY_S):
            for version in left:
                self._world.withdraw(version)

    def _is_to_be_watched(self) -> bool:
        try:
            return not self.state.test and self.situation.policy.watch is not None
        except ValidationError:
            return False

    def _epoch(self) -> int:
        return self.table.epoch if self.table is not None else 0

    def _since_entered(self) -> float:
        return self._real() - self._seen.entered


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
