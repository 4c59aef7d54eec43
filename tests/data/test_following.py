"""A gateway that follows the controller: what it applies, what it says to have loaded, when its champion changes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayError

from cluster.database import Database
from pipelines import usecases
from serving import following, routing
from serving.following import Follower
from serving.routing import Challenger, RoutingTable, Share, Split
from serving.runner import DescribedVersion, LoadedVersion, VersionRefused

USE_CASE = usecases.load("aqua")
FIRST = {"champion": "1", "previous": None, "prepare": None, "challenger": None}
CHALLENGER = Challenger(
    version="2", rollout=1, salt="s", weight=0.1, shadow=1.0, deadline_ms=50.0, slow_factor=5.0, slow_floor_ms=0.5,
    harm_cap=25,
)  # fmt: skip
WAIT_S = 5.0


@dataclass(frozen=True)
class Call:
    """What a gateway said in one exchange, and how often version 2 had been loaded in vain by then."""

    epoch: int
    prepared: list[str]
    refused: dict[str, str]
    tries: int


@dataclass
class Surroundings:
    """What a follower deals with: the controller, the registry and the challenger's application."""

    tables: queue.Queue[RoutingTable] = field(default_factory=queue.Queue)
    calls: list[Call] = field(default_factory=list)
    tries: int = 0
    broken: bool = False
    away: bool = False
    odd: dict[str, Any] | None = None
    ready: set[str] = field(default_factory=set)
    made: list[str] = field(default_factory=list)  # the ways to versions, in their order
    loaded: threading.Event = field(default_factory=threading.Event)
    warmed: threading.Event = field(default_factory=threading.Event)
    answering: threading.Event = field(default_factory=threading.Event)
    hanging: threading.Event = field(default_factory=threading.Event)
    database: Database | None = None

    # The controller's handle is ``handle.exchange.remote``.
    @property
    def exchange(self) -> Surroundings:
        return self

    def remote(self, gateway: str, epoch: int, prepared: list[str], refused: dict[str, str], *_: Any) -> Any:
        if self.away:
            raise RayError("the controller is away")
        self.calls.append(Call(epoch, prepared, refused, self.tries))
        if self.odd is not None:
            return self.odd
        try:
            return self.tables.get(timeout=0.01).model_dump(mode="json")
        except queue.Empty:
            return None

    def load(self, use_case: Any, version: str, settings: Any) -> LoadedVersion:
        if version != "1":
            assert self.loaded.wait(WAIT_S)
            if self.broken:
                self.tries += 1
                raise VersionRefused("its digest differs")
        nothing: Any = None
        found = LoadedVersion(version, nothing, None)
        found.past.append(0.001)
        return found

    def describe(self, use_case: Any, version: str, settings: Any) -> DescribedVersion:
        while self.hanging.is_set():
            time.sleep(0.002)
        if self.broken:
            raise VersionRefused("the state of its view is not built")
        nothing: Any = None
        return DescribedVersion(version, nothing, None)

    def warm(self, loaded: LoadedVersion | DescribedVersion) -> None:
        if isinstance(loaded, DescribedVersion):
            return
        assert loaded.version == "1" or self.warmed.wait(WAIT_S)

    def after(self, count: int) -> list[Call]:
        """The next ``count`` calls."""
        had = len(self.calls)
        until(lambda: len(self.calls) >= had + count)
        return self.calls[had : had + count]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


@pytest.fixture
def around(tmp_path, monkeypatch) -> Surroundings:
    made = Surroundings(database=Database(f"sqlite:///{tmp_path}/control.db"))

    class Asker:
        def __init__(self, usecase: str, version: str) -> None:
            self._version = version

        def ready(self, timeout_s: float) -> bool:
            ready = made.answering.is_set() or self._version in made.ready
            made.made += [self._version] * ready
            return ready

        def ask(self, rows: Any) -> Any:
            raise AssertionError("nobody asks here")

        def close(self) -> None:
            pass

    monkeypatch.setattr(following, "load_version", made.load)
    monkeypatch.setattr(following, "describe_version", made.describe)
    monkeypatch.setattr(following, "handle", lambda _: made)
    monkeypatch.setattr(following, "start", lambda _: made)
    monkeypatch.setattr(following, "Asker", Asker)
    monkeypatch.setattr(following, "_AFTER_REFUSAL_S", 0.05)
    monkeypatch.setattr(following, "_WITHOUT_CONTROLLER_S", 0.01)
    monkeypatch.setattr(following.ray, "get", lambda answer, timeout: answer)
    return made


