"""The rollout as an explicit table: (phase, event) → the next state. Pure, without a clock and without I/O.

``required`` says what must be true of the world in a state. Every effect may be carried out any number of times, so
a controller that was killed anywhere replays its journal and carries out what its last state requires.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Where a use case's release stands."""

    EMPTY = "empty"  # no version answers yet
    IDLE = "idle"  # a champion answers, nothing is being tried
    STARTING = "starting"  # the challenger is being deployed
    SHADOW = "shadow"  # it gets copies
    CANARY = "canary"  # it answers a share of the instances
    PROMOTING = "promoting"  # one gateway loads and warms it, then every other
    WITHDRAWING = "withdrawing"  # it gets nothing any more and is being taken down
    WATCHING = "watching"  # it was promoted, and the version before it still gets copies
    TESTING = "testing"  # an A/B test: several versions answer, each its share of the units


class Kind(StrEnum):
    """What can happen. The journal holds events under these names."""

    ADOPTED = "champion_adopted"
    REFUSED = "request_refused"
    STARTED = "rollout_started"
    READY = "challenger_ready"
    FAILED = "challenger_failed"
    EVIDENCE = "evidence"
    LABELS = "labels"
    SKEW = "skew"
    ADVANCED = "advanced"
    PAUSED = "paused"
    RESUMED = "resumed"
    APPROVED = "approved"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    REVERTED = "reverted"
    SUPERSEDED = "superseded"
    INCONCLUSIVE = "inconclusive"
    PROMOTION_BEGUN = "promotion_begun"
    LOADING = "promotion_loading"
    LOADED = "promotion_loaded"
    PROMOTED = "promoted"
    WITHDRAWN = "withdrawn"
    CONFIRMED = "confirmed"
    TEST_STARTED = "test_started"
    TEST_RESULTS = "test_results"
    TEST_ENDED = "test_ended"


class Outcome(StrEnum):
    """How a rollout or an A/B test ended."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"
    INCONCLUSIVE = "inconclusive"
    WON = "won"  # by a variant, whose release is asked for
    LOST = "lost"  # no variant is better, or they could not go on


class Effect(StrEnum):
    """What the controller does to the world; each may be repeated without harm."""

    ROUTE = "route"  # publish the routing table of the state
    DEPLOY = "deploy"  # have the applications of the challenger, or of the variants, running
    CLOSE = "close"  # write the outcome into the release request, also into one that was refused
    TELL = "tell"  # have the alerts of the state open, and no others


class NotAllowed(RuntimeError):
    """The event does not fit the phase; the message says what would."""


@dataclass(frozen=True)
class State:
    """``weights`` are those of the canary steps; ``step`` counts from 0 and is -1 before the first.

    ``rollout`` numbers a use case's rollouts and A/B tests from 1; ``test`` says that the last one is a test, and
    ``variants`` are the versions that it has beside the champion, as long as they run. ``salt`` is drawn for each, so
    that nobody can choose a key by the version it will find. ``outcome`` and ``ended`` (that version, or the winner of
    a test) are of the last one that ended, ``request`` is the release request of the last one that began. ``refused``
    is the version whose request ``refused_request`` was refused since then, the last one if there were several.
    ``reverted`` is a champion that was taken back since then. ``loaders`` are the gateways that were asked, one after
    the other, to load a version that is promoted before all others do, and ``everywhere`` says that one of them has.
    """

    phase: Phase = Phase.EMPTY
    champion: str | None = None
    previous: str | None = None
    challenger: str | None = None
    rollout: int = 0
    weights: tuple[float, ...] = ()
    step: int = -1
    paused: bool = False
    approved: bool = False
    salt: str = ""
    request: int | None = None
    outcome: Outcome | None = None
    ended: str | None = None
    refused: str | None = None
    refused_request: int | None = None
    reverted: str | None = None
    test: bool = False
    variants: tuple[str, ...] = ()
    loaders: tuple[str, ...] = ()
    everywhere: bool = False

    @property
    def applications(self) -> tuple[str, ...]:
        """The versions that have, or had, Serve applications of their own in this phase."""
        return self.variants if self.test else (self.challenger,) if self.challenger is not None else ()

    @property
    def weight(self) -> float:
        """The challenger's share of the answers."""
        return self.weights[self.step] if self.phase in (Phase.CANARY, Phase.PROMOTING) and self.step >= 0 else 0.0

    @property
    def tried(self) -> bool:
        """Whether the challenger is being tried: it gets copies, and what becomes of them is evidence."""
        return self.phase in (Phase.SHADOW, Phase.CANARY, Phase.PROMOTING)

    @property
    def judged(self) -> bool:
        """Whether what is counted and what matures is evidence: of the challenger, or of a champion that is watched."""
        return self.tried or self.phase is Phase.WATCHING

    @property
    def counted(self) -> bool:
        """Whether what gateways count is taken in; also of what is over, as long as it is being taken down."""
        return self.judged or self.phase in (Phase.TESTING, Phase.WITHDRAWING)

    @property
    def last_step(self) -> bool:
        """Whether no canary step follows."""
        return self.step == len(self.weights) - 1


