"""What the gateway costs over nothing: against an empty FastAPI deployment and an empty ASGI app in the same Serve."""

from __future__ import annotations

import statistics

from tests.benchmarks.gateway import empty
from tests.benchmarks.gateway.world import Side, World, in_turn, lowest_ratio, ours
from tests.benchmarks.harness import say


def figures(world: World, pairs: int) -> dict[str, float]:
    """Ratios of throughput, the lowest of the concurrencies; ``p50_added_ms`` is over the empty ASGI app."""
    sides = {
        "ours": ours(world),
        "empty FastAPI": Side(world.port, world.requests(f"/{empty.FASTAPI}/predict")),
        "empty ASGI": Side(world.port, world.requests(f"/{empty.ASGI}/predict")),
    }
    found = in_turn(sides, pairs)
    added = statistics.median(taken["ours"].p50_ms - taken["empty ASGI"].p50_ms for taken in found[1])
    say(f"one request at a time: p50 {added:.3f} ms over the empty ASGI app")
    return {
        "vs_empty_fastapi": lowest_ratio(found, "ours", "empty FastAPI"),
        "vs_empty_asgi": lowest_ratio(found, "ours", "empty ASGI"),
        "p50_added_ms": added,
    }
