"""What a rollout controller sees of the world, and which event that is: a request, an application that runs or does
not, gateways that have loaded a version or no longer ask one, and time that has passed.

Nothing is journalled here. A finding that was not journalled is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from cluster.database import ReleaseRequest
from pipelines.spec import ReleasePolicy, UseCase
from serving.rollout.journal import Situation
from serving.rollout.machine import Kind, Outcome, Phase, State
from serving.rollout.projections import WAITING, alerts
from serving.rollout.world import Standing, World
from serving.routing import RoutingTable

START_TIMEOUT_S = 180.0
PROMOTE_TIMEOUT_S = 90.0
APPLY_TIMEOUT_S = 15.0
_LOADERS = 3  # one that ends for another reason is no fault of the version
_LOOK_EVERY_S, _REQUESTS_EVERY_S = 2.0, 0.25


@dataclass(frozen=True)
class Finding:
    """An event that is to be journalled, None when nothing happened; ``redo`` when what the state requires has to be
    done again, whether or not it was done before.
    """

    kind: Kind | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)
    redo: bool = False


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


class Lookout:
    """Looks at the world for one controller, which sees to it that nobody else does at the same time."""

    def __init__(self, use_case: UseCase, world: World, real: Callable[[], float], draw: Callable[[], str]) -> None:
        self._use_case = use_case
        self._world = world
        self._real = real  # time-outs of machinery are real time, also under a replay clock
        self._draw = draw
        self._seen = _Seen(real())
        self._applied: dict[str, int] = {}
        self._prepared: dict[str, set[str]] = {}

    def hear(self, gateway: str, epoch: int, prepared: list[str]) -> None:
        """Which table a gateway follows, and which versions it has loaded."""
        self._applied[gateway], self._prepared[gateway] = epoch, set(prepared)

    def begin(self, before: State, state: State) -> None:
        """The state has changed."""
        same = (before.phase, before.rollout) == (state.phase, state.rollout)
        self._seen = _Seen(self._real(), ran=same and self._seen.ran)

    def told(self) -> None:
        """The alerts of the state were told anew, without what a challenger waits for."""
        self._seen.waiting = None

    def look(self, situation: Situation, table: RoutingTable | None, settled: bool) -> Finding:
        """What has happened; ``settled`` when everything is done that the state requires."""
        state = situation.state
        match state.phase:
            case Phase.EMPTY | Phase.IDLE | Phase.WATCHING:
                return self._requests(state, table, settled)
            case Phase.STARTING:
                return self._start(situation)
            case Phase.SHADOW | Phase.CANARY:
                return self._trial(situation)
            case Phase.PROMOTING:
                return self._promotion(state)
            case Phase.TESTING:
                return self._test(situation)
            case Phase.WITHDRAWING:
                return self._withdrawal(situation, table)

    def _requests(self, state: State, table: RoutingTable | None, settled: bool) -> Finding:
        if state.phase is Phase.EMPTY and table is not None:
            # A champion from before there was a journal stays what it is.
            return Finding(Kind.ADOPTED, {"version": table.champion, "reason": "it answered already"})
        ready = state.phase is Phase.EMPTY or settled
        if not ready or not self._due(_REQUESTS_EVERY_S):
            return Finding()
        request = self._world.next_request()
        if request is None:
            return Finding()
        if state.phase is Phase.EMPTY:
            payload = {"version": request.version, **request.payload, "request_sequence": request.sequence}
            return Finding(Kind.ADOPTED, payload)
        given = request.payload.get("policy")
        try:
            policy = self._use_case.release if given is None else ReleasePolicy.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            return _refusal(request, f"its policy does not fit this code: {first['loc']}: {first['msg']}")
        if request.version == state.champion:
            return _refusal(request, "it is the champion already")
        return Finding(
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

    def _superseded(self, situation: Situation) -> Finding:
        """Ends a trial whose policy gives way to a version whose release was asked for later."""
        request = situation.state.request
        if request is None or not situation.policy.supersede:
            return Finding()
        newer = self._world.asked_after(request)
        if newer is None:
            return Finding()
        return Finding(Kind.SUPERSEDED, {"reason": f"the release of version {newer} was asked for after it"})

    def _start(self, situation: Situation) -> Finding:
        state = situation.state
        if self._due(_LOOK_EVERY_S) and (superseded := self._superseded(situation)).kind:
            return superseded
        standing, why = self._world.standing(state.challenger or "")
        if standing is Standing.RUNNING:
            lacking = self._world.lacking(state.champion or "", state.challenger or "")
            if lacking is None:
                return Finding(Kind.READY)
            why = lacking
            if why != self._seen.waiting:
                self._world.tell({**alerts(situation), WAITING: f"version {state.challenger} waits: {why}"})
                self._seen.waiting = why
        if standing is Standing.FAILED:
            return Finding(Kind.FAILED, {"reason": why})
        if self._since_entered() > START_TIMEOUT_S:
            return Finding(Kind.FAILED, {"reason": f"it was not ready within {START_TIMEOUT_S:g} s: {why}"})
        return Finding()

    def _trial(self, situation: Situation) -> Finding:
        if not self._due(_LOOK_EVERY_S):
            return Finding()
        if (superseded := self._superseded(situation)).kind:
            return superseded
        gone = self._absent_s(situation.state)
        if gone is not None and gone > START_TIMEOUT_S:
            return Finding(Kind.FAILED, {"reason": "its application is gone and does not come back"}, redo=True)
        return Finding(redo=gone is not None)

    def _test(self, situation: Situation) -> Finding:
        if not self._due(_LOOK_EVERY_S):
            return Finding()
        # What has answered did run; a replica that is being replaced later is no reason to end a test.
        if not self._seen.ran and not situation.evidence.served:
            ran, why = self._run(situation.state)
            if not ran:
                return Finding() if why is None else _lost(why)
        self._seen.ran = True
        gone = self._absent_s(situation.state)
        if gone is not None and gone > START_TIMEOUT_S:
            return _lost("an application of a variant is gone and does not come back")
        return Finding(redo=gone is not None)

    def _run(self, state: State) -> tuple[bool, str | None]:
        """Whether all variants run, with the state that they answer from, and why one never will."""
        for version in state.variants:
            standing, why = self._world.standing(version)
            if standing is Standing.FAILED:
                return False, f"version {version} does not run: {why}"
            if standing is Standing.RUNNING:
                lacking = self._world.lacking(state.champion or "", version)
                if lacking is None:
                    continue
                why = lacking
            late = self._since_entered() > START_TIMEOUT_S
            return False, f"version {version} did not run within {START_TIMEOUT_S:g} s: {why}" if late else None
        return True, None

    def _absent_s(self, state: State) -> float | None:
        """For how long an application that had been deployed has been absent; None when all are there.

        It is to be deployed again: the whole cluster may have been started anew, which is no fault of the version.
        """
        if all(self._world.standing(version)[0] is not Standing.ABSENT for version in state.applications):
            self._seen.absent = None
            return None
        self._seen.absent = self._seen.absent or self._real()
        return self._real() - self._seen.absent

    def _promotion(self, state: State) -> Finding:
        live = self._world.gateways()
        if not state.everywhere:
            return self._first(state, live)
        waiting = [gateway for gateway in live if state.challenger not in self._prepared.get(gateway, ())]
        if live and not waiting:
            return Finding(Kind.PROMOTED, {"gateways": live, "replaced": state.champion})
        if self._since_entered() > PROMOTE_TIMEOUT_S:
            reason = f"not loaded within {PROMOTE_TIMEOUT_S:g} s by {waiting or 'any gateway: none is alive'}"
            return Finding(Kind.FAILED, {"reason": reason})
        return Finding()

    def _first(self, state: State, live: list[str]) -> Finding:
        """One gateway loads a version before the others: what ends a gateway, and was not seen before, ends one."""
        loader = state.loaders[-1] if state.loaders else None
        if loader in live:
            if state.challenger in self._prepared.get(loader, ()):
                return Finding(Kind.LOADED, {"gateway": loader})
        elif len(state.loaders) >= _LOADERS:
            return Finding(Kind.FAILED, {"reason": f"gateways ended while they loaded it: {', '.join(state.loaders)}"})
        elif fresh := [gateway for gateway in live if gateway not in state.loaders]:
            return Finding(Kind.LOADING, {"gateway": fresh[0]})
        if self._since_entered() > PROMOTE_TIMEOUT_S:
            reason = f"not loaded within {PROMOTE_TIMEOUT_S:g} s by {loader or 'any gateway: none is alive'}"
            return Finding(Kind.FAILED, {"reason": reason})
        return Finding()

    def _withdrawal(self, situation: Situation, table: RoutingTable | None) -> Finding:
        state = situation.state
        if table is not None and table.tried:
            return Finding()  # the table without it could not be put in force yet: it is still being asked
        if self._seen.told is None:
            self._seen.told = self._real()
        live, epoch = self._world.gateways(), table.epoch if table is not None else 0
        if self._seen.unrouted_s is None:
            followed = all(self._applied.get(gateway, 0) >= epoch for gateway in live)
            if not followed and self._real() - self._seen.told <= APPLY_TIMEOUT_S:
                return Finding()  # first nobody asks it any more, then it goes
            self._seen.unrouted_s = self._since_entered()
            self._applied = {gateway: self._applied.get(gateway, 0) for gateway in live}
            self._prepared = {gateway: self._prepared.get(gateway, set()) for gateway in live}
        left = [v for v in state.applications if self._world.standing(v)[0] is not Standing.ABSENT]
        if not left:
            if state.outcome is Outcome.WON and state.ended is not None:
                # As long as this is not journalled no request is looked at, so that asking again asks for nothing more.
                begun = situation.begun
                forced = state.ended in begun.get("forced", ())
                self._world.ask(state.ended, begun["by"], f"it won A/B test {state.rollout}", forced=forced)
            watch = _is_to_be_watched(situation)
            return Finding(Kind.WITHDRAWN, {"zero_weight_s": round(self._seen.unrouted_s, 4), "watch": watch})
        if self._due(_LOOK_EVERY_S):
            for version in left:
                self._world.withdraw(version)
        return Finding()

    def _due(self, every_s: float) -> bool:
        """True once in that time, and at once after the state has changed."""
        due = self._real() - self._seen.looked >= every_s
        if due:
            self._seen.looked = self._real()
        return due

    def _since_entered(self) -> float:
        return self._real() - self._seen.entered


def _refusal(request: ReleaseRequest, reason: str) -> Finding:
    """The state has the request closed, and until that is done none is looked at; so it is also when a request was
    refused before under the same number.
    """
    payload = {"version": request.version, "reason": reason, "request_sequence": request.sequence}
    return Finding(Kind.REFUSED, payload, redo=True)


def _lost(reason: str) -> Finding:
    return Finding(Kind.TEST_ENDED, {"outcome": Outcome.LOST, "winner": None, "reason": reason})


def _is_to_be_watched(situation: Situation) -> bool:
    try:
        return not situation.state.test and situation.policy.watch is not None
    except ValidationError:
        return False
