"""Tells people how releases and A/B tests go: every change of theirs as a line in the log and to the webhook.

The journal is what is told from. The last entry that the webhook took is kept, so a controller that is killed, or a
receiver that is away, delays an announcement and loses none; one may come twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.database import Database, JournalEntry
from cluster.notifications import Webhook
from serving.rollout.journal import Journal, Situation
from serving.rollout.machine import Kind, State


class Announcer:
    """Tells ``webhook`` of one use case's journal. What was journalled before the first of its kind is not told."""

    def __init__(self, usecase: str, database: Database, webhook: Webhook) -> None:
        self.webhook = webhook
        self._usecase, self._database = usecase, database
        self._journal = Journal(database, usecase)
        self._situation: Situation | None = None

    def begin(self) -> None:
        """From here on everything is told; to be called before anything is journalled. Again it does nothing."""
        if self._situation is None:
            told = self._database.told(self._journal.stream)
            self._situation = self._journal.situation(until=told)
            if told is None:
                self._database.tell_until(self._journal.stream, self._situation.sequence)

    def turn(self) -> int:
        """Sends what was journalled since the last turn and returns how much that was.

        Raises ``NotificationFailed``; then the next turn goes on from there.
        """
        self.begin()
        assert self._situation is not None
        sent = 0
        for entry in self._journal.read(self._situation.sequence):
            before, after = self._situation, self._situation.after(entry)
            if (text := announcement(self._usecase, before.state, after.state, entry)) is not None:
                self.webhook.send(_document(self._usecase, text, before.state, after.state, entry))
                self._database.tell_until(self._journal.stream, entry.sequence)
                sent += 1
            self._situation = after
        return sent


def announcement(usecase: str, before: State, after: State, entry: JournalEntry) -> str | None:
    """What a person is told of an entry of the journal, in a line; None of one that is not worth it."""
    say = _LINES.get(Kind(entry.kind))
    if say is None:
        return None
    who, why = _said(entry)
    by = f" by {who}" if who else ""
    reason = f": {why}" if why else ""
    return f"{usecase}: {say(before, after)}{by}{reason}"


def _said(entry: JournalEntry) -> tuple[str | None, str | None]:
    """Who caused the entry, and why; of a release that begins who asked for it."""
    asked = entry.payload.get("request", {})
    return entry.payload.get("by") or asked.get("requested_by"), entry.payload.get("reason") or asked.get("reason")


def _what(state: State) -> str:
    return f"A/B test {state.rollout}" if state.test else f"rollout {state.rollout} of version {state.challenger}"


def _started(_: State, after: State) -> str:
    weights = ", ".join(f"{weight:.3g}" for weight in after.weights)
    return f"{_what(after)} begins beside champion {after.champion} (shadow, then shares of {weights})"


def _failed(before: State, after: State) -> str:
    return f"version {after.ended} is withdrawn; champion {before.champion} answers"


def _rolled_back(before: State, after: State) -> str:
    if after.reverted != before.reverted:
        return _reverted(before, after)
    return _failed(before, after)


def _reverted(before: State, after: State) -> str:
    ended = f", and {_what(before)} is aborted" if before.applications and after.ended != before.ended else ""
    return f"version {after.champion} answers again in place of {before.champion}{ended}"


def _test_ended(before: State, after: State) -> str:
    return f"{_what(before)} ended: {after.outcome}" + (f", by version {after.ended}" if after.ended else "")


_LINES: dict[Kind, Callable[[State, State], str]] = {
    Kind.ADOPTED: lambda _, after: f"version {after.champion} is the first champion",
    Kind.REFUSED: lambda _, after: f"the release of version {after.refused} is refused",
    Kind.STARTED: _started,
    Kind.FAILED: _failed,
    Kind.ADVANCED: lambda _, after: f"version {after.challenger} answers a share of {after.weight:.3g}",
    Kind.PAUSED: lambda before, _: f"{_what(before)} is paused",
    Kind.RESUMED: lambda before, _: f"{_what(before)} is resumed",
    Kind.APPROVED: lambda before, _: f"{_what(before)} is approved",
    Kind.ROLLED_BACK: _rolled_back,
    Kind.ABORTED: lambda before, _: f"{_what(before)} is aborted",
    Kind.REVERTED: _reverted,
    Kind.SUPERSEDED: lambda before, _: f"{_what(before)} gives way",
    Kind.INCONCLUSIVE: lambda before, _: f"{_what(before)} ended without a finding",
    Kind.PROMOTED: lambda before, after: f"version {after.champion} is champion in place of {before.champion}",
    Kind.CONFIRMED: lambda _, after: f"version {after.champion} is confirmed as champion",
    Kind.TEST_STARTED: lambda _, after: f"{_what(after)} of {', '.join(after.variants)} beside {after.champion} begins",
    Kind.TEST_ENDED: _test_ended,
}


def _document(usecase: str, text: str, before: State, after: State, entry: JournalEntry) -> dict[str, Any]:
    """``text`` is for receivers that show a line of text, as chats do."""
    who, why = _said(entry)
    return {
        "text": text,
        "change": entry.kind,
        "release": {
            "usecase": usecase,
            "rollout": after.rollout,
            "champion": after.champion,
            "tried": list(after.applications or before.applications),
            "phase": after.phase,
            "weight": after.weight,
            "by": who,
            "reason": why,
            "sequence": entry.sequence,
            "at_us": entry.at_us,
        },
    }
