"""The skew audit that a rollout's controller has run: the real job in a process of its own, and what is made of it."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest

from pipelines.spec import SkewRule
from serving.rollout.audits import AuditFailed, Schedule, audit
from serving.rollout.evidence import Skew

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
RULE = SkewRule(every=15 * MINUTE)


def test_the_job_tells_when_there_is_nothing_to_say_and_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path))
    assert audit("aqua", SkewRule(), DAY) is None  # nothing was served
    monkeypatch.setenv("TIDEGATE_BUKETS", "4")
    with pytest.raises(AuditFailed, match=r"audit of 'aqua' failed: .*TIDEGATE_BUKETS"):
        audit("aqua", SkewRule(), DAY)


def test_what_differs_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job"
    report = '{"checked": 9, "mismatched": 2, "by_feature": {"flow_mean_1d": {"differing": 2, "largest": null}}}'
    job.write_text(f"#!/bin/sh\necho \"$@\" >{tmp_path}/told\necho a warning\necho '{report}'\nexit 1\n")
    job.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(job))
    found = audit("aqua", SkewRule(share=0.5, rows=7), timedelta(minutes=90))
    assert found == Skew(checked=9, mismatched=2, features={"flow_mean_1d": 2})
    told = (tmp_path / "told").read_text().split()
    assert told == ["-m", "pipelines.audit", "aqua", "--hours", "1.5", "--share", "0.5", "--rows", "7"]


def at(minutes: float) -> int:
    return 1_700_000_000_000_000 + round(minutes * 60_000_000)


def test_an_audit_goes_back_to_the_one_before_it_and_the_first_of_a_process_a_day() -> None:
    schedule = Schedule()
    assert schedule.span(at(0), RULE, None, paused=False) == DAY
    assert schedule.span(at(1), RULE, None, paused=False) == DAY  # the first one came to no end
    schedule.done(at(1))
    assert schedule.span(at(15), RULE, None, paused=False) is None
    assert schedule.span(at(16), RULE, None, paused=False) == 20 * MINUTE
    assert schedule.span(at(16), None, None, paused=False) is None
    assert schedule.span(at(-60), RULE, None, paused=False) is not None  # a replay clock that was set back


def test_a_rollout_is_not_paused_for_what_was_answered_before_it_began_or_was_resumed() -> None:
    schedule = Schedule()
    assert schedule.span(at(0), RULE, at(-3), paused=False) == 3 * MINUTE
    schedule.done(at(0))
    for minute in range(1, 12):  # somebody looks into what was found
        assert schedule.span(at(minute), RULE, at(-3), paused=True) is None
    assert schedule.span(at(15), RULE, at(-3), paused=False) == 4 * MINUTE
    schedule.done(at(15))
    assert schedule.span(at(30), RULE, at(-3), paused=True) == 20 * MINUTE  # the alert follows what is served meanwhile
    assert schedule.span(at(31), RULE, at(29), paused=False) == MINUTE  # another rollout


def test_a_controller_that_is_started_anew_while_a_rollout_is_paused_pauses_it_for_nothing_old() -> None:
    schedule = Schedule()
    assert schedule.span(at(0), RULE, at(-600), paused=True) == DAY
    schedule.done(at(0))
    assert schedule.span(at(15), RULE, at(-600), paused=False) == 15 * MINUTE
