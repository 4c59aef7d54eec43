"""One demo at reduced size, left running: the report is asserted on, and its cluster serves the other tests.

Before it a demo in the same home is killed in the middle, so everything here also shows that one can be run again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import processes, session
from cluster.settings import Settings
from serving.auth import owner_key
from serving.client import Client
from tests.receiver import Receiver, receiving

HISTORY_DAYS, REPLAY_DAYS, TRIALS = 430, 76, 2


@dataclass(frozen=True)
class DemoRun:
    """A finished demo whose cluster still runs."""

    settings: Settings
    steps: dict[str, dict[str, Any]]
    output: str
    url: str
    key: str
    webhook: Receiver

    def client(self, usecase: str = "aqua", **options: Any) -> Client:
        return Client(usecase, url=self.url, api_key=self.key, **options)


def tidegate(*arguments: str, port: int, log: Path, webhook: str | None = None) -> subprocess.Popen[bytes]:
    """Starts the command as a user would, away from this process's own Ray settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TIDEGATE_"))}
    environment |= {"TIDEGATE_HTTP_PORT": str(port), "TIDEGATE_DRAIN_SECONDS": "0.5", "TIDEGATE_GATEWAY_REPLICAS": "2"}
    if webhook is not None:
        environment["TIDEGATE_WEBHOOK_URL"] = webhook
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("tidegate")), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoRun]:
    with receiving() as webhook:
        yield from _demo(tmp_path_factory, webhook)


def _demo(tmp_path_factory: pytest.TempPathFactory, webhook: Receiver) -> Iterator[DemoRun]:
    folder = tmp_path_factory.mktemp("demo")
    home, log, port = folder / "home", folder / "output.txt", session.free_port()
    settings = Settings(
        home=home,
        clock="replay",
        http_port=port,
        drain_seconds=0.5,
        gateway_replicas=2,
        drills=home / "drills.json",
        webhook_url=webhook.url,
    )
    size = [
        "--home",
        str(home),
        "--history-days",
        str(HISTORY_DAYS),
        "--replay-days",
        str(REPLAY_DAYS),
        "--trials",
        str(TRIALS),
    ]
    running = tidegate("demo", "aqua", *size, port=port, log=log, webhook=webhook.url)
    try:
        first = _until_first_step(home, settings, running)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert processes.session_pids(first.environment_marker), "the killed demo's cluster should still run"
        log.write_bytes(b"")
        running = tidegate("demo", "aqua", *size, "--keep", port=port, log=log, webhook=webhook.url)
        code = running.wait(timeout=900)
        output = log.read_text()
        assert code == 0, output
        assert processes.session_pids(first.environment_marker) == []
        steps = {s["step"]: s for s in json.loads((home / "report.json").read_text())["steps"]}
        yield DemoRun(settings, steps, output, f"http://127.0.0.1:{port}", owner_key(settings), webhook)
    finally:
        running.kill()
        session.down(settings)


def _until_first_step(home: Path, settings: Settings, run: subprocess.Popen[bytes]) -> session.Session:
    deadline = time.monotonic() + 300
    while not (home / "report.json").exists():
        assert run.poll() is None, "the demo ended before its first step"
        assert time.monotonic() < deadline, "the demo did not reach its first step"
        time.sleep(0.05)
    running = session.current(settings)
    assert running is not None
    return running
