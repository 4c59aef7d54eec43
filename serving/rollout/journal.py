"""The journal of a use case's rollouts: the truth that routing tables, aliases and release requests are made from.

Every event is written before anything is done about it. Two writers exclude each other: each entry names its
predecessor, and a writer that has not seen the newest is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.database import Database, JournalEntry
from pipelines.spec import ABTest, ReleasePolicy
from serving.rollout.evidence import Evidence, Report, Skew, days_of, results_of
from serving.rollout.machine import Kind, Phase, State, restored, snapshot, step

_REASONED = frozenset(
    {
        *(Kind.FAILED, Kind.PAUSED, Kind.ROLLED_BACK, Kind.ABORTED, Kind.REVERTED, Kind.SUPERSEDED),
        *(Kind.INCONCLUSIVE, Kind.CONFIRMED, Kind.TEST_ENDED),
    }
)


@dataclass(frozen=True)
class Situation:
    """Everything that follows from the journal: the state, its evidence, and what it is held to.

    ``why`` is the reason of what last paused or ended a rollout or test. ``sequence`` is that of the last entry.
    ``fields`` are the policy of a rollout, or the definition of an A/B test, as journalled: it is read when it is
    needed, so that one of long ago, which the present code may not know, stands in nobody's way. ``begun`` is all
    that was journalled when it began.
    """

    state: State = field(default_factory=State)
    evidence: Evidence = field(default_factory=Evidence)
    fields: Mapping[str, Any] = field(default_factory=dict)
    sequence: int = 0
    begun: Mapping[str, Any] = field(default_factory=dict)
    why: str | None = None

    @property
    def policy(self) -> ReleasePolicy:
        """The policy of the last rollout that began; raises pydantic's ``ValidationError`` when it no longer fits."""
        return ReleasePolicy.model_validate(self.fields)

    @property
    def test(self) -> ABTest:
        """The last A/B test that began; raises pydantic's ``ValidationError`` when it no longer fits."""
        return ABTest.model_validate(self.fields)

    @property
    def tested(self) -> str:
        """The version that was champion when the last A/B test began."""
        found: str = self.begun["champion"]
        return found

    def after(self, entry: JournalEntry) -> Situation:
        """The situation after one more entry; raises ``NotAllowed`` for an event that does not fit."""
        kind, payload = Kind(entry.kind), entry.payload
        state, evidence, fields = step(self.state, kind, payload), self.evidence, self.fields
        begun = self.begun
        match kind:
            case Kind.STARTED:
                fields, begun = payload["policy"], payload
                evidence = Evidence(started_us=entry.at_us, stage_us=entry.at_us)
            case Kind.TEST_STARTED:
                fields, begun = payload["test"], payload
                evidence = Evidence(started_us=entry.at_us, stage_us=entry.at_us)
            case Kind.TEST_RESULTS:
                evidence = replace(evidence, results=(*evidence.results, results_of(payload)))
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
        why = self.why
        if kind in _REASONED:
            why = payload.get("reason") or None
        elif kind in (Kind.STARTED, Kind.TEST_STARTED, Kind.RESUMED):
            why = None
        return Situation(state, evidence, fields, entry.sequence, begun, why)


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

    def situation(self, known: Situation | None = None, until: int | None = None) -> Situation:
        """The situation now, or after the entry ``until``: from ``known`` on, or from where the last rollout or test
        began.

        The entry that ended the one before keeps the state, so older ones need not be replayed.
        """
        if known is not None and known.sequence:
            return replay(self.read(known.sequence), known)
        end = None if until is None else until + 1
        began = (self._database.last_entry(self.stream, kind.value, end) for kind in (Kind.STARTED, Kind.TEST_STARTED))
        begun = max((entry for entry in began if entry is not None), key=lambda entry: entry.sequence, default=None)
        before = self._before(begun)
        return replay((e for e in self.read(before.sequence) if end is None or e.sequence < end), before)

    def test(self) -> Situation | None:
        """The situation of the last A/B test: that of now, or that in which it ended; None when there was none."""
        begun = self._database.last_entry(self.stream, Kind.TEST_STARTED.value)
        if begun is None:
            return None
        situation = self._before(begun)
        for entry in self.read(situation.sequence):
            situation = situation.after(entry)
            if entry.sequence > begun.sequence and situation.state.phase is Phase.IDLE:
                break
        return situation

    def _before(self, begun: JournalEntry | None) -> Situation:
        """A situation from which ``begun``, the beginning of a rollout or test, can be replayed."""
        ended = begun and self._database.last_entry(self.stream, Kind.WITHDRAWN.value, before=begun.sequence)
        return Situation() if ended is None else Situation(restored(ended.payload["state"]), sequence=ended.sequence)

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
