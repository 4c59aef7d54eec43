"""The release step of the demo: versions that err, are slow, answer NaN, are the same or are better go through the
rollout controller under replayed traffic, and the scoreboard says what became of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.database import Database, JournalEntry
from cluster.settings import Settings
from pipelines.spec import UseCase
from pipelines.training.registry import Registry
from serving.client import Client
from serving.demo.replay import Replay, Replayed
from serving.demo.report import expect
from serving.drills import Drill, register_copy
from serving.rollout.journal import Journal, replay
from serving.rollout.machine import Kind
from serving.wire import RolloutStatus

DRILLS = {
    "erring": Drill(errors=0.05),
    "slow": Drill(slower=10.0),
    "nan": Drill(nan=1.0),
    "identical": None,
}
WITHDRAWN_BY = {
    "erring": {"errors"},
    "slow": {"latency", "harm"},  # on a busy machine its calls are late before enough of them were slow
    "nan": {"errors"},
}
"""The guardrails that may end a version of ``DRILLS``."""
_ENDS = (Kind.PROMOTED, Kind.ROLLED_BACK, Kind.FAILED, Kind.ABORTED, Kind.INCONCLUSIVE)
_MACHINERY_S = 120.0
_TOGETHER_EVERY = 4
"""In a canary, after so many moments, all instances of one are asked for in one request too."""


@dataclass(frozen=True)
class Tried:
    """What became of one rollout. ``batches`` are requests of several instances that were sent during the canary,
    ``shared`` those of them that both versions answered.
    """

    version: str
    outcome: str
    guardrail: str | None
    challenger_requests: int
    copies: int
    batches: int
    shared: int
    days: int
    harmed: int
    failed: int
    invalid: int
    zero_weight_s: float | None
    seconds: float
    ended: JournalEntry

    def figures(self, name: str) -> dict[str, Any]:
        """Its line of the scoreboard."""
        return {
            f"{name}_outcome": self.outcome if self.guardrail is None else f"{self.outcome}:{self.guardrail}",
            f"{name}_challenger_requests": self.challenger_requests,
            f"{name}_shared_batches": self.shared,
            f"{name}_zero_weight_s": self.zero_weight_s,
            f"{name}_harmed": self.harmed,
            f"{name}_failed": self.failed,
        }


class Releases:
    """Tries versions one after the other under the replay's traffic."""

    def __init__(
        self, use_case: UseCase, settings: Settings, database: Database, replay: Replay, say: Callable[[str], None]
    ) -> None:
        self._use_case = use_case
        self._settings = settings
        self._database = database
        self._registry = Registry(settings)
        self._journal = Journal(database, use_case.name)
        self._replay = replay
        self._client: Client = replay.client
        self._say = say

    def copy_of_champion(self, drill: Drill | None) -> str:
        """Registers the champion's artifact once more, with ``drill`` on its runner, and asks for its release."""
        champion = str(self._client.rollout().champion)
        version = register_copy(self._use_case.name, champion, drill, self._registry, self._settings)
        self._client.rollout_start(version, reason="a drill")
        return version

    def drive(self, version: str, *, most: int, abort_when: Callable[[RolloutStatus], bool] | None = None) -> Tried:
        """Replays until the rollout of ``version`` is over, at most ``most`` moments.

        While the challenger starts or leaves, time stands still and callers go on asking.
        """
        done, began, moments, aborted = self._replay.begin(), time.perf_counter(), 0, False
        together: list[frozenset[str]] = []
        self._replay.alone = True
        waited = time.monotonic()
        while True:
            status = self._client.rollout()
            if status.ended == version and status.phase in ("idle", "watching"):
                break
            if status.challenger == version and status.phase in ("shadow", "canary"):
                expect(moments < most, f"version {version} was not decided within {most} moments: {status}")
                if not aborted and abort_when is not None and abort_when(status):
                    self._client.rollout_command("abort", "the drill is over; nothing was wrong with this version")
                    aborted = True
                    continue
                self._replay.moment()
                moments += 1
                if status.phase == "canary" and moments % _TOGETHER_EVERY == 0:
                    together.append(self._replay.ask_together())
                waited = time.monotonic()
            else:
                expect(time.monotonic() - waited < _MACHINERY_S, f"the release stands still: {status}")
                self._replay.ask_again()
        seconds = time.perf_counter() - began
        self._replay.alone = False
        tried = self._tried(version, done, together, seconds)
        expect(done.failed == done.invalid == 0, f"{done.failed} requests failed, {done.invalid} answers were invalid")
        expect(tried.copies > 0, f"version {version} got no copies")
        cap = self._use_case.release.harm_cap
        expect(tried.harmed <= cap, f"{tried.harmed} answers of version {version} were harmed; the cap is {cap}")
        return tried

    def last_step_is_complete(self, status: RolloutStatus) -> bool:
        """Whether the challenger has gone through every stage and only its outcomes are awaited."""
        return status.step == len(self._use_case.release.steps) - 1 and "days with matured" in (status.reason or "")

    def started(self, version: str) -> dict[str, Any]:
        """What the journal says about the beginning of the last rollout of a version."""
        entries = [e for e in self._journal.read() if e.kind == Kind.STARTED and e.payload["version"] == version]
        return entries[-1].payload

    def _tried(self, version: str, done: Replayed, together: list[frozenset[str]], seconds: float) -> Tried:
        entries = self._journal.read()
        started = max(i for i, e in enumerate(entries) if e.kind == Kind.STARTED and e.payload["version"] == version)
        mine = entries[started:]
        ended = next(entry for entry in mine if entry.kind in _ENDS)
        withdrawn = next(entry for entry in mine if entry.kind == Kind.WITHDRAWN)
        evidence = replay(entries[: entries.index(withdrawn)]).evidence
        decided = ended.payload
        if ended.kind == Kind.PROMOTED:
            decided = next(entry for entry in mine if entry.kind == Kind.PROMOTION_BEGUN).payload
        tried = Tried(
            version=version,
            outcome=ended.kind,
            guardrail=ended.payload.get("guardrail"),
            challenger_requests=decided.get("challenger_requests", evidence.challenger_requests()),
            copies=evidence.copies,
            batches=len(together),
            shared=sum(len(versions) > 1 for versions in together),
            days=len(evidence.days),
            harmed=evidence.harmed,
            failed=done.failed,
            invalid=done.invalid,
            zero_weight_s=withdrawn.payload["zero_weight_s"],
            seconds=seconds,
            ended=ended,
        )
        said = decided.get("reason", "")
        self._say(
            f"    version {version}: {tried.outcome} ({said}); {tried.challenger_requests} challenger requests, "
            f"{tried.harmed} harmed, {tried.failed} failed, zero weight after {tried.zero_weight_s} s, {seconds:.0f} s"
        )
        return tried
