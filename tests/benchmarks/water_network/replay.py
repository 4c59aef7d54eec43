"""Sends a replayed network's readings to the gateway process, minute by minute, and keeps what was acknowledged.

The replay clock stands still while a minute's readings are on their way, so when each became known is the same in
every run. A refusal for want of room is waited out and the request sent again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cluster.clock import ReplayClock
from cluster.settings import Settings
from pipelines.contracts.events import event_order, from_microseconds
from pipelines.contracts.rules import as_json
from pipelines.drain import EVENTS
from pipelines.features.online import Read, open_log, open_state
from tests.benchmarks.features.worlds import BASE, MINUTE_US
from tests.benchmarks.harness import Incomparable, say
from tests.benchmarks.water_network.faults import Faults, broken_value
from tests.benchmarks.water_network.gateway import peak_kib
from tests.benchmarks.water_network.network import Sensors
from tests.benchmarks.water_network.page import USE_CASE

STATIONS = 4  # each sends the readings of its share of the sensors in one request a minute
ARRIVAL_US = 5_000_000  # after the minute
_PROBE_MINUTES, _SAY_MINUTES = 60, 240


@dataclass(frozen=True)
class Request:
    """What one station sends for one minute, and of each event whether it repeats one and whether it is broken."""

    events: list[dict[str, Any]]
    body: bytes
    repeated: list[bool]
    broken: list[bool]


@dataclass
class Acknowledged:
    """What was acknowledged, by number. ``ids`` and ``refused`` are XXH3 hashes, int64[k] a request: of the ids of
    accepted events, the repeated ones included, and of the records that were refused.
    """

    new: int = 0
    repeated: int = 0
    resent: int = 0  # requests, after a refusal for want of room
    ids: list[np.ndarray] = field(default_factory=list)
    refused: list[np.ndarray] = field(default_factory=list)

    def take(self, request: Request, results: Sequence[dict[str, Any]], tries: int) -> None:
        """Counts the answer to a request; ``Incomparable`` when an event did not become what it had to."""
        self.resent += tries - 1
        found = [_status(result) for result in results]
        due = ["quarantined" if b else "repeated" if r else "new" for r, b in _pairs(request)]
        # The events of a request that was refused may be durable all the same, and then its second try repeats them.
        if found != due and (tries == 1 or [s == "quarantined" for s in found] != request.broken):
            raise Incomparable("readings did not become what they had to: " + _first_difference(request, found, due))
        self.new += found.count("new")
        self.repeated += found.count("repeated")
        self.ids.append(event_order(result["event_id"] for result in results if "event_id" in result))
        refused = [event for event, broken in zip(request.events, request.broken, strict=True) if broken]
        self.refused.append(event_order(map(as_json, refused)))


@dataclass(frozen=True)
class Replayed:
    """A replay: what was acknowledged, what the state answered for the sampled nodes at some moments (us), the seconds
    until all was in the tables, those that each process computed for, and the sum of their peaks of memory (KiB).
    """

    acknowledged: Acknowledged
    probes: list[tuple[int, Read]]
    wall_s: float
    gateway_cpu_s: float
    sender_cpu_s: float
    peak_kib: int


def replay(
    settings: Settings, names: tuple[str, ...], sensors: Sensors, faults: Faults, minutes: int, sample: Sequence[str]
) -> Replayed:
    """Replays so many minutes, and reads the state of ``sample`` every hour and at the end."""
    clock, kept, probes = ReplayClock(settings.clock_file), Acknowledged(), []
    with _gateway(settings) as (process, connections):
        log, state = open_log(settings, USE_CASE), open_state(settings, USE_CASE)
        reader, begun, before = state.bind(), time.perf_counter(), time.process_time()
        requests = _requests(0, names, sensors, faults)
        answered: list[tuple[Request, list[dict[str, Any]], int]] = []
        for minute in range(minutes):
            clock.set(BASE + minute * MINUTE_US + ARRIVAL_US)
            for connection, request in zip(connections, requests, strict=True):
                connection.send_bytes(request.body)
            for answer in answered:  # of the minute before, while the gateway works on this one
                kept.take(*answer)
            upcoming = _requests(minute + 1, names, sensors, faults)
            answered = [(r, *_answer(c, r)) for c, r in zip(connections, requests, strict=True)]
            requests = upcoming
            if (minute + 1) % _PROBE_MINUTES == 0 or minute + 1 == minutes:
                probes.append((clock.now(), reader.read(sample, clock.now())))
            if (minute + 1) % _SAY_MINUTES == 0:
                waiting, rate = log.pending(EVENTS), kept.new / (time.perf_counter() - begun)
                say(f"{(minute + 1) // 60} h: {kept.new:,} readings, {rate:,.0f}/s; {waiting:,} not in the table yet")
        for answer in answered:
            kept.take(*answer)
        for connection in connections:
            connection.send_bytes(b"")
        told = json.loads(_line(process))
        wall, cpu = time.perf_counter() - begun, time.process_time() - before
    state.close()
    log.close()
    if told["unplaced"]:
        raise Incomparable(f"state could not place {told['unplaced']} events")
    return Replayed(kept, probes, wall, told["cpu_s"], cpu, told["peak_kib"] + peak_kib())


@contextmanager
def _gateway(settings: Settings) -> Iterator[tuple[subprocess.Popen[str], list[Connection]]]:
    with tempfile.TemporaryDirectory() as place:
        address = str(Path(place) / "socket")
        command = [sys.executable, "-m", "tests.benchmarks.water_network.gateway", address, str(STATIONS)]
        environment = {**os.environ, **settings.environment()}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        connections: list[Connection] = []
        try:
            _line(process)
            connections += [Client(address) for _ in range(STATIONS)]
            yield process, connections
        finally:
            for connection in connections:
                connection.close()
            process.kill()
            process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the gateway process ended with status {process.wait()}: its error is above")
    return line


def _answer(connection: Connection, request: Request) -> tuple[list[dict[str, Any]], int]:
    """The results of a request that was sent, and how often it had to be."""
    tries = 1
    while "results" not in (document := orjson.loads(connection.recv_bytes())):
        if document["status"] not in (429, 503):
            raise RuntimeError(f"the gateway refused a request: {document}")
        time.sleep(1)
        connection.send_bytes(request.body)
        tries += 1
    return document["results"], tries


def _requests(minute: int, names: tuple[str, ...], sensors: Sensors, faults: Faults) -> list[Request]:
    arrivals = faults.arrivals(minute)
    values = np.empty(len(arrivals.sensors))
    for told in np.unique(arrivals.minutes).tolist():
        rows = arrivals.minutes == told
        values[rows] = sensors.at(told)[arrivals.sensors[rows]]
    events = [
        {"node": names[sensor], "time": _instant(told), "pressure": broken_value(sensor) if broken else value}
        for sensor, told, value, broken in zip(
            arrivals.sensors.tolist(), arrivals.minutes.tolist(), values.tolist(), arrivals.broken.tolist(), strict=True
        )
    ]
    made = []
    for station in range(STATIONS):
        rows = np.flatnonzero(arrivals.sensors % STATIONS == station)
        mine = [events[row] for row in rows.tolist()]
        repeated, broken = arrivals.repeated[rows].tolist(), arrivals.broken[rows].tolist()
        made.append(Request(mine, orjson.dumps({"events": mine}), repeated, broken))
    return made


@lru_cache(maxsize=1024)
def _instant(minute: int) -> str:
    return from_microseconds(BASE + minute * MINUTE_US).isoformat()


def _status(result: dict[str, Any]) -> str:
    if result["status"] == "quarantined":
        return "quarantined"
    return "repeated" if "duplicate" in result else "new"


def _pairs(request: Request) -> Iterator[tuple[bool, bool]]:
    return zip(request.repeated, request.broken, strict=True)


def _first_difference(request: Request, found: Sequence[str], due: Sequence[str]) -> str:
    place = next(place for place, (f, d) in enumerate(zip(found, due, strict=True)) if f != d)
    return f"{request.events[place]} is {found[place]}, not {due[place]}"
