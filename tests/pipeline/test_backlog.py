"""A log that nobody drains: callers are refused before anything is lost, and taken again once there is room."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.group_commit import GroupCommit
from cluster.log import LogFull, Record
from pipelines.drain import EVENTS, QUARANTINE
from pipelines.features.online import OnlineState
from serving.events import EventIntake
from serving.problems import Problem
from tests.backends import open_log, open_state
from tests.data.worlds import BASE
from tests.pipeline.test_online_state import use_case


class Clock:
    def now(self) -> int:
        return BASE + 60_000_000


def numbered(first: int, count: int) -> list[Record]:
    return [Record(b"%d" % number, b"%d" % number) for number in range(first, first + count)]


def test_a_stream_takes_no_more_than_it_may_keep_and_goes_on_when_it_is_drained(place: str) -> None:
    log, time = open_log(place), [0.0]
    group = GroupCommit(log, Clock(), max_kept=10, real=lambda: time[0])
    assert group.submit("events", numbered(0, 8)).result() == list(range(1, 9))
    with pytest.raises(LogFull, match=r"'events' of the log .* keeps 8 records that were not drained, at most 10 may"):
        group.submit("events", numbered(8, 3))
    assert group.submit("events", numbered(8, 2)).result() == [9, 10]
    assert group.submit("others", numbered(0, 10)).result() == list(range(1, 11))
    with pytest.raises(LogFull):
        group.submit_quiet("events", numbered(10, 1))
    log.trim("events", 4)
    with pytest.raises(LogFull):
        group.submit("events", numbered(10, 1))  # it was looked at a moment ago
    time[0] += 0.2
    assert group.submit("events", numbered(10, 4)).result() == [11, 12, 13, 14]
    assert log.pending("events") == 10
    group.close()
    log.close()


def event(second: int) -> dict[str, Any]:
    return {"meter": "a", "at": f"2023-11-14T22:13:{20 + second:02d}Z", "flow": 1.0, "level": 0.5}


def test_events_beyond_it_are_refused_with_when_to_try_again(place: str) -> None:
    log, case = open_log(place), use_case()
    state: OnlineState = open_state(place, case)
    intake = EventIntake(case, log, Clock(), lambda: state.project(log), max_kept=5)
    taken = asyncio.run(intake.ingest([event(second) for second in range(5)]))
    assert [result["status"] for result in taken] == ["accepted"] * 5
    with pytest.raises(Problem) as refused:
        asyncio.run(intake.ingest([event(5)]))
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
    assert "drain" in refused.value.detail
    assert log.last(EVENTS) == 5
    with pytest.raises(Problem):
        asyncio.run(intake.ingest([{"meter": "a"}, event(5)]))
    assert log.last(QUARANTINE) == 0, "what is sent again would be quarantined twice"
    intake.close()
    state.close()
    log.close()
