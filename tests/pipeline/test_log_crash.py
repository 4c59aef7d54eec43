"""Both logs under SIGKILL: whatever a writer acknowledged is there once, and the survivors go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.log import Record
from tests.backends import open_log

ROOT = Path(__file__).parents[2]

# Writes numbered records by group commit from two threads and prints a number once it is acknowledged.
WRITER = """
import os, sys, threading
from cluster.clock import SystemClock
from cluster.group_commit import GroupCommit
from cluster.log import Record
from tests.backends import open_log

log = open_log(sys.argv[1])
group = GroupCommit(log, SystemClock())

def write(name):
    for number in range(10**9):
        text = b"%s-%d" % (name, number)
        future = group.submit("events", [Record(text, text), Record(text + b"+", text + b"+")])
        future.result()
        os.write(1, text + b"\\n")

for name in sys.argv[2:]:
    threading.Thread(target=write, args=(name.encode(),)).start()
"""


def _start(place: str, *names: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, place, *names]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def _kill_after(writer: subprocess.Popen[bytes], seconds: float) -> list[bytes]:
    """The lines that were written whole before the writer was killed."""
    assert writer.stdout is not None
    lines = [writer.stdout.readline()]  # it writes: from here the time counts
    time.sleep(seconds)
    os.kill(writer.pid, signal.SIGKILL)
    lines += writer.stdout.read().splitlines(keepends=True)
    writer.wait()
    return [line[:-1] for line in lines if line.endswith(b"\n")]


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.35])
def test_every_acknowledged_record_of_a_killed_writer_is_there_once(place, seconds):
    acknowledged = _kill_after(_start(place, "a", "b"), seconds)
    assert len(acknowledged) > 2
    log = open_log(place)
    records = log.read("events", 0)
    values = [record.value for record in records]
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    assert len(values) == len(set(values))
    assert set(acknowledged) | {text + b"+" for text in acknowledged} <= set(values)
    assert {value.rstrip(b"+") for value in values} == {v for v in values if not v.endswith(b"+")}  # both or neither
    with log.transaction(time.time_ns() // 1000) as txn:
        again = txn.append("events", [Record(value, value) for value in values])
    assert set(again) == {None}
    log.close()


def test_a_killed_writer_does_not_stop_the_others(place):
    victim, survivor = _start(place, "victim"), _start(place, "survivor")
    assert survivor.stdout is not None
    survivor.stdout.readline()
    dead = _kill_after(victim, 0.2)
    alive = [survivor.stdout.readline() for _ in range(50)]  # goes on after the other's death
    alive = [line[:-1] for line in alive] + _kill_after(survivor, 0.05)
    log = open_log(place)
    records = log.read("events", 0)
    values = [record.value for record in records]
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    assert len(values) == len(set(values))
    assert set(dead) | set(alive) <= set(values)
    known = [record.known_at_us for record in records]
    assert known == sorted(known)
    log.close()


def test_a_trim_survives_a_kill(place):
    _kill_after(_start(place, "a"), 0.05)
    log = open_log(place)
    last = log.last("events")
    log.trim("events", last)
    log.close()
    _kill_after(_start(place, "b"), 0.05)
    log = open_log(place)
    records = log.read("events", 0)
    assert log.first("events") == last + 1 == records[0].sequence
    assert all(record.value.startswith(b"b-") for record in records)
    log.close()
