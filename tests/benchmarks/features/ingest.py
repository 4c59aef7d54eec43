"""Durable ingest as a gateway does it, without HTTP: contract, log with fsync, state brought up to it, acknowledgement.

The floor beside it is this machine's time for an fsync of 4 KiB in the same directory.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from cluster.clock import ReplayClock
from cluster.settings import Settings
from pipelines.contracts.events import from_microseconds
from pipelines.features.online import log_path, open_log, open_state
from serving.events import EventIntake
from tests.benchmarks.features.reads import page
from tests.benchmarks.features.worlds import BASE, MINUTE_US
from tests.benchmarks.harness import Incomparable, say

BATCH, CALLERS, EVENTS, SENSORS = 100, 4, 400_000, 1_000


def figures(rounds: int = 3) -> dict[str, float]:
    """Acknowledged events per second, bytes of log per event, and the fsync time, as medians."""
    rates, sizes, syncs = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            syncs.append(_fsync_ms(Path(place)))
            rate, size = _ingest(Settings(home=Path(place)))
            rates.append(rate)
            sizes.append(size)
    rate, size, sync = (statistics.median(found) for found in (rates, sizes, syncs))
    say(f"durable ingest: {rate:,.0f} events/s, {size:.0f} bytes an event; an fsync takes {sync:.3f} ms")
    return {"ingest_events_per_s": rate, "ingest_bytes_per_event": size, "fsync_ms": sync}


def _ingest(settings: Settings) -> tuple[float, float]:
    made = page()
    settings.home.mkdir(parents=True, exist_ok=True)
    clock = ReplayClock(settings.home / "clock")
    clock.set(BASE + (EVENTS // SENSORS + 1) * MINUTE_US)
    log, state = open_log(settings, made), open_state(settings, made)
    intake = EventIntake(made, log, clock, lambda: state.project(log))
    batches = [
        [_event(number) for number in range(first, first + BATCH)] for first in range(0, EVENTS, BATCH)
    ]  # in the order of time, sensors in turn
    waiting = iter(batches)

    async def caller() -> None:
        for batch in waiting:
            for answer in await intake.ingest(batch):
                if answer["status"] != "accepted" or "sequence" not in answer:
                    raise Incomparable(f"an event was not taken: {answer}")

    async def all_callers() -> None:
        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    begun = time.perf_counter()
    asyncio.run(all_callers())
    took = time.perf_counter() - begun
    intake.close()
    if state.applied() != EVENTS:
        raise Incomparable(f"state has applied {state.applied()} of {EVENTS} events")
    size = sum(os.stat(file).st_blocks * 512 for file in log_path(settings, made).iterdir()) / EVENTS
    state.close()
    log.close()
    return EVENTS / took, size


def _event(number: int) -> dict[str, object]:
    turn, sensor = divmod(number, SENSORS)
    at = from_microseconds(BASE + turn * MINUTE_US).isoformat()
    return {"sensor": f"sensor{sensor:05d}", "at": at, "flow": 10.0 + number % 7}


def _fsync_ms(place: Path) -> float:
    took = []
    with open(place / "probe", "wb") as file:
        for _ in range(200):
            file.write(bytes(4096))
            file.flush()
            begun = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - begun)
    return statistics.median(took) * 1e3
