"""The skew audit that a rollout's controller has run: the real job in a process of its own, and what is made of it."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest

from pipelines.spec import SkewRule
from serving.rollout.audits import AuditFailed, audit
from serving.rollout.evidence import Skew

DAY = timedelta(days=1)


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
