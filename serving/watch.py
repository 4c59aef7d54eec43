"""Looks out for silent sensors in the background of a gateway; see ``pipelines.monitoring.sensors``."""

from __future__ import annotations

import threading

from sqlalchemy.exc import OperationalError

from cluster.alerts import Alerts
from cluster.clock import Clock
from pipelines.features.online import OnlineState
from pipelines.features.state import StateError
from pipelines.monitoring.sensors import SilenceMonitor
from pipelines.spec import UseCase

_PERIOD_S = 1.0


class Watch:
    """Checks once a second until ``close``; ``failure`` is why the last check came to nothing."""

    def __init__(self, use_case: UseCase, state: OnlineState, alerts: Alerts, clock: Clock) -> None:
        self.failure: str | None = None
        self._monitor = SilenceMonitor(use_case, state, alerts)
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
        while not self._stop.wait(_PERIOD_S):
            try:
                self._monitor.check(self._clock.now())
                self.failure = None
            except (StateError, OperationalError) as error:
                self.failure = f"silent sensors are not looked for: {error}"  # the next check does the same again
