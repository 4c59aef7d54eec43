"""Which gateways the controller waits for: those that hold a lease and whose process has not ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.alerts import Alerts
from cluster.clock import SystemClock
from cluster.database import Database
from cluster.settings import Settings
from pipelines import usecases
from serving.rollout.serve_world import ServeWorld, gateway_lease

NAME = "from serving.rollout.serve_world import gateway_name; print(gateway_name(), flush=True); input()"


@pytest.fixture
def database(tmp_path) -> Database:
    made = Database(f"sqlite:///{tmp_path / 'control.db'}")
    made.create()
    return made


def test_a_gateway_whose_process_was_killed_is_not_waited_for(database, tmp_path) -> None:
    clock = SystemClock()
    world = ServeWorld(usecases.load("aqua"), Settings(home=tmp_path), database, Alerts(database, clock), clock)
    process = subprocess.Popen([sys.executable, "-c", NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    named = process.stdout.readline().strip()
    elsewhere = "another-host:1:abc"
    try:
        for gateway in (named, elsewhere):
            database.acquire_lease(gateway_lease("aqua", gateway), gateway, 60, clock.now())
        assert sorted(world.gateways()) == sorted([named, elsewhere])
    finally:
        process.kill()
        process.wait()
    assert world.gateways() == [elsewhere], "of another host only the lease can tell"
