"""Every transition of the rollout's table, and what each state requires of the world."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from serving.rollout.machine import Effect, Kind, NotAllowed, Outcome, Phase, State, required, restored, snapshot, step

IDLE = State(Phase.IDLE, champion="1", outcome=Outcome.PROMOTED, ended="1")
STARTING = State(Phase.STARTING, champion="1", challenger="2", rollout=1, weights=(0.1, 0.5), salt="pepper", request=7)
SHADOW = replace(STARTING, phase=Phase.SHADOW)
CANARY = replace(SHADOW, phase=Phase.CANARY, step=0)
LAST = replace(CANARY, step=1)
PROMOTING = replace(LAST, phase=Phase.PROMOTING)
WITHDRAWING = replace(LAST, phase=Phase.WITHDRAWING, outcome=Outcome.ROLLED_BACK, ended="2")
WATCHING = State(Phase.WATCHING, champion="1", rollout=1, salt="pepper", outcome=Outcome.PROMOTED, ended="1")
TESTING = State(Phase.TESTING, champion="1", rollout=1, salt="pepper", test=True, variants=("2", "3"))
STATES = {s.phase: s for s in (State(), IDLE, STARTING, SHADOW, CANARY, PROMOTING, WITHDRAWING, WATCHING, TESTING)}


def withdrawing(state: State, outcome: Outcome, **changes: object) -> State:
    return replace(state, phase=Phase.WITHDRAWING, outcome=outcome, ended="2", paused=False, **changes)


PAYLOAD = {
    Kind.ADOPTED: {"version": "1"},
    Kind.STARTED: {"version": "2", "weights": [0.1, 0.5], "salt": "pepper", "request_sequence": 7},
    Kind.ADVANCED: {"step": 0},
    Kind.LOADING: {"gateway": "one"},
    Kind.REFUSED: {"version": "3", "request_sequence": 9, "reason": "odd"},
    Kind.TEST_STARTED: {"test": {"variants": [{"version": "2"}, {"version": "3"}]}, "champion": "1", "salt": "pepper"},
    Kind.TEST_ENDED: {"outcome": "won", "winner": "3", "reason": "better"},
}
BACK = {"champion": "0", "previous": None, "reverted": "1"}
STOPS = {
    Kind.ROLLED_BACK: lambda s: withdrawing(s, Outcome.ROLLED_BACK),
    Kind.FAILED: lambda s: withdrawing(s, Outcome.ROLLED_BACK),
    Kind.ABORTED: lambda s: withdrawing(s, Outcome.ABORTED),
    Kind.REVERTED: lambda s: withdrawing(s, Outcome.ABORTED, **BACK),
}
TRIED = {
    **STOPS,
    Kind.INCONCLUSIVE: lambda s: withdrawing(s, Outcome.INCONCLUSIVE),
    Kind.SUPERSEDED: lambda s: withdrawing(s, Outcome.SUPERSEDED),
    Kind.EVIDENCE: lambda s: s,
    Kind.LABELS: lambda s: s,
    Kind.SKEW: lambda s: s,
    Kind.PAUSED: lambda s: replace(s, paused=True),
    Kind.RESUMED: lambda s: replace(s, paused=False),
    Kind.APPROVED: lambda s: replace(s, approved=True),
}
EXPECTED = {
    Phase.EMPTY: {Kind.ADOPTED: lambda _: IDLE},
    Phase.IDLE: {
        Kind.STARTED: lambda _: STARTING,
        Kind.TEST_STARTED: lambda _: TESTING,
        Kind.REFUSED: lambda s: replace(s, refused="3", refused_request=9),
        Kind.REVERTED: lambda s: replace(s, **BACK),
    },
    Phase.STARTING: {
        **STOPS,
        Kind.SKEW: lambda s: s,
        Kind.READY: lambda _: SHADOW,
        Kind.SUPERSEDED: lambda s: withdrawing(s, Outcome.SUPERSEDED),
    },
    Phase.SHADOW: {**TRIED, Kind.ADVANCED: lambda _: CANARY},
    Phase.CANARY: {
        **TRIED,
        Kind.ADVANCED: lambda _: LAST,
        Kind.PROMOTION_BEGUN: lambda s: replace(s, phase=Phase.PROMOTING),
    },
    Phase.PROMOTING: {
        **STOPS,
        Kind.EVIDENCE: lambda s: s,
        Kind.LABELS: lambda s: s,
        Kind.SKEW: lambda s: s,
        Kind.LOADING: lambda s: replace(s, loaders=("one",)),
        Kind.LOADED: lambda s: replace(s, everywhere=True),
        Kind.PROMOTED: lambda s: withdrawing(s, Outcome.PROMOTED, champion="2", previous="1"),
    },
    Phase.WITHDRAWING: {
        Kind.EVIDENCE: lambda s: s,
        Kind.REVERTED: lambda s: replace(s, **BACK),
        Kind.WITHDRAWN: lambda s: replace(s, phase=Phase.IDLE, challenger=None, weights=(), step=-1),
    },
    Phase.WATCHING: {
        Kind.STARTED: lambda _: replace(STARTING, rollout=2, previous="0"),
        Kind.REFUSED: lambda s: replace(s, refused="3", refused_request=9),
        Kind.REVERTED: lambda s: replace(s, phase=Phase.IDLE, **BACK),
        Kind.EVIDENCE: lambda s: s,
        Kind.LABELS: lambda s: s,
        Kind.ROLLED_BACK: lambda s: replace(s, phase=Phase.IDLE, **BACK),
        Kind.CONFIRMED: lambda s: replace(s, phase=Phase.IDLE),
        Kind.TEST_STARTED: lambda _: replace(TESTING, rollout=2, previous="0"),
    },
    Phase.TESTING: {
        Kind.EVIDENCE: lambda s: s,
        Kind.TEST_RESULTS: lambda s: s,
        Kind.PAUSED: lambda s: replace(s, paused=True),
        Kind.RESUMED: lambda s: replace(s, paused=False),
        Kind.ABORTED: lambda s: replace(withdrawing(s, Outcome.ABORTED), ended=None),
        Kind.REVERTED: lambda s: replace(withdrawing(s, Outcome.ABORTED, **BACK), ended=None),
        Kind.TEST_ENDED: lambda s: replace(withdrawing(s, Outcome.WON), ended="3"),
    },
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("kind", Kind)
def test_every_transition(phase, kind):
    state, wanted = STATES[phase], EXPECTED[phase].get(kind)
    if kind is Kind.REVERTED or phase is Phase.WATCHING:
        state = replace(state, previous="0")
    payload = {"step": 1} if (phase, kind) == (Phase.CANARY, Kind.ADVANCED) else PAYLOAD.get(kind, {})
    if wanted is None:
        with pytest.raises(NotAllowed, match=f"{kind} does not fit a release that is {phase}"):
            step(state, kind, payload)
    else:
        assert step(state, kind, payload) == wanted(state)


def test_a_step_cannot_be_left_out_repeated_or_passed():
    for state, given in ((SHADOW, 1), (CANARY, 0), (CANARY, 2)):
        with pytest.raises(NotAllowed, match="comes"):
            step(state, Kind.ADVANCED, {"step": given})
    with pytest.raises(NotAllowed, match="promotion"):
        step(LAST, Kind.ADVANCED, {"step": 2})


def test_a_paused_rollout_is_not_promoted():
    with pytest.raises(NotAllowed, match="resume it first"):
        step(replace(LAST, paused=True), Kind.PROMOTION_BEGUN, {})


@pytest.mark.parametrize("phase", EXPECTED)
def test_a_champion_is_taken_back_once(phase):
    if phase is Phase.EMPTY:
        return
    back = step(replace(STATES[phase], previous="0"), Kind.REVERTED, {})
    for state in (STATES[phase], back):
        with pytest.raises(NotAllowed, match=f"no version is kept that version {state.champion} could"):
            step(state, Kind.REVERTED, {})
    began = step(replace(IDLE, reverted="5"), Kind.STARTED, PAYLOAD[Kind.STARTED])
    assert began.reverted is None


def test_the_weight_is_that_of_the_step_and_nothing_before_and_after():
    assert [s.weight for s in (IDLE, STARTING, SHADOW, CANARY, LAST, PROMOTING, WITHDRAWING)] == [
        0.0, 0.0, 0.0, 0.1, 0.5, 0.5, 0.0,
    ]  # fmt: skip
    assert [s.tried for s in (STARTING, SHADOW, CANARY, PROMOTING, WITHDRAWING)] == [False, True, True, True, False]
    assert [phase for phase, state in STATES.items() if state.judged != state.tried] == [Phase.WATCHING]


def test_only_a_version_that_was_promoted_and_not_taken_back_is_watched():
    promoted = replace(WITHDRAWING, outcome=Outcome.PROMOTED, champion="2", previous="1")
    watched = step(promoted, Kind.WITHDRAWN, {"watch": True})
    assert (watched.phase, watched.champion, watched.previous, watched.challenger) == (Phase.WATCHING, "2", "1", None)
    assert restored(json.loads(json.dumps(snapshot(watched)))) == watched
    back = step(promoted, Kind.REVERTED, {})
    refused = replace(promoted, outcome=Outcome.ROLLED_BACK)
    for state, given in (
        (promoted, {}),
        (promoted, {"watch": False}),
        (back, {"watch": True}),
        (refused, {"watch": True}),
    ):
        assert step(state, Kind.WITHDRAWN, given).phase is Phase.IDLE


def test_a_second_rollout_knows_nothing_of_the_first_but_its_number():
    again = step(step(WITHDRAWING, Kind.WITHDRAWN, {}), Kind.STARTED, {"version": "3", "weights": [0.2], "salt": "s"})
    assert again == State(Phase.STARTING, champion="1", challenger="3", rollout=2, weights=(0.2,), salt="s")


def test_a_rollout_knows_nothing_of_a_request_refused_before_it():
    refused = step(IDLE, Kind.REFUSED, PAYLOAD[Kind.REFUSED])
    assert step(refused, Kind.STARTED, PAYLOAD[Kind.STARTED]) == STARTING
    assert restored(json.loads(json.dumps(snapshot(refused)))) == refused


def test_the_table_comes_first_and_a_challenger_is_kept_running_while_it_is_tried():
    assert all(required(state)[0] is Effect.ROUTE for state in STATES.values() if state.phase is not Phase.EMPTY)
    for state in (STARTING, SHADOW, CANARY, PROMOTING, TESTING):
        assert Effect.DEPLOY in required(state)
    assert Effect.DEPLOY not in required(WITHDRAWING)
    assert Effect.CLOSE in required(IDLE)


def test_an_idle_state_comes_back_from_what_is_kept_of_it():
    idle = step(step(replace(WITHDRAWING, previous="0"), Kind.REVERTED, {}), Kind.WITHDRAWN, {})
    assert idle.reverted == "1"
    assert restored(json.loads(json.dumps(snapshot(idle)))) == idle
    old = {name: value for name, value in snapshot(idle).items() if name != "phase"}
    assert restored(old) == idle, "of a journal from before there was a watch"
    with pytest.raises(ValueError, match="only an idle state"):
        snapshot(CANARY)


def test_a_test_is_over_as_a_rollout_is_and_the_next_one_knows_its_number_only():
    ended = step(replace(TESTING, paused=True, previous="0"), Kind.TEST_ENDED, {"outcome": "lost", "winner": None})
    assert (ended.applications, ended.paused, ended.outcome, ended.ended) == (("2", "3"), False, Outcome.LOST, None)
    idle = step(ended, Kind.WITHDRAWN, {"watch": True})
    assert (idle.phase, idle.test, idle.variants, idle.applications) == (Phase.IDLE, True, (), ())
    assert restored(json.loads(json.dumps(snapshot(idle)))) == idle
    began = step(idle, Kind.STARTED, PAYLOAD[Kind.STARTED])
    assert began == replace(STARTING, rollout=2, previous="0")
    assert began.applications == ("2",)


def test_what_is_counted_of_a_test_is_taken_in_and_the_judge_of_releases_has_no_say():
    assert [phase for phase, state in STATES.items() if state.counted] == [
        Phase.SHADOW, Phase.CANARY, Phase.PROMOTING, Phase.WITHDRAWING, Phase.WATCHING, Phase.TESTING,
    ]  # fmt: skip
    assert not TESTING.judged
    assert TESTING.weight == 0.0