Payload = Mapping[str, Any]


def _adopted(state: State, event: Payload) -> State:
    version, request = event["version"], event.get("request_sequence")
    return replace(state, phase=Phase.IDLE, champion=version, request=request, outcome=Outcome.PROMOTED, ended=version)


def _refused(state: State, event: Payload) -> State:
    return replace(state, refused=event["version"], refused_request=event["request_sequence"])


def _started(state: State, event: Payload) -> State:
    return State(
        phase=Phase.STARTING,
        champion=state.champion,
        previous=state.previous,
        challenger=event["version"],
        rollout=state.rollout + 1,
        weights=tuple(event["weights"]),
        salt=event["salt"],
        request=event.get("request_sequence"),
    )


def _test_started(state: State, event: Payload) -> State:
    return State(
        phase=Phase.TESTING,
        champion=state.champion,
        previous=state.previous,
        rollout=state.rollout + 1,
        salt=event["salt"],
        test=True,
        variants=tuple(variant["version"] for variant in event["test"]["variants"]),
    )


def _test_ended(state: State, event: Payload) -> State:
    """``winner`` is the variant that won, None where none did."""
    ended = _ends(Outcome(event["outcome"]))(state, event)
    return replace(ended, ended=event["winner"])


def _ready(state: State, _: Payload) -> State:
    return replace(state, phase=Phase.SHADOW)


def _same(state: State, _: Payload) -> State:
    return state


def _advanced(state: State, event: Payload) -> State:
    if state.last_step:
        raise NotAllowed(f"step {state.step} is the last: what follows is promotion")
    if event["step"] != state.step + 1:
        raise NotAllowed(f"after step {state.step} comes {state.step + 1}, not {event['step']}")
    return replace(state, phase=Phase.CANARY, step=state.step + 1)


def _paused(state: State, _: Payload) -> State:
    return replace(state, paused=True)


def _resumed(state: State, _: Payload) -> State:
    return replace(state, paused=False)


def _approved(state: State, _: Payload) -> State:
    return replace(state, approved=True)


def _promotion_begun(state: State, _: Payload) -> State:
    if state.paused:
        raise NotAllowed("a paused rollout is not promoted: resume it first")
    return replace(state, phase=Phase.PROMOTING)


def _loading(state: State, event: Payload) -> State:
    return replace(state, loaders=(*state.loaders, event["gateway"]))


def _loaded(state: State, _: Payload) -> State:
    return replace(state, everywhere=True)


def _ends(outcome: Outcome) -> Callable[[State, Payload], State]:
    def end(state: State, _: Payload) -> State:
        ended = replace(state, phase=Phase.WITHDRAWING, outcome=outcome, ended=state.challenger, paused=False)
        return replace(ended, loaders=(), everywhere=False)

    return end


def _promoted(state: State, event: Payload) -> State:
    ended = _ends(Outcome.PROMOTED)(state, event)
    return replace(ended, champion=state.challenger, previous=state.champion)


def _reverted(state: State, event: Payload) -> State:
    """Back to the previous version, whatever is being tried. Then none is kept: who says it twice says it once."""
    if state.previous is None:
        raise NotAllowed(f"no version is kept that version {state.champion} could be taken back to")
    back = replace(state, champion=state.previous, previous=None, reverted=state.champion)
    if state.phase is Phase.WATCHING:
        return replace(back, phase=Phase.IDLE)
    return back if state.phase in (Phase.IDLE, Phase.WITHDRAWING) else _ends(Outcome.ABORTED)(back, event)


def _withdrawn(state: State, event: Payload) -> State:
    """``watch`` says whether a version that was promoted is to be watched; one that was taken back is not."""
    kept = state.outcome is Outcome.PROMOTED and state.previous is not None
    phase = Phase.WATCHING if kept and event.get("watch") else Phase.IDLE
    return replace(state, phase=phase, challenger=None, variants=(), weights=(), step=-1, approved=False)


def _confirmed(state: State, _: Payload) -> State:
    return replace(state, phase=Phase.IDLE)