@pytest.fixture
def follower(around) -> Iterator[Follower]:
    around.database.create()
    table = routing.publish(around.database, "aqua", None, FIRST)
    for _ in range(4):  # so that there are older epochs
        table = table.model_copy(update={"epoch": around.database.put_routing("aqua", table.epoch, FIRST)})
    nothing: Any = None
    made = Follower(USE_CASE, nothing, around.database, around.warm)
    yield made
    around.loaded.set()
    around.warmed.set()
    around.hanging.clear()
    made.close()
    assert not made.alive()


def table(epoch: int, **fields: Any) -> RoutingTable:
    return RoutingTable(epoch=epoch, **{**FIRST, **fields})


def test_a_table_of_an_older_epoch_is_not_applied(around, follower):
    assert follower.serving.table.epoch == 5
    around.tables.put(table(4, previous="1"))
    until(around.tables.empty)
    around.after(2)
    assert follower.serving.table == table(5)
    around.tables.put(table(6, previous="1"))
    until(lambda: follower.serving.table == table(6, previous="1"))
    assert around.after(1)[0].epoch == 6


def test_a_version_is_said_to_be_prepared_only_after_it_was_warmed(around, follower):
    around.tables.put(table(6, prepare="2"))
    until(lambda: follower.serving.table.epoch == 6)
    assert all(call.prepared == ["1"] for call in around.after(4))
    around.loaded.set()
    assert all(call.prepared == ["1"] for call in around.after(4))
    around.warmed.set()
    until(lambda: around.after(1)[0].prepared == ["1", "2"])
    assert follower.serving.champion.version == "1"


def test_a_version_that_another_gateway_is_to_load_first_is_not_loaded_here(around, follower):
    around.loaded.set()
    around.warmed.set()
    for epoch, name in ((6, ""), (7, "another")):
        around.tables.put(table(epoch, prepare="2", prepare_in=name))
        until(lambda: follower.serving.table.epoch == epoch)  # noqa: B023
        assert all(call.prepared == ["1"] for call in around.after(6))
    around.tables.put(table(8, prepare="2", prepare_in=follower.gateway))
    until(lambda: around.after(1)[0].prepared == ["1", "2"])
    around.tables.put(table(9, prepare="2"))
    until(lambda: follower.serving.table.epoch == 9)
    assert around.after(1)[0].prepared == ["1", "2"]


def test_the_champion_changes_only_when_the_new_one_is_warm_and_together_with_its_table(around, follower):
    around.tables.put(table(6, champion="2", previous="1"))
    until(around.tables.empty)
    around.loaded.set()
    time.sleep(0.05)
    assert (follower.serving.table.epoch, follower.serving.champion.version) == (5, "1")
    around.warmed.set()
    until(lambda: follower.serving.table.epoch == 6)
    assert follower.serving.champion.version == "2"


def test_a_champion_that_does_not_load_leaves_the_last_table_answering_and_readiness_says_why(around, follower):
    around.broken = True
    around.loaded.set()
    around.tables.put(table(6, champion="2", previous="1"))
    until(lambda: follower.failure is not None)
    assert "its digest differs" in follower.failure
    assert (follower.serving.table.epoch, follower.serving.champion.version) == (5, "1")


def test_a_version_that_does_not_load_is_refused_after_three_tries(around, follower):
    around.broken = True
    around.loaded.set()
    around.tables.put(table(6, prepare="2"))
    until(lambda: bool(around.after(1)[0].refused))
    assert around.calls[-1].refused == {"2": "its digest differs"}
    assert all(call.tries >= 3 for call in around.calls if call.refused)
    around.broken = False  # the registry was away for longer than that
    around.warmed.set()
    until(lambda: around.after(1)[0].prepared == ["1", "2"])
    assert around.after(1)[0].refused == {}


def test_a_challenger_is_tried_when_it_can_be_asked_and_no_longer_than_its_table_says(around, follower):
    around.tables.put(table(6, challenger=CHALLENGER))
    until(lambda: follower.serving.table.epoch == 6)
    around.after(2)
    assert follower.serving.trial is None
    around.answering.set()
    until(lambda: follower.serving.trial is not None)
    trial = follower.serving.trial
    around.tables.put(table(7, challenger=CHALLENGER.model_copy(update={"weight": 0.5})))
    until(lambda: follower.serving.table.epoch == 7)
    assert follower.serving.trial is trial
    assert trial.weight == 0.5
    around.tables.put(table(8))
    until(lambda: follower.serving.table.epoch == 8)
    assert follower.serving.trial is None


