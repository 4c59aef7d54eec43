"""Faults on purpose do what they say and nothing else; and a process is refused the memory that it may not take."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from pipelines.training.artifact import Prediction
from serving.drills import Drill, DrilledRunner, DrillError


class Steady:
    """Answers the column ``x``."""

    artifact: Any = None

    def predict(self, columns: dict[str, np.ndarray], strings: object, level: object = None) -> Prediction:
        return Prediction(columns["x"], columns["x"] - 1, columns["x"] + 1)


def ask(drill: Drill, rows: int = 3) -> Prediction:
    runner: Any = Steady()
    return DrilledRunner(runner, drill).predict({"x": np.arange(float(rows))}, {})


def same(found: Prediction, rows: int) -> bool:
    wanted = Steady().predict({"x": np.arange(float(rows))}, {})
    return all(np.array_equal(getattr(found, name), getattr(wanted, name)) for name in ("value", "lower", "upper"))


@pytest.mark.parametrize("drill", [Drill(), Drill(leak_mb=0.5), Drill(slower=2.0)])
def test_answers_stay_what_they_are_where_no_fault_is_in_them(drill: Drill) -> None:
    assert same(ask(drill), 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_answers_of_the_wrong_shape_have_a_row_more_than_was_asked_for(rows: int) -> None:
    found = ask(Drill(shape=1.0), rows)
    assert found.value.shape == found.lower.shape == found.upper.shape == (rows + 1,)
    assert same(Prediction(found.value[:rows], found.lower[:rows], found.upper[:rows]), rows)


def test_answers_that_are_no_numbers_and_calls_that_err() -> None:
    assert np.isnan(ask(Drill(nan=1.0)).value).all()
    with pytest.raises(DrillError):
        ask(Drill(errors=1.0))


def test_a_call_that_hangs_does_not_return() -> None:
    asked = threading.Thread(target=ask, args=(Drill(hang=1.0),), daemon=True)
    asked.start()
    asked.join(0.3)
    assert asked.is_alive()


LEAKING = """
import numpy as np
from serving.drills import Drill, DrilledRunner
from tests.data.test_drills import Steady, resident
leaking, before = DrilledRunner(Steady(), Drill(leak_mb=16.0)), resident()
for _ in range(4):
    leaking.predict({"x": np.ones(1)}, {})
print(resident() - before)
"""


def test_what_a_leak_takes_is_never_given_back() -> None:
    """In a process of its own, for the tests before it may just have given memory back."""
    done = subprocess.run([sys.executable, "-c", LEAKING], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60 * 2**20


def resident() -> int:
    """Bytes of memory that this process really has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_version_that_crashes_ends_its_process_when_it_is_loaded() -> None:
    started = multiprocessing.get_context("spawn").Process(target=ask, args=(Drill(crash=True),))
    started.start()
    started.join(60)
    assert started.exitcode == -signal.SIGKILL


BOUNDED = """
import mmap
from cluster.processes import bound_memory
bound_memory(96)
shared, kept = mmap.mmap(-1, 512 * 2**20), []
try:
    while len(kept) < 1000:
        kept.append(bytearray(2**20))
except MemoryError:
    print(len(kept))
kept.clear()
print(len(bytearray(64 * 2**20)))
"""


def test_a_process_is_refused_more_memory_than_it_may_take_and_goes_on() -> None:
    """What it shares with others is not counted, and what it gave back it may take again."""
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, check=True)
    taken, again = map(int, done.stdout.split())
    assert 80 <= taken <= 96
    assert again == 64 * 2**20
