"""``python -m tests.benchmarks.soak``: promotions, reverts and withdrawals under load, while their parts are killed.

Everything runs on a cluster of its own, and nothing of that is left at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.benchmarks.harness import ENVIRONMENTS, report, say
from tests.benchmarks.soak.cycles import Cycles, Done
from tests.benchmarks.soak.kills import TITLES, Killer
from tests.benchmarks.soak.load import Load
from tests.benchmarks.soak.place import served

_SEED = 20_261_126
_RESET_S = 2.0  # so long after a killed gateway is replaced, connections to it may still be found dead
_LEASE_S = 15.0  # so long the controller must take a killed gateway for one that may still ask a challenger


def _unexplained(load: Load, killer: Killer) -> list[str]:
    """Requests that had to be sent again though no gateway was killed at the time."""
    return [r.why for r in load.repeated if not killer.killed("gateway", r.sent - _RESET_S, r.answered)]


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[-(-95 * len(values) // 100) - 1]


def _figures(load: Load, killer: Killer, done: Done) -> dict[str, float]:
    failed = [*load.failures, *_unexplained(load, killer)]
    for found in (*failed, *done.wrong, *killer.faults):
        say(f"WRONG: {found}")
    zero_weight = [seconds for seconds, _ in done.zero_weight]
    alive = [took for took, at in done.zero_weight if not killer.killed("gateway", at - took - _LEASE_S, at)]
    return {
        "failed": len(failed),
        "wrong_outcomes": len(done.wrong),
        "journal_faults": len(killer.faults),
        "zero_weight_p95_s": _p95(zero_weight),
        "zero_weight_max_s": max(zero_weight),
        # Where no gateway had just been killed; a short run may have no such withdrawal.
        **({"zero_weight_alive_p95_s": _p95(alive)} if alive else {}),
        "revert_p95_s": _p95(done.revert_s),
        "promoted": done.promoted,
        "rolled_back": done.rolled_back,
        "reverted": len(done.revert_s),
        "killed_in_trial": done.killed_in_trial,
        "requests": load.answers,
        "repeated": len(load.repeated),
        "orders_repeated": done.orders_repeated,
        "kills": len(killer.kills),
        **{f"kills_{kind}": sum(k.kind == kind for k in killer.kills) for kind in TITLES},
    }


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=__doc__)
    parser.add_argument("--cycles", type=int, default=100, help="promotions, and as many withdrawals (default 100)")
    parser.add_argument("--seed", type=int, default=_SEED, help="of the kills")
    options = parser.parse_args()
    with served(ENVIRONMENTS / "soak") as place, Load(place) as load, Killer(place, options.seed) as killer:
        done = Cycles(place, load, killer).run(options.cycles)
    report("soak", _figures(load, killer, done))


if __name__ == "__main__":
    main()
