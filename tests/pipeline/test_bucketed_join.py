"""The join with a bucketed table on Ray: the rows that one process finds, busy keys shared out, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.settings import Settings
from pipelines.features import bucketed_join as module
from pipelines.features.asof import join_latest
from pipelines.features.bucketed_join import join_bucketed
from tests.data.asof_oracle import BASE, BY_KEY, skewed, stored, tables

ROOT = Path(__file__).parents[2]
NUMBERS = ["number", "reading", "state"]


def worlds() -> tuple[pa.Table, pa.Table]:
    """Requests and rows with everything that a join must get right, and values of several types."""
    requests, rows = skewed(30, 3_000)
    odd = [{"key": None, "at": BASE}, {"key": "k1", "at": None}, {"key": "unheard of", "at": BASE + 10_000_000}]
    later = [{"key": "future", "at": BASE + 500_000_000 + i, "delay": 0} for i in range(3)]
    early = [{"key": "future", "at": BASE + i * 1_000_000} for i in range(5)]
    edge = [{"key": "edge", "at": BASE, "delay": 0}] * 2 + [{"key": "edge", "at": BASE + 1, "delay": None}]
    edges = [{"key": "edge", "at": BASE + 30_000_000 + i} for i in (-1, 0, 1)] * 500  # many requests for few rows
    requests = odd + requests + early + edges
    rows = [{"key": None, "at": BASE, "delay": 0}, {"key": "k1", "at": None, "delay": None}, *later, *rows, *edge]
    left, right = tables(requests, rows)
    numbers = right.column("number").to_pylist()
    right = right.append_column("reading", pa.array([None if i % 7 == 0 else i / 3 for i in numbers]))
    right = right.append_column("state", pa.array([None if i % 5 == 0 else f"state {i % 11}" for i in numbers]))
    return left, right


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each task of Ray is given."""
    sizes: list[int] = []
    original = module._with_ray

    def counting(join: Any, shares: Iterator[tuple[Any, pa.Table]]) -> Iterator[pa.Table]:
        listed = list(shares)
        sizes.extend(block.num_rows for _, block in listed)
        return original(join, iter(listed))

    monkeypatch.setattr(module, "_with_ray", counting)
    return sizes


@pytest.mark.usefixtures("ray_cluster")
def test_ray_and_one_process_find_the_same_rows(home: Path, asked: list[int]) -> None:
    left, right = worlds()
    held = stored(home / "tables", right.slice(0, 2_000), right.slice(2_000))
    whole = held.read("readings")
    options = {"columns": NUMBERS, "ttl": timedelta(seconds=30), "known_at": "known"}
    expected = join_latest(left, whole, **BY_KEY | options)
    settings = Settings(home=home, buckets=3, task_rows=700, ray_rows=9_000)
    here = join_bucketed(left, "readings", tables=held, settings=settings, **BY_KEY | options)
    assert asked == []  # fewer rows than Ray is worth
    there = join_bucketed(
        left, "readings", tables=held, settings=settings.model_copy(update={"ray_rows": 5_000}), **BY_KEY | options
    )
    assert expected.column("number").null_count > 10
    assert here.equals(expected)
    assert there.equals(expected)
    # Neither a key with nine tenths of the rows nor one with a third of the requests keeps a task busy alone.
    assert len(asked) > 6
    assert max(asked) < 1_000 < sum(asked)


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_task_refuses_is_refused_with_its_reason(home: Path) -> None:
    rows = [{"key": name, "at": BASE, "delay": 0} for name in "abcdefgh"]
    held = stored(home / "tables", tables([], rows)[1])
    settings = Settings(home=home, buckets=8)
    with pytest.raises(ValueError, match="set TIDEGATE_BUCKETS"):
        join_bucketed(tables(rows, [])[0], "readings", tables=held, settings=settings, engine="ray", **BY_KEY)


def test_more_events_than_the_object_store_holds_are_backfilled_and_joined_without_spilling(home: Path) -> None:
    command = [sys.executable, "-m", "tests.pipeline.small_store", str(home)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["events"] > report["store"]
    assert report["examples"] > 800_000
    assert report["joined"]
    assert report["spilled"] == 0 < report["spilled_by_the_events_themselves"]
