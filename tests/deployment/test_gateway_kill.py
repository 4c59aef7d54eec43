"""SIGKILL of the gateway in the middle of ingest: nothing acknowledged is lost, and nothing appears twice."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from cluster import processes, session
from cluster.clock import ReplayClock
from cluster.log import DurableLog
from cluster.tables import Tables
from pipelines import usecases
from pipelines.contracts.events import EVENT_ID, KNOWN_AT, SEQUENCE
from pipelines.features.online import OnlineState
from tests.deployment.waiting import drained, until

WRITERS, BATCHES, BATCH, KILLS = 3, 40, 20, 3


def _replicas(demo) -> list[int]:
    running = session.current(demo.settings)
    assert running is not None
    found = processes.session_pids(running.environment_marker)
    return [pid for pid in found if processes.command(pid).startswith("ray::ServeReplica:aqua")]


def _batch(writer: int, number: int, start: datetime) -> list[dict[str, object]]:
    return [
        {
            "district": f"dma_{100 + writer}",
            "time": (start + timedelta(seconds=number * BATCH + i)).isoformat(),
            "inflow": float((number * BATCH + i) % 97),
            "temperature": 10.0,
            "rain": 0.0,
            "humidity": None,
            "windspeed": None,
            "holiday": False,
        }
        for i in range(BATCH)
    ]


@pytest.mark.timeout(240)
def test_sigkill_of_the_gateway_loses_and_doubles_no_acknowledged_event(demo, tmp_path):
    clock = ReplayClock(demo.settings.clock_file)
    start = datetime.fromtimestamp(clock.now() // 1_000_000, UTC) - timedelta(hours=2)
    acknowledged: set[str] = set()
    done = [0] * WRITERS
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            with demo.client(retries=60, timeout_s=20) as client:
                for number in range(BATCHES):
                    for result in client.events(_batch(writer, number, start)):
                        assert result.status == "accepted"
                        acknowledged.add(result.event_id or "")
                    done[writer] += 1
                    time.sleep(0.02)
        except BaseException as error:
            failures.append(error)
            raise

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(WRITERS)]
    for thread in writers:
        thread.start()
    for kill in range(1, KILLS + 1):
        share = kill * BATCHES * WRITERS // (KILLS + 1)
        until(lambda: sum(done) >= share or bool(failures), f"{share} batches are acknowledged", 120)  # noqa: B023
        replicas = _replicas(demo)
        assert replicas, "no gateway replica was found"
        os.kill(replicas[0], signal.SIGKILL)
    for thread in writers:
        thread.join(timeout=120)
    assert not failures
    assert len(acknowledged) == WRITERS * BATCHES * BATCH

    with demo.client(retries=60) as client:
        drained(client)
        applied = client.status()["applied"]
        served = {w: client.features(f"dma_{100 + w}").features for w in range(WRITERS)}

    use_case = usecases.load("aqua")
    tables = Tables(demo.settings.tables_url, demo.settings.storage_options)
    rows = tables.read("aqua/events")
    ids = rows[EVENT_ID].to_pylist()
    assert len(ids) == len(set(ids)), "an event is in the table twice"
    assert acknowledged <= set(ids), "an acknowledged event is not in the table"
    sequences = sorted(s for s in rows[SEQUENCE].to_pylist() if s > 0)
    assert len(sequences) == len(set(sequences))
    assert rows[KNOWN_AT].null_count == 0

    # The state that the killed processes left equals one rebuilt from the table alone.
    empty = DurableLog(tmp_path / "log", remember_us=1_000_000)
    rebuilt = OnlineState(tmp_path / "state", use_case)
    bulk = rows.set_column(rows.schema.get_field_index(SEQUENCE), SEQUENCE, pa.array(np.zeros(rows.num_rows, np.int64)))
    rebuilt.materialize(bulk, tables.version("aqua/events"), empty)
    read = rebuilt.bind().read([f"dma_{100 + w}" for w in range(WRITERS)], clock.now())
    assert applied == sequences[-1]
    for writer in range(WRITERS):
        values = [served[writer][name].value for name in use_case.view.stored]
        expected = [None if np.isnan(v) else v for v in read.values[writer]]
        assert values == expected
    rebuilt.close()
    empty.close()


@pytest.mark.timeout(120)
def test_a_request_of_a_thousand_instances_outlives_the_gateway_that_had_it(demo):
    """Its body does not fit the buffer from which the proxy sends a request again, so the client does."""
    instances = [
        {"district": f"dma_{i % 10}", "temperature": 15.0, "rain": 0.0, "holiday": False} for i in range(1_000)
    ]
    assert len(json.dumps(instances)) > 4 * 16_384
    answered, failures, stop = [0], [], threading.Event()

    def ask() -> None:
        try:
            with demo.client(timeout_s=20) as client:
                while not stop.is_set():
                    assert len(client.predict(instances)) == 1_000
                    answered[0] += 1
        except BaseException as error:
            failures.append(error)
            raise

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in callers:
        thread.start()
    try:
        for kill in range(1, KILLS + 1):
            until(lambda: answered[0] >= 10 * kill or bool(failures), "requests are answered", 60)  # noqa: B023
            os.kill(_replicas(demo)[0], signal.SIGKILL)
            until(lambda: len(_replicas(demo)) == 2, "the gateway is replaced", 60)
    finally:
        stop.set()
        for thread in callers:
            thread.join(timeout=60)
    assert not failures
    assert answered[0] >= 10 * KILLS
