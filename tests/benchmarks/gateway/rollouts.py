"""What a rollout costs the callers: an open loop with no rollout, with a shadow, and with a canary and its shadow.

The challenger is a second version of the champion's artifact in an application of its own, started and withdrawn by
the rollout controller. In every round the two stages of one rollout are measured, and before and after them the same
without any; a stage is compared with the mean of these two, so that a drift of the machine counts for neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

from pipelines.spec import CanaryStep, ReleasePolicy, Shadow
from serving.client import Client, TidegateError
from serving.wire import RolloutStatus
from tests.benchmarks.gateway.load import Load, Plan, apart
from tests.benchmarks.gateway.world import World, instance
from tests.benchmarks.harness import Incomparable, say

RATE, SHARE = 300.0, 0.1
CONNECTIONS, WARM_S, SECONDS = 32, 2.0, 10.0
_NOW = timedelta(0)
# The second stage never ends by itself, and a busy machine withdraws nothing: this is about speed.
POLICY = ReleasePolicy(
    shadow=Shadow(share=SHARE, requests=1, time=_NOW),
    steps=(CanaryStep(weight=SHARE, requests=1_000_000_000, time=_NOW),),
    harm_cap=1_000_000,
    deadline_ms=1_000,
    budget=None,
    skew=None,
    watch=None,
)
_WAIT_S = 120.0
_SETTLE_S = 1.0
_SHARES = (0.6 * SHARE, 1.4 * SHARE)


@dataclass(frozen=True)
class Stages:
    """One round."""

    shadow: Load
    canary: Load


def figures(world: World, pairs: int) -> dict[str, float]:
    """Relative costs of the median latency, and what is added to the 99th percentile, as medians over rounds."""
    with world.client() as client:
        without = [_without(world)]
        rounds: list[Stages] = []
        for _ in range(pairs):
            rounds.append(_round(world, client))
            without.append(_without(world))
    p50 = [(a.p50_ms + b.p50_ms) / 2 for a, b in pairwise(without)]
    p99 = [(a.p99_ms + b.p99_ms) / 2 for a, b in pairwise(without)]
    shadow = [stages.shadow.p50_ms / base - 1 for stages, base in zip(rounds, p50, strict=True)]
    canary = [stages.canary.p50_ms / base - 1 for stages, base in zip(rounds, p50, strict=True)]
    added = [stages.canary.p99_ms - base for stages, base in zip(rounds, p99, strict=True)]
    return {
        "canary_p50_cost": statistics.median(canary),
        "shadow_p50_cost": statistics.median(shadow),
        "canary_p99_added_ms": statistics.median(added),
    }


def _round(world: World, client: Client) -> Stages:
    """A rollout from its start until nothing of it is left."""
    client.rollout_start(world.challenger, policy=POLICY, reason="benchmark")
    try:
        _until(lambda: client.rollout().phase == "shadow", "the challenger is shadowed")
        _until(lambda: _tried(world, client), "the gateway asks it")
        client.rollout_command("pause", "it is measured")  # or the first copy would begin the canary
        before = client.rollout()
        shadow = _measured(world, "shadow")
        _share(client, before, shadow, copies=True)
        client.rollout_command("resume", "it was measured")
        _until(lambda: client.rollout().weight == SHARE, "it is a canary")
        time.sleep(_SETTLE_S)
        before = client.rollout()
        canary = _measured(world, "canary")
        _share(client, before, canary, copies=False)
    finally:
        client.rollout_command("abort", "it was measured")
    _until(lambda: client.rollout().phase == "idle", "it is withdrawn")
    time.sleep(_SETTLE_S)
    return Stages(shadow, canary)


def _measured(world: World, stage: str) -> Load:
    # The seed is the same: requests come at the same distances in every stage.
    found = apart(Plan(world.port, world.requests(), CONNECTIONS, WARM_S, SECONDS, RATE))
    world.drained()
    say(f"  {stage}: {found.per_s:.0f}/s, p50 {found.p50_ms:.3f} ms, p99 {found.p99_ms:.2f} ms")
    return found


def _without(world: World) -> Load:
    """No rollout; raises ``Incomparable`` when not even then the requests are answered as they come."""
    found = _measured(world, "no rollout")
    # By Little's law all connections are under way then, and latencies are those of a queue that grows.
    if found.p50_ms > CONNECTIONS / RATE * 1e3:
        raise Incomparable(f"this machine does not keep up with {RATE:g} requests/s: p50 is {found.p50_ms:.0f} ms")
    return found


def _tried(world: World, client: Client) -> bool:
    """A request for the challenger is answered by it; it is no evidence and no copy."""
    try:
        (answer,) = client.predict([instance(world.names[0])], variant="challenger")
    except TidegateError:
        return False  # the gateway does not follow its table yet
    return answer.model_version == world.challenger


def _share(client: Client, before: RolloutStatus, load: Load, *, copies: bool) -> None:
    """Raises ``Incomparable`` unless about the share of the requests went to the challenger in the stage."""
    time.sleep(_SETTLE_S)  # until the gateway has reported
    after = client.rollout()
    if after.challenger != before.challenger or after.step != before.step:
        raise Incomparable(f"the rollout went on while it was measured: {before.phase} became {after.phase}")
    was, is_now = (s.evidence.copies if copies else s.evidence.served for s in (before, after))
    share = (is_now - was) / (load.per_s * (WARM_S + SECONDS))
    if not _SHARES[0] <= share <= _SHARES[1]:
        raise Incomparable(f"{share:.1%} of the requests went to the challenger, not {SHARE:.0%}")


def _until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {_WAIT_S:g} s it is not so: {what}")
        time.sleep(0.2)
