"""A gateway of the water use case with a model that is trained in seconds, served by a running cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray import serve

from cluster.clock import ReplayClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import backfill
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, events_schema
from pipelines.train import train
from serving import app
from serving.auth import owner_key
from serving.client import Client
from serving.rollout import actor
from tests.model import demand

DISTRICTS, DAYS = 2, 150


@dataclass(frozen=True)
class SmallGateway:
    """Where it answers, and the key that may do everything. Its clock stands still."""

    settings: Settings
    url: str
    key: str

    def client(self, **options: Any) -> Client:
        return Client("aqua", url=self.url, api_key=self.key, **options)


@contextmanager
def small_gateway(settings: Settings) -> Iterator[SmallGateway]:
    """Trains, releases and deploys on the cluster of ``settings``, which has a replay clock; takes it down again."""
    case = demand.use_case(hidden=(32, 16), epochs=8)  # enough to pass its gate
    clock, tables = ReplayClock(settings.clock_file), Tables(settings.tables_url)
    database = Database(settings.database_url)
    database.create()
    events = demand.events(case, districts=DISTRICTS, days=DAYS, buckets=settings.buckets)
    clock.set(pc.max(pc.cast(events.column(case.contract.time), pa.int64())).as_py())
    tables.ensure(events_table(case), events_schema(case.contract), [BUCKET])
    tables.append(events_table(case), events, "load/1")
    made = train(case, tables=tables, database=database, settings=settings, clock=clock)
    assert made.requested, made.validation.text()
    backfill.materialize(case, tables=tables, database=database, settings=settings, clock=clock)
    try:
        app.deploy(case.name, settings)
        yield SmallGateway(settings, f"http://127.0.0.1:{settings.http_port}", owner_key(settings))
    finally:
        serve.delete(case.name)
        ray.kill(actor.handle(case.name))
