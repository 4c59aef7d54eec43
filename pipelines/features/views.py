"""The states of all views of a page side by side: one log feeds each, and versions read the view they were trained on.

A state whose records have left the log, such as that of a new view before its first backfill, holds up no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.log import Log
from cluster.settings import Settings
from pipelines.features.dimensions import DimensionState
from pipelines.features.online import NO_TABLE, OnlineState, StateGap, state_path
from pipelines.features.projection import Projection
from pipelines.features.state import StateError
from pipelines.features.stores import StateUnavailable
from pipelines.features.windows import pages
from pipelines.spec import EventSource, UseCase


class Fed:
    """The states that the log of one source feeds, by the view that is read from them. Threads may share it."""

    def __init__(self, source: EventSource, states: Mapping[str, Projection[Any]]) -> None:
        self.source = source
        self.states = states
        self._gaps: dict[str, StateGap | None] = {}  # a view that was not looked at yet has no entry

    def project(self, log: Log, needed: str | None = None, stream: str = "events") -> int:
        """Applies the log to every state; the last sequence that all of them have, 0 when there is none to apply it to.

        A state with a gap, or one that cannot be written, is left alone and counts for nothing (``gaps``), but that of
        the view ``needed``: when all others have been written, its gap is raised.
        """
        applied = []
        for view, state in self.states.items():
            # A state that was last seen with a gap is looked at first: a rebuild of it keeps writers waiting.
            suspect = view not in self._gaps or self._gaps[view] is not None
            gap = state.gap(log, stream) if suspect else None
            if gap is None:
                try:
                    applied.append(state.project(log, stream))
                except StateGap as error:
                    gap = error
                except StateUnavailable:
                    raise  # the server does not answer for any of them
                except StateError as error:
                    if view == needed:
                        raise
                    gap = StateGap(str(error))
            self._note(view, gap)
        if needed is not None:
            self.check(needed)
        return min(applied, default=0)

    def look(self, log: Log, stream: str = "events") -> None:
        """Finds out which states have a gap, and applies nothing."""
        for view, state in self.states.items():
            self._note(view, state.gap(log, stream))

    def gaps(self) -> dict[str, StateGap]:
        """The views whose state had a gap when it was last written or looked at, and what to do about it."""
        return {view: gap for view, gap in self._gaps.items() if gap is not None}

    def check(self, view: str) -> None:
        """Raises ``StateGap`` when the state of ``view`` must not be read, because it had a gap."""
        if (gap := self._gaps.get(view)) is not None:
            raise gap

    def _note(self, view: str, gap: StateGap | None) -> None:
        self._gaps[view] = None if gap is None else StateGap(f"view {view}: {gap}")


class Views:
    """The states of one use case by view fingerprint, the present view's first; one object per process.

    ``events`` are those that its own log feeds, ``dimensions`` those that the log of a dimension does, by its name.
    Threads may share it. ``place`` as of ``OnlineState``; raises ``ValueError`` when two views of the page are one.
    """

    def __init__(self, place: Path | str, use_case: UseCase) -> None:
        self.use_case = use_case
        self.states = {view: OnlineState(place, page) for view, page in pages(use_case).items()}
        self.present = next(iter(self.states))
        self.events = Fed(use_case, self.states)
        facts: dict[str, dict[str, DimensionState]] = {}
        for view, state in self.states.items():
            for dimension in state.dimensions:
                facts.setdefault(dimension.dimension.name, {})[view] = dimension
        self.dimensions = {
            name: Fed(use_case.source(next(iter(held.values())).dimension), held) for name, held in facts.items()
        }

    @property
    def sources(self) -> tuple[Fed, ...]:
        """All that is fed by a log: the events, then the dimensions."""
        return (self.events, *self.dimensions.values())

    def project(self, log: Log, needed: str | None = None) -> int:
        """``Fed.project`` of the use case's events."""
        return self.events.project(log, needed)

    def gaps(self) -> dict[str, StateGap]:
        """``Fed.gaps`` of all sources; one of each view."""
        return {view: gap for fed in self.sources for view, gap in fed.gaps().items()}

    def check(self, view: str) -> None:
        """``Fed.check`` of all sources."""
        for fed in self.sources:
            fed.check(view)

    def behind(self, view: str, ahead: str) -> str | None:
        """Why the states of ``view`` do not hold what those of the view ``ahead`` hold; None when they do.

        A dimension that only ``view`` has must have been built.
        """
        own, other = self.states[view], self.states[ahead]
        known = {state.dimension.name: state for state in other.dimensions}
        pairs: list[tuple[str, Sequence[Projection[Any]], Sequence[Projection[Any]]]] = [
            ("state", own.projections, other.projections)
        ]
        for state in own.dimensions:
            name = state.dimension.name
            pairs.append((f"dimension {name!r}", [state], [known[name]] if name in known else []))
        build = f"run `python -m pipelines.backfill {self.use_case.name} --materialize`"
        for what, mine, theirs in pairs:
            wanted, leading = _holds(theirs) if theirs else (0, 0)
            made, applied = _holds(mine)
            if made < wanted:
                source = "no version" if made == NO_TABLE else f"version {made}"
                return (
                    f"the {what} of view {view} was made from {source} of the events table, and has to be from "
                    f"{wanted} or a later one to be as far as view {ahead}, from which the champion answers: {build}"
                )
            if applied < leading:
                return (
                    f"the {what} of view {view} has not applied all that the one of view {ahead} has, from which the "
                    f"champion answers; if that lasts, records that it lacks have left the log: {build}"
                )
        return None

    def close(self) -> None:
        """Releases files and connections."""
        for state in self.states.values():
            state.close()


def _holds(states: Sequence[Projection[Any]]) -> tuple[int, int]:
    """The oldest table version that ``states`` were made from, and the log sequence that all have applied."""
    positions = [(state, *state.position()) for state in states]
    versions = [state.generation(generation) for state, generation, _ in positions]
    return min(versions), min(applied for _, _, applied in positions)


def open_views(settings: Settings, use_case: UseCase) -> Views:
    """The states of all views of the use case's page."""
    return Views(settings.state_url or state_path(settings, use_case), use_case)
