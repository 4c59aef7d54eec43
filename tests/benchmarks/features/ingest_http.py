"""Durable ingest over HTTP: events posted to a gateway of a cluster that a short demo left running on this machine.

The callers share its cores with the gateway, so this is what one small machine does in all. No bar is set.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import orjson

from cluster import session
from cluster.clock import ReplayClock
from cluster.settings import Settings
from pipelines import usecases
from pipelines.contracts.events import from_microseconds
from pipelines.features.online import open_log
from serving.auth import owner_key
from tests.benchmarks.harness import Incomparable, say

BATCH, CALLERS, BATCHES, DISTRICTS = 100, 8, 1_000, 50
_SECOND_US, _HOURS_BACK = 1_000_000, 4


def figures() -> dict[str, float]:
    """Acknowledged events per second."""
    with tempfile.TemporaryDirectory() as place:
        settings = Settings(home=Path(place), clock="replay", http_port=session.free_port())
        command = [str(Path(sys.executable).with_name("tidegate")), "demo", "aqua", "--home", place]
        command += ["--history-days", "430", "--replay-days", "76", "--trials", "2", "--keep"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TIDEGATE_"))}
        try:
            subprocess.run(
                command, env=environment | {"TIDEGATE_HTTP_PORT": str(settings.http_port)}, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            rate = asyncio.run(_post(settings))
        finally:
            session.down(settings)
    say(f"durable ingest over HTTP: {rate:,.0f} events/s from {CALLERS} connections in batches of {BATCH}")
    return {"ingest_http_events_per_s": rate}


async def _post(settings: Settings) -> float:
    first_us = ReplayClock(settings.clock_file).now() - _HOURS_BACK * 3_600 * _SECOND_US
    bodies = iter([_body(first_us, number) for number in range(BATCHES)])
    log = open_log(settings, usecases.load("aqua"))
    before = log.last("events")
    headers = {"authorization": f"Bearer {owner_key(settings)}", "content-type": "application/json"}
    url = f"http://127.0.0.1:{settings.http_port}/v1/aqua/events"

    async def caller(client: httpx.AsyncClient) -> None:
        for body in bodies:
            answer = await client.post(url, content=body)
            results = answer.raise_for_status().json()["results"]
            if any(result["status"] != "accepted" or "sequence" not in result for result in results):
                raise Incomparable(f"an event was not taken: {results[:1]}")

    async with httpx.AsyncClient(headers=headers, timeout=60.0) as client:
        begun = time.perf_counter()
        await asyncio.gather(*(caller(client) for _ in range(CALLERS)))
        took = time.perf_counter() - begun
    logged = log.last("events") - before
    log.close()
    if logged != BATCH * BATCHES:
        raise Incomparable(f"{BATCH * BATCHES} events were acknowledged and {logged} logged")
    return logged / took


def _body(first_us: int, number: int) -> bytes:
    events = []
    for place in range(number * BATCH, (number + 1) * BATCH):
        turn, district = divmod(place, DISTRICTS)
        events.append(
            {
                "district": f"dma_{100 + district}",
                "time": from_microseconds(first_us + turn * _SECOND_US).isoformat(),
                "inflow": float(place % 97),
                "temperature": 10.0,
                "rain": 0.0,
                "humidity": None,
                "windspeed": None,
                "holiday": False,
            }
        )
    return orjson.dumps({"events": events})
