"""``python -m tests.benchmarks.contracts [PART …]``: all figures, or those of some parts."""

from __future__ import annotations

import argparse
import importlib

from tests.benchmarks.harness import report, say

PARTS = ("sides", "inside_ray", "records")


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.contracts", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all when none is given")
    options = parser.parse_args()
    if odd := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"there are no parts {odd}; there are {', '.join(PARTS)}")
    found: dict[str, float] = {}
    for part in options.parts or PARTS:
        say(f"{part}:")
        found |= importlib.import_module(f"tests.benchmarks.contracts.{part}").figures()
    report("contracts", found)


if __name__ == "__main__":
    main()
