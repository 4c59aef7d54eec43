"""The skew audit that runs by itself: the job ``pipelines.audit`` in a process of its own, and what it found.

It takes only what time is left over by those that answer, and whatever happens to it happens to nobody else.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import orjson

from cluster.processes import python_environment
from pipelines.audit import DIFFERS
from pipelines.spec import SkewRule
from pipelines.spec.base import DAY_US, microseconds
from serving.rollout.evidence import Skew

TIMEOUT_S = 600.0
_OVERLAP_US = 300_000_000  # within which an answer has reached its table
_LOWEST_PRIORITY = 19


class Schedule:
    """When to audit, and how far back. Moments are in microseconds of the cluster's clock.

    An audit goes back to the one before it and a little further, because an answer reaches its table some time after
    it was given; the first one of a process to a day before, whatever an earlier process audited. A rollout is not
    paused for answers given before it began, nor for those that somebody had before his eyes when he resumed it.
    """

    def __init__(self) -> None:
        self._last_us: int | None = None
        self._known_us = 0  # answers given until then pause no rollout

    def span(self, now_us: int, rule: SkewRule | None, began_us: int | None, *, paused: bool) -> timedelta | None:
        """How far back an audit is to look now, None for none; to be asked about as often as ``paused`` may change.

        ``began_us`` is when the rollout that is under way began, None when there is none.
        """
        if began_us is not None:
            self._known_us = max(self._known_us, now_us if paused else began_us)
        if rule is None or (self._last_us is not None and 0 <= now_us - self._last_us < microseconds(rule.every)):
            return None
        since_us = now_us - DAY_US if self._last_us is None else self._last_us - _OVERLAP_US
        if began_us is not None and not paused:
            since_us = max(since_us, self._known_us)
        return timedelta(microseconds=max(now_us - since_us, 1))

    def done(self, now_us: int) -> None:
        """The audit that was due at ``now_us`` came to its end."""
        self._last_us = now_us


class AuditFailed(RuntimeError):
    """The audit came to no end; the message says what it said."""


def audit(usecase: str, rule: SkewRule, lately: timedelta) -> Skew | None:
    """Audits what was served in the time ``lately`` as ``rule`` says; what differs, None when nothing does.

    The job's alert ``feature_skew`` follows suit. Raises ``AuditFailed``.
    """
    hours = repr(lately / timedelta(hours=1))
    command = [sys.executable, "-m", "pipelines.audit", usecase, "--hours", hours]
    command += ["--share", repr(rule.share), "--rows", str(rule.rows)]
    try:
        done = subprocess.run(
            ["nice", "-n", str(_LOWEST_PRIORITY), *command],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=python_environment(),
        )  # fmt: skip
        report = orjson.loads(done.stdout.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired as error:
        raise AuditFailed(f"the skew audit of {usecase!r} did not end within {TIMEOUT_S:g} s") from error
    except orjson.JSONDecodeError as error:
        reason = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        raise AuditFailed(f"the skew audit of {usecase!r} failed: {reason[0]}") from error
    if done.returncode != DIFFERS:
        return None
    features = {name: found["differing"] for name, found in report["by_feature"].items()}
    return Skew(checked=report["checked"], mismatched=report["mismatched"], features=features)
