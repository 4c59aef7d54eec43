"""SIGKILL at random times, seeded, of what stands behind a release; and whether the journal goes on where it was."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from cluster.database import JournalEntry
from serving import routing
from serving.rollout.journal import replay
from serving.rollout.machine import NotAllowed
from serving.rollout.projections import document
from tests.benchmarks.harness import say
from tests.benchmarks.soak.place import GATEWAYS, USECASE, Place

TITLES = {
    "gateway": f"ray::ServeReplica:{USECASE}:",
    "challenger": f"ray::ServeReplica:{USECASE}-challenger-",
    "controller": "ray::RolloutActor",
    "serve": "ray::ServeController",
}
_EVERY_S = 10.0  # on average, from one part's return to the next kill
_INTO_A_TRIAL_S = 4.0
_BACK_S, _LOOK_S = 120.0, 0.2


@dataclass(frozen=True)
class Kill:
    """What was killed and when (monotonic seconds), and when another stood in its place."""

    kind: str
    at: float
    back: float


class Killer:
    """Kills one part after the other, each when all that were killed before are back, for the length of a block.

    ``faults`` is what was wrong with the journal, or with what is routed, afterwards.
    """

    def __init__(self, place: Place, seed: int) -> None:
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self._place = place
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="killer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def killed(self, kind: str, since: float, until: float) -> bool:
        """Whether such a part was killed, or not back yet, in that time (monotonic seconds)."""
        return any(k.kind == kind and k.at <= until and k.back >= since for k in [*self.kills])

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                for kind in self._random.sample(sorted(TITLES), len(TITLES)):
                    self._stop.wait(self._random.uniform(0, 2 * _EVERY_S))
                    if (victim := self._victim(kind)) is not None:
                        self._kill(kind, victim)
        except BaseException as error:
            self._failure = error
            raise

    def _victim(self, kind: str) -> int | None:
        """A process of that kind, None when the run is over; with one gateway left there would be nobody to answer."""
        pause, least = self._random.uniform(0, _INTO_A_TRIAL_S), GATEWAYS if kind == "gateway" else 1
        while not self._stop.wait(_LOOK_S):
            if len(self._place.pids(TITLES[kind])) < least:
                continue
            if kind == "challenger":  # they come and go: not each at its first breath
                self._stop.wait(pause)
            if len(found := self._place.pids(TITLES[kind])) >= least:
                return self._random.choice(sorted(found))
        return None

    def _kill(self, kind: str, victim: int) -> None:
        before = self._place.journal.read()
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return  # it ended by itself just now, as a challenger does whose release is over
        at = time.monotonic()
        self.kills.append(Kill(kind, at, float("inf")))
        if not _becomes(lambda: self._back(kind, victim)):
            raise RuntimeError(f"nothing stands in for the killed {kind} {victim}")
        self.kills[-1] = Kill(kind, at, time.monotonic())
        fault = broken(before, self._place.journal.read())
        if fault is None and not _becomes(self._routed):
            fault = "what is routed does not follow from the journal"
        if fault is not None:
            self.faults.append(f"after the kill of {kind} {victim}: {fault}")
        say(f"    {kind} {victim} killed, back after {self.kills[-1].back - at:.1f} s")

    def _back(self, kind: str, victim: int) -> bool:
        """Whether another stands in for the victim; with a challenger the release may be over."""
        found = self._place.pids(TITLES[kind])
        if kind == "gateway":  # only what answers through the proxy is one
            return len(found) == GATEWAYS and self._answering() == set(found)
        return victim not in found and (kind == "challenger" or len(found) == 1)

    def _answering(self) -> set[int]:
        """The process ids of gateways that answer."""
        with self._place.client() as client:
            return {int(client.status()["replica"].rsplit(":", 1)[1]) for _ in range(4 * GATEWAYS)}

    def _routed(self) -> bool:
        """Whether the table in force is that of the journal's last state; a moment later it may be again."""
        table = routing.read(self._place.database, USECASE)
        found = table and table.model_dump(mode="json", exclude={"epoch"})
        return found == document(self._place.journal.situation())


def broken(before: Sequence[JournalEntry], after: Sequence[JournalEntry]) -> str | None:
    """What is wrong with a journal that held ``before`` and now ``after``; None when nothing is.

    Nothing of it may change, and what came to it must lead on from its last state; ``replay`` refuses anything else.
    The evidence is what the entries add up to.
    """
    if list(after[: len(before)]) != list(before):
        return f"of {len(before)} entries not all are as they were"
    if [entry.sequence for entry in after] != list(range(1, len(after) + 1)):
        return "its entries are not numbered without gaps"
    try:
        replay(after[len(before) :], replay(before))
    except NotAllowed as error:
        return f"an entry does not fit: {error}"
    return None


def _becomes(condition: Callable[[], bool]) -> bool:
    """Whether it is true within the time that parts have to come back."""
    deadline = time.monotonic() + _BACK_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True
