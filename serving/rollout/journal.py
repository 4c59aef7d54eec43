"""The journal of a use case's rollouts: the truth that routing tables, aliases and release requests are made from.

Every event is written before anything is done about it. Two writers exclude each other: each entry names its
predecessor, and a writer that has not seen the newest is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.database import Database, JournalEntry
from pipelines.spec import ReleasePolicy
from serving.rollout.evidence import Evidence, Report, days_of
from serving.rollout.machine import Kind, State, step


@dataclass(frozen=True)
class Situation:
    """Everything that follows from the journal: the state, its evidence, and the policy it is held to.

    ``sequence`` is that of the last entry, ``decided_us`` when the phase last changed.
    """

    state: State = field(default_factory=State)
    evidence: Evidence = field(default_factory=Evidence)
    policy: ReleasePolicy = field(default_factory=ReleasePolicy)
    sequence: int = 0
    decided_us: int = 0

    def after(self, entry: JournalEntry) -> Situation:
        """The situation after one more entry; raises ``NotAllowed`` for an event that does not fit."""
        kind, payload = Kind(entry.kind), entry.payload
        state, evidence, policy = step(self.state, kind, payload), self.evidence, self.policy
        match kind:
            case Kind.STARTED:
                policy = ReleasePolicy.model_validate(payload["policy"])
                evidence = Evidence(started_us=entry.at_us, stage_us=entry.at_us)
            case Kind.EVIDENCE:
                evidence = evidence.with_report(Report.model_validate(payload))
            case Kind.LABELS:
                evidence = evidence.with_labels(days_of(payload))
            case Kind.READY | Kind.ADVANCED:
                evidence = evidence.at_stage(entry.at_us)
            case Kind.RESUMED:
                evidence = evidence.resumed()
        decided = entry.at_us if state != self.state else self.decided_us
        return Situation(state, evidence, policy, entry.sequence, decided)


def replay(entries: Iterable[JournalEntry]) -> Situation:
    """The situation after all entries, in order."""
    situation = Situation()
    for entry in entries:
        situation = situation.after(entry)
    return situation


class Journal:
    """The journal of one use case in ``database``."""

    def __init__(self, database: Database, usecase: str) -> None:
        self._database = database
        self.stream = f"{usecase}/rollout"

    def read(self, after: int = 0) -> list[JournalEntry]:
        """The entries after a sequence, in order."""
        return self._database.journal(self.stream, after=after)

    def append(self, situation: Situation, kind: Kind, payload: dict[str, Any], at_us: int) -> Situation:
        """Writes an event that follows on ``situation`` and returns what follows from it.

        Raises ``NotAllowed`` when the event does not fit, ``StaleJournal`` when another wrote meanwhile; then nothing
        is written.
        """
        entry = JournalEntry(situation.sequence + 1, kind.value, payload, at_us)
        following = situation.after(entry)
        self._database.append_journal(self.stream, kind.value, payload, at_us, expected=situation.sequence)
        return following
