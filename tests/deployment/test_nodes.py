"""What several nodes cannot share is refused before anything is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from serving import app
from serving.app import refuse_node_local
from serving.releases import ReleaseError

SHARED: dict[str, Any] = {
    "state_url": "rediss://:hunter2@cache.example:6379/0",
    "database_url": "postgresql://tidegate:hunter2@db.example/tidegate",
    "mlflow_url": "postgresql+psycopg://tidegate@db.example/mlflow",
}


def test_one_node_may_use_its_files(home: Path) -> None:
    refuse_node_local(Settings(home=home), 1)


def test_several_nodes_may_use_servers(home: Path) -> None:
    refuse_node_local(Settings(home=home, **SHARED), 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"state_url": None}, "LMDB .* set TIDEGATE_STATE_URL"),
        ({"state_url": "redis://:hunter2@127.0.0.1:6379/0"}, "redis://127.0.0.1:6379/0, another server on every node"),
        ({"state_url": "unix://:hunter2@/run/redis.sock"}, "unix:///run/redis.sock, another server on every node"),
        ({"database_url": "sqlite:////srv/control.db"}, "TIDEGATE_DATABASE_URL is a SQLite file"),
        ({"mlflow_url": "sqlite:////srv/mlflow.db"}, "TIDEGATE_MLFLOW_URL is a SQLite file"),
    ],
)
def test_several_nodes_may_not_use_what_belongs_to_one(home: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ReleaseError, match=f"2 nodes, .*{told}") as caught:
        refuse_node_local(Settings(home=home, **{**SHARED, **given}), 2)
    assert "hunter2" not in str(caught.value)


def test_a_deployment_counts_the_nodes_that_are_alive(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.session, "nodes", lambda: [{"Alive": True}, {"Alive": False}, {"Alive": True}])
    with pytest.raises(ReleaseError, match=r"2 nodes, .*TIDEGATE_STATE_URL"):
        app.deploy("aqua", Settings(home=home))
