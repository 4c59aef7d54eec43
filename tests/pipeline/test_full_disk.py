"""A disk that takes no more: what was acknowledged stays, callers hear what to do, and all goes on with new room."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.log import DurableLog
from pipelines.features.online import OnlineState
from pipelines.features.stores import StateUnavailable
from serving.events import EventIntake
from serving.problems import Problem
from tests.data.worlds import BASE
from tests.pipeline.test_backlog import Clock, event
from tests.pipeline.test_online_state import record, use_case, write


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """No file of this process may grow beyond what LMDB's file in ``directory`` has."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((directory / "data.mdb").stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_callers_hear_of_a_full_log_and_their_events_are_taken_when_there_is_room(tmp_path: Path) -> None:
    log, case = DurableLog(tmp_path / "log", remember_us=3_600_000_000), use_case()
    intake = EventIntake(case, log, Clock(), lambda: None)
    large = [{**event(0), "meter": f"{place:0200d}"} for place in range(500)]
    with full(tmp_path / "log"), pytest.raises(Problem) as refused:
        asyncio.run(intake.ingest(large))
    assert refused.value.status == 503
    assert "Make room there" in refused.value.detail
    taken = asyncio.run(intake.ingest(large))
    assert [result.get("sequence") for result in taken] == list(range(1, 501))
    intake.close()
    log.close()


def test_state_that_cannot_be_written_catches_up_with_its_log_when_there_is_room(tmp_path: Path) -> None:
    log, state = DurableLog(tmp_path / "log", remember_us=3_600_000_000), OnlineState(tmp_path / "state", use_case())
    write(log, [record("m0", BASE, 1.0, 2.0)], BASE)
    state.project(log)  # its kernels are compiled, and their files written
    write(log, [record(f"m{place}", BASE, 1.0, 2.0) for place in range(1, 50)], BASE)
    with full(state.store.path), pytest.raises(StateUnavailable, match="the disk refuses the state"):
        state.project(log)
    assert (state.applied(), state.entities()) == (1, 1)
    assert state.project(log) == 50
    assert state.entities() == 50
    state.close()
    log.close()
