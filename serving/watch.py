"""Looks out for silent sensors in the background of a gateway; see ``pipelines.monitoring.sensors``."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy.exc import OperationalError

from cluster.alerts import Alerts
from cluster.clock import Clock
from pipelines.features.online import OnlineState
from pipelines.features.state import StateError
from pipelines.monitoring.sensors import SilenceMonitor

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
        while not self._stop.wait(_PERIOD_S):
            if (state := self._state()) is not watched:
                watched, monitor = state, SilenceMonitor(state.use_case, state, self._alerts)
            try:
                monitor.check(self._clock.now())
                self.failure = None
            except (StateError, OperationalError) as error:
                self.failure = f"silent sensors are not looked for: {error}"  # the next check does the same again
