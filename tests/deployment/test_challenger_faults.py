"""Challengers that hang, answer the wrong shape, crash or leak, and one that gateways cannot load, under load.

No caller notices: every answer is valid (the ``load`` fixture sees to that), the champion stays what it was, and no
process but the challenger's own ends.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.database import Database
from pipelines.training.artifact import GRAPH
from pipelines.training.registry import Registry
from serving.drills import Drill
from serving.rollout.journal import Journal
from serving.rollout.machine import Kind
from tests.deployment import releasing
from tests.deployment.releasing import copy, finished, pids, replicas
from tests.deployment.test_rollout import LONG, QUICK, went_back
from tests.deployment.waiting import until

load, client = releasing.load, releasing.client  # fixtures
# On a busy machine calls of a challenger are slow besides; nothing is to end for that here.
CALM = QUICK.model_copy(update={"slow_floor_ms": 10_000.0, "budget": None})


@pytest.fixture
def alone(demo, client) -> Iterator[None]:
    """The champion is the same afterwards, in the same gateways under the same controllers, and the challenger gone."""

    def around() -> tuple[str | None, list[int], list[int], list[int]]:
        serve = pids(demo, "ray::ServeController")
        return client.rollout().champion, replicas(demo, "aqua"), pids(demo, "ray::RolloutActor"), serve

    before = around()
    yield
    assert around() == before
    until(lambda: replicas(demo, "aqua-challenger") == [], "the challenger's process has ended", 10)


def why(demo, version: str) -> str:
    """Why the last rollout, that of ``version``, was undone."""
    entries = Journal(Database(demo.settings.database_url), "aqua").read()
    begun = max(i for i, e in enumerate(entries) if e.kind == Kind.STARTED)
    assert entries[begun].payload["version"] == version
    (ended,) = [e for e in entries[begun:] if e.kind in (Kind.ROLLED_BACK, Kind.FAILED)]
    return str(ended.payload["reason"])


@pytest.mark.timeout(240)
def test_a_challenger_that_answers_the_wrong_shape_answers_nobody(demo, client, load, alone):
    version = copy(demo, client, Drill(shape=1.0))
    client.rollout_start(version, policy=CALM)
    assert finished(client, version) == "rolled_back"
    assert "errors" in why(demo, version)
    assert version not in load.versions


@pytest.mark.timeout(240)
def test_a_challenger_whose_calls_hang_is_withdrawn_at_its_cap_of_harm(demo, client, load, alone):
    """Some calls are answered at first, so that it comes to answer callers and hangs there, for as long as it takes."""
    version = copy(demo, client, Drill(hang=0.2))
    client.rollout_start(version, policy=CALM.model_copy(update={"harm_cap": 25, "steps": LONG.steps}))
    assert finished(client, version) == "rolled_back"
    assert "harmed or left unanswered" in why(demo, version)


@pytest.mark.timeout(300)
def test_a_challenger_that_crashes_when_it_is_loaded_never_starts(demo, client, load, alone):
    version = copy(demo, client, Drill(crash=True))
    client.rollout_start(version, policy=CALM)
    assert finished(client, version) == "rolled_back"
    assert version not in load.versions


@contextmanager
def most_memory(demo, version: str) -> Iterator[list[float]]:
    """The most MiB of its own that a process of the challenger had during the block."""
    most, stop = [0.0], threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            for pid in replicas(demo, f"aqua-challenger-{version}"):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it has just ended
                if (found := re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)) is not None:
                    most[0] = max(most[0], int(found[1]) / 1024)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield most
    finally:
        stop.set()
        looking.join()


@pytest.mark.timeout(240)
def test_a_challenger_that_leaks_is_refused_memory_before_the_node_lacks_it(demo, client, load, alone):
    allowed = demo.settings.challenger_memory_mb
    version = copy(demo, client, Drill(leak_mb=8.0))
    with most_memory(demo, version) as most:
        client.rollout_start(version, policy=CALM.model_copy(update={"steps": LONG.steps}))
        assert finished(client, version) == "rolled_back"
    assert allowed / 2 < most[0] < allowed + 300, "it leaked, and no more than it may beside what Ray's worker has"
    assert "errors" in why(demo, version)


@pytest.mark.timeout(240)
def test_a_version_that_gateways_cannot_load_is_not_promoted_though_its_challenger_ran(demo, client, load, alone):
    version, champion = copy(demo, client), client.rollout().champion
    client.rollout_start(version, policy=CALM.model_copy(update={"approval": True}))
    until(lambda: client.rollout().reason == "waiting for approval", "only the approval is missing", 90)
    place = Registry(demo.settings).download("aqua", version, demo.settings.cache_dir / "models")
    whole = (place / GRAPH).read_bytes()
    (place / GRAPH).write_bytes(b"not a graph")
    client.rollout_command("approve", "it looks good")
    assert finished(client, version) == "rolled_back"
    (place / GRAPH).write_bytes(whole)  # other tests have all that was served made again
    assert "cannot load it" in why(demo, version)
    until(lambda: went_back(load, champion), "the champion answers alone", 10)
