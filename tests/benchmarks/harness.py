"""How benchmarks measure and report: sides in turn within one run, ratios of medians, peers in their own environments.

The last line a benchmark prints is ``{"benchmark": NAME, "figures": {…}}``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path("var/benchmarks")


class Incomparable(RuntimeError):
    """The sides did not compute the same thing, so their speeds are not compared."""


@dataclass(frozen=True)
class Spent:
    """Medians over the rounds of a side, in seconds: on the clock, and of all threads of this process."""

    wall_s: float
    cpu_s: float


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Spent]:
    """Calls the sides one after the other, ``rounds`` times after a round that is not counted.

    What a side returns is let go before the next is called, so that each finds the memory that it had before.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            made = side()
            took = Spent(time.perf_counter() - wall, time.process_time() - cpu)
            del made
            if turn:
                spent[name].append(took)
    return {
        name: Spent(statistics.median(s.wall_s for s in took), statistics.median(s.cpu_s for s in took))
        for name, took in spent.items()
    }


def median_us(call: Callable[[int], object], calls: int) -> float:
    """The median of single calls in microseconds, after a tenth of them that are not counted."""
    took = []
    for i in range(-(calls // 10), calls):
        begun = time.perf_counter_ns()
        call(i)
        if i >= 0:
            took.append(time.perf_counter_ns() - begun)
    return statistics.median(took) / 1e3


def peer(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment that has ``requirements``; made at the first call below ``var/benchmarks``."""
    home = ENVIRONMENTS / name
    python, done = (home / "bin" / "python").absolute(), home / ".installed"
    wanted = "\n".join(requirements)
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        done.write_text(wanted)
    return python


def run_parts(benchmark: str, description: str | None, parts: Sequence[str], package: str) -> None:
    """``python -m PACKAGE [PART …]``: reports the figures of all ``parts``, modules of ``package``, or of some."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=description)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all when none is given")
    options = parser.parse_args()
    if odd := sorted(set(options.parts) - set(parts)):
        parser.error(f"there are no parts {odd}; there are {', '.join(parts)}")
    found: dict[str, float] = {}
    for part in options.parts or parts:
        say(f"{part}:")
        found |= importlib.import_module(f"{package}.{part}").figures()
    report(benchmark, found)


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def report(benchmark: str, figures: Mapping[str, float]) -> None:
    """The last line."""
    rounded = {name: float(f"{figure:.4g}") for name, figure in figures.items()}
    say(json.dumps({"benchmark": benchmark, "figures": rounded}))
