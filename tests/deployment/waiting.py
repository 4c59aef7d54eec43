"""Waiting for something to become true, with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable

from serving.client import Client


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def drained(client: Client) -> None:
    """Until every record of the log has reached its table."""
    until(lambda: not any(s["pending"] for s in client.status()["log"].values()), "the log is drained")
