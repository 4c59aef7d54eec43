"""State and log of both backends between processes: concurrent writers, SIGKILL, rebuilds under load, readers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import EVENT_ID, SEQUENCE
from pipelines.drain import drain
from pipelines.features.online import OnlineState
from tests.backends import open_log, open_state, open_views
from tests.data.worlds import BASE, same_bits
from tests.pipeline.test_online_state import bulk, record, two_views, use_case

ROOT = Path(__file__).parents[2]
METERS = 5
KILLS = int(os.environ.get("KILLS", "5"))
REBUILDS = 10
NOW = BASE + 5_000_000

# Every write is one event of a meter aN and one of bN at the same time, so in every state both have as many.
COMMON = """
import os, select, sys, threading
from cluster.group_commit import GroupCommit
from cluster.log import Record
from pipelines.contracts.events import encode_event
from tests.backends import open_log, open_views
from tests.data.worlds import BASE, CONTRACT
from tests.pipeline.test_online_state import record, two_views

place, NOW = sys.argv[1], BASE + 5_000_000
views = open_views(place, two_views())
state = views.states[views.present]

class Clock:
    def now(self):
        return NOW

def pair(at, meters):
    rows = [record(f"{side}{at % meters}", BASE + at, 0.1 * (at % 7)) for side in "ab"]
    return [Record(b"%s|%d" % (row["meter"].encode(), BASE + at), encode_event(CONTRACT, row)) for row in rows]

def told_to_stop():
    return bool(select.select([sys.stdin], [], [], 0)[0])
"""
# Ingests as a gateway does, into so many pairs of meters and from a thread for each first time that is given, and
# prints the time of a pair once it is acknowledged.
INGEST = (
    COMMON
    + """
log = open_log(place)
group = GroupCommit(log, Clock(), after_commit=lambda: views.project(log))

def ingest(first):
    at = first
    while not told_to_stop():
        group.submit("events", pair(at, int(sys.argv[2]))).result()
        os.write(1, b"%d\\n" % at)
        at += 1