def test_a_challenger_whose_rows_cannot_be_made_is_not_tried_until_they_can_and_the_gateway_says_why(around, follower):
    around.broken = True
    around.answering.set()
    around.tables.put(table(6, challenger=CHALLENGER))
    until(lambda: follower.refused() == {"2": "the state of its view is not built"})
    assert (follower.serving.trial, follower.failure) == (None, None)
    around.broken = False
    until(lambda: follower.serving.trial is not None)
    assert follower.serving.trial.described.version == "2"
    assert follower.refused() == {}


def test_a_registry_that_hangs_over_a_challenger_keeps_no_table_and_no_report_back(around, follower):
    around.hanging.set()
    around.answering.set()
    around.tables.put(table(6, challenger=CHALLENGER))
    until(lambda: follower.serving.table.epoch == 6)
    around.after(5)
    around.tables.put(table(7, challenger=CHALLENGER, previous="1"))
    until(lambda: follower.serving.table.epoch == 7)
    assert (follower.serving.trial, follower.refused()) == (None, {})
    around.hanging.clear()
    until(lambda: follower.serving.trial is not None)


def test_a_watched_champion_is_tried_beside_the_version_before_it_once_that_is_loaded(around, follower):
    watch = CHALLENGER.model_copy(update={"version": "2", "watch": True, "weight": 0.0})
    around.tables.put(table(6, previous="2", challenger=watch))
    until(lambda: follower.serving.table.epoch == 6)
    around.after(3)
    assert follower.serving.trial is None, "the version before it is being loaded"
    around.loaded.set()
    around.warmed.set()
    until(lambda: follower.serving.trial is not None)
    assert follower.serving.trial.challenger == watch
    around.tables.put(table(7, previous="2", challenger=CHALLENGER))
    until(lambda: follower.serving.table.epoch == 7)
    assert follower.serving.trial is None, "a rollout of the same number, whose challenger cannot be asked yet"


SPLIT = Split(
    test=1,
    salt="s",
    by_entity=True,
    shares=(Share(version="2", upto=0.3), Share(version="3", upto=0.5)),
    deadline_ms=50.0,
    harm_cap=9,
)


def test_a_test_is_taken_part_in_when_all_its_versions_can_be_asked_and_no_longer_than_its_table_says(around, follower):
    around.ready = {"2"}
    around.tables.put(table(6, split=SPLIT))
    until(lambda: follower.serving.table.epoch == 6)
    around.after(2)
    assert (follower.serving.split, follower.serving.trial) == (None, None)
    around.ready = {"2", "3"}
    until(lambda: follower.serving.split is not None)
    split = follower.serving.split
    assert split.versions == ("1", "2", "3")
    around.tables.put(table(7, split=SPLIT))
    until(lambda: follower.serving.table.epoch == 7)
    assert follower.serving.split is split, "what it has counted stays"
    assert around.made == ["2", "3"], "and so do its ways"
    around.tables.put(table(8))
    until(lambda: follower.serving.table.epoch == 8)
    assert follower.serving.split is None
    around.tables.put(table(9, split=SPLIT.model_copy(update={"test": 2})))
    until(lambda: follower.serving.split is not None)
    assert follower.serving.split.split.test == 2
    assert around.made == ["2", "3"] * 2
    around.tables.put(table(10, split=SPLIT.model_copy(update={"test": 3})))
    until(lambda: follower.serving.table.epoch == 10 and follower.serving.split is not None)
    assert around.made == ["2", "3"] * 3, "another test has other applications, though of the same names"


def test_a_table_of_other_code_is_not_followed_and_the_last_one_goes_on_answering(around, follower):
    around.odd = {**FIRST, "epoch": 6, "mood": "bad"}
    until(lambda: follower.failure is not None and "epoch 6 is not one of this code: mood" in follower.failure)
    assert follower.alive()
    assert (follower.serving.table, follower.serving.champion.version) == (table(5), "1")
    around.odd = None
    around.tables.put(table(7, previous="1"))
    until(lambda: follower.serving.table == table(7, previous="1"))
    assert follower.failure is None
    around.away = True
    around.database.put_routing("aqua", 5, {**FIRST, "mood": "bad"})
    until(lambda: follower.failure is not None)
    assert follower.alive()


def test_without_the_controller_newer_tables_come_from_the_database(around, follower):
    around.away = True
    around.database.put_routing("aqua", 5, {**FIRST, "previous": "1"})
    until(lambda: follower.serving.table == table(6, previous="1"))
    assert follower.failure is None