_STOPPED = {
    Kind.ROLLED_BACK: _ends(Outcome.ROLLED_BACK),
    Kind.FAILED: _ends(Outcome.ROLLED_BACK),
    Kind.ABORTED: _ends(Outcome.ABORTED),
    Kind.REVERTED: _reverted,
}
_TRIED = {
    **_STOPPED,
    Kind.EVIDENCE: _same,
    Kind.LABELS: _same,
    Kind.SKEW: _same,
    Kind.PAUSED: _paused,
    Kind.RESUMED: _resumed,
    Kind.APPROVED: _approved,
    Kind.SUPERSEDED: _ends(Outcome.SUPERSEDED),
    Kind.INCONCLUSIVE: _ends(Outcome.INCONCLUSIVE),
}

_ANSWERING = {
    Kind.STARTED: _started,
    Kind.TEST_STARTED: _test_started,
    Kind.REFUSED: _refused,
    Kind.REVERTED: _reverted,
}

TABLE: Mapping[Phase, Mapping[Kind, Callable[[State, Payload], State]]] = {
    Phase.EMPTY: {Kind.ADOPTED: _adopted},
    Phase.IDLE: _ANSWERING,
    Phase.STARTING: {
        **_STOPPED,
        Kind.SKEW: _same,
        Kind.READY: _ready,
        Kind.SUPERSEDED: _ends(Outcome.SUPERSEDED),
    },
    Phase.SHADOW: {**_TRIED, Kind.ADVANCED: _advanced},
    Phase.CANARY: {**_TRIED, Kind.ADVANCED: _advanced, Kind.PROMOTION_BEGUN: _promotion_begun},
    Phase.PROMOTING: {
        **_STOPPED,
        Kind.EVIDENCE: _same,
        Kind.LABELS: _same,
        Kind.SKEW: _same,
        Kind.LOADING: _loading,
        Kind.LOADED: _loaded,
        Kind.PROMOTED: _promoted,
    },
    Phase.WITHDRAWING: {Kind.EVIDENCE: _same, Kind.REVERTED: _reverted, Kind.WITHDRAWN: _withdrawn},
    Phase.WATCHING: {
        **_ANSWERING,
        Kind.EVIDENCE: _same,
        Kind.LABELS: _same,
        Kind.ROLLED_BACK: _reverted,
        Kind.CONFIRMED: _confirmed,
    },
    Phase.TESTING: {
        Kind.EVIDENCE: _same,
        Kind.TEST_RESULTS: _same,
        Kind.PAUSED: _paused,
        Kind.RESUMED: _resumed,
        Kind.ABORTED: _ends(Outcome.ABORTED),
        Kind.REVERTED: _reverted,
        Kind.TEST_ENDED: _test_ended,
    },
}


def step(state: State, kind: Kind, payload: Payload) -> State:
    """The state after the event; raises ``NotAllowed`` when it does not fit."""
    handler = TABLE[state.phase].get(kind)
    if handler is None:
        fits = ", ".join(TABLE[state.phase])
        raise NotAllowed(f"{kind} does not fit a release that is {state.phase}; what fits: {fits}")
    return handler(state, payload)


def required(state: State) -> tuple[Effect, ...]:
    """What must be true of the world in this state, in the order in which it is made true.

    In WITHDRAWING the application goes once no gateway asks it any more, which the controller has to see first.
    """
    match state.phase:
        case Phase.EMPTY:
            return ()
        case Phase.IDLE | Phase.WATCHING:
            return (Effect.ROUTE, Effect.CLOSE, Effect.TELL)
        case Phase.STARTING | Phase.SHADOW | Phase.CANARY | Phase.PROMOTING | Phase.TESTING:
            return (Effect.ROUTE, Effect.DEPLOY, Effect.TELL)
        case Phase.WITHDRAWING:
            return (Effect.ROUTE, Effect.TELL)


def snapshot(state: State) -> dict[str, Any]:
    """A state without a challenger as the payload from which ``restored`` makes it again."""
    if state.phase not in (Phase.IDLE, Phase.WATCHING):
        raise ValueError(f"only an idle state is kept whole, not one that is {state.phase}")
    kept = ("phase", "champion", "previous", "rollout", "salt", "request", "outcome", "ended")
    found = {name: getattr(state, name) for name in (*kept, "refused", "refused_request", "reverted")}
    return found | ({"test": True} if state.test else {})  # code from before there were tests reads all others


def restored(payload: Payload) -> State:
    """The state that ``snapshot`` kept; of journals from before there was a watch it is idle, and no test was."""
    phase, outcome = Phase(payload.get("phase", Phase.IDLE)), Outcome(payload["outcome"])
    return State(**{**payload, "phase": phase, "outcome": outcome})
