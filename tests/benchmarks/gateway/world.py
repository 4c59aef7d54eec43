"""A cluster of its own with the gateway and the empty deployments, and a closed loop over two or more sides in turn.

State, registry, routing and log are those of any deployment. Only the model is not trained: its weights are drawn,
which changes nothing about what an answer costs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import session
from cluster.clock import SystemClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.backfill import materialize
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, INSTANT, events_schema
from pipelines.features.windows import pages
from pipelines.training.artifact import Artifact, Calibration, Output, save
from pipelines.training.networks import Network, Shape, fit_preprocessing
from pipelines.training.registry import Registry
from serving.app import deploy
from serving.auth import owner_key
from serving.client import Client
from serving.drills import register_copy
from tests.benchmarks.features.worlds import events
from tests.benchmarks.gateway import USE_CASE, empty
from tests.benchmarks.gateway.load import Load, Plan, apart
from tests.benchmarks.harness import Incomparable, say

SENSORS, READINGS, EVERY_US = 1_000, 84, 8 * 3_600 * 1_000_000
CONCURRENCIES = (1, 16, 64)
WARM_S, SECONDS = 1.0, 2.0
"""Of a closed loop. The log is drained every two seconds; after a second of warming nine tenths of what the counted
answers logged is drained while they are counted."""
MOST_BUSY = 0.8
_SECOND_US = 1_000_000
_DRAINED_S = 60.0


@dataclass(frozen=True)
class World:
    """A running deployment: ``champion`` and ``challenger`` are two registered versions of one artifact."""

    settings: Settings
    key: str
    names: list[str]
    champion: str
    challenger: str
    artifact: Path

    @property
    def port(self) -> int:
        """Of the HTTP proxy in front of all deployments."""
        return self.settings.http_port

    def client(self) -> Client:
        """A caller of the gateway."""
        return Client(USE_CASE, url=f"http://127.0.0.1:{self.port}", api_key=self.key, timeout_s=30)

    def requests(self, path: str = f"/v1/{USE_CASE}/predict") -> list[str]:
        """One prediction for each sensor, as it goes over the wire."""
        bodies = [json.dumps({"instances": [instance(name)]}) for name in self.names]
        return [http(path, body, authorization=f"Bearer {self.key}") for body in bodies]

    def drained(self) -> None:
        """Waits until what the gateway has logged is in its tables, so that no other side pays for it."""
        with self.client() as client:
            deadline = time.monotonic() + _DRAINED_S
            while any(stream["pending"] for stream in client.status()["log"].values()):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the log was not drained within {_DRAINED_S:g} s")
                time.sleep(0.1)


@dataclass(frozen=True)
class Side:
    """What is called, where, and what is to be waited for after it was measured."""

    port: int
    requests: list[str]
    after: Callable[[], None] = lambda: None


def ours(world: World) -> Side:
    """The gateway's ``predict``: key, contract, ten features from LMDB, model, routing, log."""
    return Side(world.port, world.requests(), world.drained)


def instance(name: str) -> dict[str, Any]:
    """What a caller gives of a sensor."""
    number = int(name.rsplit("_", 1)[1])
    return {"sensor": name, "temperature": number % 300 / 10, "holiday": number % 7 == 0}


