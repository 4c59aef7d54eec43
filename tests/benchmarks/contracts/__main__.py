"""``python -m tests.benchmarks.contracts [PART …]``: all figures, or those of some parts."""

from __future__ import annotations

from tests.benchmarks.harness import run_parts

PARTS = ("sides", "inside_ray", "records")

if __name__ == "__main__":
    run_parts("contracts", __doc__, PARTS, "tests.benchmarks.contracts")
