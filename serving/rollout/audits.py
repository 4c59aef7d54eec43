"""The skew audit that runs by itself: the job ``pipelines.audit`` in a process of its own, and what it found.

It takes only what time is left over by those that answer, and whatever happens to it happens to nobody else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import orjson

from pipelines.audit import DIFFERS
from pipelines.spec import SkewRule
from serving.rollout.evidence import Skew

TIMEOUT_S = 600.0
_LOWEST_PRIORITY = 19


class AuditFailed(RuntimeError):
    """The audit came to no end; the message says what it said."""


def audit(usecase: str, rule: SkewRule, lately: timedelta) -> Skew | None:
    """Audits what was served in the time ``lately`` as ``rule`` says; what differs, None when nothing does.

    The job's alert ``feature_skew`` follows suit. Raises ``AuditFailed``.
    """
    hours = repr(lately / timedelta(hours=1))
    command = [sys.executable, "-m", "pipelines.audit", usecase, "--hours", hours]
    command += ["--share", repr(rule.share), "--rows", str(rule.rows)]
    # A worker may have found this code by its sys.path alone (an unpacked working directory).
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            ["nice", "-n", str(_LOWEST_PRIORITY), *command],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment,
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