def http(path: str, body: str, **headers: str) -> str:
    """A whole HTTP/1.1 POST of a JSON body."""
    given = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(body)), **headers}
    return "\r\n".join([f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", body])


def in_turn(sides: Mapping[str, Side], pairs: int) -> dict[int, list[dict[str, Load]]]:
    """By concurrency, ``pairs`` rounds of all sides, each at once after the other; who begins goes round.

    Raises ``Incomparable`` when the load generator computed for so much of the time that it may have been the limit.
    """
    found: dict[int, list[dict[str, Load]]] = {}
    names = list(sides)
    for concurrency in CONCURRENCIES:
        rounds = found.setdefault(concurrency, [])
        for turn in range(pairs):
            at = turn % len(names)
            taken: dict[str, Load] = {}
            for name in (*names[at:], *names[:at]):
                side = sides[name]
                taken[name] = apart(Plan(side.port, side.requests, concurrency, WARM_S, SECONDS))
                side.after()
                if taken[name].busy > MOST_BUSY:
                    raise Incomparable(f"the load generator computed for {taken[name].busy:.0%} of the time: {name}")
            rounds.append(taken)
        for name in names:
            per_s, p50, busy = (
                statistics.median(getattr(taken[name], figure) for taken in rounds)
                for figure in ("per_s", "p50_ms", "busy")
            )
            say(f"  {concurrency:>2} at once, {name}: {per_s:,.0f}/s, p50 {p50:.3f} ms (generator {busy:.0%} busy)")
    return found


def lowest_ratio(found: Mapping[int, list[dict[str, Load]]], one: str, other: str) -> float:
    """The throughput of ``one`` over that of ``other``: the median over pairs, at the worst of the concurrencies."""
    ratios = {
        concurrency: statistics.median(taken[one].per_s / taken[other].per_s for taken in rounds)
        for concurrency, rounds in found.items()
    }
    say(f"{one} / {other}: " + ", ".join(f"{ratio:.3f} at {c}" for c, ratio in ratios.items()))
    return min(ratios.values())


@contextmanager
def running(settings: Settings) -> Iterator[World]:
    """A cluster with one replica of each deployment, which is gone at the end."""
    names = [f"sensor_{number:04d}" for number in range(SENSORS)]
    _state(settings, names)
    artifact = settings.home / "artifact"
    _artifact(artifact, names)
    registry = Registry(settings)
    version = registry.register(artifact, gates={}, gates_passed=True, params={}, metrics={}).version
    challenger = register_copy(USE_CASE, version, None, registry, settings)
    asked = {"requested_by": "benchmark", "reason": "", "forced": False, "policy": None}
    Database(settings.database_url).request_release(USE_CASE, version, asked, SystemClock().now())
    with session.running(settings, say=say):
        deploy(USE_CASE, settings)
        empty.deploy()
        say(f"version {version} answers; {_busy():.2f} cores are busy while nobody calls")
        yield World(settings, owner_key(settings), names, version, challenger, artifact)


def _state(settings: Settings, names: list[str]) -> None:
    """A month of readings in the events table, and the state made of them."""
    use_case = usecases.load(USE_CASE)
    last = SystemClock().now() // EVERY_US * EVERY_US - _SECOND_US
    rng, count = np.random.default_rng(1), len(names) * READINGS
    rows = pa.table(
        {
            "sensor": pa.array(np.repeat(names, READINGS)),
            "at": pa.array(np.tile(last - np.arange(READINGS)[::-1] * EVERY_US, len(names))).cast(INSTANT),
            "flow": rng.gamma(9.0, 3.0, count),
            "temperature": rng.normal(12.0, 6.0, count).clip(-40, 55),
            "holiday": rng.random(count) < 0.1,
        }
    )
    tables, database, clock = Tables(settings.tables_url), Database(settings.database_url), SystemClock()
    database.create()
    tables.ensure(events_table(use_case), events_schema(use_case.contract), [BUCKET])
    tables.append(events_table(use_case), events(use_case.contract, rows), "load/1")
    done = materialize(use_case, tables=tables, database=database, settings=settings, clock=clock)
    if done.entities != len(names):
        raise Incomparable(f"{done.entities} of {len(names)} sensors have state")


def _artifact(folder: Path, names: list[str]) -> None:
    """A version with drawn weights, whose preprocessing fits made-up rows."""
    import torch

    use_case = usecases.load(USE_CASE)
    model, contract = use_case.model, use_case.contract
    (view,) = pages(use_case)
    rng, rows = np.random.default_rng(2), 1_000
    numeric, codes = rng.normal(20.0, 8.0, (rows, len(model.numeric))), rng.integers(0, len(names) + 1, (rows, 1))
    shape = Shape(numeric=len(model.numeric), categories=(len(names),), hidden=model.hidden)
    torch.manual_seed(model.seed)
    network = Network(shape).fitted(fit_preprocessing(numeric, numeric[:, 0], shape.bins))
    field = contract.field(model.target.field)
    page = Artifact(
        use_case=use_case.name,
        contract=contract.name,
        contract_version=contract.version,
        view=view,
        entity=contract.entity,
        inputs=use_case.view.inputs,
        numeric=model.numeric,
        vocabularies={contract.entity: tuple(names)},
        anchor=model.anchor,
        scale=None,
        transform=model.transform,
        output=Output(field=field.name, unit=field.unit, horizon_us=0),
        shape={"hidden": shape.hidden},
        calibration=Calibration(coverage=model.coverage, everywhere=5.0, rows=rows),
        snapshot={},
        training={"made": datetime.now(UTC).isoformat()},
        code="",
        versions={},
    )
    given = {"numeric": numeric, "categories": codes, "anchor": np.full(rows, 20.0), "scale": np.ones(rows)}
    save(folder, network, page, given)


def _busy(seconds: float = 3.0) -> float:
    """How many cores of this machine compute, on the average over a few seconds."""

    def computed() -> tuple[float, float]:
        # user, nice, system, idle, iowait, … in clock ticks over all cores: see proc(5)
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)

    before, of = computed()
    time.sleep(seconds)
    after, upto = computed()
    cores = sum(line.startswith("cpu") for line in Path("/proc/stat").read_text().splitlines()) - 1
    return (after - before) / (upto - of) * cores
