"""How many requests a key may send: a bucket of tokens that fills with time."""

from __future__ import annotations

import threading


class Limit:
    """``per_s`` requests a second, and after a pause as many at once as in one second, at least one.

    Each gateway counts for itself. Threads may share it; moments are real seconds.
    """

    def __init__(self, per_s: float, now_s: float) -> None:
        self.per_s = per_s
        self._most = max(per_s, 1.0)
        self._left, self._at = self._most, now_s
        self._lock = threading.Lock()

    def take(self, now_s: float) -> float:
        """Takes one request, and returns 0; or how many seconds there is none to be taken."""
        with self._lock:
            self._left = min(self._most, self._left + (now_s - self._at) * self.per_s)
            self._at = now_s
            if self._left < 1.0:
                return (1.0 - self._left) / self.per_s
            self._left -= 1.0
            return 0.0
