"""Callers that never stop, and what they got.

A caller tries nothing twice by itself. A request that came to nothing is sent again as HTTP asks of a client, and noted
with its time: that is put up with only where a gateway was killed, because the kernel then resets connections whose
request nobody had read, which no proxy may repeat by itself.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass
from typing import Self

import httpx

from serving.client import Client, TidegateError
from serving.wire import Prediction
from tests.benchmarks.soak.place import Place

CALLERS = 3
INSTANCE = {"district": "dma_1", "temperature": 8.0, "rain": 0.0, "holiday": False}
_LOWEST, _HIGHEST = 0.0, 300.0  # what the contract allows
_PAUSE_S, _TIMEOUT_S, _RETRIES = 0.004, 20.0, 8


@dataclass(frozen=True)
class Repeated:
    """A request that had to be sent again: when (monotonic seconds) it was first sent and answered, and why."""

    sent: float
    answered: float
    why: str


class Load:
    """The callers, for the length of a block. ``unfit`` are versions of which no caller may ever get an answer."""

    def __init__(self, place: Place) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self.repeated: list[Repeated] = []
        self.last: dict[str, float] = {}
        """When (monotonic seconds) a version last answered."""
        self.unfit: set[str] = set()
        self._place = place
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._callers = [threading.Thread(target=self._call, name="caller") for _ in range(CALLERS)]

    def __enter__(self) -> Self:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for caller in self._callers:
            caller.join()

    def _call(self) -> None:
        once = self._place.client(retries=0, timeout_s=_TIMEOUT_S)
        again = self._place.client(retries=_RETRIES, timeout_s=_TIMEOUT_S)
        with once, again:
            while not self._stop.wait(_PAUSE_S):
                try:
                    self._note(self._ask(once, again))
                except (TidegateError, httpx.TransportError) as error:
                    with self._lock:
                        self.failures.append(repr(error))

    def _ask(self, once: Client, again: Client) -> Prediction:
        key, sent = secrets.token_hex(8), time.monotonic()
        try:
            (answer,) = once.predict([INSTANCE], idempotency_key=key)
        except (TidegateError, httpx.TransportError) as error:
            (answer,) = again.predict([INSTANCE], idempotency_key=key)
            with self._lock:
                self.repeated.append(Repeated(sent, time.monotonic(), repr(error)))
        return answer

    def _note(self, answer: Prediction) -> None:
        with self._lock:
            self.answers += 1
            self.last[answer.model_version] = time.monotonic()
            valid = answer.value is not None and _LOWEST <= answer.value <= _HIGHEST
            if not valid or answer.model_version in self.unfit:
                self.failures.append(f"an invalid answer: {answer}")
