"""``python -m tests.benchmarks.features [PART …]``: all figures, or those of some parts."""

from __future__ import annotations

from tests.benchmarks.harness import run_parts

PARTS = ("windows", "joins", "reads", "ingest", "ingest_http")

if __name__ == "__main__":
    run_parts("features", __doc__, PARTS, "tests.benchmarks.features")