threads = [threading.Thread(target=ingest, args=(int(first),)) for first in sys.argv[3:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
group.close()
"""
)
# Reads all the time. Generation g was made from g pairs, and every pair of the log counts besides.
READ = (
    COMMON
    + """
reader, count = state.bind(), state.plan.features.index("flow_count_1m")
os.write(1, b"ready\\n")
seen = 0
while not told_to_stop():
    read = reader.read(["a0", "b0"], NOW)
    found = read.values[:, count].tolist()
    assert found == [read.sequence // 2 + read.generation] * 2, (found, read.sequence, read.generation)
    if read.generation > seen:
        seen = read.generation
        os.write(1, b"%d\\n" % seen)
"""
)


@contextmanager
def running(code: str, place: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has printed its first line; it is gone at the end."""
    command = [sys.executable, "-c", code, place, *map(str, arguments)]
    # Unbuffered: what a buffer had read beyond the first line would be lost to ``communicate``.
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert process.stdout is not None
        process.first = process.stdout.readline()  # type: ignore[attr-defined]
        yield process
    finally:
        process.kill()
        process.communicate()


def stopped(process: subprocess.Popen[bytes]) -> list[bytes]:
    """The lines of a process that is told to stop and ends well."""
    out, _ = process.communicate(b"stop", timeout=60)
    assert process.returncode == 0
    return [process.first.strip(), *out.split()]  # type: ignore[attr-defined]


def killed(process: subprocess.Popen[bytes]) -> list[bytes]:
    """The lines that a process had written whole when it was killed."""
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    return [line[:-1] for line in [process.first, *out.splitlines(True)] if line.endswith(b"\n")]  # type: ignore[attr-defined]


def blobs(state: OnlineState) -> dict[str, bytes]:
    names = state.names()
    with state.store.reading(names) as snapshot:
        return {name: bytes(blob or b"") for name, blob in zip(names, snapshot.blobs, strict=True)}


@pytest.mark.timeout(60 + 20 * KILLS)
def test_killed_and_concurrent_ingest_loses_and_doubles_nothing(place: str, tmp_path: Path) -> None:
    rng = random.Random(KILLS)
    acknowledged: list[bytes] = []
    with running(INGEST, place, METERS, 4_000_000) as bystander:
        for kill in range(KILLS):
            with running(INGEST, place, METERS, kill * 20_000, kill * 20_000 + 10_000) as victim:
                time.sleep(rng.uniform(0, 0.2))
                acknowledged += killed(victim)
        acknowledged += stopped(bystander)

    log, views = open_log(place), open_views(place, two_views())
    assert views.project(log) == log.last("events")
    records = log.read("events", 0)
    assert [r.sequence for r in records] == list(range(1, len(records) + 1))
    values = [r.value for r in records]
    assert len(values) == len(set(values)), "an event is in the log twice"
    expected = {b'"%c%d|%d"' % (s, int(at) % METERS, BASE + int(at)) for at in acknowledged for s in b"ab"}
    assert expected <= {value.split(b",")[1] for value in values}, "an acknowledged event is not in the log"

    for state in views.states.values():
        replayed = OnlineState(tmp_path / "replayed", state.use_case)
        replayed.project(log)
        assert blobs(state) == blobs(replayed)
        replayed.close()

    tables = Tables((tmp_path / "tables").as_uri())
    drain(use_case(), log, tables, Settings(home=tmp_path))
    rows = tables.read(events_table(use_case()))
    assert sorted(rows.column(SEQUENCE).to_pylist()) == list(range(1, len(records) + 1))
    drained = rows.column(EVENT_ID).to_pylist()
    assert len(drained) == len(set(drained)), "an event is in the table twice"
    assert {f"{s}{int(at) % METERS}|{BASE + int(at)}" for at in acknowledged for s in "ab"} <= set(drained)
    version = tables.version(events_table(use_case()))
    for state in views.states.values():
        rebuilt = OnlineState(tmp_path / "rebuilt", state.use_case)
        rebuilt.materialize(rows, version, log, drained=len(records))
        assert blobs(state) == blobs(rebuilt)
        rebuilt.close()
    views.close()
    log.close()


def test_readers_see_the_old_or_the_new_state_while_rebuilds_race_with_ingest(place: str) -> None:
    log, state = open_log(place), open_state(place, use_case())
    with running(INGEST, place, 1, 0, 1_000_000) as ingest, running(READ, place) as reader:
        for generation in range(1, REBUILDS + 1):
            rows = [record(meter, BASE - 1 - i, 1.0) for i in range(generation) for meter in ("a0", "b0")]
            parts = [bulk([row for row in rows if row["meter"] == meter]) for meter in ("a0", "b0")]
            assert state.materialize(parts, generation, log) == generation
            assert reader.stdout is not None
            while int(reader.stdout.readline()) < generation:
                pass  # the reader names each generation as soon as it reads from it
        written = len(stopped(ingest))
        stopped(reader)
    assert state.project(log) == log.last("events") == 2 * written
    count = state.plan.features.index("flow_count_1m")
    assert state.bind().read(["a0", "b0"], NOW).values[:, count].tolist() == [written + REBUILDS] * 2
    assert [state.generation(g) for g in range(1, REBUILDS + 1)] == list(range(1, REBUILDS + 1))
    state.close()
    log.close()


# Rebuilds from three meters, and is killed when two of them have gone in.
KILLED_REBUILD = """
import os, signal, sys
from tests.backends import open_log, open_state
from tests.data.worlds import BASE
from tests.pipeline.test_online_state import bulk, record, use_case

def parts():
    yield bulk([record("x", BASE, 1.0)])
    yield bulk([record("y", BASE, 1.0)])
    os.kill(os.getpid(), signal.SIGKILL)

open_state(sys.argv[1], use_case()).materialize(parts(), 7, open_log(sys.argv[1]))
"""


def test_a_killed_rebuild_changes_nothing_and_the_next_one_cleans_up(
    place: str, request: pytest.FixtureRequest
) -> None:
    log, state = open_log(place), open_state(place, use_case())
    state.materialize(bulk([record("a", BASE, 1.0)]), 1, log)
    before = blobs(state)
    done = subprocess.run([sys.executable, "-c", KILLED_REBUILD, place], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (blobs(state), state.position()) == (before, (1, 0))
    assert state.materialize(bulk([record("b", BASE, 1.0)]), 2, log) == 2
    assert state.names() == ["b"]
    if "://" in place:
        keys = request.getfixturevalue("redis_server").ask("--scan", "--pattern", "*:entities:*").split()
        assert len(keys) == 1, keys
    state.close()
    log.close()


def test_both_backends_read_the_same_bits(redis_server, tmp_path: Path) -> None:
    redis_server.empty()
    rows = bulk([record(m, BASE + i * 7_000_000, i / 3, -i / 7) for i in range(40) for m in ("a", "b")])
    read = []
    for place in (str(tmp_path), redis_server.url):
        log, state = open_log(place), open_state(place, use_case())
        state.materialize(rows, 1, log)
        read.append(state.bind().read(["b", "a", "never"], BASE + 290_000_000))
        state.close()
        log.close()
    one, other = read
    assert same_bits(one.values, other.values)
    assert same_bits(one.age_s, other.age_s)
    assert one.status.tolist() == other.status.tolist()
    assert one.known.tolist() == other.known.tolist() == [True, True, False]
