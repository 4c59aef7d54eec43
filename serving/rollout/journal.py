"""The journal of a use case's rollouts: the truth that routing tables, aliases and release requests are made from.

Every event is written before anything is done about it. Two writers exclude each other: each entry names its
predecessor, and a writer that has not seen the newest is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.database import Database, JournalEntry
from pipelines.spec import ReleasePolicy
from serving.rollout.evidence import Evidence, Report, Skew, days_of
from serving.rollout.machine import Kind, Phase, State, restored, snapshot, step


@dataclass(frozen=True)
class Situation:
    """Everything that follows from the journal: the state, its evidence, and the policy it is held to.

    ``sequence`` is that of the last entry. ``fields`` are the policy as journalled: it is read when it is needed, so
    that one of long ago, which the present code may not know, stands in nobody's way.
    """

    state: State = field(default_factory=State)
    evidence: Evidence = field(default_factory=Evidence)
    fields: Mapping[str, Any] = field(default_factory=dict)
    sequence: int = 0

    @property
    def policy(self) -> ReleasePolicy:
        """The policy of the last rollout that began; raises pydantic's ``ValidationError`` when it no longer fits."""
        return ReleasePolicy.model_validate(self.fields)

    def after(self, entry: JournalEntry) -> Situation:
        """The situation after one more entry; raises ``NotAllowed`` for an event that does not fit."""
        kind, payload = Kind(entry.kind), entry.payload
        state, evidence, fields = step(self.state, kind, payload), self.evidence, self.fields
        match kind:
            case Kind.STARTED:
                fields = payload["policy"]
                evidence = Evidence(started_us=entry.at_us, stage_us=entry.at_us)
            case Kind.EVIDENCE:
                evidence = evidence.with_report(Report.model_validate(payload))
            case Kind.LABELS:
                evidence = evidence.with_labels(days_of(payload))
            case Kind.SKEW:
                evidence = replace(evidence, skew=Skew.model_validate(payload))
            case Kind.READY | Kind.ADVANCED:
                evidence = evidence.at_stage(entry.at_us)
            case Kind.WITHDRAWN if state.phase is Phase.WATCHING:
                evidence = Evidence(started_us=entry.at_us, stage_us=entry.at_us, sequences=evidence.sequences)
            case Kind.RESUMED:
                evidence = evidence.resumed()
        return Situation(state, evidence, fields, entry.sequence)


def replay(entries: Iterable[JournalEntry], before: Situation | None = None) -> Situation:
    """The situation after all entries, in order; ``before`` is that before the first of them."""
    situation = before or Situation()
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

    def situation(self, known: Situation | None = None) -> Situation:
        """The situation now: from ``known`` on, or from where the last rollout began.

        The entry that ended the one before keeps the state, so older rollouts need not be replayed.
        """
        if known is not None and known.sequence:
            return replay(self.read(known.sequence), known)
        begun = self._database.last_entry(self.stream, Kind.STARTED.value)
        ended = begun and self._database.last_entry(self.stream, Kind.WITHDRAWN.value, before=begun.sequence)
        if ended is None:
            return replay(self.read())
        return replay(self.read(ended.sequence), Situation(restored(ended.payload["state"]), sequence=ended.sequence))

    def append(self, situation: Situation, kind: Kind, payload: dict[str, Any], at_us: int) -> Situation:
        """Writes an event that follows on ``situation`` and returns what follows from it.

        Raises ``NotAllowed`` when the event does not fit, ``StaleJournal`` when another wrote meanwhile; then nothing
        is written.
        """
        entry = JournalEntry(situation.sequence + 1, kind.value, payload, at_us)
        following = situation.after(entry)
        if kind is Kind.WITHDRAWN:
            entry = replace(entry, payload={**payload, "state": snapshot(following.state)})
        self._database.append_journal(self.stream, kind.value, entry.payload, at_us, expected=situation.sequence)
        return following
