"""The gateway's part, in a process of its own: what ``serving.gateway`` does with ``POST /events``, without HTTP.

A body is answered as there, by the same intake, log, state and drain under the same settings; a refusal comes as its
problem document. An empty body ends a connection. The first line of output says that it listens, the last one, when
all is in the tables, what it took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import orjson

from cluster.alerts import Alerts
from cluster.clock import open_clock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.drain import EVENTS, QUARANTINE
from pipelines.features.online import open_log, open_state
from serving.events import Drain, EventIntake
from serving.problems import Problem
from tests.benchmarks.harness import say
from tests.benchmarks.water_network.page import USE_CASE


def main(address: str, callers: int) -> None:
    """Answers ``callers`` connections to the socket ``address`` until all have ended."""
    settings = Settings.from_environment()
    clock, database = open_clock(settings), Database(settings.database_url)
    database.create()
    log, state = open_log(settings, USE_CASE), open_state(settings, USE_CASE)
    tables = Tables(settings.tables_url, settings.storage_options)

    def project() -> int:
        return state.project(log)

    intake = EventIntake(USE_CASE, log, clock, project, settings.log_rows)
    drain = Drain(USE_CASE, log, project, tables, database, settings, Alerts(database, clock), "gateway")
    with Listener(address) as listener:
        say("listening")
        before = time.process_time()
        connections = [listener.accept() for _ in range(callers)]
    asyncio.run(_serve(intake, connections))
    intake.close()
    while log.pending(EVENTS) or log.pending(QUARANTINE):
        if drain.failure is not None or not drain.alive():
            raise RuntimeError("the log does not reach its tables") from drain.failure
        time.sleep(0.05)
    drain.close()
    took = {"peak_kib": peak_kib(), "cpu_s": time.process_time() - before, "unplaced": state.unplaced()}
    say(json.dumps(took))
    state.close()
    log.close()


async def _serve(intake: EventIntake, connections: list[Connection]) -> None:
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(2 * len(connections))  # one to wait for each caller, one to answer it

    async def caller(connection: Connection) -> None:
        while body := await loop.run_in_executor(threads, connection.recv_bytes):
            try:
                answer = orjson.dumps({"results": await intake.ingest(orjson.loads(body)["events"])})
            except Problem as problem:
                answer = problem.body()
            await loop.run_in_executor(threads, connection.send_bytes, answer)

    await asyncio.gather(*map(caller, connections))


def peak_kib() -> int:
    """The most memory that this process has had, as the kernel counts its resident pages."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
