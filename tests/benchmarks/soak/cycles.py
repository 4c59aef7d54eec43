"""Releases one after the other: a good version is promoted, and taken back every other time; a bad one is withdrawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import httpx

from pipelines.spec import CanaryStep, ReleasePolicy, Shadow
from serving.client import TidegateError
from serving.drills import Drill
from serving.rollout.journal import Situation
from serving.rollout.machine import Kind, Outcome, Phase, State
from serving.wire import RolloutStatus
from tests.benchmarks.harness import say
from tests.benchmarks.soak.kills import Killer
from tests.benchmarks.soak.load import Load
from tests.benchmarks.soak.place import Place

POLICY = ReleasePolicy(
    shadow=Shadow(requests=20, time=timedelta(0)),
    steps=(CanaryStep(weight=0.5, requests=30, time=timedelta(0)),),
    harm_cap=10_000,
    watch=None,
)
BAD = (Drill(nan=1.0), Drill(errors=1.0), Drill(shape=1.0))
_OVER_S, _REVERTED_S, _TAKEN_S = 300.0, 60.0, 60.0
_TRIES = 5  # of one promotion, when its challengers are killed
_QUIET_S = 0.5  # so long only the version before answers, and it counts as back
_LOOK_S = 0.05


@dataclass
class Done:
    """What came of it. ``wrong`` are rollouts that ended otherwise than they should have.

    ``zero_weight`` are the journal's seconds from each decision until no gateway asked the challenger any more, and
    when (monotonic seconds) that was read.
    """

    promoted: int = 0
    rolled_back: int = 0
    killed_in_trial: int = 0
    orders_repeated: int = 0
    wrong: list[str] = field(default_factory=list)
    revert_s: list[float] = field(default_factory=list)
    zero_weight: list[tuple[float, float]] = field(default_factory=list)


class Cycles:
    """The operator who releases, and what he counts."""

    def __init__(self, place: Place, load: Load, killer: Killer) -> None:
        self.done = Done()
        self._place, self._load, self._killer = place, load, killer
        self._client = place.client(timeout_s=30)
        self._known = Situation()

    def run(self, cycles: int) -> Done:
        """So many promotions and as many withdrawals."""
        with self._client:
            for number in range(1, cycles + 1):
                began, before = time.monotonic(), str(self._state().champion)
                good = self._promote()
                if number % 2:
                    self._revert(before, good)
                self._withdraw(BAD[number % len(BAD)])
                say(f"cycle {number} of {cycles}: {time.monotonic() - began:.1f} s, {self._load.answers:,} answers")
        return self.done

    def _promote(self) -> str:
        for _ in range(_TRIES):
            began = time.monotonic()
            version = self._place.copy(str(self._state().champion), None)
            ended = self._release(version)
            if ended.outcome is Outcome.PROMOTED:
                self.done.promoted += 1
                self._until(lambda: version in self._load.last, f"callers get {version}", _TAKEN_S)  # noqa: B023
                return version
            # Judged by its answers, a challenger that was killed is a bad one.
            if self._killer.killed("challenger", began, time.monotonic()):
                self.done.killed_in_trial += 1
            else:
                self.done.wrong.append(f"version {version} is good and was {ended.outcome}: {self._why(version)}")
        raise RuntimeError(f"no version was promoted in {_TRIES} tries: {self.done.wrong}")

    def _withdraw(self, drill: Drill) -> None:
        version = self._place.copy(str(self._state().champion), drill)
        self._load.unfit.add(version)
        ended = self._release(version)
        if ended.outcome is Outcome.ROLLED_BACK:
            self.done.rolled_back += 1
        else:
            self.done.wrong.append(f"version {version} is bad and was {ended.outcome}")

    def _release(self, version: str) -> State:
        """The state in which the rollout of that version has left the release."""

        def taken(now: RolloutStatus) -> bool:
            return version in (now.challenger, now.ended, *now.waiting)

        before, since = self._state(), self._known.sequence
        self._order(lambda: self._client.rollout_start(version, policy=POLICY), taken)
        self._until(lambda: self._state().ended == version and self._state().phase is Phase.IDLE, version, _OVER_S)
        ended = self._state()
        replaced = ended.outcome is Outcome.PROMOTED
        wanted = (version, before.champion) if replaced else (before.champion, before.previous)
        if (ended.champion, ended.previous) != wanted:
            self.done.wrong.append(f"after {version} the champion is {ended.champion}, before it {ended.previous}")
        took = [e.payload["zero_weight_s"] for e in self._place.journal.read(since) if e.kind == Kind.WITHDRAWN]
        self.done.zero_weight += [(seconds, time.monotonic()) for seconds in took]
        return ended

    def _revert(self, before: str, good: str) -> None:
        """Takes the promoted version back and sees how long any other than the one before it still answers."""

        def taken(now: RolloutStatus) -> bool:
            return now.champion == before and now.reverted == good

        said = self._order(lambda: self._client.rollout_command("revert", "the soak"), taken)
        self._until(lambda: time.monotonic() - max(said, self._load.last.get(good, 0)) > _QUIET_S, "back", _REVERTED_S)
        self.done.revert_s.append(max(self._load.last.get(good, 0) - said, 0.0))

    def _order(self, order: Callable[[], object], taken: Callable[[RolloutStatus], bool]) -> float:
        """Has an operator's word taken; when (monotonic seconds) it was first said.

        It is no request that may be sent twice unseen: one that came to nothing is looked after before it is repeated.
        """
        said = time.monotonic()
        while True:
            try:
                order()
                return said
            except (TidegateError, httpx.TransportError):
                if taken(self._client.rollout()):
                    return said
                if time.monotonic() - said > _TAKEN_S:
                    raise
            self.done.orders_repeated += 1
            time.sleep(_LOOK_S)

    def _state(self) -> State:
        self._known = self._place.journal.situation(self._known)
        return self._known.state

    def _why(self, version: str) -> object:
        ends = (Kind.ROLLED_BACK, Kind.FAILED, Kind.ABORTED, Kind.INCONCLUSIVE)
        return [entry.payload.get("reason") for entry in self._place.journal.read() if entry.kind in ends][-1:]

    def _until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {seconds:g} s: {what}; the release is {self._state()}")
            time.sleep(_LOOK_S)
