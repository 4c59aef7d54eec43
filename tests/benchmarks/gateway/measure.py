"""Measures and reports, in a copy of the code that has the benchmark's page; started by ``__main__``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping

from cluster.settings import Settings
from tests.benchmarks.gateway import PARTS, floors, peers, rollouts
from tests.benchmarks.gateway.world import World, running
from tests.benchmarks.harness import report, say

FIGURES: Mapping[str, Callable[[World, int], dict[str, float]]] = dict(
    zip(PARTS, (floors.figures, peers.mlflow, peers.feast, rollouts.figures), strict=True)
)


def main(pairs: int, parts: list[str]) -> None:
    """All figures, or those of some parts."""
    found: dict[str, float] = {}
    with running(Settings.from_environment()) as world:
        # What was started is ended as on an interrupt. Ray's own handler, which it has put in place, would just end.
        signal.signal(signal.SIGTERM, _interrupted)
        for part in parts or PARTS:
            say(f"{part}:")
            found |= FIGURES[part](world, pairs)
    report("gateway", found)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
