"""Looks out in the background of a gateway: for silent sensors, and for events that state could not place."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy.exc import OperationalError

from cluster.alerts import Alerts
from cluster.clock import Clock
from pipelines.features.online import OnlineState
from pipelines.features.state import StateError
from pipelines.monitoring.sensors import SilenceMonitor
from pipelines.monitoring.unplaced import UnplacedMonitor

_PERIOD_S = 1.0


class Watch:
    """Checks once a second until ``close``; ``failure`` is why the last check came to nothing."""

    def __init__(self, state: Callable[[], OnlineState], alerts: Alerts, clock: Clock) -> None:
        """``state`` gives the one to look into: that of the champion's view, which may change."""
        self.failure: str | None = None
        self._state, self._alerts = state, alerts
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        """Whether it still looks."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stops."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _loop(self) -> None:
        watched: OnlineState | None = None
        monitors: list[SilenceMonitor | UnplacedMonitor] = []
        while not self._stop.wait(_PERIOD_S):
            if (state := self._state()) is not watched:
                watched, monitors = state, self._monitors(state)
            failures = []
            for monitor in monitors:
                try:
                    monitor.check(self._clock.now())
                except (StateError, OperationalError) as error:
                    failures.append(str(error))  # the next check does the same again
            self.failure = f"sensors and events are not watched: {'; '.join(failures)}" if failures else None

    def _monitors(self, state: OnlineState) -> list[SilenceMonitor | UnplacedMonitor]:
        found: list[SilenceMonitor | UnplacedMonitor] = [UnplacedMonitor(state, self._alerts)]
        if state.use_case.fallback is not None:
            found.append(SilenceMonitor(state.use_case, state, self._alerts))
        return found
