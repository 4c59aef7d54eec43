"""Fixtures shared by all four layers of tests: one Ray cluster with Serve for the whole run, on ports of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import session
from cluster.settings import Settings
from tests import services

_HOME = Path(tempfile.mkdtemp(prefix="tidegate-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
CLUSTER = Settings(home=_HOME, clock="replay", http_port=session.free_port(), num_cpus=2, buckets=4, drain_seconds=0.5)
# Ray and Serve read these when a test module imports them, before any fixture runs.
os.environ.update(session.driver_environment(CLUSTER))
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / "var" / "cache" / "numba"))


# What shares a cluster stays together when two processes share the tests; the longest part is begun first.
_SHARED = {"demo": "demo", "cluster": "cluster", "ray_cluster": "cluster"}


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        groups = [group for name, group in _SHARED.items() if name in getattr(item, "fixturenames", ())]
        if groups:
            item.add_marker(pytest.mark.xdist_group(groups[0]))
    layers = ["data", "model", "pipeline", "deployment"]
    items.sort(key=lambda item: ("demo" not in getattr(item, "fixturenames", ()), layers.index(item.path.parent.name)))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("loadgroup", False):
        lost = [i for i in session.items if i.get_closest_marker("xdist_group") and "@" not in i.nodeid]
        assert not lost, "pytest-xdist did not take up the groups: every process would start clusters of its own"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Settings]:
    """The settings of a running cluster, to which this process is connected."""
    with session.running(CLUSTER):
        yield CLUSTER


@pytest.fixture(scope="session")
def ray_cluster(cluster: Settings) -> None:
    """For tests that need Ray alone."""


@pytest.fixture(scope="session")
def redis_server() -> Iterator[services.RedisServer]:
    """A Redis server; what a test leaves there, the next one that uses ``place`` does not find."""
    with services.redis() as server:
        yield server


@pytest.fixture(params=["lmdb", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where log and state are kept, empty: on each of the two backends; see ``tests.backends``."""
    if request.param == "lmdb":
        return str(tmp_path)
    server: services.RedisServer = request.getfixturevalue("redis_server")
    server.empty()
    return server.url


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"
